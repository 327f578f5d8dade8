"""The item side at one time, as rankers take it: arrays by key, in outside terms, for a bundle of any version to read.

A partition's snapshot is one value: its time, how far each partition's log is counted in it, then a table (Arrow) per group of
aggregates that the group's declaration names. A row is a key (its texts), the amounts of each aggregate at that time and when its newest event was; a list's values are texts.
A ranker joins the snapshots of all partitions into an `ItemSnapshot` of its own rows and codes, in the background.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recsys.core import Vocabulary
from recsys.errors import StoreError
from recsys.features.counting import home
from recsys.features.groups import Group, GroupState, Plan
from recsys.features.inputs import AggregateInputs
from recsys.features.item_table import ItemTable
from recsys.features.packed import digest
from recsys.features.reading import Key
from recsys.features.states import Coder, ItemSnapshot, Looked
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


def packed_snapshot(plan: Plan, states: States, at: float, counted: Sequence[int], kept: dict[int, ItemTable] | None = None) -> bytes:
    """The states of item-side keys at a time, as one value of a store. `kept`: what the snapshots before left, by number of the group."""
    kept = {} if kept is None else kept
    out = bytearray(_HEAD.pack(VERSION, at, len(counted))) + struct.pack(f"<{len(counted)}Q", *counted)
    by_group: dict[int, list[tuple[Key, GroupState]]] = {}
    for (number, key), state in states.items():
        by_group.setdefault(number, []).append((key, state))
    for number, held in sorted(by_group.items()):
        group = plan.groups[number]
        if number not in kept:
            kept[number] = ItemTable(group)
        body = _as_arrow(kept[number].table(held, at))
        out += _SIZE.pack(digest(group), len(body)) + body
    return bytes(out)


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


class Bundled:
    """What a bundle counts of the item side itself: it stands in for what no partition has published, a group of one of them or all."""

    def __init__(self, snapshot: ItemSnapshot, states: States, coder: Coder, partitions: int) -> None:
        self.snapshot, self.partitions = snapshot, partitions
        self._states, self._coder = states, coder
        self._homes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._held: dict[int, tuple[tuple[int, ...], Looked]] = {}

    def at_home(self, number: int, group: Group, absent: tuple[int, ...]) -> Looked:
        """Of a group, the keys that are at home in some partitions."""
        whole = self.snapshot.groups[number]
        if len(absent) == self.partitions:
            return whole
        if number not in self._held or self._held[number][0] != absent:
            homes, codes = self._placed(number, group)
            self._held[number] = absent, whole.only(np.isin(whole.codes, codes[np.isin(homes, absent)]))
        return self._held[number][1]

    def _placed(self, number: int, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Of a group's keys (K,) the partition and the code; found once, as partitions come one after another."""
        if number not in self._homes:
            keys = [key for n, key in self._states if n == number]
            homes = np.array([home(key, self.partitions) for key in keys], np.int64)
            self._homes[number] = homes, np.array([self._coder.of_key(group, key, -1) for key in keys], np.int64)
        return self._homes[number]


def item_snapshot(parts: Mapping[int, Part], inputs: AggregateInputs, coder: Coder, bundled: Bundled) -> ItemSnapshot:
    """One snapshot in a bundle's own rows, as old as its oldest part.

    What a partition does not hold, because it or the group was not published yet, keeps the bundle's values; a page of such a snapshot cannot
    be counted again, nor one of parts that were cut at several places. Keys of texts that the bundle does not know are left out; items that
    came after it are kept under rows behind its own (see `states.Coder`).
    """
    if not parts:
        return bundled.snapshot
    groups: dict[int, Looked] = {}
    whole = len(parts) == bundled.partitions
    for number, group in enumerate(inputs.plan.groups):
        if "user" in group.key:
            continue
        mark = digest(group)
        tables = {p: part.tables[mark] for p, part in parts.items() if mark in part.tables}
        absent = tuple(p for p in range(bundled.partitions) if p not in tables)
        own = bundled.at_home(number, group, absent) if absent else None
        if own is None or (tables and not len(own.codes)):
            groups[number] = coded(group, tables, coder)
            continue
        groups[number] = coded(group, tables, coder).joined(own) if tables else own
        whole = whole and not len(own.codes)
    cuts = {(part.at, part.counted) for part in parts.values()}
    at, counted = min(cuts)
    return ItemSnapshot(at, groups, counted if whole and len(cuts) == 1 else ())


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


def coded(group: Group, tables: Mapping[int, pa.Table], coder: Coder) -> Looked:
    """A group's tables by partition in a bundle's own codes, ascending; keys that have none are left out."""
    table = pa.concat_tables(tables.values())
    codes = np.concatenate([coder.of_keys(group, p, one["key"]) for p, one in tables.items()])
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
                    known = [coder.value(f.config.reads, v) for v in values[at]]
                    row[len(row) - len(known) :] = known
            amounts.append(rows)
            last.append(np.empty(0))
            continue
        width = sum(name.startswith(f"{i}.") and name != f"{i}.last" for name in table.column_names)
        columns = [table[f"{i}.{c}"].to_numpy()[order] for c in range(width)]
        amounts.append(np.stack(columns, 1) if columns else np.empty((len(order), 0)))
        last.append(table[f"{i}.last"].to_numpy()[order] if isinstance(f.monoid, Tally) else np.empty(0))
    return Looked(codes[order], tuple(amounts), tuple(last))
