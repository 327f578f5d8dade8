"""The log itself: its files as one table, then the rows that can be used, sorted by (time, log position)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import UNKNOWN, fits_a_key
from recsys.data import cleaning, live_columns, live_log
from recsys.data.cleaning import Account, Coded
from recsys.data.columns import FROM_TIME
from recsys.data.formats import Need, Raw, format_of, read
from recsys.data.live_log import as_rows
from recsys.data.paths import Resolver
from recsys.data.sources import DataConfig, EventConfig, InteractionsConfig, LogColumns
from recsys.data.tables import text_wanted
from recsys.errors import DataError

MOST_NAMES = 32_767
"""Event types that a log can tell apart: their codes are int16."""


class RawLog(NamedTuple):
    """The files of a log as one table of raw columns, the columns in force, and the (n,) int8 part of each row."""

    table: pa.Table
    columns: LogColumns
    parts: np.ndarray


def read_log(config: DataConfig, resolve: Resolver, keep: Sequence[str], account: Account) -> RawLog:
    """All files of the log as one table, the columns in force, and the (n,) int8 part of each row."""
    log = config.interactions
    files = [(resolve(path), part) for path, part in log.files()]
    columns = log.columns(format_of(files[0][0], log))
    needs = _needs(config, columns, keep)
    raws: list[tuple[Raw, int]] = [(read(path, log, "log", needs), part) for path, part in files]
    absent = {name for raw, _ in raws for name in needs if name not in raw.table.column_names}
    try:
        table = pa.concat_tables(
            [raw.table.drop_columns(sorted(absent & set(raw.table.column_names))) for raw, _ in raws], promote_options="permissive"
        )
    except (pa.ArrowTypeError, pa.ArrowInvalid) as fault:
        raise DataError(f"interactions: the files of the log have columns of different types. {fault}") from fault
    columns = columns._replace(
        time=None if columns.time in absent else columns.time, value=None if columns.value in absent else columns.value
    )
    lengths, part = [len(raw.table) for raw, _ in raws], [part for _, part in raws]
    if log.live is not None:
        told = as_rows(live_log.read(str(resolve(log.live))), config, columns, keep, table.schema)
        for name in told.column_names:
            if name in table.column_names and cleaning.is_text(told[name]) and not cleaning.is_text(table[name]):
                table = table.set_column(table.column_names.index(name), name, live_columns.as_texts(table[name]))
        table = pa.concat_tables([table, told], promote_options="permissive")
        if live_log.TYPE in table.column_names:  # rows of files have none, and are of the default
            columns = columns._replace(event=columns.event.model_copy(update={"column": live_log.TYPE}))
        if live_log.VALUE in table.column_names:
            columns = columns._replace(value=live_log.VALUE)
        lengths, part = [*lengths, len(told)], [*part, 0]
    malformed = sum(raw.malformed for raw, _ in raws)
    account.read, account.dropped = len(table) + malformed, dict.fromkeys(cleaning.REASONS, 0)
    account.dropped["malformed line"] = malformed
    if columns.time is None and (guess := [name for name in ("timestamp", "time", "time_ms", "ts", "date") if name in raws[0][0].header]):
        account.notes.append(f"no time is declared, so the order of the log counts; column '{guess[0]}' looks like one (interactions.time)")
    return RawLog(table, columns, np.repeat(np.array(part, np.int8), lengths))


def _needs(config: DataConfig, columns: LogColumns, keep: Sequence[str]) -> dict[str, Need]:
    """Every column of the log that is read, with the key that asks for it."""
    log = config.interactions
    needs: dict[str, Need] = {}

    def want(column: str | None, key: str, *, text: bool = False, guess: bool = False) -> None:
        if column is not None:
            before = needs.get(column, Need(key, optional=True))
            optional = before.optional and guess and column in columns.optional
            needs[column] = Need(before.key, text or before.text, optional)

    want(columns.user, "interactions.user", text=True)
    want(columns.item, "interactions.item", text=True)
    want(columns.time, "interactions.time", guess=True)
    want(columns.value, "interactions.value", guess=True)
    want(columns.event.column, "interactions.event.column", text=True)
    want(log.session, "interactions.session", text=True)
    for name, rule in config.labels.items():
        want(rule.column, f"labels.{name}.column")
    for name, column in log.context.items():
        if column.kind not in FROM_TIME:
            want(column.source(name), f"interactions.context.{name}", text=text_wanted(column))
    for name in keep:
        want(name, "split.column")
    return needs


class Events(NamedTuple):
    """The E kept rows of a log, sorted by (time, log position).

    order (E,) positions in the raw log; user, item: codes of each row; time (E,) float64 Unix seconds; event (E,) int16 codes into
    event_names; value (E,) float32, NaN where absent.
    """

    order: np.ndarray
    user: Coded
    item: Coded
    time: np.ndarray
    event: np.ndarray
    event_names: tuple[str, ...]
    value: np.ndarray


def clean(log: RawLog, config: InteractionsConfig, now: float, account: Account) -> Events:
    """Drop what cannot be used, and write down why; sort the rest. DataError where nothing is left."""
    table, columns, parts = log
    n = len(table)
    reason = np.zeros(n, np.int8)  # 0: kept, r: dropped for REASONS[r]

    def drop(why: str, rows: np.ndarray) -> None:
        rows = rows & (reason == 0)
        reason[rows] = cleaning.REASONS.index(why)
        account.dropped[why] += int(rows.sum())

    user = cleaning.code_ids(table[columns.user], key="interactions.user")
    item = cleaning.code_ids(table[columns.item], key="interactions.item")
    drop("missing user id", user.codes == UNKNOWN)
    drop("missing item id", item.codes == UNKNOWN)
    drop("id too long or with a NUL", _unfit(user) | _unfit(item))
    if columns.time is None:
        time = np.arange(n, dtype=np.float64)
    else:
        time = cleaning.to_seconds(table[columns.time], columns.time_unit, name=columns.time)
        with np.errstate(invalid="ignore"):
            drop("bad time", ~np.isfinite(time) | (time < 0))
            drop("future time", time > now)
    value = np.full(n, np.nan, np.float32) if columns.value is None else cleaning.to_numbers(table[columns.value]).astype(np.float32)
    low, high = config.min_value, config.max_value
    outside = np.isinf(value)
    if low is not None:
        outside |= value < low
    if high is not None:
        outside |= value > high
    drop("value out of range", outside)
    event, names = _event_codes(table, columns.event)

    order = np.flatnonzero(reason == 0)
    order = order[np.argsort(time[order], kind="stable")]
    if columns.time is not None:
        # A log that names no events may hold a live one under another type: what it is called does not tell them apart there.
        kinds = event if columns.event.column != live_log.TYPE else np.zeros_like(event)
        told = pc.fill_null(table[live_log.TOLD], UNKNOWN).to_numpy()[order] if live_log.TOLD in table.column_names else None
        again = cleaning.duplicates(time[order], user.codes[order], item.codes[order], kinds[order], parts[order], told=told)
        account.dropped["duplicate"] = int(again.sum())
        order = order[~again]
    if not len(order):
        raise DataError(f"interactions: no row is left of {account.read:,}.\n{account}")
    if columns.time is None:
        time = np.arange(n, dtype=np.float64)
        time[order] = np.arange(len(order))
    return Events(
        order, Coded(user.codes[order], user.ids), Coded(item.codes[order], item.ids), time[order], event[order], names, value[order]
    )


def _unfit(coded: Coded) -> np.ndarray:
    """(n,) bool: rows whose id no counter could be kept by; live events with such an id are refused."""
    unfit = np.array([not fits_a_key(text) for text in coded.ids] + [False], bool)
    found: np.ndarray = unfit[coded.codes]
    return found


def _event_codes(table: pa.Table, config: EventConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n,) int16 codes and the names they stand for, in alphabetical order."""
    if config.column is None:
        return np.zeros(len(table), np.int16), (config.default,)
    coded = cleaning.code_ids(table[config.column], key="interactions.event.column")
    names = sorted({*coded.ids, config.default} if (coded.codes == UNKNOWN).any() else coded.ids)
    if len(names) > MOST_NAMES:
        raise DataError(
            f"interactions.event: column '{config.column}' holds {len(names):,} different values, such as '{names[0]}' and '{names[1]}'. "
            f"Expected event types, at most {MOST_NAMES:,}."
        )
    rank = {name: i for i, name in enumerate(names)}
    codes = np.array([rank[name] for name in coded.ids] + [rank.get(config.default, 0)], np.int16)
    return codes[coded.codes], tuple(names)
