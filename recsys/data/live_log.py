"""Events that came in live, as rows of the configured log: the same columns, so that everything after is one road.

The rules are those by which the streaming road reads an event (`recsys.features.live_rows`): the first label is of the event's
value where it reads that column, else it is what `sources.is_positive` says of its type; every other label is the event type of its name. What a
column of the log cannot know of a live event is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.data import event_files, live_columns
from recsys.data.columns import FROM_TIME
from recsys.data.interactions import SHOWN, Interactions
from recsys.data.sources import IMPRESSION, DataConfig, LogColumns, is_positive
from recsys.errors import DataError

TYPE = "type of a live event"
"""The column of `as_rows` that holds event types, where the log's files name none."""
VALUE = "value of a live event"
"""Likewise its values, where the log's files have none."""
TOLD = "number of a live event's id"
"""Likewise a number for each event id: live rows that are alike but for it are several events."""
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def read(root: str) -> pa.Table:
    """Live events of a folder in the layout of `event_files`, or of one Parquet file or folder of them with the same columns."""
    if ("://" in root or Path(root).is_dir()) and event_files.manifests(root):
        return event_files.read(root)
    if not Path(root).exists():
        raise DataError(f"'{root}' does not exist. Expected a Parquet file of live events, or a folder of them.")
    if Path(root).is_dir() and not any(Path(root).rglob("*.parquet")):
        raise DataError(
            f"'{root}' holds no event: no partition's manifest and no Parquet file lies in it. Is the ingestion running? The first events come "
            "after ingest.parquet_every_s (60 s)."
        )
    try:
        table = pq.read_table(root, partitioning=None)
    except (pa.ArrowInvalid, OSError) as fault:
        raise DataError(f"'{root}' cannot be read as Parquet ({str(fault).splitlines()[0]}).") from fault
    if lacking := [name for name in event_files.SCHEMA.names if name not in table.column_names]:
        raise DataError(f"'{root}' lacks the columns {', '.join(lacking)} of live events. Expected: {', '.join(event_files.SCHEMA.names)}.")
    return table.select(event_files.SCHEMA.names).cast(event_files.SCHEMA)


def as_rows(events: pa.Table, config: DataConfig, columns: LogColumns, keep: Sequence[str], like: pa.Schema) -> pa.Table:
    """Live events as raw rows of the log whose columns are `like`, or texts where a column cannot hold them. Where the log holds no
    impressions and names no events, they are left out.

    What a user did in a log that names no events is told apart by TYPE, as the service does: a view enters no history, in neither road.
    """
    log = config.interactions
    if config.leaves_out_impressions:
        events = events.filter(pc.not_equal(events["event"], IMPRESSION))
    contexts = _contexts(events["context"])
    names = events["event"].to_pylist()
    texts = {columns.user: events["user_id"], columns.item: events["item_id"]}
    if columns.event.column is not None:
        texts[columns.event.column] = events["event"]
    said = {name: live_columns.exactly(told.to_pylist(), like.field(name).type) for name, told in texts.items()}
    out: dict[str, Any] = {}
    if columns.time is None:
        raise DataError(
            "interactions.live: the log has no time, so nobody knows where live events belong in it. Declare interactions.time."
        )
    out[columns.time] = _times(events["time_ms"], columns.time_unit, like.field(columns.time).type)
    if columns.value is not None:
        out[columns.value] = events["value"]
    for name, column in log.context.items():
        source = column.source(name)
        if column.kind not in FROM_TIME and source in like.names and source not in {*out, *said}:
            said[source] = live_columns.column_of([c.get(name) for c in contexts], column, like.field(source).type)
    for name in keep:
        if name in like.names and name not in {*out, *said}:
            said[name] = live_columns.fitting([_text(c.get(name)) for c in contexts], like.field(name).type)
    for number, (name, rule) in enumerate(config.labels.items()):
        if rule.column not in {*out, *said}:
            hits = np.array([is_positive(e, config.refusals) if number == 0 else (e == name) for e in names], bool)
            yes = rule.equals if rule.equals is not None else 1 if rule.at_least is None else rule.at_least
            out[rule.column] = pa.array([yes if hit else None for hit in hits])
    cast = said | {name: _cast(column, like.field(name).type, name) for name, column in out.items() if name in like.names}
    if config.impressions:  # a click is told of by itself here; in the files it is the label of what was shown
        cast[SHOWN] = pc.equal(events["event"], IMPRESSION)
    if columns.event.column is None:
        cast[TYPE] = events["event"]
    if columns.value is None:
        cast[VALUE] = events["value"]
    cast[TOLD] = pa.chunked_array([events["event_id"].combine_chunks().dictionary_encode().indices])
    return pa.table(cast)


def arrivals(log: Interactions, events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """((E,) partition, (E,) position) in the event log of each row of a log that took `events` in; -1 for rows of its own files.

    A row is known by its user, item and time; of several the last ones came in live, in the order of their positions.
    """
    columns = ("partition", "position")
    came = events.select(["user_id", "item_id", "time_ms", *columns]).to_pandas().sort_values(list(columns), kind="stable")
    live = pd.DataFrame(
        {"user": log.users.rows(came["user_id"].to_numpy(object)), "item": log.items.rows(came["item_id"].to_numpy(object))}
    )
    live = live.assign(ms=came["time_ms"].to_numpy(), **{c: came[c].to_numpy() for c in columns})
    key = ["user", "item", "ms"]
    live["behind"] = live.groupby(key).cumcount(ascending=False)
    rows = pd.DataFrame({"user": log.user, "item": log.item, "ms": np.round(1000 * log.time).astype(np.int64)})
    rows["behind"] = rows.groupby(key).cumcount(ascending=False)
    found = rows.merge(live, how="left", on=[*key, "behind"])
    partition, position = (found[c].fillna(-1).to_numpy(np.int64) for c in columns)
    return partition, position


def _contexts(column: pa.ChunkedArray) -> list[dict[str, Any]]:
    """Each row's context; equal texts share one."""
    read: dict[str, dict[str, Any]] = {}
    out = []
    for text in column.to_pylist():
        if text not in read:
            held = json.loads(text) if text else {}
            read[text] = held if isinstance(held, dict) else {}
        out.append(read[text])
    return out


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, list | dict | bool) else str(value)


def _times(time_ms: pa.ChunkedArray, unit: str, wanted: pa.DataType) -> pa.ChunkedArray:
    """Milliseconds in the log's own unit."""
    if pa.types.is_timestamp(wanted):
        return time_ms.cast(pa.timestamp("ms", wanted.tz))
    if unit == "iso":
        return pc.strftime(time_ms.cast(pa.timestamp("ms", "UTC")), "%Y-%m-%dT%H:%M:%SZ")
    if unit == "s":
        return pc.divide(time_ms.cast(pa.float64()), 1_000.0)
    return pc.multiply(time_ms, PER_SECOND[unit] // 1_000)


def _cast(column: Any, wanted: pa.DataType, name: str) -> Any:
    array = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    if pa.types.is_dictionary(wanted):
        return _cast(array, wanted.value_type, name).dictionary_encode()
    if (pa.types.is_integer(wanted) and pa.types.is_floating(array.type)) or pa.types.is_timestamp(array.type):
        return array  # a half second, or a missing value, has no place in whole numbers: the log's own become finer
    try:
        return array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
        raise DataError(
            f"interactions.live: column '{name}' of the log is {wanted}, which a live event's value is not ({str(fault).splitlines()[0]})."
        ) from fault
