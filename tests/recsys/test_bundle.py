"""Bundles: whole or not there, and every damage is named."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from recsys import bundle
from recsys.errors import BundleError


def fill(folder: Path) -> None:
    """Two files, one of them in a folder."""
    np.save(folder / "vectors.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    (folder / "recall" / "item_cf").mkdir(parents=True)
    (folder / "recall" / "item_cf" / "config.json").write_text('{"neighbors": 5}')


def written(home: Path, name: str = "v1") -> Path:
    """A bundle in `home`."""
    return bundle.write(home / name, fill, schema_hash="s" * 64, metrics={"ndcg@10": 0.3})[0]


def leftovers(home: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(p.name for p in home.iterdir())


def test_a_written_bundle_verifies_and_its_manifest_says_what_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path)
    manifest = bundle.verify(folder, schema_hash="s" * 64)
    assert manifest.version == "v1"
    assert manifest.metrics == {"ndcg@10": 0.3}
    assert sorted(manifest.files) == ["recall/item_cf/config.json", "vectors.npy"]
    assert manifest.files["recall/item_cf/config.json"].bytes == len('{"neighbors": 5}')
    assert leftovers(tmp_path) == ["v1"]


def test_equal_content_has_an_equal_hash_whenever_and_wherever_it_is_written(tmp_path: Path) -> None:
    first, second = bundle.read_manifest(written(tmp_path, "a")), bundle.read_manifest(written(tmp_path, "b"))
    assert first.content_hash == second.content_hash
    other = bundle.write(tmp_path / "c", lambda folder: (folder / "x").write_text("y") and None)[1]
    assert other.content_hash != first.content_hash


def test_what_fill_returns_enters_the_manifest(tmp_path: Path) -> None:
    def measured(folder: Path) -> dict[str, float]:
        fill(folder)
        return {"index_recall": 0.99, "bytes_per_item": 12.5}

    manifest = bundle.write(tmp_path / "v1", measured)[1]
    assert (manifest.index_recall, manifest.bytes_per_item) == (0.99, 12.5)


def test_the_name_may_follow_from_the_content(tmp_path: Path) -> None:
    folder, manifest = bundle.write(lambda content: tmp_path / f"v-{content[:4]}", fill, parent=tmp_path)
    assert folder.name == manifest.version == f"v-{manifest.content_hash[:4]}"


@pytest.mark.parametrize("path", ["vectors.npy", "recall/item_cf/config.json"], ids=["an array", "a file in a folder"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, path: str, position: int) -> None:
    file = written(tmp_path) / path
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"'{path}' was changed after it was written. Publish again, or promote another version."):
        bundle.verify(tmp_path / "v1")


def test_sizes_alone_miss_a_flipped_bit_but_not_a_cut_file(tmp_path: Path) -> None:
    file = written(tmp_path) / "vectors.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x7f")
    bundle.verify(tmp_path / "v1", contents=False)
    file.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"'vectors.npy' was changed"):
        bundle.verify(tmp_path / "v1", contents=False)


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    manifest = written(tmp_path) / "manifest.json"
    content = manifest.read_bytes()
    missed = []
    for at in range(len(content)):
        if chr(content[at]).isspace():
            continue  # the layout of JSON means nothing
        manifest.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        try:
            bundle.verify(tmp_path / "v1")
            missed.append(at)
        except BundleError:
            pass
    assert missed == []


def test_a_missing_and_an_unexpected_file_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "vectors.npy").rename(tmp_path / "elsewhere.npy")
    with pytest.raises(BundleError, match=r"lacks 'vectors.npy'"):
        bundle.verify(folder)
    (tmp_path / "elsewhere.npy").rename(folder / "vectors.npy")
    (folder / "extra.bin").write_bytes(b"1")
    with pytest.raises(BundleError, match=r"holds 'extra.bin', which its manifest does not know"):
        bundle.verify(folder)


def test_links_and_paths_to_the_outside_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match=r"symbolic link, 'link'"):
        bundle.verify(folder)
    (folder / "link").unlink()
    (tmp_path / "v2").symlink_to(folder)
    with pytest.raises(BundleError, match=r"is a symbolic link. Name the folder itself"):
        bundle.verify(tmp_path / "v2")
    forged = bundle.read_manifest(folder)
    forged = forged.model_copy(update={"files": forged.files | {"../secret": forged.files["vectors.npy"]}})
    (folder / "manifest.json").write_text(forged.model_copy(update={"checksum": forged.digest()}).model_dump_json())
    with pytest.raises(BundleError, match=r"lists '../secret', which lies outside of it. Do not use this bundle."):
        bundle.verify(folder)


def test_another_schema_is_refused_with_both_hashes(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"was built for schema ssssssssssss, this service uses tttttttttttt"):
        bundle.verify(written(tmp_path), schema_hash="t" * 64)


def test_a_folder_that_is_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist. Name a folder that 'publish' wrote."):
        bundle.verify(tmp_path / "none")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        bundle.verify(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"version": "v1"}))
    with pytest.raises(BundleError, match=r"manifest\.json is damaged \(created: Field required\)"):
        bundle.verify(tmp_path)


def test_pickles_and_empty_bundles_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"must not hold pickles, got 'model.pt'. Use safetensors"):
        bundle.write(tmp_path / "v1", lambda folder: (folder / "model.pt").write_bytes(b"x") and None)
    with pytest.raises(BundleError, match=r"needs at least one file"):
        bundle.write(tmp_path / "v1", lambda folder: None)
    assert leftovers(tmp_path) == []


def test_a_name_is_never_written_twice(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(BundleError, match=r"exists already. Bundles never change"):
        written(tmp_path)
    assert leftovers(tmp_path) == ["v1"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left under .* Nothing was published. Free some space"),
        (OSError("6 requested and 2 written"), "No space left under"),
        (PermissionError(13, "Permission denied"), "No permission to write a bundle under .* Nothing was published"),
        (OSError(5, "Input/output error"), "Writing a bundle under .* failed .*Input/output error.* Nothing was published"),
    ],
    ids=["disk full", "disk full, as numpy says it", "no permission", "broken disk"],
)
def test_a_failed_write_leaves_nothing_and_says_why(tmp_path: Path, error: OSError, sentence: str) -> None:
    def fails(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(BundleError, match=sentence):
        bundle.write(tmp_path / "v1", fails)
    assert leftovers(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.write(tmp_path / "v1", interrupted)
    assert leftovers(tmp_path) == []


def test_a_really_full_disk_publishes_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses the write as a full disk does, without root and without filling one."""
    code = f"""
        import resource
        from pathlib import Path
        import numpy as np
        from recsys import bundle
        from recsys.errors import BundleError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            bundle.write(Path({str(tmp_path)!r}) / "v1", lambda folder: np.save(folder / "big.npy", np.zeros(100_000)))
        except BundleError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "No space left under" in done.stdout
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_tmpfs_publishes_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this host lets nobody mount a tmpfs")
    try:
        with pytest.raises(BundleError, match=r"No space left under"):
            bundle.write(small / "v1", lambda folder: np.save(folder / "big.npy", np.zeros(100_000)))
        assert leftovers(small) == []
        assert bundle.verify(written(small)).version == "v1"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_killed_writers_left_is_swept_when_old(tmp_path: Path) -> None:
    left = tmp_path / f"{bundle.UNFINISHED}abc"
    left.mkdir()
    bundle.sweep(tmp_path)
    assert left.exists()
    os.utime(left, (0, 0))
    bundle.sweep(tmp_path)
    assert not left.exists()
