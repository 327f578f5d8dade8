"""`rayfunnel items|users upsert|delete FILE`: a table's rows into the live catalogue, checked like those of a request."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import pandas as pd
import typer
from rich.console import Console

from cluster.redis_items import RedisItemLog
from cluster.redis_store import RedisStore
from cluster.store_url import store_url
from recsys.config import Config
from recsys.core import canonical_id
from recsys.data.columns import ColumnConfig
from recsys.data.formats import Need, check_present, read
from recsys.data.sources import TableConfig
from recsys.errors import DataError, RequestError
from recsys.features.live_items import LONGEST_TITLE, ItemChange, checked

Side = Literal["items", "users"]
SHOWN = 5
"""Refused rows that are told one by one."""


class Rows(NamedTuple):
    """What a file gave: (id, columns, title) of the rows that can be taken, and a sentence for each that cannot."""

    taken: list[tuple[str, dict[str, Any], str | None]]
    refused: list[str]


def upsert(config: Config, side: Side, path: Path, console: Console) -> None:
    """New and changed rows. A column that the file lacks keeps its values, an empty cell takes the value away."""
    rows = rows_of(config, side, path)
    if side == "items":
        _change(config, [ItemChange(one, columns, title) for one, columns, title in rows.taken])
    else:
        profiles: dict[str, dict[str, Any]] = {}
        for one, columns, _ in rows.taken:  # JSON lines may tell of a user twice, with other columns
            profiles.setdefault(one, {}).update(columns)
        _profiles(config, profiles)
    _tell(console, side, "upserted", rows)


def delete(config: Config, side: Side, path: Path, console: Console) -> None:
    """Rows by id: items are never shown again, profiles are forgotten. A file .txt has one id a line."""
    if path.suffix == ".txt":
        rows = Rows([], [])
        for n, line in enumerate(_lines(path, side), 1):
            if not (one := line.strip()):
                continue
            if why := _unfit_id(one, config):
                rows.refused.append(f"Line {n}: {why}")
            else:
                rows.taken.append((one, {}, None))
    else:
        rows = rows_of(config, side, path, ids_alone=True)
    if side == "items":
        _change(config, [ItemChange(one, None) for one, _, _ in rows.taken])
    else:
        _profiles(config, {one: None for one, _, _ in rows.taken})
    _tell(console, side, "deleted", rows)


def _tell(console: Console, side: Side, done: str, rows: Rows) -> None:
    things = side if len(rows.taken) != 1 else side[:-1]
    console.print(f"{len(rows.taken):,} {things} {done}" + (f", {len(rows.refused):,} refused:" if rows.refused else ""))
    for sentence in rows.refused[:SHOWN]:
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)
    if len(rows.refused) > SHOWN:
        console.print(f"and {len(rows.refused) - SHOWN:,} more")
    if rows.refused:
        raise typer.Exit(2)


# ---- the file ---------------------------------------------------------------------------------------------------------


def rows_of(config: Config, side: Side, path: Path, *, ids_alone: bool = False) -> Rows:
    """The rows of a file with the columns that the configuration declares: csv, Parquet, or JSON lines (.jsonl)."""
    table = config.data.items if side == "items" else config.data.users
    table = table if table is not None else TableConfig(path=str(path), columns={})
    declared: Mapping[str, ColumnConfig] = {} if ids_alone else table.columns
    key = table.id or ("item_id" if side == "items" else "user_id")
    records = _records(path, table, side, key, {name: c.source(name) for name, c in declared.items()})
    title = table.title or "title"
    rows = Rows([], [])
    for n, cells in enumerate(records, 1):
        one = canonical_id(cells[key]) if _value(cells[key]) is not None else ""
        if not one:
            rows.refused.append(f"Row {n} has no id in column '{key}'.")
            continue
        if why := _unfit_id(cells[key], config):
            rows.refused.append(f"Row {n}: {why}")
            continue
        given = {name: _cell(c, _value(cells[source])) for name, c in declared.items() if (source := c.source(name)) in cells}
        try:
            shown = _title(_value(cells.get(title))) if side == "items" else None
            columns = checked(given, declared, whose=side[:-1])
            orjson.dumps([columns, shown])
            rows.taken.append((one, columns, shown))
        except (RequestError, orjson.JSONEncodeError) as error:
            rows.refused.append(f"Row {n}, '{one[:80]}': {error}")
    return rows


def _records(path: Path, table: TableConfig, side: Side, key: str, sources: Mapping[str, str]) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [_object(path, n, line, key) for n, line in enumerate(_lines(path, side), 1) if line.strip()]
    needs = {key: Need(f"{side}.id", text=True)}
    needs |= {source: Need(f"{side}.columns.{name}", text=True, optional=True) for name, source in sources.items()}
    needs.setdefault(table.title or "title", Need(f"{side}.title", text=True, optional=True))
    raw = read(path, table.model_copy(update={"format": "auto"}), side, needs)
    rows: list[dict[str, Any]] = raw.table.to_pylist()
    return rows


def _lines(path: Path, side: Side) -> list[str]:
    check_present(path, side)
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as fault:
        text = f"'{path}': the byte 0x{fault.object[fault.start]:02X} at offset {fault.start} is not UTF-8. Save it as UTF-8; nothing was changed."
        raise DataError(text) from fault


def _object(path: Path, n: int, line: str, key: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"'{path}': line {n} is not JSON ({fault}). Expected one object a line; nothing was changed.") from fault
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"'{path}': line {n} is {line.strip()[:60]}, expected an object with '{key}'. Nothing was changed.")
    return row


def _unfit_id(cell: Any, config: Config) -> str:
    """Why the id in a cell is refused, as a request's would be; "" where it is not. No event could name such an item or user."""
    one, most = canonical_id(cell), config.serve.limits.id_bytes
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal) or (isinstance(cell, float) and math.isinf(cell)):
        return f"{one[:60]} is no id; expected a text or a number."
    if "\0" in one:
        return f"the id {one[:60]!r} holds a NUL character; take another."
    try:
        size = len(one.encode())
    except UnicodeEncodeError:
        return f"the id {one[:60]!r} holds bytes that are no UTF-8. Write text as UTF-8."
    return f"the id '{one[:60]}' has {size:,} bytes; at most {most:,} are taken (serve.limits.id_bytes)." if size > most else ""


def _title(cell: Any) -> str | None:
    """A title as text. RequestError where it is none, or longer than a request's may be."""
    if isinstance(cell, list | dict) or len(text := "" if cell is None else str(cell)) > LONGEST_TITLE:
        raise RequestError("invalid_value", f"the title is {str(cell)[:60]}; expected a text of at most {LONGEST_TITLE:,} characters.")
    return None if cell is None else text


def _value(cell: Any) -> Any:
    """A cell as plain Python, None where it is empty."""
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    empty = cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell)) or cell == ""
    return None if empty else cell


def _cell(column: ColumnConfig, value: Any) -> Any:
    """What a text file writes for a vector, as numbers."""
    if column.kind == "vector" and isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]")
        return [part for part in text.split(column.splits_on if column.splits_on in text else None) if part.strip()]
    return value


# ---- the store --------------------------------------------------------------------------------------------------------


def _change(config: Config, changes: list[ItemChange]) -> None:
    with store_url(config) as url:
        log = RedisItemLog(url, config.store)
        try:
            log.change(changes)
        finally:
            log.close()


def _profiles(config: Config, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
    async def whole(url: str) -> None:
        store = RedisStore(url, config.store, config.history)
        try:
            await store.change_profiles(changes)
        finally:
            await store.close()

    with store_url(config) as url:
        asyncio.run(whole(url))
