"""Where a replica's own words go: into Serve's log of it, `logs/serve` of Ray's session, one file a replica.

The trap: Serve turns a replica's stderr into INFO lines of its own logger, which passes on warnings alone (see app.QUIET).
Whatever a handler of ours wrote there, every fault of a stage included, was in no file.
"""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

from recsys.config_faults import redact

SERVE_LOGGER = "ray.serve"
PACKAGES = ("recsys", "cluster", "deployments")


class ToServe(logging.Handler):
    """Hands records to the handlers of Serve's logger, whatever its level; without any, to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Written here, because `logging` prints tracebacks, and Serve puts a `print` in place that breaks them up. Passwords are masked."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        for handler in logging.getLogger(SERVE_LOGGER).handlers or [logging.StreamHandler()]:
            handler.handle(record)


def log_with_serve() -> None:
    """Let this replica's choices, warnings and faults stand in Serve's log. Every deployment calls it first."""
    handler = ToServe()
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def log_folder() -> str:
    """Where the replicas of the Ray that this process is connected to write on this host."""
    import ray

    root = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"  # noqa: S108 - Ray's own place, read only
    return str(root / ray.get_runtime_context().get_session_name() / "logs" / "serve")
