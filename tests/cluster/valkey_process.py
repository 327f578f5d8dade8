"""The process behind an embedded Valkey: which it is, and its end by SIGKILL."""

from __future__ import annotations

import os
import signal
import time

from cluster.embedded import EmbeddedValkey


def pid_of(server: EmbeddedValkey) -> int:
    return int((server.folder / "valkey.pid").read_text())


def kill(server: EmbeddedValkey) -> None:
    """SIGKILL, and gone: it no longer answers. The test's own time limit ends a wait that never comes true."""
    os.kill(pid_of(server), signal.SIGKILL)
    while server._answers():
        time.sleep(0.01)
