"""Raw columns of a log to clean arrays, with an account of every row that was left out and why.

Times become Unix seconds; ids become codes; a row is dropped for the first reason that holds, in the order of REASONS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import UNKNOWN, canonical_id
from recsys.data.sources import LabelConfig, TimeUnit
from recsys.errors import DataError

REASONS = (
    "malformed line",
    "missing user id",
    "missing item id",
    "id too long or with a NUL",
    "bad time",
    "future time",
    "value out of range",
    "duplicate",
)
"""Why a row is left out. A duplicate repeats user, item, time and event of an earlier row; of live rows, the event id as well."""

_SECONDS: dict[str, float] = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
_UNIT_NAME: dict[TimeUnit, str] = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", "iso": "ISO text"}
_PER_SECOND: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_PLAUSIBLE_S = (631_152_000.0, 4_102_444_800.0)
"""1990 to 2100: a log whose middle lies here in another unit than declared has its unit wrong."""


@dataclass
class Account:
    """What became of the rows of a log: `read` = `kept` + the sum of `dropped`; notes are worth knowing but cost no row."""

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that the log holds."""
        return self.read - sum(self.dropped.values())

    def rows(self) -> list[tuple[str, int]]:
        """(what, how many) in the order to print them: read, dropped by reason, kept."""
        return [("rows read", self.read), *((f"dropped: {why}", n) for why, n in self.dropped.items() if n), ("kept", self.kept)]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        return "\n".join([*(f"{what:<{width}}  {n:>12,}" for what, n in self.rows()), *self.notes])


class Coded(NamedTuple):
    """A column of ids: (n,) int32 codes, UNKNOWN where missing, and the canonical id of each code, by first appearance."""

    codes: np.ndarray
    ids: list[str]


def code_ids(column: pa.ChunkedArray, *, key: str = "") -> Coded:
    """Ids as written -> codes of canonical ids. Empty, blank and NaN are missing. `key` names the column in an error."""
    try:
        coded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    except pa.ArrowNotImplementedError as fault:
        raise DataError(f"{key}: the column holds {column.type}. Expected one id per row, as text or whole numbers.") from fault
    array = coded.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no rows
        array = array.chunk(0) if array.num_chunks else pa.array([], pa.string()).dictionary_encode()
    codes = pc.fill_null(array.indices, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    known: dict[str, int] = {}
    values = array.dictionary.to_pylist()
    remap = np.empty(len(values) + 1, np.int32)
    remap[-1] = UNKNOWN
    for at, value in enumerate(values):
        text = "" if value is None or (isinstance(value, float) and math.isnan(value)) else canonical_id(value)
        remap[at] = known.setdefault(text, len(known)) if text else UNKNOWN
    return Coded(remap[codes], list(known))


def to_seconds(column: pa.ChunkedArray, unit: TimeUnit, *, name: str) -> np.ndarray:
    """(n,) float64 Unix seconds, NaN where a cell is no time. Text without a zone is UTC."""
    column = decoded(column)
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        # Microseconds of any year near ours are exact in a float64, nanoseconds are not.
        stamps = pc.cast(column, pa.timestamp("us", tz=getattr(column.type, "tz", None)), safe=False)
        return np.asarray(pc.cast(pc.cast(stamps, pa.int64()), pa.float64(), safe=False).to_numpy(), np.float64) / 1e6
    if pa.types.is_temporal(column.type) or pa.types.is_nested(column.type):
        raise DataError(
            f"interactions.time: column '{name}' holds {column.type} such as {first_value(column)}. Expected a date with its time."
        )
    if unit == "iso":
        if not is_text(column):
            raise DataError(f"interactions.time: column '{name}' holds numbers, but time_unit is iso. Declare time_unit: s, ms, us or ns.")
        return _iso_seconds(column)
    numbers = to_numbers(column)
    if is_text(column) and np.isnan(numbers).mean() > 0.5 and np.isfinite(_iso_seconds(column[:1000])).mean() > 0.5:
        raise DataError(
            f"interactions.time: column '{name}' holds text such as '{first_value(column)}', but time_unit is {unit}. Declare time_unit: iso."
        )
    check_unit(numbers, unit, name=name)
    return numbers / _PER_SECOND[unit]  # a division is exact where the product with 1e-3 is not


def _iso_seconds(column: pa.ChunkedArray) -> np.ndarray:
    texts = pd.Series(column.to_pandas())
    stamps = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    micros = stamps.dt.tz_localize(None).to_numpy("datetime64[us]")
    return np.where(np.isnat(micros), np.nan, micros.astype(np.int64) / 1e6)


def check_unit(numbers: np.ndarray, unit: TimeUnit, *, name: str) -> None:
    """DataError where the middle of the times is absurd as declared and lies between 1990 and 2100 in another unit."""
    usable = numbers[np.isfinite(numbers)]
    if len(usable) == 0:
        return
    low, high = _PLAUSIBLE_S
    middle = float(np.median(usable))
    if low <= middle * _SECONDS[_UNIT_NAME[unit]] <= high:
        return
    for other, factor in _SECONDS.items():
        if low <= middle * factor <= high:
            year = pd.Timestamp(middle * factor, unit="s").year
            short = next(short for short, long in _UNIT_NAME.items() if long == other)
            raise DataError(
                f"interactions.time: column '{name}' holds values such as {middle:.0f}, which are {other} (year {year}), but time_unit is {unit}. "
                f"Declare time_unit: {short}."
            )


def is_text(column: pa.ChunkedArray) -> bool:
    """Whether a column holds text, dictionary-encoded or not."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary-encoded column as plain values."""
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


def first_value(column: pa.ChunkedArray) -> str:
    """The first value that is not missing, for messages."""
    known = column.drop_null()
    return str(known[0].as_py()) if len(known) else ""


def to_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) float64, NaN where a cell is missing or no number."""
    column = decoded(column)
    if is_text(column):
        return np.asarray(pd.to_numeric(pd.Series(column.to_pandas()), errors="coerce"), np.float64)
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    return np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy(), np.float64)


def label(column: pa.ChunkedArray, rule: LabelConfig, *, key: str) -> np.ndarray:
    """(n,) float32 of 1 and 0: whether each cell passes the rule. A missing cell does not."""
    if rule.equals is not None and is_text(column):
        wanted = str(rule.equals).lower() if isinstance(rule.equals, bool) else canonical_id(rule.equals)
        passed = pc.equal(pc.utf8_trim_whitespace(decoded(column)), wanted)
        return np.asarray(pc.fill_null(passed, False).to_numpy(), np.float32)
    numbers = to_numbers(column)
    if is_text(column) and len(column.drop_null()) and np.isnan(numbers).all():
        raise DataError(f"{key}: column '{rule.column}' holds text such as '{first_value(column)}'. Say which text means yes, with equals.")
    if rule.equals is not None:
        try:
            return np.asarray(numbers == float(rule.equals), np.float32)
        except ValueError:
            raise DataError(
                f"{key}: equals is '{rule.equals}', but column '{rule.column}' holds numbers such as {first_value(column)}."
            ) from None
    bar = rule.at_least
    return np.asarray((numbers >= bar) if bar is not None else (numbers > 0), np.float32)


def duplicates(time: np.ndarray, *keys: np.ndarray, told: np.ndarray | None = None) -> np.ndarray:
    """(n,) bool: rows that repeat an earlier row's time and keys. `time` must be sorted; only rows that share a time are compared.

    `told` (n,): the number of an event id for rows that came in live, behind those of files at the same time; -1 for the files'. Live rows
    repeat one another only by their id, as they are counted; they repeat a file's row, which was exported from them, without one.
    """
    same = time[1:] == time[:-1]
    tied = np.zeros(len(time), bool)
    tied[1:] |= same
    tied[:-1] |= same
    at = np.flatnonzero(tied)
    out = np.zeros(len(time), bool)
    if len(at):
        frame = pd.DataFrame({"time": time[at], **{str(i): key[at] for i, key in enumerate(keys)}})
        if told is None:
            out[at] = frame.duplicated().to_numpy()
        else:
            mine = told[at]
            first = frame.assign(told=mine).groupby(list(frame.columns), sort=False)["told"].transform("first").to_numpy()
            out[at] = frame.assign(told=mine).duplicated().to_numpy() | ((mine >= 0) & (first < 0))
    return out
