"""Raw values to rows of embedding tables and to floats: one encoder per kind of column, for a million rows or for one.

Row 0 of every table is "missing", rows 1..hash_buckets are "unknown" (a value that the fit did not keep lands in one of
them by its hash), then come the known values, the most frequent first. No encoder raises on a value: a serving request
may bring anything, and whatever cannot be read counts as missing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, Protocol
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from recsys.core import UNKNOWN, Vocabulary, canonical_id, id_hash

MISSING = 0
"""The row of a missing value, and of the padding of a bag or sequence."""

MOST_VALUES = 64
"""The widest bag or sequence that a fit chooses by itself."""

_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-12
"""Share of a value below which two are taken for one: float64 carries 1e-16, and what it sums up somewhat less."""
_REMEMBERED = 65_536
_WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def spelled(value: Any) -> str:
    """The canonical text of one raw value; "" where it is missing (None, NaN, NaT, NA, blank)."""
    if isinstance(value, str):
        return value.strip()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float | np.floating) and math.isnan(value)):
        return ""
    return canonical_id(value)


def words(text: str) -> list[str]:
    """Lower-cased words; scripts that write without spaces give one word a character."""
    return _WORD.findall(text.lower())


@dataclass
class Table:
    """The rows of one embedding table: what value has which row. Several features may share one."""

    known: Vocabulary
    buckets: int = 1
    _recent: dict[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, counts: Counter[str], *, min_count: int, buckets: int) -> Table:
        """Keep the values seen at least `min_count` times, the most frequent first, ties in the order of their text."""
        kept = sorted((v for v, n in counts.items() if n >= min_count and v), key=lambda v: (-counts[v], v))
        return cls(Vocabulary(kept), buckets)

    @property
    def size(self) -> int:
        """Rows: missing, unknown, known."""
        return 1 + self.buckets + len(self.known)

    def row(self, text: str) -> int:
        """The row of one canonical text."""
        found = self._recent.get(text)
        if found is None:
            at = self.known.row(text)
            found = self.unknown(text) if at == UNKNOWN else at + 1 + self.buckets
            if len(self._recent) >= _REMEMBERED:
                self._recent.clear()
            self._recent[text] = found
        return found

    def unknown(self, text: str) -> int:
        """The row of a text that is not known: missing when it is blank, else its hash bucket."""
        return 1 + id_hash(text) % self.buckets if text else MISSING

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) canonical texts -> (n,) int32 rows."""
        at = self.known.rows(texts)
        rows = at + np.int32(1 + self.buckets)
        for i in np.flatnonzero(at == UNKNOWN).tolist():
            rows[i] = self.unknown(texts[i])
        return rows.astype(np.int32, copy=False)


class Encoder(Protocol):
    """What every kind of column offers. `encode` takes (n,) raw values: a whole column, or as a list the few of a request."""

    @property
    def size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def missing(self) -> np.ndarray:
        """The encoding of a missing value: shape () or (W,)."""
        ...

    def encode(self, values: Any) -> np.ndarray: ...


@dataclass
class OneValue:
    """id and category: (n,) raw values -> (n,) int32 rows."""

    table: Table
    width: int = 1

    @property
    def size(self) -> int:
        return self.table.size

    @property
    def missing(self) -> np.ndarray:
        return np.array(MISSING, np.int32)

    def encode(self, values: Any) -> np.ndarray:
        if isinstance(values, list):
            return np.fromiter((self.table.row(spelled(v)) for v in values), np.int32, len(values))
        codes, uniques = distinct(values)
        rows = np.append(self.table.rows([spelled(u) for u in uniques]), np.int32(MISSING))
        return take(rows, codes)


@dataclass
class ManyValues:
    """tags and text (a bag: distinct, the first W, padded on the right), sequence (in order, the last W, padded on the left)."""

    table: Table
    width: int
    split: Callable[[Any], list[str]]
    ordered: bool = False

    @property
    def size(self) -> int:
        return self.table.size

    @property
    def missing(self) -> np.ndarray:
        return np.zeros(self.width, np.int32)

    def encode(self, values: Any) -> np.ndarray:
        if isinstance(values, list):
            return self._place([self.split(v) for v in values])
        codes, uniques = distinct(values)
        rows = self._place([self.split(u) for u in uniques])
        return take(np.concatenate([rows, self.missing[None]]), codes)

    def _place(self, cells: list[list[str]]) -> np.ndarray:
        W = self.width
        cells = [cell[-W:] if self.ordered else cell[:W] for cell in cells]
        lengths = np.fromiter(map(len, cells), np.int64, len(cells))
        flat = [text for cell in cells for text in cell]
        out = np.zeros((len(cells), W), np.int32)
        slot = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # 0, 1, … within each cell
        if self.ordered:
            slot += np.repeat(W - lengths, lengths)
        out[np.repeat(np.arange(len(cells)), lengths), slot] = self.table.rows(flat)
        return out


@dataclass
class Number:
    """number: (n,) -> (n, 1) float32 after its scale, or (n, 2) with a missing flag beside it where the fit saw missing values.

    A missing value takes the training mean. `low` and `high` are the range check; `centre` and `spread` the scale.
    """

    scale: Literal["none", "log", "min_max", "standard"]
    low: float = -math.inf
    high: float = math.inf
    centre: float = 0.0
    spread: float = 1.0
    mean: float = 0.0
    width: int = 1
    size: int = 0

    def fit(self, values: Any) -> Number:
        """Learn centre, spread, mean and whether a flag is needed, from the training entities' raw values."""
        x = self.read(values)
        seen = x[~np.isnan(x)]
        if len(seen):
            if self.scale == "standard":
                self.centre, self.spread = float(seen.mean()), spread_of(seen)
            elif self.scale == "min_max":
                self.centre, self.spread = float(seen.min()), float(np.ptp(seen)) or 1.0
            self.mean = float(self._scaled(seen).mean())
        self.width = 2 if len(seen) < len(x) else 1
        return self

    def read(self, values: Any) -> np.ndarray:
        """(n,) float64, NaN where a value is missing, unreadable or out of range."""
        x = as_floats(values)
        with np.errstate(invalid="ignore"):
            inside: np.ndarray = np.where((x >= self.low) & (x <= self.high), x, np.nan)
        return inside

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        low, high = (0.0, 1.0) if self.scale == "min_max" else (-_LARGEST, _LARGEST)
        scaled: np.ndarray = np.sign(x) * np.log1p(np.abs(x)) if self.scale == "log" else (x - self.centre) / self.spread
        return scaled.clip(low, high)

    @property
    def missing(self) -> np.ndarray:
        return np.array([self.mean, 1.0][: self.width], np.float32)

    def encode(self, values: Any) -> np.ndarray:
        x = self.read(values)
        absent = np.isnan(x)
        out = np.empty((len(x), self.width), np.float32)
        out[:, 0] = np.where(absent, self.mean, self._scaled(x))
        if self.width == 2:
            out[:, 1] = absent
        return out


@dataclass
class Bins:
    """bins: (n,) numbers -> (n,) int32 rows: 0 missing or out of range, then one row a bin (row 1, unknown, is never used)."""

    edges: tuple[float, ...]
    low: float = -math.inf
    high: float = math.inf
    width: int = 1

    @property
    def size(self) -> int:
        return 3 + len(self.edges)

    @property
    def missing(self) -> np.ndarray:
        return np.array(MISSING, np.int32)

    def encode(self, values: Any) -> np.ndarray:
        x = as_floats(values)
        with np.errstate(invalid="ignore"):
            inside = (x >= self.low) & (x <= self.high)
        rows: np.ndarray = np.where(inside, 2 + np.searchsorted(self.edges, x, side="right"), MISSING).astype(np.int32)
        return rows


@dataclass
class Vector:
    """vector: cells of `width` floats, as lists or as text ("1,2", "[1, 2]", "1 2") -> (n, width) float32; another length or a NaN counts as missing: zeros."""

    width: int
    separator: str = ","
    size: int = 0

    @property
    def missing(self) -> np.ndarray:
        return np.zeros(self.width, np.float32)

    def _floats(self, value: Any) -> np.ndarray:
        if isinstance(value, str):
            text = value.strip().removeprefix("[").removesuffix("]")  # as JSON and numpy write lists
            value = [part for part in text.split(self.separator if self.separator in text else None) if part.strip()]
        if not isinstance(value, list | tuple | np.ndarray) or len(value) != self.width:
            return self.missing
        out = as_floats(value)
        return self.missing if np.isnan(out).any() else out.astype(np.float32)

    def encode(self, values: Any) -> np.ndarray:
        out = np.zeros((len(values), self.width), np.float32)
        for i, value in enumerate(values):
            out[i] = self._floats(value)
        return out


@dataclass
class Clock:
    """hour (24) and weekday (7, Monday first) of Unix seconds in a timezone -> (n,) int32 rows (row 1, unknown, is never used)."""

    kind: Literal["hour", "weekday"]
    timezone: str = "UTC"
    width: int = 1

    @property
    def size(self) -> int:
        return 2 + (24 if self.kind == "hour" else 7)

    @property
    def missing(self) -> np.ndarray:
        return np.array(MISSING, np.int32)

    def encode(self, values: Any) -> np.ndarray:
        t = as_floats(values)
        known = np.abs(t) < 2e11  # beyond it (the year 8000) a time is an error, and datetime ends
        quarters, at = np.unique(np.floor(np.where(known, t, 0.0) / 900.0).astype(np.int64), return_inverse=True)
        offsets = np.fromiter((utc_offset_s(self.timezone, int(q)) for q in quarters), np.int64, len(quarters))
        local = np.where(known, t, 0.0) + offsets[at]
        if self.kind == "hour":
            value = np.floor(local / 3600.0) % 24
        else:
            value = (np.floor(local / 86400.0) + 3) % 7  # 1970-01-01 was a Thursday
        rows: np.ndarray = np.where(known, 2 + value, MISSING).astype(np.int32)
        return rows


@lru_cache(maxsize=1 << 16)
def utc_offset_s(timezone: str, quarter: int) -> int:
    """Seconds that a zone is ahead of UTC in one quarter of an hour since 1970 (clocks change only between quarters)."""
    offset = datetime.fromtimestamp(quarter * 900, UTC).astimezone(ZoneInfo(timezone)).utcoffset()
    return 0 if offset is None else int(offset.total_seconds())


def splitter(kind: str, separator: str) -> Callable[[Any], list[str]]:
    """How a cell of kind tags, sequence or text becomes its values: text is cut, lists are taken as they are."""

    def tags(cell: Any) -> list[str]:
        return list(dict.fromkeys(values(cell)))

    def values(cell: Any) -> list[str]:
        if isinstance(cell, str):
            parts: Iterable[Any] = cell.split(separator)
        elif isinstance(cell, list | tuple | np.ndarray):
            parts = cell
        else:
            parts = (cell,)
        return [text for text in map(spelled, parts) if text]

    def text(cell: Any) -> list[str]:
        return list(dict.fromkeys(words(spelled(cell))))

    return {"tags": tags, "sequence": values, "text": text}[kind]


def take(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """rows[at]; -1 is the last row."""
    taken: np.ndarray = rows[at]
    return taken


def distinct(values: Any) -> tuple[np.ndarray, Sequence[Any]]:
    """(n,) raw values -> ((n,) codes, uniques), -1 for missing; lists are not hashable and stay one by one."""
    if isinstance(values, pd.Series):
        values = values.array
    elif not isinstance(values, np.ndarray | pd.api.extensions.ExtensionArray):
        values = objects(values)
    try:
        codes, uniques = pd.factorize(values)
    except TypeError:  # unhashable cells
        return np.arange(len(values)), list(values)
    return codes, uniques.tolist()


def objects(values: Iterable[Any]) -> np.ndarray:
    """(n,) object array of any Python values, lists among them."""
    listed = list(values)
    return np.fromiter(listed, object, len(listed))


def spread_of(x: np.ndarray) -> float:
    """The standard deviation of values (n,), n > 0; 1 where they are constant, so that another value is its distance from the constant.

    A constant's own is seldom 0: the mean of a thousand times 0.1 is not 0.1, and by 1e-17 any other value would be scaled beyond all bounds.
    """
    return 1.0 if np.ptp(x) <= _ROUNDING * np.abs(x).max() else float(x.std())


def as_float(value: Any) -> float:
    """One raw value as a float; NaN where it is none, or none that float32 can hold: an infinite amount would stay in a sum for ever."""
    try:
        x = math.nan if isinstance(value, str) and "_" in value else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return x if abs(x) <= _LARGEST else math.nan


def as_floats(values: Any) -> np.ndarray:
    """(n,) raw values -> (n,) float64, NaN where a value is no number, or none that float32 can hold."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        x = values.astype(np.float64)
    else:
        x = np.fromiter(map(as_float, values), np.float64, len(values))
    x[~(np.abs(x) <= _LARGEST)] = np.nan
    return x
