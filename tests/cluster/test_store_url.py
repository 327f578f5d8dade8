"""The store of commands: whoever starts the embedded one gives it the same budget, and starts it again when it dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.embedded import EmbeddedValkey
from cluster.store_url import store_url
from tests.small import config_of, write_data


def settings_of(folder: Path) -> list[str]:
    """What the last embedded server on this workdir was started with."""
    return (Path(config_of(folder).place("store")) / "valkey.conf").read_text().splitlines()


@pytest.mark.parametrize(
    "words",
    [("items", "upsert", "{folder}/new.csv"), ("users", "delete", "{folder}/left.txt"), ("ingest", "status"), ("ingest", "dead-letters")],
)
def test_whatever_command_starts_the_embedded_store_keeps_the_budget(tmp_path: Path, words: tuple[str, ...]) -> None:
    write_data(tmp_path, users=2, events=2)
    config_of(tmp_path)
    (tmp_path / "new.csv").write_text("sku,price\nn1,7\n")
    (tmp_path / "left.txt").write_text("u1\n")
    said = [word.format(folder=tmp_path) for word in words]
    done = CliRunner().invoke(app, [*said, "-c", str(tmp_path / "small.yaml"), "--set", "store.memory_mb=48"])
    assert done.exit_code == 0, done.output
    assert "maxmemory 48mb" in settings_of(tmp_path)


def test_a_store_that_dies_under_a_command_is_started_again(tmp_path: Path) -> None:
    write_data(tmp_path, users=2, events=2)
    config = config_of(tmp_path)
    with store_url(config) as url:
        server = EmbeddedValkey(config.place("store"))
        first = int((server.folder / "valkey.pid").read_text())
        os.kill(first, signal.SIGKILL)
        while not server.check() or server._pid_of_adopted() == first:  # the test's own time limit ends a wait that never comes true
            time.sleep(0.01)
        assert server.url == url
    assert not server.check(), "who started it also ends it"


def test_a_redis_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    write_data(tmp_path, users=2, events=2)
    config = config_of(tmp_path, "redis_url=redis://elsewhere:6379/0")
    with store_url(config) as url:
        assert url == "redis://elsewhere:6379/0"
    assert not Path(config.place("store")).exists()
