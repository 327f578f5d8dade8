"""What a replica says is in Serve's log of it, whatever the level of Serve's own logger."""

from __future__ import annotations

import builtins
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.replica_log import PACKAGES, SERVE_LOGGER, log_with_serve


@pytest.fixture
def file() -> Iterator[io.StringIO]:
    """Serve's logger as it is in a replica: warnings alone, into a file."""
    loggers = [logging.getLogger(name) for name in (SERVE_LOGGER, *PACKAGES)]
    before = [(one.handlers, one.level, one.propagate) for one in loggers]
    written = io.StringIO()
    loggers[0].handlers, loggers[0].propagate = [logging.StreamHandler(written)], False
    loggers[0].setLevel(logging.WARNING)
    yield written
    for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def test_choices_and_faults_are_written_with_whole_tracebacks(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    log_with_serve()
    real = builtins.print

    def breaking_up(*given: Any, **options: Any) -> None:  # as Serve's
        real(given, **options)

    monkeypatch.setattr(builtins, "print", breaking_up)
    logging.getLogger("recsys.recall.vector").info("faiss index=flat")
    try:
        raise ValueError("rediss://:hunter2@store:6379 is of a stage")
    except ValueError:
        logging.getLogger("deployments.ladder").exception("Stage fine_rank failed.")
    lines = file.getvalue().splitlines()
    assert lines[:3] == ["faiss index=flat", "Stage fine_rank failed.", "Traceback (most recent call last):"]
    assert lines[-1] == "ValueError: rediss://:***@store:6379 is of a stage"
    logging.getLogger("cluster").warning("%s does not answer", "redis://me:hunter2@store:6379")
    assert "hunter2" not in file.getvalue()
