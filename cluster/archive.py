"""Events of the log as Parquet for training: each exactly once, whatever is killed when. The layout is `recsys.data.event_files`.

A file is written under another name, synced and renamed; the manifest that names it replaces the one before in the same way,
and that is the moment when its rows count. What a kill leaves beside the manifest is deleted by the next owner. The log is
trimmed behind the manifest only, so whatever is not counted can be read again. Two writers of one partition at once (the
older one not knowing yet) write equal rows, as both read the same log; the newer one's manifest wins.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recsys.data.event_files import MANIFEST, SCHEMA, EventFile, Written, folder_name, opened, read_manifest
from recsys.features.store import NewEvent

UNFINISHED = ".unfinished-"


class ArchivedRow(NamedTuple):
    """An event, its log position, and when the log took it."""

    event: NewEvent
    position: int
    logged_ms: int


class Archive:
    """One partition's files. Every call blocks: run it in a thread. Faults are OSError."""

    def __init__(self, root: str, partition: int) -> None:
        self.partition = partition
        self._fs, path = opened(root)
        self._local = isinstance(self._fs, pafs.LocalFileSystem)
        self._folder = f"{path}/{folder_name(partition)}"
        self.manifest = Written(partition=partition)

    def take(self, epoch: int) -> Written:
        """Begin as the owner of this epoch: read the manifest, and delete what it does not name. Gives where to go on."""
        self._fs.create_dir(self._folder, recursive=True)
        held = read_manifest(self._fs, f"{self._folder}/{MANIFEST}") or Written(partition=self.partition)
        self.manifest = held.model_copy(update={"epoch": epoch})
        named = {file.name for file in held.files} | {MANIFEST}
        for info in self._fs.get_file_info(pafs.FileSelector(self._folder)):
            if info.base_name not in named:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.delete_file(info.path)
        return self.manifest

    def append(self, rows: Sequence[ArchivedRow], at: str, n: int) -> Written:
        """Rows as the next file, which covers the log up to `at`, entry `n` being the next one."""
        held = self.manifest
        files = held.files
        if rows:
            name = f"{held.n:012d}-{n - 1:012d}.parquet"
            self._put(name, lambda path: _write(table_of(rows, self.partition), self._fs, path))
            files = (*files, EventFile(name=name, first=held.n, last=n - 1, rows=len(rows), written=time.time()))
        self.manifest = held.model_copy(update={"files": files, "at": at, "n": n})
        text = self.manifest.model_dump_json(indent=1).encode()
        self._put(MANIFEST, lambda path: _spill(text, self._fs, path))
        return self.manifest

    def _put(self, name: str, write: Callable[[str], None]) -> None:
        """A file under its name, whole or not at all."""
        if not self._local:  # an object store shows an object when it is complete
            write(f"{self._folder}/{name}")
            return
        unfinished = f"{self._folder}/{UNFINISHED}{uuid.uuid4().hex[:8]}"
        try:
            write(unfinished)
            with Path(unfinished).open("rb") as file:
                os.fsync(file.fileno())
            Path(unfinished).replace(f"{self._folder}/{name}")
        finally:
            Path(unfinished).unlink(missing_ok=True)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def table_of(rows: Sequence[ArchivedRow], partition: int) -> pa.Table:
    """Rows in the columns of the layout."""
    events = [row.event for row in rows]
    columns = {
        "user_id": [e.user_id for e in events],
        "item_id": [e.item_id for e in events],
        "event": [e.event for e in events],
        "time_ms": [e.time_ms for e in events],
        "value": [e.value for e in events],
        "event_id": [e.event_id for e in events],
        "request_id": [e.request_id for e in events],
        "context": [orjson.dumps(e.context or {}).decode() for e in events],
        "partition": [partition] * len(rows),
        "position": [row.position for row in rows],
        "logged_ms": [row.logged_ms for row in rows],
    }
    return pa.table(columns, schema=SCHEMA)


def _write(table: pa.Table, fs: pafs.FileSystem, path: str) -> None:
    pq.write_table(table, path, filesystem=fs, compression="zstd")


def _spill(text: bytes, fs: pafs.FileSystem, path: str) -> None:
    with fs.open_output_stream(path) as stream:
        stream.write(text)
