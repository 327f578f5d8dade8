"""The folders of a workdir, each named by what made its content.

A change of data or of a key that matters gives another folder, so nothing stale is reused. Of the code, only STATE_FORMAT
counts: who changes what is trained or written raises it. Old folders stay until somebody deletes them; none is needed. What a retrain
writes beside its version goes with it (see `Passing`): it comes every day, and nothing would use it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from recsys.config import Config
from recsys.data.paths import resolver

GONE = ".gone-"
"""What a folder is called while it is removed."""
STATE_FORMAT = "12"
"""Part of every state folder's name: raised when what is written there changes."""
NOT_LEARNT_FROM = {
    "name",
    "workdir",
    "registry",
    "redis_url",
    "serve",
    "evaluate",
    "fetch",
    "prepare",
    "rerank",
    "retrain",
    "ingest",
    "store",
}
"""Sections that change nothing in what is trained."""


def state_key(*parts: Any) -> str:
    """16 hexadecimal digits that name these parts, whatever JSON can write."""
    return hashlib.sha256(json.dumps([STATE_FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def input_files(config: Config) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of every input file that lies on this machine."""
    data, resolve = config.data, resolver(config.base)
    paths = [path for path, _ in data.interactions.files()]
    paths += [p for t in (data.items, data.users) if t is not None for p in ((t.path,) if isinstance(t.path, str) else t.path)]
    paths += [data.history.path] if data.history is not None else []
    live = [] if data.interactions.live is None else [resolve(data.interactions.live)]
    live += [p for folder in live for p in sorted(folder.rglob("*"))]
    found = []
    for path in (*map(resolve, paths), *live):
        stat = os.stat(path) if os.path.exists(path) else None  # noqa: PTH110, PTH116 - it may be a URI
        found.append((str(path), stat.st_size if stat else -1, stat.st_mtime_ns if stat else -1))
    return found


def state(config: Config, part: Literal["data", "examples", "runs"], key: str) -> Path:
    """A local folder of the workdir; for a workdir that is a URI, one of this machine's temporary folder."""
    if "://" in config.root:
        return Path(tempfile.gettempdir()) / f"rayfunnel-{state_key(config.root)}" / part / key
    return Path(config.place(part)) / key


class Passing:
    """Folders of the state that one run needs and no later one: removed when it is done, or by a later run when it never was.

    A run that is repeated after a kill finds what it had made: they stay for a day after their last use.
    """

    MARK = ".passing"
    KEPT_S = 86_400.0

    def __init__(self, config: Config) -> None:
        self._config, self._own = config, list[Path]()

    def mark(self, folder: Path) -> Path:
        """Take a folder for this run's own; it is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.MARK).touch()
        self._own.append(folder)
        return folder

    def clear(self) -> None:
        """Remove this run's folders."""
        for folder in self._own:
            _remove(folder)

    def sweep(self) -> None:
        """Remove those of runs that nobody has gone on with for a day."""
        parts: tuple[Literal["data", "examples", "runs"], ...] = ("data", "examples", "runs")
        for root in (state(self._config, part, "") for part in parts):
            for mark in root.glob(f"*/{self.MARK}"):
                with contextlib.suppress(FileNotFoundError):  # another run sweeps too
                    if mark.stat().st_mtime < time.time() - self.KEPT_S:
                        _remove(mark.parent)
            for gone in root.glob(f"{GONE}*"):
                shutil.rmtree(gone, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Away with a folder, at once by its name: one that is half removed would look whole to whoever comes by its key. What cannot be
    removed costs disk, and nothing else."""
    gone = folder.with_name(f"{GONE}{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def settle(unfinished: Path, folder: Path) -> bool:
    """Give a complete folder its name, and say whether it has it: where another process was faster, the other's stays."""
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # which of the two, is the filesystem's choice
            raise
        return False
    return True
