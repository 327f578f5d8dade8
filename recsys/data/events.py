"""A declared data set to arrays: `load(config, base)` reads, cleans, sorts and numbers it.

The trap: rows are numbered by the log that is kept, so two loads of one log agree, and a longer log numbers its new ids
after the old ones only by chance. Whatever outlives a load goes by id, not by row.
"""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import UNKNOWN, Vocabulary
from recsys.data import cleaning
from recsys.data.cleaning import Account, Coded
from recsys.data.columns import FROM_TIME
from recsys.data.interactions import POSITIVE, SHOWN, Interactions, group
from recsys.data.log import Events, clean, read_log
from recsys.data.paths import resolver
from recsys.data.sources import IMPRESSION, DataConfig, InteractionsConfig, is_positive
from recsys.data.tables import Table, past_rows, read_history, read_table
from recsys.errors import DataError

__all__ = ["Account", "Dataset", "load"]


@dataclass(frozen=True)
class Dataset:
    """A loaded data set. `users` and `items` have one row per row of the vocabularies, with raw values (missing where a
    table does not know the id); `parts` is (E,) int8, 0 train, 1 valid, 2 test, where the log came in parts."""

    interactions: Interactions
    users: pd.DataFrame
    items: pd.DataFrame
    account: Account
    parts: np.ndarray | None = None


def load(config: DataConfig, base: Path, *, keep: Sequence[str] = (), now: float | None = None) -> Dataset:
    """Read the declared files. `keep` names further columns of the log (a split's) to carry in `interactions.context`.

    Events after `now` (Unix seconds, default: the clock) are dropped. DataError where a file cannot be read as declared.
    """
    resolve, account = resolver(base), Account()
    raw = read_log(config, resolve, keep, account)
    events = clean(raw, config.interactions, clock.time() if now is None else now, account)
    items = read_table(config.items, "items", resolve, account) if config.items else None
    users = read_table(config.users, "users", resolve, account) if config.users else None
    past = read_history(config.history, resolve, account) if config.history else None
    user_ids = _vocabulary(events.user, users, past.users if past else None)
    item_ids = _vocabulary(events.item, items, past.items if past else None)
    log, has_time = raw.table.take(pa.array(events.order)), raw.columns.time is not None
    user = user_ids.log[events.user.codes]
    labels = _labels(log, config, events)
    event, event_names = _told_apart(events, labels[POSITIVE], config, raw.columns.event.default)
    interactions = Interactions(
        users=user_ids.vocabulary,
        items=item_ids.vocabulary,
        user=user,
        item=item_ids.log[events.item.codes],
        time=events.time,
        event=event,
        event_names=event_names,
        value=events.value,
        labels=labels,
        context=_context(log, config.interactions, keep),
        session=_session(log, config.interactions, user, events.time, has_time=has_time),
        has_time=has_time,
        impressions=config.impressions,
        past=past_rows(past, user_ids.past, item_ids.past, len(user_ids.vocabulary)) if past else None,
    )
    return Dataset(
        interactions,
        _aligned(users, user_ids.vocabulary),
        _aligned(items, item_ids.vocabulary),
        account,
        raw.parts[events.order] if config.interactions.in_parts else None,
    )


def _aligned(table: Table | None, vocabulary: Vocabulary) -> pd.DataFrame:
    return table.aligned(vocabulary.ids) if table else pd.DataFrame(index=pd.RangeIndex(len(vocabulary)))


class _Rows(NamedTuple):
    """A vocabulary and the rows of its sources' codes: of the log (UNKNOWN where no kept row has the id) and the history."""

    vocabulary: Vocabulary
    log: np.ndarray
    past: np.ndarray


def _vocabulary(log: Coded, table: Table | None, past: Coded | None) -> _Rows:
    """Ids of the kept log by first appearance in the file, then the table's, then the history's."""
    used = np.bincount(log.codes, minlength=len(log.ids)) > 0
    rows = np.where(used, np.cumsum(used) - 1, UNKNOWN).astype(np.int32)
    ids = pa.array(log.ids, pa.string()).filter(pa.array(used))
    for more in (table.ids if table else [], past.ids if past else []):
        if more:
            other = pa.array(more, pa.string())
            new = other.filter(pc.is_null(pc.index_in(other, value_set=ids)))
            ids = pa.concat_arrays([ids, new])
    of_past = pc.index_in(pa.array(past.ids, pa.string()), value_set=ids).to_numpy().astype(np.int32) if past else np.empty(0, np.int32)
    return _Rows(Vocabulary(ids), rows, of_past)


def _labels(log: pa.Table, config: DataConfig, events: Events) -> dict[str, np.ndarray]:
    """Declared labels, and `positive`: the first of them, or every row that `is_positive` lets be one. And SHOWN, beside live exposures."""
    labels = {name: cleaning.label(log[rule.column], rule, key=f"labels.{name}") for name, rule in config.labels.items()}
    first = next(iter(labels), None)
    if SHOWN in log.column_names:
        labels[SHOWN] = log[SHOWN].fill_null(True).cast(pa.float32()).to_numpy()
    if first is None:
        positive = np.array([is_positive(name, config.refusals) for name in events.event_names], np.float32)[events.event]
        return {**labels, POSITIVE: positive}
    # A refusal may bring a value that passes the label's test.
    refuses = np.array([name in config.refusals for name in events.event_names], bool)[events.event]
    labels[first] = np.where(refuses, np.float32(0), labels[first])
    return {**labels, POSITIVE: labels[first]}


def _told_apart(events: Events, positive: np.ndarray, config: DataConfig, default: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Event codes and names. Where a log of impressions names no events, its rows are clicks (or what the default is) and impressions;
    live events of another type keep it."""
    if not config.impressions or config.interactions.event.column is not None or default not in events.event_names:
        return events.event, events.event_names
    names = tuple(sorted({*events.event_names, IMPRESSION}))
    code = np.array([names.index(name) for name in events.event_names], np.int16)[events.event]
    passed_over = (code == names.index(default)) & (positive <= 0)
    return np.where(passed_over, np.int16(names.index(IMPRESSION)), code), names


def _context(log: pa.Table, config: InteractionsConfig, keep: Sequence[str]) -> dict[str, np.ndarray]:
    """Declared context columns and those to keep, by name, as raw values (None or NaN where missing)."""
    sources = {name: column.source(name) for name, column in config.context.items() if column.kind not in FROM_TIME}
    for name in keep:
        if sources.setdefault(name, name) != name:
            raise DataError(
                f"interactions.context.{name} reads column '{sources[name]}', but split.column means the column '{name}'. Rename the feature."
            )
    return {name: raw_values(log[source]) for name, source in sources.items()}


def raw_values(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) values of a column; text as objects that are shared between equal rows."""
    if cleaning.is_text(column):
        coded = cleaning.code_ids(column)
        return np.asarray(np.array([*coded.ids, None], object)[coded.codes])
    return np.asarray(column.to_numpy())


def _session(log: pa.Table, config: InteractionsConfig, user: np.ndarray, time: np.ndarray, *, has_time: bool) -> np.ndarray | None:
    """(E,) int32 visit numbers: the declared column per user, else runs of events without `session_gap_min` of silence."""
    if config.session is not None:
        visit = cleaning.code_ids(log[config.session], key="interactions.session").codes
        return pd.DataFrame({"user": user, "visit": visit}).groupby(["user", "visit"], sort=False).ngroup().to_numpy(np.int32)
    if not has_time:
        return None
    _, order = group(user, int(user.max()) + 1)
    begins = np.ones(len(order), bool)
    begins[1:] = (user[order[1:]] != user[order[:-1]]) | (np.diff(time[order]) > config.session_gap_min * 60)
    session = np.empty(len(order), np.int32)
    session[order] = np.cumsum(begins, dtype=np.int32) - 1
    return session
