"""The registry: versions never change, aliases do, and neither breaks under many hands or a bad disk."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs
import pytest

from cluster.registry import Registry
from cluster.registry_url import open_registry
from cluster.remote_registry import RemoteRegistry
from recsys.errors import BundleError


def content(text: str):
    """A fill that writes one file."""

    def fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "data.json").write_text(json.dumps(text))

    return fill


@pytest.fixture(params=["folder", "file uri", "memory uri"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """The same registry behind a path, behind pyarrow and behind fsspec."""
    if request.param == "folder":
        yield open_registry(tmp_path / "registry")
    elif request.param == "file uri":
        yield RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "cache")
    else:
        yield open_registry("memory://bucket/registry", cache=tmp_path / "cache")
        fsspec.filesystem("memory").store.clear()


def test_versions_count_up_and_carry_their_content(registry: Registry) -> None:
    first, second, again = (registry.publish(content(text)) for text in ("a", "b", "a"))
    assert [v[:8] for v in (first, second, again)] == ["v000001-", "v000002-", "v000003-"]
    assert first[8:] == again[8:] != second[8:]
    assert registry.versions() == [first, second, again]
    assert json.loads((registry.local_copy(second) / "sub" / "data.json").read_text()) == "b"


def test_promote_keeps_the_previous_and_rollback_swaps_them(registry: Registry) -> None:
    first, second = registry.publish(content("a")), registry.publish(content("b"))
    assert registry.aliases() == {}
    assert registry.promote(first) == first
    assert registry.promote("latest") == second
    assert registry.aliases() == {"production": second, "previous": first}
    assert registry.promote(second) == second  # again: nothing moves
    assert registry.aliases() == {"production": second, "previous": first}
    assert registry.rollback() == first
    assert registry.aliases() == {"production": first, "previous": second}
    assert registry.rollback() == second


def test_a_canary_stands_beside_production(registry: Registry) -> None:
    first, second = registry.publish(content("a")), registry.publish(content("b"))
    registry.promote(first)
    registry.promote(second, alias="canary")
    assert registry.aliases() == {"production": first, "canary": second}
    assert registry.drop_alias("canary") == second
    assert registry.drop_alias("canary") is None
    assert registry.aliases() == {"production": first}


def test_the_first_version_is_promoted_once(registry: Registry) -> None:
    first, second = registry.publish(content("a")), registry.publish(content("b"))
    assert registry.promote_first(first)
    assert not registry.promote_first(second)
    assert registry.aliases() == {"production": first}


def test_a_version_is_found_by_alias_number_beginning_and_hash(registry: Registry) -> None:
    first, second = registry.publish(content("a")), registry.publish(content("b"))
    registry.promote(first)
    for name in ("production", first, "1", "v1", "000001", "v000001", first[8:], first[8:12]):
        assert registry.resolve(name) == first, name
    assert registry.resolve("latest") == second


def test_a_name_that_is_no_version_gets_advice(registry: Registry) -> None:
    with pytest.raises(BundleError, match=r"has no version 'latest'. It holds no version yet; 'rayfunnel train -c FILE' publishes one."):
        registry.resolve("latest")
    version = registry.publish(content("a"))
    registry.publish(content("b"))
    with pytest.raises(BundleError, match=r"has no version 'produktion'. Did you mean 'production'?"):
        registry.resolve("produktion")
    with pytest.raises(BundleError, match=rf"No version is production in .*. Versions: {version}"):
        registry.resolve("production")
    with pytest.raises(BundleError, match=r"'v0000' could be any of v000001-.*, v000002-.*. Give more of the name."):
        registry.resolve("v0000")
    with pytest.raises(BundleError, match=r"There is no previous version in .* to go back to"):
        registry.rollback()


def test_the_list_is_newest_first_with_aliases_and_metrics(registry: Registry) -> None:
    first = registry.publish(content("a"), metrics={"ndcg@10": 0.25})
    second = registry.publish(content("b"), metrics={"ndcg@10": 0.5})
    registry.promote(first)
    listed = registry.list()
    assert [(one.version, one.aliases, one.manifest.metrics["ndcg@10"]) for one in listed] == [
        (second, (), 0.5),
        (first, ("production",), 0.25),
    ]
    assert listed[0].bytes == len('"b"')


def test_a_published_bundle_can_be_published_elsewhere_with_what_it_says_of_itself(registry: Registry, tmp_path: Path) -> None:
    source = open_registry(tmp_path / "elsewhere")
    version = source.publish(content("a"), metrics={"auc": 0.75}, schema_hash="s")
    copied = registry.publish(source.local_copy(version))
    assert copied == version  # first number, same content
    assert registry.manifest(copied).metrics == {"auc": 0.75}
    assert registry.manifest(copied).schema_hash == "s"


# What only a folder has: damage, many processes, permissions.


@pytest.fixture
def folder(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_a_damaged_bundle_is_not_promoted_and_production_stays(folder: Registry) -> None:
    first, second = folder.publish(content("a")), folder.publish(content("b"))
    folder.promote(first)
    (folder.bundles / second / "sub" / "data.json").write_text('"c"')
    with pytest.raises(BundleError, match=rf"{second} is not promoted, production stays {first}\. .*'sub/data.json' was changed"):
        folder.promote(second)
    assert folder.aliases() == {"production": first}


def test_a_bundle_that_was_damaged_on_its_way_is_not_published(folder: Registry, tmp_path: Path) -> None:
    source = Registry(tmp_path / "elsewhere")
    at = source.bundles / source.publish(content("a"))
    (at / "sub" / "data.json").write_text('"c"')
    with pytest.raises(BundleError, match=r"'sub/data.json' was changed"):
        folder.publish(at)
    with pytest.raises(BundleError, match=r"'.*nowhere' is not a folder"):
        folder.publish(tmp_path / "nowhere")
    assert folder.versions() == []


def test_a_failed_publish_leaves_no_version_and_gives_its_number_back(folder: Registry) -> None:
    def fails(at: Path) -> None:
        content("a")(at)
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match=r"No space left under .*Nothing was published"):
        folder.publish(fails)
    assert list(folder.bundles.iterdir()) == []
    assert folder.publish(content("a")).startswith("v000001-")


def _publish_five(root: str, name: int) -> list[str]:
    return [Registry(root).publish(content(f"{name}-{i}")) for i in range(5)]


def test_publishers_at_once_never_share_a_number(folder: Registry) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        published = [v for five in pool.starmap(_publish_five, [(str(folder.root), i) for i in range(3)]) for v in five]
    assert sorted(int(v[1:7]) for v in published) == list(range(1, 16))
    assert sorted(published) == folder.versions()


def test_a_watcher_reads_the_aliases_only_when_they_changed(folder: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = folder.publish(content("a")), folder.publish(content("b"))
    folder.promote(first)
    watcher, reads = Registry(folder.root), []
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: reads.append(self.name) or read_text(self, *a, **k))
    assert [watcher.aliases()["production"] for _ in range(3)] == [first] * 3
    assert reads == ["aliases.json"]
    folder.promote(second)
    reads.clear()
    assert watcher.aliases() == {"production": second, "previous": first}
    assert reads == ["aliases.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"production": "../../etc"}', '{"production": 3}'])
def test_damaged_aliases_are_named_not_followed(folder: Registry, text: str) -> None:
    folder.publish(content("a"))
    (folder.root / "aliases.json").write_text(text)
    with pytest.raises(BundleError, match=r"aliases.json' is damaged .*Remove it and promote a version again"):
        folder.aliases()


def test_half_published_and_foreign_folders_are_not_versions(folder: Registry) -> None:
    version = folder.publish(content("a"))
    (folder.bundles / ".unfinished-abc").mkdir()
    (folder.bundles / "notes").mkdir()
    assert folder.versions() == [version]


def test_a_version_with_a_damaged_manifest_does_not_hide_the_others(folder: Registry) -> None:
    first, second = folder.publish(content("a")), folder.publish(content("b"))
    (folder.bundles / second / "manifest.json").write_text("{")
    assert [one.version for one in folder.list()] == [first]
    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        folder.manifest(second)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root; without it, a read-only folder says the same")
def test_without_write_permission_every_change_is_refused_with_a_sentence(folder: Registry) -> None:
    version = folder.publish(content("a"))
    folder.promote(version)
    for parent in folder.root.parents:
        if parent != Path("/tmp") and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    code = f"""
        import os
        from pathlib import Path
        from cluster.registry import Registry
        from recsys.errors import BundleError
        os.setgid(65534)
        os.setuid(65534)
        registry = Registry({str(folder.root)!r})
        for change in (
            lambda: registry.publish(lambda at: (at / "x").write_text("y") and None),
            lambda: registry.promote("latest"),
            lambda: Registry(Path({str(folder.root)!r}) / "new").publish(lambda at: None),
        ):
            try:
                change()
            except BundleError as error:
                print(error)
        print(registry.aliases()["production"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd="/")
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert "No permission to write a bundle under" in lines[0]
    assert "No permission to change the registry" in lines[1]
    assert "No permission to write a bundle under" in lines[2]
    assert lines[3] == version


# What only a URI has: a cache.


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    registry = RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "cache")
    version = registry.publish(content("a"))
    copy = registry.local_copy(version) / "sub" / "data.json"
    copy.write_text('"x"')
    assert (registry.local_copy(version) / "sub" / "data.json").read_text() == '"a"'


def test_another_host_gets_the_version_into_its_own_cache(tmp_path: Path) -> None:
    here = RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "here")
    version = here.publish(content("a"), metrics={"auc": 0.5})
    here.promote(version)
    there = RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "there")
    assert there.list()[0].manifest.metrics == {"auc": 0.5}
    assert not there.bundles.exists()  # listing downloads no bundle
    assert there.local_copy("production") == tmp_path / "there" / "bundles" / version


def test_processes_of_one_host_that_fetch_a_version_at_once_all_get_it(tmp_path: Path) -> None:
    """A stage each, one cache: every one has its whole copy before the first of them gives it its name."""
    version = RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "publisher").publish(content("a"))
    together = threading.Barrier(3)

    class Process(RemoteRegistry):
        def _asked(self, call: Any, *arguments: Any, **named: Any) -> Any:
            answer = super()._asked(call, *arguments, **named)
            if call is pyarrow.fs.copy_files:
                together.wait(30)
            return answer

    def fetch(_: int) -> Path:
        return Process(f"file://{tmp_path}/remote", tmp_path / "cache").local_copy(version)

    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(fetch, range(3)))
    assert set(folders) == {tmp_path / "cache" / "bundles" / version}
    assert json.loads((folders[0] / "sub" / "data.json").read_text()) == "a"
    assert [p.name for p in folders[0].parent.iterdir()] == [version], "no copy is left behind"


def test_an_upload_without_its_manifest_is_not_a_version(tmp_path: Path) -> None:
    registry = RemoteRegistry(f"file://{tmp_path}/remote", tmp_path / "cache")
    version = registry.publish(content("a"))
    (tmp_path / "remote" / "bundles" / version / "manifest.json").unlink()
    assert registry.versions() == []


def test_an_unknown_kind_of_uri_is_refused() -> None:
    with pytest.raises(BundleError, match=r"'nope://user:\*\*\*@x/y' cannot be opened .* Give a folder, or a URI such as s3://bucket/path"):
        open_registry("nope://user:secret@x/y")


def test_a_publisher_killed_in_the_middle_leaves_no_version(folder: Registry) -> None:
    code = f"""
        import os, signal
        from cluster.registry import Registry

        def fill(at):
            (at / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

        Registry({str(folder.root)!r}).publish(fill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert done.returncode == -9
    assert folder.versions() == []
    assert folder.publish(content("a")) in folder.versions()
    assert len(folder.versions()) == 1
