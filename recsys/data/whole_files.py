"""Files that are whole or not there, on a disk or in an object store, whatever is killed when."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs

UNFINISHED = ".unfinished-"


def put_whole(fs: pafs.FileSystem, folder: str, name: str, write: Callable[[str], None]) -> None:
    """What `write` writes at the path that it is given, under its name in a folder that exists; durable when it returns. Faults are OSError."""
    if not isinstance(fs, pafs.LocalFileSystem):  # an object store shows an object when it is complete
        write(f"{folder}/{name}")
        return
    unfinished = f"{folder}/{UNFINISHED}{uuid.uuid4().hex[:8]}"
    try:
        write(unfinished)
        with Path(unfinished).open("rb") as file:
            os.fsync(file.fileno())
        Path(unfinished).replace(f"{folder}/{name}")
    finally:
        Path(unfinished).unlink(missing_ok=True)
    at = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
