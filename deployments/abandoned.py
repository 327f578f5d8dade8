"""HAProxy processes of a service that was killed: they keep its port, and no service could start there again.

A service that is stopped ends its HAProxy. One that is killed leaves that to Ray's workers, which do it only where they notice in time
that their raylet is gone. What is ended here is our own beyond doubt: of this user, reading the configuration in the folder of this user and
port, and below no raylet.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

PATIENCE_S = 5.0
"""How long an abandoned process may take to end by itself."""
_PROC = Path("/proc")


def end_abandoned(folder: Path) -> list[int]:
    """End the HAProxy processes that read a configuration in `folder` and below no raylet; gives their pids. None where there is no /proc."""
    found = [pid for pid in _pids() if _reads(pid, folder) and not _below_a_raylet(pid)]
    for pid in found:
        _tell(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_S
    while any(_arguments(pid) for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in found:
        if _reads(pid, folder):
            _tell(pid, signal.SIGKILL)
    return found


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()] if _PROC.is_dir() else []


def _arguments(pid: int) -> list[str]:
    """Its command line; empty for one that is gone, or that has ended and was not waited for."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _reads(pid: int, folder: Path) -> bool:
    arguments = _arguments(pid)
    if not arguments or not Path(arguments[0]).name.startswith("haproxy"):
        return False
    read = [value for option, value in itertools.pairwise(arguments) if option == "-f"]
    with contextlib.suppress(OSError):
        return (_PROC / str(pid)).stat().st_uid == os.getuid() and any(Path(one).is_relative_to(folder) for one in read)
    return False


def _below_a_raylet(pid: int) -> bool:
    while pid > 1:
        if (arguments := _arguments(pid)) and Path(arguments[0]).name == "raylet":
            return True
        try:
            pid = int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def _tell(pid: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)
