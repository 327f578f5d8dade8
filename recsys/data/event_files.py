"""The events that came in live, as Parquet: how they lie, and how they are read. Each event stands there exactly once.

    <workdir>/events/p0003/000000000000-000000004211.parquet     rows of partition 3, by log position
    <workdir>/events/p0003/manifest.json                         which files count, and up to where

A file is named after the first and the last log position that it covers; positions count the entries of a partition's log
from 0, unparsable ones (dead letters) included, so a file may hold fewer rows than its name says and the first file need not
begin at 0. Only files that the manifest names count: it is replaced in one step after its file is on disk, and what lies beside
it is left over from a kill, or was merged into a larger file within the last hour. All events of a user are in one partition, in the
order in which they came.

Columns: user_id, item_id, event (string); time_ms (int64, when it happened: late events come late, so this does not ascend);
value (float64, null); event_id (string); request_id (string, null); context (string, JSON object); partition (int16);
position (int64, its log position); logged_ms (int64, when it came).

To go on where one was: keep `position of the newest row + 1` per partition, which `read(root, since)` takes and `ends(root)` gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recsys.core import FrozenConfig
from recsys.data.logged import CONTEXT, EVENT, ITEM_ID, REQUEST_ID, TIME_MS, USER_ID
from recsys.errors import DataError

SCHEMA = pa.schema(
    [
        *(USER_ID, ITEM_ID, EVENT, TIME_MS),
        ("value", pa.float64()),
        ("event_id", pa.string()),
        *(REQUEST_ID, CONTEXT),
        ("partition", pa.int16()),
        ("position", pa.int64()),
        ("logged_ms", pa.int64()),
    ]
)
MANIFEST = "manifest.json"
FORMAT = 1


class EventFile(FrozenConfig):
    """One Parquet file."""

    name: str
    """Its name beside the manifest."""
    first: int
    """First log position that it covers."""
    last: int
    """Last log position that it covers."""
    rows: int
    """Events in it."""
    written: float
    """When, Unix seconds."""


class Written(FrozenConfig):
    """A partition's manifest."""

    format: int = FORMAT
    """Version of this layout."""
    partition: int
    """Which."""
    files: tuple[EventFile, ...] = ()
    """Every file that counts, by position."""
    at: str = ""
    """The log's own name of the last entry covered."""
    n: int = 0
    """How many entries of the log are covered: the position of the next one."""
    epoch: int = 0
    """Which owner of the partition wrote this."""


def folder_name(partition: int) -> str:
    """`p0003`."""
    return f"p{partition:04d}"


def opened(root: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a folder or URI, and the path in it."""
    if "://" in root:
        found: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(root)
        return found
    return pafs.LocalFileSystem(), root


def manifests(root: str) -> dict[int, Written]:
    """The manifest of every partition that has one. DataError for one of another version, or damaged."""
    fs, path = opened(root)
    found = {}
    for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
        if info.type != pafs.FileType.Directory:
            continue
        manifest = read_manifest(fs, f"{info.path}/{MANIFEST}")
        if manifest is not None:
            found[manifest.partition] = manifest
    return dict(sorted(found.items()))


def read_manifest(fs: pafs.FileSystem, path: str) -> Written | None:
    """One manifest; None where there is none."""
    if fs.get_file_info(path).type == pafs.FileType.NotFound:
        return None
    with fs.open_input_stream(path) as stream:
        text = stream.read()
    try:
        held: dict[str, Any] = json.loads(text)
        if held["format"] != FORMAT:
            raise DataError(f"'{path}' has format {held['format']}, this code reads {FORMAT}. Run the newer release.")
        return Written.model_validate(held)
    except (ValueError, KeyError) as error:
        raise DataError(f"'{path}' is damaged ({error}). Restore it, or delete its folder and ingest that partition again.") from error


def ends(root: str) -> dict[int, int]:
    """Partition -> the position behind its newest row: `since` of the next `read`."""
    return {p: m.n for p, m in manifests(root).items()}


def read(root: str, since: Mapping[int, int] | None = None) -> pa.Table:
    """All events from `since` (partition -> position) on, by (partition, position); columns as above."""
    fs, path = opened(root)
    since = since or {}
    parts = [SCHEMA.empty_table()]
    for partition, manifest in manifests(root).items():
        start = since.get(partition, 0)
        for file in manifest.files:
            if file.last < start or not file.rows:
                continue
            table = pq.read_table(f"{path}/{folder_name(partition)}/{file.name}", filesystem=fs, schema=SCHEMA, partitioning=None)
            parts.append(table.filter(pc.greater_equal(table["position"], start)) if file.first < start else table)
    return pa.concat_tables(parts)


def partition_manifest(root: str, partition: int) -> Written:
    """The manifest of one partition; an empty one where it has none."""
    fs, path = opened(root)
    return read_manifest(fs, f"{path}/{folder_name(partition)}/{MANIFEST}") or Written(partition=partition)


def pages(fs: pafs.FileSystem, path: str, manifest: Written, start: int, *, since_ms: float = -math.inf) -> Iterator[pa.Table]:
    """The events of one partition from position `start` on, a file at a time; without files that were written before `since_ms`."""
    for file in manifest.files:
        if file.last >= start and file.rows and 1000 * file.written >= since_ms:
            name = f"{path}/{folder_name(manifest.partition)}/{file.name}"
            table = pq.read_table(name, filesystem=fs, schema=SCHEMA, partitioning=None)
            yield table.filter(pc.greater_equal(table["position"], start)) if file.first < start else table
