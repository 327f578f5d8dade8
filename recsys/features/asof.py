"""The batch road: the aggregates of any keys at any instants of a log, by sorting once and by index arithmetic after that.

Events of a key lie side by side in (time, log position), so what an instant sees is a run [lo, hi) of them: counts are
differences of prefix sums, other sums those of blocks, decays a prefix scan of the monoid's own merge, extremes a sparse
table, distinct values a wavelet matrix. A property test holds it to the monoids' answers, event by event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from recsys.data.interactions import SHOWN, Interactions
from recsys.errors import DataError
from recsys.features import runs
from recsys.features.aggregates import CLOCK_KEYS, DAY_S
from recsys.features.encoders import as_floats
from recsys.features.groups import Counted, Group, Plan, Signal
from recsys.features.keys import KeyColumns, TextColumn, clock_codes, key_text
from recsys.features.tally import Distinct, Ends, Tally

Raw = dict[str, np.ndarray]
"""Aggregate -> (n,) float64, NaN where it has no value; last and first: (n, N), NaN or -1 on the left."""


@dataclass(frozen=True)
class Asked:
    """n instants and whose aggregates are asked at them: rows of users and items (-1: unknown), Unix seconds, the log
    positions below which the log is seen, and codes of context columns by name."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    rows: np.ndarray
    context: dict[str, np.ndarray] = field(default_factory=dict)
    clock: np.ndarray | None = None
    """(n,) instants whose hours and weekdays are parts of keys, where those are others than `times`."""

    def __len__(self) -> int:
        return len(self.users)

    def paired(self, items: np.ndarray) -> Asked:
        """The same instants of the pairs with items (n, N): n · N."""
        N = items.shape[1]
        context = {name: np.repeat(codes, N) for name, codes in self.context.items()}
        return Asked(np.repeat(self.users, N), items.reshape(-1), np.repeat(self.times, N), np.repeat(self.rows, N), context)

    @classmethod
    def joined(cls, parts: Sequence[Asked]) -> Asked:
        """One behind the other; one or more."""
        users, items, times, rows = (np.concatenate([getattr(p, name) for p in parts]) for name in ("users", "items", "times", "rows"))
        return cls(users, items, times, rows, {name: np.concatenate([p.context[name] for p in parts]) for name in parts[0].context})


@dataclass(frozen=True)
class _Sorted:
    """One signal's events by (key, log position): unique key codes, composite keys, log rows, times, amounts or values."""

    codes: np.ndarray
    keys: np.ndarray
    rows: np.ndarray
    times: np.ndarray
    starts: np.ndarray
    amounts: np.ndarray
    cache: dict[Any, Any] = field(default_factory=dict)


class AsOf:
    """Every aggregate of a plan over one log, at any instants. `told` (E,) bool: rows that enter a history."""

    def __init__(self, plan: Plan, log: Interactions, columns: KeyColumns, told: np.ndarray, *, offset_s: float = 0.0) -> None:
        self.plan, self.log, self.columns, self.told, self.offset_s = plan, log, columns, told, offset_s
        self._sorted: dict[tuple[tuple[str, ...], Signal], _Sorted] = {}

    @cached_property
    def context(self) -> dict[str, TextColumn]:
        """The log's context columns as texts, by row."""
        wanted = {p for g in self.plan.groups for p in (*g.key, *(s.of for s in g.signals))} | {
            p for a in self.plan.crosses.values() for p in a.parts
        }
        return {name: TextColumn.of_one(key_text(v) for v in values) for name, values in self.log.context.items() if name in wanted}

    def where(self, mask: np.ndarray) -> AsOf:
        """The same over the rows of `mask` (E,) bool alone; codes of context columns stay."""
        out = AsOf(self.plan, self.log.where(mask), self.columns, self.told[mask], offset_s=self.offset_s)
        return out.coded({name: TextColumn(c.codes[mask], c.texts) for name, c in self.context.items()})

    def coded(self, context: dict[str, TextColumn]) -> AsOf:
        """This, with the texts of its log's context columns numbered as they were in a larger log."""
        self.__dict__["context"] = context
        return self

    def at_rows(self, rows: np.ndarray) -> Asked:
        """What the log's rows at these positions ask, each just before itself; a screen's rows do not see each other."""
        times = self.log.time[rows]
        seen = np.searchsorted(self.log.time, times, "left") if self.log.impressions else rows
        return Asked(self.log.user[rows], self.log.item[rows], times, seen, {n: c.codes[rows, 0] for n, c in self.context.items()})

    def values(self, asked: Asked, groups: tuple[Group, ...] | None = None) -> Raw:
        """The raw value of every aggregate of the groups (default: all) at each instant, without the crosses."""
        out: Raw = {}
        for group in self.plan.groups if groups is None else groups:
            codes = self._key(group.key, asked.users, asked.items, asked.times if asked.clock is None else asked.clock, asked.context)
            for f in group.features:
                out[f.name] = self._value(f, group, codes, asked)
        return out

    def tallies(self, asked: Asked, group: Group) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
        """Per tally of a group what `values` makes its number of: merged amounts, (n,) each, and the time (n,) of the newest event, -inf
        where there is none. Of two parts of a log that share no key, they merge."""
        codes = self._key(group.key, asked.users, asked.items, asked.times if asked.clock is None else asked.clock, asked.context)
        return {f.name: self._tallied(f.monoid, self._found(f, group, codes, asked), codes.shape, asked) for f in group.features}

    # ---- keys -----------------------------------------------------------------------------------------------------

    def _part(self, part: str, users: np.ndarray, items: np.ndarray, times: np.ndarray, context: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n, W) codes of one part of a key, -1 where it is missing."""
        if part in ("user", "item"):
            return (users if part == "user" else items)[:, None].astype(np.int64)
        if part in CLOCK_KEYS:
            return clock_codes(part, times, self.offset_s)[:, None]
        side = self.columns.side_of(part)
        if side is None:
            return context[part][:, None].astype(np.int64) if part in context else np.full((len(users), 1), -1, np.int64)
        rows = users if side == "user" else items
        codes = self.columns.texts[side][part].codes
        found: np.ndarray = np.where(rows[:, None] >= 0, codes[np.maximum(rows, 0)] if len(codes) else -1, -1).astype(np.int64)
        return found

    def _size(self, part: str) -> int:
        if part in ("user", "item"):
            return max(self.log.n_users if part == "user" else self.log.n_items, 1)
        if part in CLOCK_KEYS:
            return 24 if part == "hour" else 7
        side = self.columns.side_of(part)
        column = self.context.get(part) if side is None else self.columns.texts[side][part]
        return max(len(column.texts) if column else 1, 1)

    def _key(
        self, key: tuple[str, ...], users: np.ndarray, items: np.ndarray, times: np.ndarray, context: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """(n, W) int64 code of a key, -1 where a part is missing."""
        out, total = np.zeros((len(users), 1), np.int64), 1
        for part in key:
            codes, size = self._part(part, users, items, times, context), self._size(part)
            total *= size
            if total >= 1 << 62:
                raise DataError(f"The key {list(key)} has {total:.1e} combinations, more than can be numbered. Leave a part out.")
            out = np.where((out < 0) | (codes < 0), -1, out * size + codes)
        return out

    # ---- events of a signal -----------------------------------------------------------------------------------------

    def _events(self, key: tuple[str, ...], signal: Signal) -> _Sorted:
        found = self._sorted.get((key, signal))
        if found is not None:
            return found
        log = self.log
        says, amounts = self._says(signal)
        codes = self._key(key, log.user, log.item, log.time, {n: c.codes[:, 0] for n, c in self.context.items()})
        row, slot = np.nonzero((codes >= 0) & says[:, None])
        unique, number = np.unique(codes[row, slot], return_inverse=True)
        keys = number.astype(np.int64) * (len(log) + 1) + row
        order = np.argsort(keys, kind="stable")
        starts = np.zeros(len(unique) + 1, np.int64)
        np.cumsum(np.bincount(number, minlength=len(unique)), out=starts[1:])
        rows = row[order]
        found = _Sorted(unique, keys[order], rows, log.time[rows], starts, amounts[rows])
        self._sorted[key, signal] = found
        return found

    def _says(self, signal: Signal) -> tuple[np.ndarray, np.ndarray]:
        """((E,) bool rows that a signal reads, (E, c) amounts or (E, 1) values)."""
        log, E = self.log, len(self.log)
        says = np.ones(E, bool)
        if signal.events is not None:
            says = np.array([n in signal.events for n in log.event_names], bool)[log.event]
        if signal.kind == "rate":
            hit = log.labels[signal.of] if signal.of in log.labels else np.array([n == signal.of for n in log.event_names])[log.event]
            trials = log.labels[SHOWN].astype(np.float64) if SHOWN in log.labels else np.ones(E)
            return says, np.stack([trials, hit.astype(np.float64)], 1)
        if signal.kind == "count":
            return says, np.ones((E, 1))
        if signal.kind == "recency":
            return says, np.empty((E, 0))
        if signal.kind in ("value", "told"):
            says = says & self.told if signal.kind == "told" else says
            values = self.value_codes(signal.of, log.user, log.item, {n: c.codes[:, 0] for n, c in self.context.items()}, log.value)
            return says & ~(np.isnan(values) | ((values < 0) if signal.of != "value" else False)), values[:, None]
        x = log.value.astype(np.float64) if signal.of == "value" else self._number(signal.of)
        return says & ~np.isnan(x), np.stack([np.ones(E), x], 1) if signal.kind == "mean" else x[:, None]

    def value_codes(
        self, of: str, users: np.ndarray, items: np.ndarray, context: Mapping[str, np.ndarray], value: np.ndarray | None = None
    ) -> np.ndarray:
        """(n,) float64: the number of what a list holds: an item's row, a text's code, or the event's own value."""
        if of == "value":
            return np.asarray(value, np.float64)
        return self._part(of, users, items, np.zeros(len(users)), context)[:, 0].astype(np.float64)

    def _number(self, name: str) -> np.ndarray:
        side = self.columns.side_of(name)
        if side is None:
            return as_floats(self.log.context[name])
        rows = self.log.user if side == "user" else self.log.item
        numbers: np.ndarray = np.asarray(self.columns.numbers[side][name])[rows]
        return numbers

    # ---- values -----------------------------------------------------------------------------------------------------

    def _value(self, f: Counted, group: Group, codes: np.ndarray, asked: Asked) -> np.ndarray:
        events, lo, hi = found = self._found(f, group, codes, asked)
        if isinstance(f.monoid, Ends):
            return runs.ends(events.amounts[:, 0], lo, hi, f.monoid.n, newest=f.monoid.newest)
        if isinstance(f.monoid, Distinct):
            different = runs.distinct(events.keys // (len(self.log) + 1), events.amounts[:, 0], events.cache, lo, hi)
            return np.asarray(np.minimum(different, f.monoid.cap))
        return finished(f, *self._tallied(f.monoid, found, codes.shape, asked), asked.times)

    def _found(self, f: Counted, group: Group, codes: np.ndarray, asked: Asked) -> tuple[_Sorted, np.ndarray, np.ndarray]:
        """The events of a signal, and the run [lo, hi) of them that each of the (n, W) keys counts, (n · W,) each."""
        events = self._events(group.key, group.signals[f.signal])
        n, W = codes.shape
        at, times, rows = codes.reshape(-1), np.repeat(asked.times, W), np.repeat(asked.rows, W)
        number = np.searchsorted(events.codes, at)
        known = (number < len(events.codes)) & (at >= 0)
        known[known] = events.codes[number[known]] == at[known]
        number = np.where(known, number, 0)
        if not len(events.keys):
            none = np.zeros(n * W, np.int64)
            return events, none, none
        lo, hi = self._run(f.monoid, events, number, times, rows)
        return events, np.where(known, lo, 0), np.where(known, hi, 0)

    def _tallied(
        self, m: Any, found: tuple[_Sorted, np.ndarray, np.ndarray], shape: tuple[int, ...], asked: Asked
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The merged amounts of each instant, (n,) each, and the time (n,) of its newest event, -inf where there is none."""
        amounts, last = self._amounts(m, *found, np.repeat(asked.times, shape[1]))
        newest = np.where(np.isfinite(last), last, -np.inf).reshape(shape).max(1)
        return [runs.pooled(a.reshape(shape), m.op) for a in amounts], newest

    def _run(self, m: Any, events: _Sorted, number: np.ndarray, times: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([lo, hi) of the events that each instant counts."""
        places = len(self.log) + 1
        start, cut = events.starts[number], rows
        if getattr(m, "until", "now") == "day":
            midnight = np.floor((times + self.offset_s) / DAY_S) * DAY_S - self.offset_s
            cut = np.minimum(rows, np.searchsorted(self.log.time, midnight, "left"))
        hi = np.searchsorted(events.keys, number * places + cut, "left")
        if getattr(m, "until", "now") == "session":
            hi = np.where(hi > start, runs.before_session(events, hi, times, start, m.gap_s), hi)
        if not getattr(m, "buckets", 0):
            return start, hi
        if ("bucket", m.bucket_s) not in events.cache:
            events.cache["bucket", m.bucket_s] = np.floor((self.log.time + m.offset_s) / m.bucket_s)
        bucket = events.cache["bucket", m.bucket_s]
        oldest = np.searchsorted(bucket, np.floor((times + m.offset_s) / m.bucket_s) - m.buckets, "right")
        lo = np.searchsorted(events.keys, number * places + oldest, "left")
        return lo, np.maximum(lo, hi)

    def _amounts(self, m: Tally, events: _Sorted, lo: np.ndarray, hi: np.ndarray, times: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The merged amounts of each run, and its newest time (NaN: an empty run)."""
        some = hi > lo
        last = np.where(some, events.times[np.maximum(hi, 1) - 1] if len(events.keys) else np.nan, np.nan)
        out = []
        for c in range(events.amounts.shape[1]):
            column = events.amounts[:, c]
            if m.op != "add":
                out.append(runs.extreme(column, events.cache.setdefault((m.op, c), []), lo, hi, m.op))
            elif m.half_life_s:
                key = ("decay", c, m.half_life_s)
                if key not in events.cache:
                    events.cache[key] = runs.decayed(column, events.times, events.starts, m.half_life_s)
                weight = 2.0 ** ((last - times) / m.half_life_s)
                out.append(
                    np.where(some, events.cache[key][np.maximum(hi, 1) - 1] * np.where(some, weight, 0.0), 0.0)
                    if len(column)
                    else np.zeros(len(lo))
                )
            else:
                out.append(runs.summed(column, events.cache.setdefault(("sum", c), []), lo, hi))
        return out, last


def finished(f: Counted, pooled: Sequence[np.ndarray], newest: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(n,) the raw value of a tally's merged amounts, the newest event at `newest` (-inf: none), asked at `times`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(f.final(pooled, np.where(np.isfinite(newest), newest, np.nan), times), np.float64)


Road = Callable[[AsOf, Asked, tuple[Group, ...]], Raw]
"""What computes the values of groups at instants: `AsOf.values` in this process, or one that computes the same elsewhere."""
Roads = Callable[[AsOf], Road | None]
"""Chooses the road for a log; None: in this process."""


def in_process(_: AsOf) -> None:
    """The choice that needs nobody else."""
