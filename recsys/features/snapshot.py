"""The item side at one time, as rankers take it: arrays by key, in outside terms, for a bundle of any version to read.

A partition's snapshot is one value: its time, how far each partition's log is counted in it, then a table (Arrow) per group of
aggregates that the group's declaration names. A row is a key (its texts), the amounts of each aggregate at that time and when its newest event was; a list's values are texts.
A ranker joins the snapshots of all partitions into an `ItemSnapshot` of its own rows and codes, in the background.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recsys.core import Vocabulary
from recsys.errors import StoreError
from recsys.features.generate import Instant
from recsys.features.groups import Group, GroupState, Plan
from recsys.features.inputs import AggregateInputs
from recsys.features.packed import digest
from recsys.features.reading import Key
from recsys.features.states import LATEST, Coder, ItemSnapshot, Looked, looked
from recsys.features.stream import States
from recsys.features.tally import Ends, Tally

_HEAD = struct.Struct("<BdH")
_SIZE = struct.Struct("<4sI")
VERSION = 2


class Part(NamedTuple):
    """One partition's snapshot: Unix seconds, and by the mark of a group its keys (texts joined by NUL) and columns. counted: per
    partition, the log entries below this number are counted."""

    at: float
    counted: tuple[int, ...]
    tables: dict[bytes, pa.Table]


def packed_snapshot(plan: Plan, states: States, at: float, counted: Sequence[int]) -> bytes:
    """The states of item-side keys at a time, as one value of a store."""
    out = bytearray(_HEAD.pack(VERSION, at, len(counted))) + struct.pack(f"<{len(counted)}Q", *counted)
    by_group: dict[int, list[tuple[Key, GroupState]]] = {}
    for (number, key), state in states.items():
        by_group.setdefault(number, []).append((key, state))
    for number, held in sorted(by_group.items()):
        group = plan.groups[number]
        texts: dict[str, int] = {}
        found = looked(
            group,
            [(code, state) for code, (_, state) in enumerate(held)],
            Instant(at, LATEST),
            lambda of, v, texts=texts: float(v) if of == "value" else float(texts.setdefault(str(v), len(texts))),
        )
        body = _as_arrow(_table(group, [key for key, _ in held], found, list(texts)))
        out += _SIZE.pack(digest(group), len(body)) + body
    return bytes(out)


def _table(group: Group, keys: list[Key], found: Looked, texts: list[str]) -> pa.Table:
    columns: dict[str, pa.Array] = {"key": pa.array(["\0".join(key) for key in keys], pa.string())}
    for i, f in enumerate(group.features):
        amounts = found.amounts[i]
        if isinstance(f.monoid, Ends) and f.config.reads != "value":
            rows = [[texts[int(c)] for c in row if not math.isnan(c)] for row in amounts]
            columns[f"{i}"] = pa.array(rows, pa.list_(pa.string()))
            continue
        for c in range(amounts.shape[1]):
            columns[f"{i}.{c}"] = pa.array(amounts[:, c], pa.float64())
        if isinstance(f.monoid, Tally):
            columns[f"{i}.last"] = pa.array(found.last[i], pa.float64())
    return pa.table(columns)


def _as_arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpacked_snapshot(held: bytes) -> Part:
    """What `packed_snapshot` wrote. StoreError for another version or damage."""
    try:
        version, at, n = _HEAD.unpack_from(held)
        if version != VERSION:
            raise StoreError(
                f"A snapshot has version {version}, this code reads {VERSION}. Run one release; its consumers write another within seconds."
            )
        counted = struct.unpack_from(f"<{n}Q", held, _HEAD.size)
        place, tables = _HEAD.size + 8 * n, {}
        while place < len(held):
            mark, size = _SIZE.unpack_from(held, place)
            place += _SIZE.size
            with pa.ipc.open_stream(held[place : place + size]) as reader:
                tables[mark] = reader.read_all()
            place += size
    except (struct.error, pa.ArrowInvalid, OSError) as fault:
        raise StoreError(f"A snapshot of {len(held)} bytes is damaged ({fault}). The next one replaces it.") from fault
    return Part(at, counted, tables)


def item_snapshot(parts: Mapping[int, Part], inputs: AggregateInputs, coder: Coder, fallback: ItemSnapshot) -> ItemSnapshot:
    """One snapshot in a bundle's own rows, as old as its oldest part.

    `fallback` is that of the bundle: a group that no part holds yet keeps its values. Keys that the bundle does not know are left out.
    """
    groups: dict[int, Looked] = {}
    for number, group in enumerate(inputs.plan.groups):
        if "user" in group.key:
            continue
        tables = [t for part in parts.values() if (t := part.tables.get(digest(group))) is not None]
        if tables:
            groups[number] = _looked(group, tables, coder)
        elif number in fallback.groups:
            groups[number] = fallback.groups[number]
    if not parts:
        return fallback
    cuts = {(part.at, part.counted) for part in parts.values()}
    at, counted = min(cuts)
    return ItemSnapshot(at, groups, counted if len(cuts) == 1 else ())


def decayed_counts(parts: Mapping[int, Part], group: Group, items: Vocabulary) -> tuple[np.ndarray, float]:
    """((I,) the one count of a group by item, in the rows of `items`; its Unix seconds), as old as the oldest part that holds it.

    A part of a later time is weighed as if it were of that time. An item that is not of the vocabulary is left out.
    """
    mark, (feature,) = digest(group), group.features
    held = [(part.at, part.tables[mark]) for part in parts.values() if mark in part.tables]
    out, at = np.zeros(len(items)), min((when for when, _ in held), default=0.0)
    half_life_s = feature.monoid.half_life_s
    for when, table in held:
        rows = items.rows(table["key"].to_pylist())
        known = (rows >= 0) & (rows < len(out))
        out[rows[known]] += table["0.0"].to_numpy()[known] * 2.0 ** ((when - at) / half_life_s)
    return out, at


def _looked(group: Group, tables: Iterable[pa.Table], coder: Coder) -> Looked:
    table = pa.concat_tables(tables)
    codes = np.array([coder.of_key(group, tuple(key.split("\0")), -1) for key in table["key"].to_pylist()], np.int64)
    order = np.argsort(codes, kind="stable")
    order = order[codes[order] >= 0]
    amounts: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for i, f in enumerate(group.features):
        if isinstance(f.monoid, Ends):
            rows = np.full((len(order), f.monoid.n), math.nan)
            if f.config.reads == "value":
                for c in range(f.monoid.n):
                    rows[:, c] = table[f"{i}.{c}"].to_numpy()[order]
            else:
                values = table[f"{i}"].to_pylist()
                for row, at in zip(rows, order, strict=True):
                    known = [float(coder.text(f.config.reads, v, new=True)) for v in values[at]]
                    row[len(row) - len(known) :] = known
            amounts.append(rows)
            last.append(np.empty(0))
            continue
        width = sum(name.startswith(f"{i}.") and name != f"{i}.last" for name in table.column_names)
        columns = [table[f"{i}.{c}"].to_numpy()[order] for c in range(width)]
        amounts.append(np.stack(columns, 1) if columns else np.empty((len(order), 0)))
        last.append(table[f"{i}.last"].to_numpy()[order] if isinstance(f.monoid, Tally) else np.empty(0))
    return Looked(codes[order], tuple(amounts), tuple(last))
