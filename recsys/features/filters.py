"""A request's filter: from JSON to conditions, checked against the declared item columns, and from conditions to a bitmap.

    {"genres": ["Comedy", "Drama"], "colour": "red"}      at least one of the values
    {"price": {"min": 5, "max": 20}}                      numbers, both ends included
    {"genres": {"all": ["Comedy"], "none": ["Horror"]}}   every one of these, none of those
    {"item_id": ["242", "302"]}                           only these items

A column that is not declared is a fault of the request. A value that no item has is not: catalogues change, and the answer
that nothing passes is the right one.
"""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.allowed import Allowed, Condition, Filter, Mask
from recsys.core import UNKNOWN, Vocabulary
from recsys.errors import RequestError
from recsys.features.catalogue import LISTED, NUMERIC, Catalogue
from recsys.features.encoders import spelled, words

ITEM_ID = "item_id"
MOST_COLUMNS = 16
MOST_VALUES = 1_000
"""Values of one condition at most."""
MOST_SEARCHED = 20
"""Values that are looked up one by one, at most: those of `all`, and texts."""
CACHE_BYTES = 64 * 2**20
"""Memory of the bitmaps that a process keeps per bundle."""
_KEYS = {"any", "all", "none", "min", "max"}


class Filters:
    """The filters of one bundle's catalogue. Bitmaps are kept, the least recently used go first; safe to use from many threads."""

    def __init__(self, catalogue: Catalogue, items: Vocabulary) -> None:
        self._catalogue, self._items = catalogue, items
        self._most = max(8, CACHE_BYTES // max(5 * len(items) // 4, 1))
        self._masks: OrderedDict[Filter, Mask] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Filters], tuple[Catalogue, Vocabulary]]:
        """Sent to another process, it starts with no masks and a lock of its own."""
        return Filters, (self._catalogue, self._items)

    @property
    def columns(self) -> list[str]:
        """What can be filtered by."""
        return [ITEM_ID, *(n for n, c in self._catalogue.columns.items() if c.kind in LISTED or c.kind in NUMERIC)]

    # ---- from JSON to conditions ----------------------------------------------------------------------------------

    def parse(self, given: Mapping[str, Any], *, where: str = "filter") -> Filter | None:
        """The conditions of a request, None where it asks nothing. RequestError (422) names the column and says what would do.

        `where` is the field of the request that holds them.
        """
        if len(given) > MOST_COLUMNS:
            raise RequestError("too_many_items", f"'{where}' has {len(given)} columns; at most {MOST_COLUMNS} are taken.", field=where)
        return tuple(self._condition(name, given[name], f"{where}.{name[:64]}") for name in sorted(given)) or None

    def _condition(self, name: str, wanted: Any, where: str) -> Condition:
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, 1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise RequestError(
                "unknown_field",
                f"'{where}' is no item column that can be filtered by. {hint}Known: {', '.join(self.columns)}.",
                field=where,
            )
        asked = wanted if isinstance(wanted, dict) else {"any": wanted}
        if unknown := sorted(set(asked) - _KEYS):
            raise RequestError(
                "unknown_field",
                f"'{where}' has a key '{unknown[0][:64]}'; known: any, all, none, min, max.",
                field=f"{where}.{unknown[0][:64]}",
            )
        if not asked:
            raise RequestError("empty_list", f"'{where}' asks nothing. Give values, or any, all, none, min or max.", field=where)
        numeric = name in self._catalogue.numbers
        texts = {key: self._texts(asked[key], f"{where}.{key}", name) for key in ("any", "all", "none") if key in asked}
        ends = {key: _number(asked[key], f"{where}.{key}") for key in ("min", "max") if key in asked}
        if ends and not numeric:
            raise RequestError("wrong_type", f"'{where}' holds no numbers, so it has no min or max. Give values.", field=where)
        if numeric and "all" in texts:
            raise RequestError("wrong_type", f"'{where}' holds one number per item: give any, none, min or max.", field=where)
        low, high = ends.get("min", -np.inf), ends.get("max", np.inf)
        if low > high:
            raise RequestError("invalid_value", f"'{where}': min {low:g} is above max {high:g}.", field=where)
        return Condition(name, texts.get("any"), texts.get("all", ()), texts.get("none", ()), low, high)

    def _texts(self, wanted: Any, where: str, name: str) -> tuple[str, ...]:
        listed = wanted if isinstance(wanted, list) else [wanted]
        slow = where.endswith(".all") or self._is_text(name)
        if len(listed) > (most := MOST_SEARCHED if slow else MOST_VALUES):
            raise RequestError("too_many_items", f"'{where}' has {len(listed)} values; at most {most} are taken.", field=where)
        for value in listed:
            if not isinstance(value, str | int | float):
                raise RequestError("wrong_type", f"'{where}': expected texts or numbers, got {str(value)[:60]!r}.", field=where)
            if name in self._catalogue.numbers:
                _number(value, where)
        return tuple(sorted({spelled(v) for v in listed}))

    def _is_text(self, name: str) -> bool:
        column = self._catalogue.columns.get(name)
        return column is not None and column.kind == "text"

    # ---- from conditions to bitmaps -------------------------------------------------------------------------------

    def allowed(self, filters: Sequence[Filter | None]) -> Allowed:
        """The bitmaps of a batch: one per distinct filter."""
        distinct = {f: n for n, f in enumerate(dict.fromkeys(f for f in filters if f))}
        of = np.fromiter((distinct[f] if f else -1 for f in filters), np.int32, len(filters))
        return Allowed(tuple(self.mask(f) for f in distinct), of)

    def mask(self, wanted: Filter) -> Mask:
        """The items that pass every condition. Of a column that this bundle does not have no item holds anything."""
        with self._lock:
            if (known := self._masks.get(wanted)) is not None:
                self._masks.move_to_end(wanted)
                return known
        items = np.ones(len(self._items), bool)
        for condition in wanted:
            items &= self._passes(condition)
        found = Mask(items)
        with self._lock:
            self._masks[wanted] = found
            while len(self._masks) > self._most:
                self._masks.popitem(last=False)
        return found

    def _passes(self, c: Condition) -> np.ndarray:
        if c.column in self._catalogue.numbers:
            x = np.asarray(self._catalogue.numbers[c.column])
            out: np.ndarray = (x >= c.low) & (x <= c.high) if np.isfinite([c.low, c.high]).any() else np.ones(len(x), bool)
            if c.any is not None:
                out &= np.isin(x, [float(v) for v in c.any])
            return out & ~np.isin(x, [float(v) for v in c.none])
        if c.column != ITEM_ID and c.column not in self._catalogue.values:
            asked = c.any is not None or c.all or np.isfinite([c.low, c.high]).any()
            return np.full(len(self._items), not asked)  # a block of rules that are younger than this bundle must not empty every page
        out = ~self._holders(c.column, c.none) if c.none else np.ones(len(self._items), bool)
        if c.any is not None:
            out &= self._holders(c.column, c.any)
        for value in c.all:
            out &= self._holders(c.column, (value,))
        return out

    def _holders(self, name: str, wanted: Sequence[str]) -> np.ndarray:
        """(I,) bool: the items with at least one of these values; of a text, with every word of one of them."""
        out = np.zeros(len(self._items), bool)
        if name == ITEM_ID:
            rows = self._items.rows(wanted)
            out[rows[(rows != UNKNOWN) & (rows < len(out))]] = True  # later items are asked of beside these
            return out
        values = self._catalogue.values[name]
        if not self._is_text(name):
            return values.holders(values.known.rows(wanted))
        for value in wanted:
            found = [values.holders(values.known.rows([word])) for word in dict.fromkeys(words(value))]
            out |= np.logical_and.reduce(found) if found else False
        return out


def _number(value: Any, where: str) -> float:
    try:
        x = float(value) if not isinstance(value, bool) else np.nan
    except (TypeError, ValueError):
        x = np.nan
    if not np.isfinite(x):
        raise RequestError("wrong_type", f"'{where}': expected a number, got {str(value)[:60]!r}.", field=where)
    return x
