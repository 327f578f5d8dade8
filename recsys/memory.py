"""Peak memory of a block of code: how far the process's resident memory rose above where it began.

Linux keeps the high-water mark in /proc and lets a process reset its own, so short peaks inside a library are seen too;
elsewhere only the mark since the process started is known, and a block that stays below it counts as 0.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory() as memory: …`, then `memory.mib`. Blocks may not be nested: the inner one moves the mark."""

    mib: float = 0.0

    def __enter__(self) -> Self:
        self._before = _resident()
        self._resettable = reset()
        self._mark = _peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        start = self._before if self._resettable else max(self._before, self._mark)
        self.mib = max(0.0, _peak() - start)


def reset() -> bool:
    """Set the high-water mark to what is resident now; whether the system let us."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> float | None:
    try:
        lines = _STATUS.read_text("ascii", "ignore").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


def _resident() -> float:
    found = _status("VmRSS:")
    return _peak() if found is None else found


def _peak() -> float:
    """MiB; macOS counts bytes, Linux kibibytes."""
    found = _status("VmHWM:")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
