"""The monoids of declared aggregates: numbers by bucket, day or session, and bounded lists. What `generate.Monoid` asks for.

A tally is a line of parts, each the merged amounts of the events between its first and its last time. What a declaration
needs kept apart stays apart (a bucket of a window, a day, a session); what no instant can tell apart any more is folded into
one, and what has left every window is dropped. So a state is bounded whatever happens to a key.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter, mul
from typing import Any, Literal, NamedTuple

from recsys.core import id_hash
from recsys.features.aggregates import DAY_S
from recsys.features.generate import Event, Instant

MASK = (1 << 64) - 1
ORDER = itemgetter(0, 1)
"""(time, log position) of an event or an entry."""


class Part(NamedTuple):
    """The merged amounts of events from time `first` to `last`; decayed amounts hold at `last`."""

    first: float
    last: float
    amounts: tuple[float, ...]


_BEGIN = itemgetter(0)
_OPS: dict[str, Callable[[Iterable[float]], float]] = {"add": sum, "min": min, "max": max}


@dataclass(frozen=True)
class Tally:
    """Amounts of a key's events that add up, or whose least or greatest counts.

    An event's value is a tuple of amounts. `horizon` is the time before which nothing is asked any more (the newest event
    less the lateness allowed); `settled` uses it to fold and drop.
    """

    op: Literal["add", "min", "max"] = "add"
    half_life_s: float | None = None
    bucket_s: float = 0.0
    buckets: int = 0
    """0: no window."""
    until: Literal["now", "day", "session"] = "now"
    offset_s: float = 0.0
    """How far the days and buckets are ahead of UTC."""
    gap_s: float = 1_800.0
    """Silence that ends a session."""

    def init(self) -> tuple[Part, ...]:
        return ()

    def apply(self, state: tuple[Part, ...], event: Event) -> tuple[Part, ...]:
        return self.take(state, (event,))

    def take(self, state: tuple[Part, ...], events: Sequence[Event]) -> tuple[Part, ...]:
        """`apply` of one event after another, in one pass."""
        return self.merge(state, tuple(Part(e.time, e.time, e.value) for e in events))

    def merge(self, a: tuple[Part, ...], b: tuple[Part, ...]) -> tuple[Part, ...]:
        if not (a and b):
            return self._joined(a or b, -math.inf) if len(a or b) > 1 else a or b
        if self.until == "now" and not self.buckets:
            return (self.combined((*a, *b)),)
        # Parts of a state are apart: what lies before the last that begins before all of `b` stays as it is.
        untouched = max(bisect.bisect_right(a, min(b)[0], key=_BEGIN) - 1, 0)
        return (*a[:untouched], *self._joined(sorted((*a[untouched:], *b)), -math.inf))

    def settled(self, state: tuple[Part, ...], horizon: float) -> tuple[Part, ...]:
        """The state without what no instant from `horizon` on can tell apart or see."""
        if self.buckets:
            oldest, gone = self.bucket(horizon) - self.buckets, 0
            while gone < len(state) and self.bucket(state[gone].last) <= oldest:
                gone += 1
            return state[gone:]
        if self.until == "day":
            return self._joined(state, self.day_start(horizon))
        return self._joined(state, horizon - self.gap_s) if self.until == "session" else state

    def value(self, state: tuple[Part, ...], at: Instant) -> Part | None:
        """The amounts that count at an instant, as one part; None where nothing does. A decay is taken to the instant."""
        seen = [p for p in state if self._counts(p, at.time)]
        if not seen:
            return None
        whole = self.combined(seen)
        return self._at(whole, at.time) if self.half_life_s else whole

    def stands_until(self, state: tuple[Part, ...], at: float) -> float:
        """The first time at which another set of parts may count than at `at`."""
        if self.until == "session":
            return at
        out = self.day_start(at) + DAY_S if self.until == "day" else math.inf
        oldest = next((p for p in state if self._counts(p, at)), None) if self.buckets else None
        return out if oldest is None else min(out, (self.bucket(oldest.last) + self.buckets) * self.bucket_s - self.offset_s)

    def bucket(self, time: float) -> int:
        """The number of the bucket that a time falls in."""
        return math.floor((time + self.offset_s) / self.bucket_s) if math.isfinite(time) else -(1 << 62)

    def day_start(self, time: float) -> float:
        """The midnight before a time."""
        return math.floor((time + self.offset_s) / DAY_S) * DAY_S - self.offset_s if math.isfinite(time) else time

    def _counts(self, p: Part, at: float) -> bool:
        if self.buckets and self.bucket(p.last) <= self.bucket(at) - self.buckets:
            return False
        if self.until == "day":
            return p.last < self.day_start(at)
        return self.until == "now" or at - p.last > self.gap_s

    def _joined(self, parts: Sequence[Part], folded_before: float) -> tuple[Part, ...]:
        """Parts ascending by their beginning, those that belong together merged."""
        runs: list[list[Part]] = []
        last = -math.inf
        for p in parts:
            if runs and (self._together(last, p.first) or max(last, p.last) < folded_before):
                runs[-1].append(p)
                last = max(last, p.last)
            else:
                runs.append([p])
                last = p.last
        return tuple(map(self.combined, runs))

    def _together(self, last: float, first: float) -> bool:
        """Whether a part that begins at `first` belongs to one that ends at `last`."""
        if self.buckets:
            return first <= last or self.bucket(first) <= self.bucket(last)
        if self.until == "day":
            return first <= last or self.day_start(first) <= self.day_start(last)
        return self.until == "now" or first - last <= self.gap_s

    def combined(self, parts: Sequence[Part]) -> Part:
        """Several parts, at least one, as one."""
        if len(parts) == 1:
            return parts[0]
        first, last = min(p.first for p in parts), max(p.last for p in parts)
        columns = zip(*(p.amounts for p in parts), strict=True)
        if self.half_life_s:
            weights = [2.0 ** ((p.last - last) / self.half_life_s) for p in parts]
            columns = (tuple(map(mul, column, weights)) for column in columns)  # type: ignore[assignment]
        return Part(first, last, tuple(map(_OPS[self.op], columns)))

    def _at(self, p: Part, time: float) -> Part:
        assert self.half_life_s is not None  # noqa: S101 - callers look
        weight = 2.0 ** ((p.last - time) / self.half_life_s)
        return Part(p.first, time, tuple(x * weight for x in p.amounts))


class Entry(NamedTuple):
    """One value of a list and when it came."""

    time: float
    position: int
    value: Any


@dataclass(frozen=True)
class Ends:
    """The newest n values of a key, or the oldest n, ascending in (time, position)."""

    n: int
    newest: bool = True

    def init(self) -> tuple[Entry, ...]:
        return ()

    def apply(self, state: tuple[Entry, ...], event: Event) -> tuple[Entry, ...]:
        return self.take(state, (event,))

    def take(self, state: tuple[Entry, ...], events: Sequence[Event]) -> tuple[Entry, ...]:
        """`apply` of one event after another, in one pass."""
        return self.merge(state, tuple(itertools.starmap(Entry, events)))

    def merge(self, a: tuple[Entry, ...], b: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return self._cut(tuple(sorted(a + b, key=ORDER)))

    def settled(self, state: tuple[Entry, ...], horizon: float) -> tuple[Entry, ...]:  # noqa: ARG002 - nothing ages here
        return state

    def value(self, state: tuple[Entry, ...], at: Instant) -> tuple[Any, ...]:  # noqa: ARG002 - nothing ages here
        return tuple(e.value for e in state)

    def _cut(self, state: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return state[-self.n :] if self.newest else state[: self.n]


@dataclass(frozen=True)
class Distinct:
    """How many different values in the window: exact up to `cap`, where it stays. State: (last time, 64-bit hash) ascending.

    The cap keeps the values seen last, so a window that holds fewer than `cap` is always counted exactly.
    """

    cap: int
    bucket_s: float = 0.0
    buckets: int = 0
    offset_s: float = 0.0

    def init(self) -> tuple[tuple[float, int], ...]:
        return ()

    def apply(self, state: tuple[tuple[float, int], ...], event: Event) -> tuple[tuple[float, int], ...]:
        return self.take(state, (event,))

    def take(self, state: tuple[tuple[float, int], ...], events: Sequence[Event]) -> tuple[tuple[float, int], ...]:
        """`apply` of one event after another, in one pass."""
        return self.merge(state, tuple((e.time, hashed(e.value)) for e in events))

    def merge(self, a: tuple[tuple[float, int], ...], b: tuple[tuple[float, int], ...]) -> tuple[tuple[float, int], ...]:
        newest: dict[int, float] = {}
        for time, value in (*a, *b):
            newest[value] = max(time, newest.get(value, -math.inf))
        return tuple(sorted((time, value) for value, time in newest.items())[-self.cap :])

    def settled(self, state: tuple[tuple[float, int], ...], horizon: float) -> tuple[tuple[float, int], ...]:
        """The state without values that have left every window."""
        if not self.buckets:
            return state
        oldest = self.bucket(horizon) - self.buckets
        return tuple(e for e in state if self.bucket(e[0]) > oldest)

    def value(self, state: tuple[tuple[float, int], ...], at: Instant) -> float:
        if not self.buckets:
            return float(len(state))
        oldest = self.bucket(at.time) - self.buckets
        return float(sum(self.bucket(time) > oldest for time, _ in state))

    def stands_until(self, state: tuple[tuple[float, int], ...], at: float) -> float:
        """The first time at which another set of values may count than at `at`."""
        gone = self.bucket(at) - self.buckets if self.buckets else 0
        oldest = next((bucket for time, _ in state if (bucket := self.bucket(time)) > gone), None) if self.buckets else None
        return math.inf if oldest is None else (oldest + self.buckets) * self.bucket_s - self.offset_s

    def bucket(self, time: float) -> int:
        """The number of the bucket that a time falls in."""
        return math.floor((time + self.offset_s) / self.bucket_s) if math.isfinite(time) else -(1 << 62)


def hashed(value: Any) -> int:
    """64 bits of a value, stable over processes."""
    return id_hash(value if isinstance(value, str) else repr(float(value))) & MASK
