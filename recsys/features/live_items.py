"""Items told of while a service runs: what a change may hold, and the log of changes that every replica follows.

The log keeps the newest record of each item, under a position that ascends with every change: who has read up to a position
asks for what lies behind it. An item's number is given once, in the order in which ids were first told of; it names the
item's row beyond the items of any bundle, so that all replicas number alike whatever they have read so far.
"""

from __future__ import annotations

import difflib
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from recsys.data.columns import FROM_TIME, ColumnConfig
from recsys.errors import RequestError, StoreError

Declared = Mapping[str, ColumnConfig]
LONGEST_TITLE = 1_000
"""Characters of a title, by request or from a file."""
MOST_VALUES = 1_000
"""Values of one cell at most."""


class ItemChange(NamedTuple):
    """An upsert, or with columns None a deletion. A column that is not named keeps its value, None takes it away."""

    item_id: str
    columns: Mapping[str, Any] | None
    title: str | None = None


class ItemRecord(NamedTuple):
    """What the log holds of an item; columns None: deleted. anew: it was deleted once and put again, so what a bundle, of any
    version, has of it is not its own any more."""

    item_id: str
    number: int
    columns: dict[str, Any] | None
    title: str | None
    time_ms: int
    anew: bool = False


class Changes(NamedTuple):
    """The records behind a position, and the position after them. Another `epoch` than before: the log began anew. rules: how often
    the rules were told, and their newest document, empty where they were taken back."""

    epoch: str
    position: int
    records: list[ItemRecord]
    rules: tuple[int, bytes] = (0, b"")


class ItemLog(Protocol):
    """Blocking; safe to use from many threads. Every call raises StoreUnavailableError when the store does not answer."""

    def change(self, changes: Sequence[ItemChange]) -> int:
        """Keep the changes, durable when it returns; the position of the last."""
        ...

    def since(self, position: int) -> Changes:
        """What changed behind a position; 0 for everything."""
        ...

    def rule(self, document: bytes) -> int:
        """Keep the rules of pages, in place of those of before, durable when it returns; b"" takes them back. The number of the telling."""
        ...

    def show(self, counts: Mapping[str, int]) -> None:
        """Items were shown so many times more. May be forgotten where the store ends abruptly: a start, not a bill."""
        ...

    def shown(self) -> dict[str, int]:
        """How often each item that `show` told of was shown."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


def merged(held: ItemRecord | None, change: ItemChange, time_ms: int, number: int = -1) -> ItemRecord:
    """The record after a change. What a deleted item had is forgotten, here and, by `anew`, in bundles."""
    number = held.number if held is not None else number
    if change.columns is None:
        return ItemRecord(change.item_id, number, None, None, time_ms)
    before = held if held is not None and held.columns is not None else None
    anew = held is not None and (held.columns is None or held.anew)
    columns = {**(before.columns or {} if before else {}), **change.columns}
    return ItemRecord(change.item_id, number, columns, change.title or (before.title if before else None), time_ms, anew)


def to_json(record: ItemRecord) -> bytes:
    """A record without its id and number, which the store keeps beside it. StoreError where JSON cannot hold it."""
    try:
        told = [record.time_ms, record.columns, record.title]
        # A release that does not know the mark must not take the item for what the bundle has: it refuses version 2.
        return orjson.dumps([2, *told, True] if record.anew else [1, *told])
    except (TypeError, ValueError) as fault:
        raise StoreError(f"Item '{record.item_id[:80]}' cannot be written as JSON ({fault}).") from fault


def from_json(item_id: str, number: int, held: bytes) -> ItemRecord:
    """What `to_json` wrote: version 1, or 2, which says at its end whether the item came anew."""
    version, *told = orjson.loads(held)
    if version not in (1, 2):
        raise StoreError(f"The item log holds a record of version {version}, this code reads versions 1 and 2. Run the newer release.")
    time_ms, columns, title, *anew = told
    return ItemRecord(item_id, number, columns, title, time_ms, anew == [True])


class MemoryItemLog:
    """A log in this process, for tests and for trying things out: nothing survives it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._epoch, self._position = clock, uuid.uuid4().hex, 0
        self._held: dict[str, tuple[int, ItemRecord]] = {}
        self._shown: Counter[str] = Counter()
        self._rules = (0, b"")
        self._lock = threading.Lock()

    def change(self, changes: Sequence[ItemChange]) -> int:
        """See ItemLog."""
        with self._lock:
            for change in changes:
                _, held = self._held.get(change.item_id, (0, None))
                record = merged(held, change, int(1000 * self._clock()), number=len(self._held))
                to_json(record)
                self._position += 1
                self._held[change.item_id] = (self._position, record)
            return self._position

    def since(self, position: int) -> Changes:
        """See ItemLog."""
        with self._lock:
            found = sorted((at, record) for at, record in self._held.values() if at > position)
            return Changes(self._epoch, self._position, [record for _, record in found], self._rules)

    def rule(self, document: bytes) -> int:
        """See ItemLog."""
        with self._lock:
            self._rules = (self._rules[0] + 1, document)
            return self._rules[0]

    def show(self, counts: Mapping[str, int]) -> None:
        """See ItemLog."""
        with self._lock:
            self._shown.update(counts)

    def shown(self) -> dict[str, int]:
        """See ItemLog."""
        with self._lock:
            return dict(self._shown)

    def close(self) -> None:
        """See ItemLog."""


# ---- what a change may hold -------------------------------------------------------------------------------------------


def checked(given: Mapping[str, Any], declared: Declared, *, whose: str) -> dict[str, Any]:
    """The columns of an upsert, each fit for what it is declared as. RequestError (422) names the first that is not.

    `whose` is item or user. Values are kept as they came: encoders read them as they read the table's.
    """
    known = {name: column for name, column in declared.items() if column.kind not in FROM_TIME}
    check_declared(given, known, field="columns", whose=whose)
    return {name: None if value is None else _value(known[name], value, f"columns.{name[:64]}") for name, value in given.items()}


def check_declared(given: Mapping[str, Any], known: Mapping[str, Any], *, field: str, whose: str) -> None:
    """RequestError (422) with the first name of a body's `field` that no column of this name is declared for, and what was meant."""
    for name in given:
        if name not in known:
            where = f"{field}.{name[:64]}"
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise RequestError(
                "unknown_field", f"'{where}' is no declared {whose} column. {hint}Known: {', '.join(known) or 'none'}.", field=where
            )


def _value(column: ColumnConfig, value: Any, where: str) -> Any:
    kind = column.kind
    if kind in ("number", "bins"):
        x = _number(value, where)
        low = -math.inf if column.min_value is None else column.min_value
        high = math.inf if column.max_value is None else column.max_value
        if not low <= x <= high:
            raise RequestError("invalid_value", f"'{where}' is {x:g}; declared are {low:g} to {high:g}.", field=where)
        return x
    if kind == "vector":
        if not isinstance(value, list) or len(value) != column.dim:
            got = f"{len(value)}" if isinstance(value, list) else f"{str(value)[:40]!r}"
            raise RequestError("wrong_type", f"'{where}': expected a list of {column.dim} numbers, got {got}.", field=where)
        return [_number(x, where) for x in value]
    if kind in ("tags", "sequence"):
        values = value if isinstance(value, list) else [value]
        if len(values) > MOST_VALUES:
            raise RequestError("too_many_items", f"'{where}' has {len(values)} values; at most {MOST_VALUES} are taken.", field=where)
        for one in values:
            _scalar(one, where)
        return value
    if kind == "text" and not isinstance(value, str):
        raise RequestError("wrong_type", f"'{where}': expected text, got {str(value)[:60]!r}.", field=where)
    return _scalar(value, where)


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, dict | list) or value is None:
        raise RequestError("wrong_type", f"'{where}': expected one text or number, got {str(value)[:60]!r}.", field=where)
    return value


def _number(value: Any, where: str) -> float:
    try:
        x = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        x = math.nan
    if not math.isfinite(x) or abs(x) > 3e38:
        raise RequestError("wrong_type", f"'{where}': expected a finite number, got {str(value)[:60]!r}.", field=where)
    return x
