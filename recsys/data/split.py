"""What is learnt from, what is tuned on, what is judged by: the parts of a log.

By time is the default, and the only split behind a claim about production. `Split.check` proves what a split promises.
"""

from __future__ import annotations

import datetime as dt
import logging
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from recsys.core import FrozenConfig, canonical_id
from recsys.data.interactions import Interactions, group
from recsys.errors import DataError

log = logging.getLogger(__name__)

Cut = int | float | str | dt.datetime | dt.date


class SplitConfig(FrozenConfig):
    by: Literal["time", "random", "leave_one_out", "parts"] = "time"
    """time: what comes first is learnt from. random: any row goes anywhere. leave_one_out: each user's last positive is the
    test, the one before it validation. parts: as the files of the log say."""
    column: str | None = None
    """by time: column of the log that the cuts speak of, such as a date (default: the time)."""
    valid_from: Cut | None = None
    """by time: the first value of validation: of `column`, or a time (ISO text, or seconds since 1970)."""
    test_from: Cut | None = None
    """by time: the first value of the test."""
    ratio: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (8, 1, 1)
    """train : valid : test, by time (where no cuts are given; a log that comes in parts keeps those) or at random."""
    seed: NonNegativeInt = 1
    """by random: which shuffle."""
    per_user: bool = False
    """by random: cut each user's rows by the ratio, as protocol top_n does, instead of all rows."""
    min_events: int = Field(default=3, ge=3)
    """by leave_one_out: users with fewer positives stay in train whole."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from go together: give both, or neither for a ratio")
        if self.valid_from is not None and self.by != "time":
            raise ValueError(f"valid_from and test_from belong to by: time, not by: {self.by}")
        if self.column is not None and self.valid_from is None:
            raise ValueError(f"column '{self.column}' needs valid_from and test_from")
        if self.ratio[0] <= 0:
            raise ValueError(f"the ratio {list(self.ratio)} leaves nothing to train on")
        return self

    @property
    def keep(self) -> tuple[str, ...]:
        """Columns of the log that this split needs: what `load` takes as `keep`."""
        return (self.column,) if self.column else ()

    def split(self, interactions: Interactions, parts: np.ndarray | None = None) -> Split:
        """Cut a log, and check the promise. `parts` (E,) int8 is what `load` gave for a log in parts.

        DataError where train or test would be empty, or a part breaks the promise.
        """
        if self.by == "parts" or (self.by == "time" and parts is not None and self.valid_from is None):
            out = _by_parts(parts)
        elif self.by == "time":
            out = _by_time(self, interactions)
        elif self.by == "random":
            out = _by_random(self, interactions)
        else:
            out = _leave_one_out(self, interactions)
        sizes = {name: int(mask.sum()) for name, mask in (("train", out.train), ("valid", out.valid), ("test", out.test))}
        empty = [
            name for name, size in sizes.items() if size == 0 and name in ("train", "test" if self.ratio[2] or out.by != "random" else "")
        ]
        if empty:
            raise DataError(
                f"split by {out.by}: {empty[0]} is empty ({_sizes(sizes, len(interactions))}). {_span(interactions)} Change split."
            )
        out.check(interactions)
        log.info("split by %s: %s", out.by, _sizes(sizes, len(interactions)))
        return out


@dataclass(frozen=True)
class Split:
    """Three (E,) bool masks over one log that share no row; some rows may be in none. `by` says what is promised."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    by: Literal["time", "random", "leave_one_out", "parts"]

    @property
    def parts(self) -> np.ndarray:
        """(E,) int64: 1 train, 2 valid, 3 test, 0 none."""
        return np.asarray(self.train * 1 + self.valid * 2 + self.test * 3, np.int64)

    def check(self, interactions: Interactions) -> None:
        """Prove the promise, or raise DataError naming a row that breaks it.

        Always: no row is in two parts. By time: every train row is earlier than every valid row, and those than every test row.
        leave_one_out: the same within each user, by (time, log position).
        """
        E = len(interactions)
        if any(len(mask) != E for mask in (self.train, self.valid, self.test)):
            raise DataError(f"split: the masks are for {len(self.train):,} rows, the log has {E:,}. Split the log that you use.")
        twice = (self.train & self.valid) | (self.train & self.test) | (self.valid & self.test)
        if twice.any():
            raise DataError(f"split: {int(twice.sum()):,} rows are in two parts, the first at position {int(np.flatnonzero(twice)[0]):,}.")
        pairs = (
            ("train", self.train, "valid", self.valid),
            ("train", self.train, "test", self.test),
            ("valid", self.valid, "test", self.test),
        )
        for early_name, early, late_name, late in pairs:
            wrong = self._not_before(interactions, early, late)
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise DataError(
                    f"split by {self.by}: {int(wrong.sum()):,} rows of {early_name} are not before {late_name}, such as user "
                    f"'{interactions.users.outside([interactions.user[at]])[0]}', item '{interactions.items.outside([interactions.item[at]])[0]}' "
                    f"at {show_time(interactions, interactions.time[at])}. They would let the future into {early_name}."
                )

    def _not_before(self, interactions: Interactions, early: np.ndarray, late: np.ndarray) -> np.ndarray:
        """(E,) bool: rows of `early` that do not come before the rows of `late` they must come before."""
        if self.by == "time":
            first = interactions.time[late].min(initial=np.inf)
            return np.asarray(early & (interactions.time >= first))
        if self.by == "leave_one_out":
            first_of = np.full(interactions.n_users, len(early))
            at = np.flatnonzero(late)
            np.minimum.at(first_of, interactions.user[at], at)
            return np.asarray(early & (np.arange(len(early)) > first_of[interactions.user]))
        return np.zeros(len(early), bool)


def show_time(interactions: Interactions, time: float) -> str:
    """A time for a sentence: ISO in UTC, or the position where the log has no time."""
    return f"{pd.Timestamp(time, unit='s'):%Y-%m-%dT%H:%M:%SZ}" if interactions.has_time else f"log position {time:,.0f}"


def _sizes(sizes: dict[str, int], total: int) -> str:
    none = total - sum(sizes.values())
    return ", ".join([*(f"{name} {size:,}" for name, size in sizes.items()), *([f"in none {none:,}"] if none else [])])


def _span(interactions: Interactions) -> str:
    if not len(interactions):
        return "The log is empty."
    return f"The log has {len(interactions):,} rows from {show_time(interactions, interactions.time[0])} to {show_time(interactions, interactions.time[-1])}."


def _by_parts(parts: np.ndarray | None) -> Split:
    if parts is None:
        raise DataError("split by parts: the log came in one piece. Declare interactions.train, valid and test, or another split.")
    return Split(parts == 0, parts == 1, parts == 2, "parts")


def _by_time(config: SplitConfig, interactions: Interactions) -> Split:
    if config.valid_from is None or config.test_from is None:
        valid_from, test_from = _quantiles(config.ratio, interactions.time)
        late, later = interactions.time >= valid_from, interactions.time >= test_from
        return Split(~late, late & ~later, later, "time")
    if config.column is None:
        if not interactions.has_time:
            raise DataError(
                "split.valid_from: the log has no time to cut at. Declare interactions.time, or give a ratio: the order of the log counts then."
            )
        valid_from, test_from = _seconds(config.valid_from, "valid_from"), _seconds(config.test_from, "test_from")
        late, later = interactions.time >= valid_from, interactions.time >= test_from
        _ordered(bool(valid_from < test_from), config)
        return Split(~late, late & ~later, later, "time")
    if config.column not in interactions.context:
        raise DataError(
            f"split.column: the log was loaded without column '{config.column}'. It has: {', '.join(interactions.context) or 'none'}."
        )
    values, cuts = _comparable(interactions.context[config.column], (config.valid_from, config.test_from), config.column)
    _ordered(bool(cuts[0] < cuts[1]), config)
    known = ~pd.isna(values)
    late, later = known & (values >= cuts[0]), known & (values >= cuts[1])
    return _purged(known & ~late, late & ~later, later, interactions, config.column)


def _ordered(right: bool, config: SplitConfig) -> None:
    if not right:
        raise DataError(f"split: valid_from {config.valid_from} is not before test_from {config.test_from}.")


def _purged(train: np.ndarray, valid: np.ndarray, test: np.ndarray, interactions: Interactions, column: str) -> Split:
    """Drop rows whose column says earlier but whose time does not: a date of a log need not turn over at the clock's midnight."""
    first_test = interactions.time[test].min(initial=np.inf)
    valid_kept = valid & (interactions.time < first_test)
    train_kept = train & (interactions.time < min(first_test, interactions.time[valid_kept].min(initial=np.inf)))
    n = int(train.sum() - train_kept.sum() + valid.sum() - valid_kept.sum())
    if n:
        log.info("split: %s rows left out of train and valid: earlier by column '%s', not by time", f"{n:,}", column)
    return Split(train_kept, valid_kept, test, "time")


def _quantiles(ratio: tuple[float, float, float], time: np.ndarray) -> tuple[float, float]:
    """Times of the first valid and test row; rows that share a time stay together, in the later part."""
    share = np.cumsum(ratio) / np.sum(ratio)
    at = [round(len(time) * float(s)) for s in share[:2]]
    return float(time[at[0]]) if at[0] < len(time) else np.inf, float(time[at[1]]) if at[1] < len(time) else np.inf


def _seconds(cut: Cut, key: str) -> float:
    if isinstance(cut, int | float):
        return float(cut)
    try:
        stamp = pd.Timestamp(cut)
    except ValueError:
        raise DataError(
            f"split.{key}: '{cut}' is no time. Expected ISO text such as 2024-05-31T00:00:00Z, or seconds since 1970."
        ) from None
    return float((stamp if stamp.tzinfo else stamp.tz_localize("UTC")).timestamp())


def _comparable(values: np.ndarray, cuts: tuple[Cut, Cut], column: str) -> tuple[np.ndarray, tuple[Any, Any]]:
    """Column and cuts as one kind: numbers, times or text."""
    try:
        if np.issubdtype(values.dtype, np.datetime64):
            return values, (np.datetime64(str(cuts[0])), np.datetime64(str(cuts[1])))
        if np.issubdtype(values.dtype, np.number):
            return values, (float(str(cuts[0])), float(str(cuts[1])))
    except ValueError:
        raise DataError(
            f"split: column '{column}' holds {values.dtype} such as {values[0]}, the cuts are '{cuts[0]}' and '{cuts[1]}'."
        ) from None
    codes, known = pd.factorize(values, sort=False)  # -1 where missing
    texts = np.array([canonical_id(value) for value in known], str)
    ordered = np.unique(texts)  # ISO dates sort as text
    rank = np.append(np.searchsorted(ordered, texts), np.nan)[codes]
    at = np.searchsorted(ordered, np.array([canonical_id(cut) for cut in cuts], str))
    return rank, (float(at[0]), float(at[1]))


def counts(n: np.ndarray, ratio: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """(U,) rows -> (U,) valid and (U,) test rows: RecBole's rounding, where a part due less than one row gets one while train has two."""
    share = np.asarray(ratio) / np.sum(ratio)
    valid, test = (share[1] * n).astype(np.int64), (share[2] * n).astype(np.int64)
    train = n - valid - test
    more = (train > 1) & (share[2] * n > 0) & (share[2] * n < 1)
    test, train = test + more, train - more
    more = (train > 1) & (share[1] * n > 0) & (share[1] * n < 1)
    return valid + more, test


def _by_random(config: SplitConfig, interactions: Interactions) -> Split:
    E = len(interactions)
    shuffled = np.random.default_rng(config.seed).permutation(E)
    user = interactions.user if config.per_user else np.zeros(E, np.int32)
    indptr, within = group(user[shuffled], int(user.max(initial=0)) + 1)
    order = shuffled[within]  # by user, shuffled within each
    n = np.diff(indptr)
    n_valid, n_test = counts(n, config.ratio)
    rank = np.empty(E, np.int64)
    rank[order] = np.arange(E) - np.repeat(indptr[:-1], n)
    until_valid = (n - n_valid - n_test)[user]
    until_test = (n - n_test)[user]
    return Split(rank < until_valid, (rank >= until_valid) & (rank < until_test), rank >= until_test, "random")


def _leave_one_out(config: SplitConfig, interactions: Interactions) -> Split:
    """Rows of a user after the validation positive, other than the test positive, are in no part."""
    E = len(interactions)
    at = np.flatnonzero(interactions.positive)
    indptr, order = group(interactions.user[at], interactions.n_users)
    enough = np.flatnonzero(np.diff(indptr) >= config.min_events)
    last, before = at[order[indptr[enough + 1] - 1]], at[order[indptr[enough + 1] - 2]]
    valid, test = np.zeros(E, bool), np.zeros(E, bool)
    valid[before], test[last] = True, True
    until = np.full(interactions.n_users, E)
    until[enough] = before
    return Split(np.arange(E) < until[interactions.user], valid, test, "leave_one_out")
