"""Events of the log as Parquet for training: each exactly once, whatever is killed when. The layout is `recsys.data.event_files`.

A file is written under another name, synced and renamed; the manifest that names it replaces the one before in the same way,
and that is the moment when its rows count. What a kill leaves beside the manifest is deleted by the next owner. Small files are
merged in the same way: the larger one, then the manifest, and after an hour, when nobody reads them any more, they go. The log is
trimmed behind the manifest only, so whatever is not counted can be read again. Two writers of one partition at once (the
older one not knowing yet) write equal rows, as both read the same log; the newer one's manifest wins.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recsys.data.event_files import MANIFEST, SCHEMA, EventFile, Written, folder_name, opened, read_manifest
from recsys.data.whole_files import put_whole
from recsys.features.store import NewEvent

MERGE_AT = 32
"""The newest files become one when there are so many that fit into one: a quiet log would leave a file a minute for ever."""
KEEP_S = 3_600.0
"""How long files that were merged into another stay: who has read the manifest of before is still reading them."""
_SPAN = re.compile(r"(\d+)-(\d+)\.parquet")


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
        self._folder = f"{path}/{folder_name(partition)}"
        self.manifest = Written(partition=partition)

    def take(self, epoch: int) -> Written:
        """Begin as the owner of this epoch: read the manifest, and delete what was left beside it. Gives where to go on."""
        self._fs.create_dir(self._folder, recursive=True)
        held = read_manifest(self._fs, f"{self._folder}/{MANIFEST}") or Written(partition=self.partition)
        self.manifest = held.model_copy(update={"epoch": epoch})
        self._remove(leftovers=True)
        return self.manifest

    def append(self, rows: Sequence[ArchivedRow], at: str, n: int) -> Written:
        """Rows as the next file, which covers the log up to `at`, entry `n` being the next one."""
        held = self.manifest
        files = held.files
        if rows:
            name = f"{held.n:012d}-{n - 1:012d}.parquet"
            self._put(name, lambda path: _write(table_of(rows, self.partition), self._fs, path))
            files = (*files, EventFile(name=name, first=held.n, last=n - 1, rows=len(rows), written=time.time()))
        return self._swap(held.model_copy(update={"files": files, "at": at, "n": n}))

    def mergeable(self, most_rows: int) -> tuple[EventFile, ...]:
        """The newest files that together hold at most `most_rows`, where they are MERGE_AT or more; else none."""
        run, rows = 0, 0
        for file in reversed(self.manifest.files):
            rows += file.rows
            if rows > most_rows:
                break
            run += 1
        return self.manifest.files[-run:] if run >= MERGE_AT else ()

    def merge(self, run: Sequence[EventFile]) -> EventFile:
        """These files as one beside them, which counts when it is `put_for` them."""
        name = f"{run[0].first:012d}-{run[-1].last:012d}.parquet"
        paths = [f"{self._folder}/{file.name}" for file in run]
        table = pa.concat_tables([pq.read_table(path, filesystem=self._fs, schema=SCHEMA, partitioning=None) for path in paths])
        self._put(name, lambda path: _write(table, self._fs, path))
        return EventFile(name=name, first=run[0].first, last=run[-1].last, rows=len(table), written=run[-1].written)

    def put_for(self, run: Sequence[EventFile], one: EventFile) -> Written:
        """Let the merged file count in place of `run`; what was merged KEEP_S ago is deleted."""
        files = self.manifest.files
        at = files.index(run[0])
        self._swap(self.manifest.model_copy(update={"files": (*files[:at], one, *files[at + len(run) :])}))
        self._remove(leftovers=False)
        return self.manifest

    def _swap(self, manifest: Written) -> Written:
        text = manifest.model_dump_json(indent=1).encode()
        self._put(MANIFEST, lambda path: _spill(text, self._fs, path))
        self.manifest = manifest  # not before: the log is trimmed behind it
        return manifest

    def _remove(self, *, leftovers: bool) -> None:
        """Delete files that were merged into others KEEP_S ago, and with `leftovers` whatever else the manifest does not name. What is
        not named may be the next owner's, so that leftovers are for the moment alone in which the partition is taken."""
        named = {file.name for file in self.manifest.files} | {MANIFEST}
        held = {info.base_name: info for info in self._fs.get_file_info(pafs.FileSelector(self._folder))}
        spans = {name: (int(m[1]), int(m[2])) for name in held if (m := _SPAN.fullmatch(name))}
        for name, info in held.items():
            if name in named:
                continue
            first, last = spans.get(name, (-1, -1))
            over = [other for other, (a, b) in spans.items() if other != name and a <= first and last <= b]
            if named.isdisjoint(over):
                gone = leftovers
            else:  # merged when the first of the files that hold it was written, which may be merged again by now
                gone = time.time() - min(held[other].mtime_ns or math.inf for other in over) / 1e9 >= KEEP_S
            if gone:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.delete_file(info.path)

    def _put(self, name: str, write: Callable[[str], None]) -> None:
        put_whole(self._fs, self._folder, name, write)


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
