"""What one event says to a plan: which keys it touches, and the value of each signal. A pure function of the event, compiled once.

Consumers ask this of every event in each hop, so what depends on the declaration alone (whose column a part of a key is, which
types of events a signal counts) is settled when a `Reader` is made, and the texts of an item are looked up once for many events.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recsys.core import Vocabulary
from recsys.features.aggregates import CLOCK_KEYS, DAY_S
from recsys.features.encoders import as_float
from recsys.features.generate import Event
from recsys.features.groups import Plan, Row, Signal
from recsys.features.keys import KeyColumns, key_text

Key = tuple[str, ...]
Touched = list[tuple[int, Key, Event]]
"""(number of the group, texts of the key, event with a value by signal)."""
Texts = Callable[[str, str, Mapping[str, Any], float], Sequence[str]]
"""(user, item, context, Unix seconds) -> the texts of one part of a key."""
RECENT = 16_384
"""Users or items whose texts are at hand."""


class Reader:
    """The keys and signals of a plan's groups. `vocabularies` give the rows of `columns`; ids they do not know have none."""

    def __init__(self, plan: Plan, vocabularies: Mapping[str, Vocabulary], columns: KeyColumns, offset_s: float) -> None:
        self._vocabularies, self._columns, self._offset_s = vocabularies, columns, offset_s
        self._texts = {part: self._texts_of(part) for group in plan.groups for part in group.key}
        self.keys = [_keys_of([self._texts[part] for part in group.key]) for group in plan.groups]
        """By the number of a group: (user, item, context, Unix seconds) -> its keys; none, one, or one per value of a list."""
        self._says = [[self._says_of(signal) for signal in group.signals] for group in plan.groups]

    def touched(self, row: Row) -> Touched:
        """What an event adds to which keys."""
        out: Touched = []
        time, position, user_id, item_id, context = row.time, row.position, row.user_id, row.item_id, row.context
        for number, keys in enumerate(self.keys):
            found = keys(user_id, item_id, context, time)
            if not found:
                continue
            value = tuple([says(row) for says in self._says[number]])
            if value.count(None) < len(value):
                event = Event(time, position, value)
                out += [(number, key, event) for key in found]
        return out

    def number(self, name: str, row: Row) -> float:
        """A number column's value at an event, or of a pair."""
        side = self._columns.side_of(name)
        if side is None:
            return as_float(row.context.get(name))
        at = self._vocabularies[side].row(row.user_id if side == "user" else row.item_id)
        return float(self._columns.numbers[side][name][at]) if at >= 0 else math.nan

    # ---- parts of a key ---------------------------------------------------------------------------------------------

    def _texts_of(self, part: str) -> Texts:
        if part in ("user", "item"):
            at = 0 if part == "user" else 1
            return lambda *of: (of[at],) if of[at] else ()
        if part in CLOCK_KEYS:
            return lambda _u, _i, _c, time: (clock_text(part, time, self._offset_s),)
        side = self._columns.side_of(part)
        if side is None:
            return lambda _u, _i, context, _t: (text,) if (text := key_text(context.get(part))) else ()
        vocabulary, column = self._vocabularies[side], self._columns.texts[side][part]

        @functools.lru_cache(maxsize=RECENT)
        def texts(outside_id: str) -> Sequence[str]:
            return tuple(column.at(vocabulary.row(outside_id)))

        return (lambda user_id, _i, _c, _t: texts(user_id)) if side == "user" else (lambda _u, item_id, _c, _t: texts(item_id))

    # ---- signals ----------------------------------------------------------------------------------------------------

    def _says_of(self, signal: Signal) -> Callable[[Row], Any]:
        """What a row says to a signal: amounts, a list's value, or None."""
        said = self._said(signal)
        if signal.events is None:
            return said
        counted = frozenset(signal.events)
        return lambda row: said(row) if row.event in counted else None

    def _said(self, signal: Signal) -> Callable[[Row], Any]:
        if signal.kind == "count":
            return lambda _: (1.0,)
        if signal.kind == "recency":
            return lambda _: ()
        if signal.kind == "rate":
            return lambda row: (float(row.shown), float(row.labels.get(signal.of, row.event == signal.of)))
        if signal.kind in ("value", "told"):
            value = self._value_of(signal.of)
            if signal.kind == "told":
                return lambda row: value(row) if row.told else None
            return value
        number: Callable[[Row], float] = (lambda row: row.value) if signal.of == "value" else functools.partial(self.number, signal.of)
        amounts: Callable[[float], tuple[float, ...]] = (lambda x: (1.0, x)) if signal.kind == "mean" else (lambda x: (x,))
        return lambda row: None if math.isnan(x := float(number(row))) else amounts(x)

    def _value_of(self, of: str) -> Callable[[Row], Any]:
        """The value that a list takes of a row, None where there is none."""
        if of == "item":
            return lambda row: row.item_id or None
        if of == "value":
            return lambda row: None if math.isnan(row.value) else row.value
        texts = self._texts.get(of) or self._texts_of(of)
        return lambda row: found[0] if (found := texts(row.user_id, row.item_id, row.context, row.time)) else None


def clock_text(part: str, time: float, offset_s: float) -> str:
    """`keys.clock_codes` of one time, as a key's text."""
    local = time + offset_s
    return str(math.floor(local / 3_600) % 24 if part == "hour" else (math.floor(local / DAY_S) + 3) % 7)


def _keys_of(parts: Sequence[Texts]) -> Callable[[str, str, Mapping[str, Any], float], list[Key]]:
    if len(parts) == 1:
        (only,) = parts
        return lambda *of: [(text,) for text in only(*of)]
    return lambda *of: list(itertools.product(*[texts(*of) for texts in parts]))
