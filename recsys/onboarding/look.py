"""What the cells of one column look like: how many differ, whether they are numbers, times, flags or lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]
PLAUSIBLE_S = (631_152_000.0, 4_102_444_800.0)
"""1990 to 2100: numbers in this range, in some unit, are times."""
_PER_SECOND: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_FLAGS = {"0", "1", "true", "false", "0.0", "1.0"}


@dataclass(frozen=True)
class Column:
    """One column of a sample. Facts are computed when asked for, over the cells that are not missing."""

    name: str
    cells: pd.Series

    @cached_property
    def present(self) -> pd.Series:
        """The cells that say something."""
        found = self.cells[self.cells.notna()]
        return found[found.astype(str).str.strip() != ""] if found.dtype == object or pd.api.types.is_string_dtype(found) else found

    @property
    def missing(self) -> float:
        """Share of cells without a value."""
        return 1 - len(self.present) / max(1, len(self.cells))

    @cached_property
    def is_list(self) -> bool:
        """Whether a cell holds several values (Parquet)."""
        return len(self.present) > 0 and isinstance(self.present.iloc[0], list | tuple | np.ndarray)

    @cached_property
    def is_stamp(self) -> bool:
        """Whether the file itself types the column as a time."""
        return pd.api.types.is_datetime64_any_dtype(self.cells)

    @cached_property
    def texts(self) -> pd.Series:
        """The cells as text, without blanks around; whole floats as whole numbers."""
        return _as_text(self.present)

    @cached_property
    def ids(self) -> pd.Series:
        """The different values as text, in order of appearance."""
        return _as_text(self.present).drop_duplicates() if self.is_list else _as_text(self.present.drop_duplicates()).drop_duplicates()

    @property
    def distinct(self) -> int:
        """Different values in the sample."""
        return len(self.ids)

    @property
    def repeats(self) -> float:
        """Mean number of cells per value."""
        return len(self.present) / max(1, self.distinct)

    @cached_property
    def numbers(self) -> np.ndarray | None:
        """(n,) float64 where at least 99 % of the cells are numbers, else None."""
        if self.is_list or self.is_stamp or not len(self.present):
            return None
        values = np.asarray(pd.to_numeric(self.present, errors="coerce"), np.float64)
        known = values[np.isfinite(values)]
        return known if len(known) >= 0.99 * len(values) else None

    @cached_property
    def whole(self) -> bool:
        """Whether it holds whole numbers alone."""
        return self.numbers is not None and bool((self.numbers == np.round(self.numbers)).all())

    @cached_property
    def flag(self) -> bool:
        """Whether it holds 0 and 1, or true and false, and both of them or one."""
        return 0 < self.distinct <= 2 and set(self.ids.str.lower()) <= _FLAGS

    @property
    def rate(self) -> float:
        """Of a flag: share of ones."""
        return float(self.texts.str.lower().isin({"1", "true", "1.0"}).mean())

    @cached_property
    def unit(self) -> TimeUnit | None:
        """In which unit the cells are times after 1990, or None."""
        if self.is_stamp:
            return "iso"
        if self.numbers is not None:
            middle = float(np.median(self.numbers)) if len(self.numbers) else 0.0
            low, high = PLAUSIBLE_S
            unit = next((unit for unit, per in _PER_SECOND.items() if low <= middle / per <= high), None)
            # Ids of ten digits look like seconds in the middle, not all of them.
            return (
                unit
                if unit and ((self.numbers / _PER_SECOND[unit] >= low) & (self.numbers / _PER_SECOND[unit] <= high)).mean() > 0.95
                else None
            )
        if self.is_list or not len(self.present):
            return None
        some = self.ids.iloc[:: max(1, len(self.ids) // 1000)]
        # A bare year or "2024-05" would parse too: a time has a day.
        full = some.str.match(r"\d{4}-\d{1,2}-\d{1,2}")
        stamps = pd.to_datetime(some[full], format="ISO8601", utc=True, errors="coerce")
        return "iso" if stamps.notna().sum() >= 0.95 * len(some) else None

    @cached_property
    def seconds(self) -> np.ndarray:
        """(n,) Unix seconds of the present cells, where `unit` is known."""
        if self.unit == "iso":
            stamps = pd.to_datetime(self.present, utc=True, errors="coerce") if self.is_stamp else pd.to_datetime(
                self.texts, format="ISO8601", utc=True, errors="coerce"
            )  # fmt: skip
            return stamps.dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64) / 1e6
        values = np.asarray(pd.to_numeric(self.present, errors="coerce"), np.float64)
        return values / _PER_SECOND[self.unit or "s"]

    @cached_property
    def local_date(self) -> bool:
        """Whether it holds dates as people write them, such as 31/05/2024 10:00: which is day and which month is not told."""
        some = self.ids.iloc[:200]
        return bool(len(some)) and self.numbers is None and bool(some.str.match(r"\d{1,4}[/.]\d{1,2}[/.]\d{1,4}\b").mean() > 0.9)

    @property
    def words(self) -> float:
        """Mean words per cell."""
        return float(np.mean([len(text.split()) for text in self.texts.iloc[:2000]])) if len(self.present) else 0.0

    def examples(self, n: int = 3) -> str:
        """The first few different values, shortened."""
        return ", ".join(text if len(text) <= 24 else text[:21] + "..." for text in self.ids.iloc[:n])


def _as_text(cells: pd.Series) -> pd.Series:
    if len(cells) and isinstance(cells.iloc[0], list | tuple | np.ndarray):
        return cells.map(lambda value: " ".join(str(x) for x in value))
    if pd.api.types.is_bool_dtype(cells):
        return cells.astype(str).str.lower()
    if pd.api.types.is_float_dtype(cells):
        return cells.map(lambda x: str(int(x)) if float(x).is_integer() else str(x)).astype(str)
    return cells.astype(str).str.strip()


def normal(name: str) -> str:
    """A column's name without case and marks: `User_ID` and `userId` are `userid`."""
    return re.sub(r"[\W_]+", "", name.lower())


def tokens(name: str) -> list[str]:
    """The words in a column's name: `playTime_ms` -> play, time, ms."""
    return [word for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) if word]


def columns_of(frame: pd.DataFrame) -> dict[str, Column]:
    """Every column of a sample, by name."""
    return {str(name): Column(str(name), frame[name]) for name in frame.columns}
