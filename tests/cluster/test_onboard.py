"""The command `init`: writes a configuration that every other command takes, and never over another file unasked."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app

runner = CliRunner()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAYFUNNEL_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "My clicks (1).csv"
    path.write_text("uid,sku,ts\n" + "".join(f"u{n % 5},i{n % 7},{1_700_000_000 + n}\n" for n in range(100)))
    return path


def run(*words: object) -> tuple[int, str]:
    result = runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_init_writes_what_check_takes(log):
    code, said = run("init", log)
    assert code == 0
    assert "100 rows (the whole file" in said
    assert "its name says user; 5 different in 100 rows" in said
    assert (log.parent / "My-clicks-1.yaml").exists()
    assert run("config", "check", "-c", "My-clicks-1.yaml") == (0, "My-clicks-1.yaml: no faults.")
    assert "kept │ 100" in run("data", "validate", "-c", "My-clicks-1.yaml")[1]


def test_init_does_not_write_over_a_file_unless_forced(log):
    kept = log.parent / "mine.yaml"
    kept.write_text("name: mine\n")
    code, said = run("init", log, "--output", kept)
    assert (code, kept.read_text()) == (2, "name: mine\n")
    assert "exists. Give --output another file, or --force to write over it." in said
    assert run("init", log, "--output", kept, "--force")[0] == 0
    assert "sku" in kept.read_text()


def test_init_ends_bad_input_in_a_sentence(log):
    assert "does not exist" in run("init", "absent.csv")[1]
    assert "is no folder. Make it" in run("init", log, "--output", "nowhere/mine.yaml")[1]
    code, said = run("init", log, log, log, log)
    assert code == 2
    assert "Got 4 files. Expected the log, then at most one table of items and one of users." in said


def test_init_reads_from_another_folder_by_its_full_path(log, tmp_path):
    (tmp_path / "configs").mkdir()
    assert run("init", log, "-o", "configs/mine.yaml")[0] == 0
    assert str(log) in (tmp_path / "configs" / "mine.yaml").read_text()
    assert "kept │ 100" in run("data", "validate", "-c", "configs/mine.yaml")[1]


def test_describe_shows_the_tail_the_lengths_and_the_parts(log, tmp_path):
    assert run("init", log)[0] == 0
    code, said = run("data", "describe", "-c", "My-clicks-1.yaml", "--json", tmp_path / "d.json")
    assert code == 0
    assert "users by events" in said
    assert "16-31 5 ████████████████████████" in said, "five users of twenty events each fill the bar"
    assert "by users unseen in train" in said
    found = json.loads((tmp_path / "d.json").read_text())
    assert (found["events"], found["users"], found["items"]) == (100, 5, 7)
