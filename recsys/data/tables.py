"""The tables beside the log: items, users, and the history that came before it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import UNKNOWN
from recsys.data.cleaning import Account, Coded, code_ids, decoded, is_text
from recsys.data.columns import ColumnConfig
from recsys.data.formats import Need, Role, format_of, read
from recsys.data.interactions import CSR
from recsys.data.paths import Resolver
from recsys.data.sources import HistoryConfig, TableConfig
from recsys.errors import DataError

_NUMERIC = frozenset({"number", "bins"})


class Table(NamedTuple):
    """A table of items or users: its canonical ids in order, and a frame of raw values, one row per id."""

    ids: list[str]
    frame: pd.DataFrame

    def aligned(self, ids: pa.Array) -> pd.DataFrame:
        """The frame with one row per given id, missing values where the table does not know it."""
        rows = pc.index_in(ids, value_set=pa.array(self.ids, pa.string())).to_pandas().to_numpy(np.float64)
        return self.frame.reindex(np.nan_to_num(rows, nan=-1).astype(np.int64)).reset_index(drop=True)


def text_wanted(column: ColumnConfig) -> bool:
    """Whether a text file's column is read as it is written, so that a category "007" is not 7."""
    return column.kind not in _NUMERIC


def read_table(config: TableConfig, role: Role, resolve: Resolver, account: Account) -> Table:
    """Read `items` or `users`; of rows with one id the last counts."""
    paths = [resolve(path) for path in ((config.path,) if isinstance(config.path, str) else config.path)]
    kuairand_item = role == "items" and format_of(paths[0], config) == "kuairand"
    key = config.id or ("video_id" if kuairand_item else "item_id" if role == "items" else "user_id")
    needs = {key: Need(f"{role}.id", text=True)}
    for name, column in config.columns.items():
        source = column.source(name)
        needs[source] = Need(f"{role}.columns.{name}", text=text_wanted(column) or (source in needs and needs[source].text))
    if config.title:
        needs.setdefault(config.title, Need(f"{role}.title", text=True))
    raws = [read(path, config, role, needs) for path in paths]
    table = pa.concat_tables([raw.table for raw in raws], promote_options="permissive")
    malformed = sum(raw.malformed for raw in raws)
    coded = code_ids(table[key], key=f"{role}.id")
    last = np.full(len(coded.ids), -1, np.int64)
    known = np.flatnonzero(coded.codes != UNKNOWN)
    last[coded.codes[known]] = known
    for n, what in (
        (malformed, "malformed lines"),
        (len(table) - len(known), "rows without an id"),
        (len(known) - len(last), "rows whose id comes again"),
    ):
        if n:
            account.notes.append(f"{role}: {n:,} {what} left out")
    if not len(last):
        raise DataError(f"{role}: '{paths[0]}' has no row with an id in column '{key}'.")
    kept = table.take(pa.array(last))
    columns = {name: column.source(name) for name, column in config.columns.items()}
    if config.title:
        columns.setdefault("title", config.title)
    return Table(coded.ids, pd.DataFrame({name: values(kept[source]) for name, source in columns.items()}, index=pd.RangeIndex(len(last))))


def values(column: pa.ChunkedArray) -> pd.Series:
    """Raw values of a column: str, numbers, or lists."""
    return pd.Series(decoded(column).to_pandas())


class Past(NamedTuple):
    """Sequences before the log as codes: user code of each list, list lengths, and all item codes, oldest first."""

    users: Coded
    items: Coded
    lengths: np.ndarray


def read_history(config: HistoryConfig, resolve: Resolver, account: Account) -> Past:
    """Read the `history` file; of rows with one user the last counts."""
    path = resolve(config.path)
    needs = {config.user: Need("history.user", text=True), config.items: Need("history.items", text=True)}
    raw = read(path, config, "history", needs)
    users = code_ids(raw.table[config.user], key="history.user")
    column = decoded(raw.table[config.items])
    if is_text(column):
        column = pc.split_pattern(pc.utf8_trim_whitespace(column), config.separator)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(
            f"history.items: column '{config.items}' of '{path}' holds {column.type}. Expected a list of item ids, oldest first."
        )
    last = np.full(len(users.ids), -1, np.int64)
    known = np.flatnonzero(users.codes != UNKNOWN)
    last[users.codes[known]] = known
    if len(known) < len(users.codes):
        account.notes.append(f"history: {len(users.codes) - len(known):,} rows without a user id left out")
    column = column.take(pa.array(last))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    items = code_ids(pa.chunked_array([pc.list_flatten(column.combine_chunks())]), key="history.items")
    present = items.codes != UNKNOWN
    owner = np.repeat(np.arange(len(lengths)), lengths)[present]
    return Past(
        Coded(np.arange(len(last), dtype=np.int32), users.ids),
        Coded(items.codes[present], items.ids),
        np.bincount(owner, minlength=len(lengths)),
    )


def past_rows(past: Past, user_rows: np.ndarray, item_rows: np.ndarray, n_users: int) -> CSR:
    """Codes of a history -> CSR by user row; user_rows and item_rows say which row each code has."""
    lengths = np.zeros(n_users, np.int64)
    lengths[user_rows] = past.lengths
    indptr = np.zeros(n_users + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    starts = np.cumsum(past.lengths) - past.lengths
    at = np.arange(len(past.items.codes)) - np.repeat(starts, past.lengths) + np.repeat(indptr[user_rows], past.lengths)
    items = np.empty(len(past.items.codes), np.int32)
    items[at] = item_rows[past.items.codes]
    return CSR(indptr, items)
