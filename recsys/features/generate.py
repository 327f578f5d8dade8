"""One definition of a feature over events, for training and for serving: a small monoid that both roads run.

A monoid has `init`, `apply` one event, `merge` two states and `value` at an instant; its state is bounded and immutable.
Serving keeps a state per key and applies events as they arrive; the batch road is `scan`, a sorted pass of the same code.
Order is (time, log position), and an instant sees only what is strictly before it. The rows of an impression log that share
user and time were one screen: they ask at `screen(time)`, before the first of them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from recsys.core import UNKNOWN
from recsys.data.interactions import Interactions
from recsys.features.declaration import HistoryConfig

S = TypeVar("S")
V_co = TypeVar("V_co", covariant=True)

_CHUNK = 8_192


class Instant(NamedTuple):
    """A point of the log: everything with a smaller (time, position) is before it."""

    time: float
    position: int


class Event(NamedTuple):
    """One event of a key: when, where in the log, and what it adds (an item, an amount, 1 or 0 for a rate)."""

    time: float
    position: int
    value: Any = 1.0


def screen(time: float) -> Instant:
    """The instant before every event of this time."""
    return Instant(time, -1)


class Monoid(Protocol[S, V_co]):
    """A feature. `merge` is associative with `init()` as its unit; applying events one by one is merging their states."""

    def init(self) -> S: ...
    def apply(self, state: S, event: Event) -> S: ...
    def merge(self, a: S, b: S) -> S: ...
    def value(self, state: S, at: Instant) -> V_co: ...


@dataclass(frozen=True)
class LastN:
    """The newest n values, oldest first. State: at most n events ascending in (time, position); late ones find their place."""

    n: int

    def init(self) -> tuple[Event, ...]:
        return ()

    def apply(self, state: tuple[Event, ...], event: Event) -> tuple[Event, ...]:
        at = bisect.bisect_right(state, (event.time, event.position), key=lambda e: (e.time, e.position))
        return (*state[:at], event, *state[at:])[-self.n :]

    def merge(self, a: tuple[Event, ...], b: tuple[Event, ...]) -> tuple[Event, ...]:
        return tuple(sorted(a + b, key=lambda e: (e.time, e.position)))[-self.n :]

    def value(self, state: tuple[Event, ...], at: Instant) -> tuple[Any, ...]:
        return tuple(e.value for e in state if (e.time, e.position) < at)


@dataclass(frozen=True)
class WindowCount:
    """Amounts in the last `buckets` buckets of `bucket_s` seconds, the running one included.

    The window is defined on buckets, in both roads alike: at any instant it spans between buckets - 1 and buckets times
    bucket_s seconds. State: (bucket, amount) ascending, none older than the window of the newest.
    """

    bucket_s: float
    buckets: int

    def bucket(self, time: float) -> int:
        """The number of the bucket that a time falls in."""
        return math.floor(time / self.bucket_s)

    def init(self) -> tuple[tuple[int, float], ...]:
        return ()

    def apply(self, state: tuple[tuple[int, float], ...], event: Event) -> tuple[tuple[int, float], ...]:
        return self.merge(state, ((self.bucket(event.time), event.value),))

    def merge(self, a: tuple[tuple[int, float], ...], b: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        sums = dict(a)
        for bucket, amount in b:
            sums[bucket] = sums.get(bucket, 0.0) + amount
        oldest = max(sums, default=0) - self.buckets
        return tuple(sorted((bucket, amount) for bucket, amount in sums.items() if bucket > oldest))

    def value(self, state: tuple[tuple[int, float], ...], at: Instant) -> float:
        now = self.bucket(at.time)
        return sum((amount for bucket, amount in state if now - self.buckets < bucket <= now), 0.0)


@dataclass(frozen=True)
class DecayedCount:
    """Amounts that lose half their weight every `half_life_s` seconds. State: (weight, the time it holds at)."""

    half_life_s: float

    def init(self) -> tuple[float, float]:
        return (0.0, -math.inf)

    def apply(self, state: tuple[float, float], event: Event) -> tuple[float, float]:
        return self.merge(state, (event.value, event.time))

    def merge(self, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        newest = max(a[1], b[1])
        return (self._at(a, newest) + self._at(b, newest), newest)

    def value(self, state: tuple[float, float], at: Instant) -> float:
        return self._at(state, at.time)

    def _at(self, state: tuple[float, float], time: float) -> float:
        weight, held_at = state
        return weight * 2.0 ** ((held_at - time) / self.half_life_s) if weight else 0.0


@dataclass(frozen=True)
class Rate:
    """Hits over trials, smoothed: (hits + strength · prior) / (trials + strength). An event's value is 1 for a hit, else 0.

    `count` is the window or decay that both are counted in; `strength` is how many trials the prior is worth.
    """

    count: WindowCount | DecayedCount
    prior: float
    strength: float

    def init(self) -> tuple[Any, Any]:
        return (self.count.init(), self.count.init())

    def apply(self, state: tuple[Any, Any], event: Event) -> tuple[Any, Any]:
        return (self.count.apply(state[0], event), self.count.apply(state[1], event._replace(value=1.0)))

    def merge(self, a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        return (self.count.merge(a[0], b[0]), self.count.merge(a[1], b[1]))

    def value(self, state: tuple[Any, Any], at: Instant) -> float:
        hits, trials = self.count.value(state[0], at), self.count.value(state[1], at)
        return (hits + self.strength * self.prior) / (trials + self.strength)


def scan(feature: Monoid[S, V_co], events: Iterable[tuple[Hashable, Event]], instants: Iterable[tuple[Hashable, Instant]]) -> list[V_co]:
    """The batch road: the feature of each (key, instant), in the order given, from (key, event) pairs in any order."""
    pending = sorted(events, key=lambda e: (e[1].time, e[1].position))
    asked = list(instants)
    states: dict[Hashable, S] = {}
    values: list[V_co | None] = [None] * len(asked)
    applied = 0
    for i in sorted(range(len(asked)), key=lambda i: asked[i][1]):
        key, at = asked[i]
        while applied < len(pending) and (pending[applied][1].time, pending[applied][1].position) < at:
            owner, event = pending[applied]
            states[owner] = feature.apply(states[owner] if owner in states else feature.init(), event)
            applied += 1
        values[i] = feature.value(states[key] if key in states else feature.init(), at)
    return values  # type: ignore[return-value]  # every slot was filled: the loop visits each i once


def told(log: Interactions, config: HistoryConfig) -> np.ndarray:
    """(E,) bool: the rows that enter their user's history.

    By event type, as declared; in an impression log only rows with a positive label, which are more than exposures. Never a
    refusal (see `features.refusals`).
    """
    exposed = {"impression"} if log.impressions else set()
    mask: np.ndarray = np.array([config.admits(name) or name in exposed for name in log.event_names], bool)[log.event]
    return mask & log.positive if log.impressions else mask


def cuts(log: Interactions, at: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(n,) log positions below which rows are seen at the instants of `times` (n,) Unix seconds and `at` (n,) log positions."""
    first = np.searchsorted(log.time, times, "left")
    if log.impressions:
        return first
    cut: np.ndarray = np.clip(at, first, np.searchsorted(log.time, times, "right"))
    return cut


class Histories:
    """What `scan` of LastN(length) gives along one log, for any instants; built once, asked in batches.

    `told` (E,) bool says which rows enter a history; `log.past` comes before the log, and its times are NaN. After k events
    LastN holds the last n of these k, so the scan is index arithmetic here: a million instants of 50 events take seconds
    where the loop takes minutes. A property test holds it to the loop's answers.
    """

    def __init__(self, log: Interactions, *, length: int, told: np.ndarray) -> None:
        self.log, self.length = log, length
        past_lengths = np.zeros(log.n_users, np.int64) if log.past is None else np.diff(log.past.indptr)
        self._offset = int(past_lengths.max(initial=0))  # places 0..offset-1 of a user are before the log
        self._places = self._offset + len(log) + 1
        rows = np.flatnonzero(told)
        users, place, items, times = log.user[rows].astype(np.int64), rows + self._offset, log.item[rows], log.time[rows]
        if log.past is not None:
            early = np.repeat(np.arange(log.n_users), past_lengths)
            within = np.arange(len(early)) - np.repeat(log.past.indptr[:-1], past_lengths)
            users, place = np.concatenate([early, users]), np.concatenate([within, place])
            items = np.concatenate([log.past.items, items])
            times = np.concatenate([np.full(len(early), np.nan), times])
        keys = users * self._places + place
        order = np.argsort(keys, kind="stable")
        # One line of events, user after user; _starts (U + 1,) is where each user's begin. The slot before all is the empty one.
        self._keys = keys[order]
        self._items = np.concatenate([[UNKNOWN], items[order]]).astype(np.int32)
        self._times = np.concatenate([[np.nan], times[order]])
        self._starts = np.zeros(log.n_users + 1, np.int64)
        np.cumsum(np.bincount(users, minlength=log.n_users), out=self._starts[1:])

    def before(self, users: np.ndarray, at: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((n, L) int32 item rows, (n, L) float64 Unix seconds), newest last, -1 and NaN on the left where there are fewer.

        `users` (n,) rows (-1: unknown, no history); the instants are `times` (n,) Unix seconds and `at` (n,) log positions.
        A row of an impression log does not see its own screen.
        """
        n, log = len(users), self.log
        cut = cuts(log, at, times)
        user = np.maximum(users, 0).astype(np.int64)
        start = self._starts[user] if log.n_users else np.zeros(n, np.int64)
        end = np.where(users >= 0, np.searchsorted(self._keys, user * self._places + self._offset + cut, "left"), start)
        items, item_times = np.empty((n, self.length), np.int32), np.empty((n, self.length))
        for a in range(0, n, _CHUNK):
            part = slice(a, a + _CHUNK)
            slots = end[part, None] + np.arange(1 - self.length, 1)  # (chunk, L), shifted by the empty slot
            slots[slots <= start[part, None]] = 0
            np.take(self._items, slots, out=items[part], mode="clip")
            np.take(self._times, slots, out=item_times[part], mode="clip")
        return items, item_times

    def closing(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every user's history when the log ends: ((U + 1,) int64 indptr, item rows, times), oldest first."""
        U = self.log.n_users
        items, times = self.before(np.arange(U), np.full(U, len(self.log)), np.full(U, np.inf))
        kept = items != UNKNOWN
        indptr = np.zeros(U + 1, np.int64)
        np.cumsum(kept.sum(1), out=indptr[1:])
        return indptr, items[kept], times[kept]


def histories(
    log: Interactions, users: np.ndarray, at: np.ndarray, times: np.ndarray, *, length: int, told: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Histories.before` for one batch of instants: build Histories once instead to ask in several."""
    return Histories(log, length=length, told=told).before(users, at, times)
