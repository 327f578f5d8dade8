"""What a feature space learns from the training log: vocabularies, widths and scales, and the checks of a declaration."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys.core import Vocabulary
from recsys.data.columns import ColumnConfig, Kind
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, DataError
from recsys.features.declaration import FeaturesConfig
from recsys.features.encoders import (
    MOST_VALUES,
    Bins,
    Clock,
    Encoder,
    ManyValues,
    Number,
    OneValue,
    Table,
    Vector,
    as_floats,
    distinct,
    objects,
    spelled,
    splitter,
)

Declared = Mapping[str, Mapping[str, ColumnConfig]]
Frame = pd.DataFrame | Mapping[str, Any]

SHAPES: dict[Kind, Literal["one", "bag", "sequence", "dense"]] = {
    "id": "one",
    "category": "one",
    "tags": "bag",
    "sequence": "sequence",
    "number": "dense",
    "bins": "one",
    "text": "bag",
    "vector": "dense",
    "hour": "one",
    "weekday": "one",
}
RESERVED = ("user_id", "item_id", "history", "recent")
_WITH_VOCABULARY = ("id", "category", "tags", "sequence", "text")


class Fitted(NamedTuple):
    """What a fit learned, in the order of the arguments of FeatureSpace after `columns`."""

    tables: dict[str, Table]
    encoders: dict[str, dict[str, Encoder]]
    user_rows: np.ndarray
    item_rows: np.ndarray
    account: dict[str, dict[str, int]]


def all_columns(columns: Declared) -> Iterator[tuple[str, str, ColumnConfig]]:
    """(side, name, column) of every declared column."""
    for side, named in columns.items():
        for name, column in named.items():
            yield side, name, column


def check(config: FeaturesConfig, columns: Declared, *, has_time: bool) -> None:
    """Raise ConfigError with every fault that only shows when all columns stand beside each other."""
    faults: list[str] = []
    owners: dict[str, str] = {}
    for side, name, column in all_columns(columns):
        if name in RESERVED:
            faults.append(f"Feature '{name}' of the {side} table has a name that the system uses itself. Give the column another name.")
        elif name in owners:
            faults.append(f"Feature '{name}' is declared for {owners[name]} and for {side}. Rename one; `column` names its file column.")
        owners.setdefault(name, side)
        if column.kind in ("hour", "weekday"):
            if side != "context":
                faults.append(f"Feature '{name}' of kind {column.kind} is declared for {side}; only context has the time of a request.")
            elif not has_time:
                faults.append(f"Feature '{name}' of kind {column.kind} needs times, and the log has none. Declare data.interactions.time.")
    faults += [fault for _, name, column in all_columns(columns) if (fault := _table_fault(name, column, config, columns))]
    if faults:
        raise ConfigError(faults)


def _table_fault(name: str, column: ColumnConfig, config: FeaturesConfig, columns: Declared) -> str:
    if column.table is None:
        return ""
    owners = {"user_id": None, "item_id": None} | {n: c for _, n, c in all_columns(columns) if c.kind in _WITH_VOCABULARY}
    owner = owners.get(column.table)
    if column.table not in owners:
        near = difflib.get_close_matches(column.table, owners, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"Feature '{name}' shares table '{column.table}', which is no feature with a vocabulary.{hint} Known: {', '.join(owners)}."
    if owner is not None and owner.table is not None:
        return f"Feature '{name}' shares table '{column.table}', which itself shares '{owner.table}'. Name '{owner.table}' in both."
    dim = dim_of(column.table, config, columns)
    if column.dim is not None and column.dim != dim:
        return (
            f"Feature '{name}' asks for dim {column.dim}, but the table '{column.table}' that it shares has dim {dim}. State one of them."
        )
    return ""


def dim_of(table: str, config: FeaturesConfig, columns: Declared) -> int:
    """Width of the embeddings of a table: its owner's, else the default."""
    ids = {"user_id": config.user_id, "item_id": config.item_id}
    if table in ids:
        return ids[table].dim or config.dim
    owner = next((c for _, name, c in all_columns(columns) if name == table), None)
    return (owner.dim if owner is not None else None) or config.dim


def fit(config: FeaturesConfig, columns: Declared, users: Frame, items: Frame, interactions: Interactions) -> Fitted:
    """Learn from the training events and the users and items in them; see FeatureSpace.fit."""
    user_events, item_events = events_per_row(interactions)
    tables: dict[str, Table] = {}
    tables["user_id"], user_rows = fit_ids(interactions.users, user_events, config, "user_id")
    tables["item_id"], item_rows = fit_ids(interactions.items, item_events, config, "item_id")
    seen = {"user": user_events > 0, "item": item_events > 0, "context": np.ones(len(interactions), bool)}
    frames: dict[str, Frame] = {"user": users, "item": items, "context": {"time": interactions.time, **interactions.context}}
    raw = {
        (side, name): training_values(frames[side], "time" if column.kind in ("hour", "weekday") else name, side, seen[side])
        for side, name, column in all_columns(columns)
    }
    for side, name, column in all_columns(columns):
        if column.kind in _WITH_VOCABULARY and column.table is None:
            tables[name] = fit_table(column, raw[side, name], config)
    encoders: dict[str, dict[str, Encoder]] = {side: {} for side in columns}
    account: dict[str, dict[str, int]] = {}
    for side, name, column in all_columns(columns):
        encoder = build(column, tables.get(column.table or name))
        encoders[side][name] = learn(encoder, column, raw[side, name])
        account[name] = counted(encoder, raw[side, name])
    return Fitted(tables, encoders, user_rows, item_rows, account)


def events_per_row(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """((U,), (I,)) training events per user and item; what users did before the log counts too, it precedes every example."""
    users = np.bincount(interactions.user, minlength=interactions.n_users)
    items = np.bincount(interactions.item, minlength=interactions.n_items)
    if interactions.past is not None:
        users = users + np.diff(interactions.past.indptr)
        items = items + np.bincount(interactions.past.items, minlength=interactions.n_items)
    return users, items


def fit_ids(
    vocabulary: Vocabulary, events: np.ndarray, config: FeaturesConfig, name: Literal["user_id", "item_id"]
) -> tuple[Table, np.ndarray]:
    """The table of an id and the (n,) int32 rows in it of the whole vocabulary; ids without training events are unknown."""
    own = config.user_id if name == "user_id" else config.item_id
    buckets = own.hash_buckets or config.hash_buckets
    kept = np.flatnonzero(events >= (own.min_count or config.min_count))
    kept = kept[np.argsort(-events[kept], kind="stable")]
    table = Table(Vocabulary(vocabulary.ids.take(pa.array(kept))), buckets)
    rows = np.full(len(vocabulary), -1, np.int32)
    rows[kept] = np.arange(1 + buckets, table.size, dtype=np.int32)
    others = np.flatnonzero(rows < 0)
    rows[others] = [table.unknown(text) for text in vocabulary.outside(others)]
    return table, rows


def training_values(frame: Frame, name: str, side: str, seen: np.ndarray) -> Any:
    """The raw values of a column in the rows that training saw."""
    values = column_of(frame, name, side)
    if not isinstance(values, pd.Series | np.ndarray):
        values = objects(values)
    if len(values) != len(seen):
        raise DataError(f"Column '{name}' of the {side} table has {len(values):,} rows, expected {len(seen):,}: one per {side}, in order.")
    return values[seen]


def column_of(frame: Frame, name: str, side: str) -> Any:
    """The raw values of a column; DataError where the frame has none of that name."""
    if name not in frame:
        has = ", ".join(map(str, frame)) or "no column"
        raise DataError(f"The {side} table has no column '{name}', which the features declare. It has: {has}.")
    return frame[name]


def rows_of(frame: Frame) -> int:
    """How many rows a table has."""
    return len(frame) if isinstance(frame, pd.DataFrame) else len(next(iter(frame.values()), ()))


def fit_table(column: ColumnConfig, values: Any, config: FeaturesConfig) -> Table:
    """Count the column's values and keep the frequent ones."""
    codes, uniques = distinct(values)
    times = np.bincount(codes[codes >= 0], minlength=len(uniques))
    counts: Counter[str] = Counter()
    if column.kind in ("id", "category"):
        for value, n in zip(uniques, times, strict=True):
            counts[spelled(value)] += int(n)
    else:
        split = splitter(column.kind, column.splits_on)
        for cell, n in zip(uniques, times, strict=True):
            for text in split(cell):
                counts[text] += int(n)
    given = column.model_fields_set
    return Table.fit(
        counts,
        min_count=column.min_count if "min_count" in given else config.min_count,
        buckets=column.hash_buckets if "hash_buckets" in given else config.hash_buckets,
    )


def build(column: ColumnConfig, table: Table | None) -> Encoder:
    """The encoder of a column before it has learned its scale or width."""
    low = -math.inf if column.min_value is None else column.min_value
    high = math.inf if column.max_value is None else column.max_value
    if column.kind == "number":
        return Number(column.scale, low, high)
    if column.kind == "bins":
        return Bins(column.edges, low, high)
    if column.kind == "vector":
        return Vector(column.dim or 1, column.splits_on)
    if column.kind in ("hour", "weekday"):
        return Clock("hour" if column.kind == "hour" else "weekday", column.timezone)
    assert table is not None  # noqa: S101 - every other kind has a vocabulary, its own or a shared one
    if column.kind in ("id", "category"):
        return OneValue(table)
    return ManyValues(table, column.length or 1, splitter(column.kind, column.splits_on), ordered=column.kind == "sequence")


def learn(encoder: Encoder, column: ColumnConfig, values: Any) -> Encoder:
    """Learn a number's scale, and a bag's or sequence's width where the column states none."""
    if isinstance(encoder, Number):
        encoder.fit(values)
    elif isinstance(encoder, ManyValues) and column.length is None:
        longest = max((len(encoder.split(cell)) for cell in distinct(values)[1]), default=1)
        encoder.width = max(1, min(MOST_VALUES, longest))
    return encoder


def counted(encoder: Encoder, values: Any) -> dict[str, int]:
    """How many of the training entities' values are missing, and how many of these were out of range."""
    encoded = encoder.encode(values)
    rows, outside = len(encoded), 0
    if isinstance(encoder, Number | Bins):
        x = as_floats(values)
        outside = int(((x < encoder.low) | (x > encoder.high)).sum())
    if isinstance(encoder, Number):
        missing = int(np.isnan(encoder.read(values)).sum())
    else:
        missing = int((encoded.reshape(rows, -1) == 0).all(1).sum()) if rows else 0
    return {"rows": rows, "missing": missing, "out_of_range": outside}


def state(encoder: Encoder) -> dict[str, float]:
    """What an encoder learned beside its vocabulary, for JSON."""
    learned: dict[str, float] = {"width": encoder.width}
    if isinstance(encoder, Number):
        learned |= {"centre": encoder.centre, "spread": encoder.spread, "mean": encoder.mean}
    return learned


def restore(encoder: Encoder, learned: Mapping[str, Any]) -> Encoder:
    """Give a built encoder what `state` wrote."""
    for name, value in learned.items():
        if getattr(encoder, name) != value:
            setattr(encoder, name, value)
    return encoder
