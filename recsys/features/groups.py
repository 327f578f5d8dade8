"""Aggregates of one key side by side: what an event adds to each, one state for all of them, their values at an instant.

A key's state is the events of the last `lateness_s` as they came, which an instant may still stand between, and behind them
the settled tallies. Late events within that time find their place; later ones are counted but no instant is told apart for
them. Past `most_pending` events the oldest settle early, so a hot key is bounded too.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from recsys.features.aggregates import CROSSED, LISTED, AggregateConfig, Aggregates
from recsys.features.generate import Event, Instant
from recsys.features.tally import ORDER, Distinct, Ends, Part, Tally

MOST_PENDING = 1_024
_TIME = itemgetter(0)


class Row(NamedTuple):
    """One event in outside terms, as the streaming road takes it and a log holds it.

    shown: whether it is an exposure, a rate's trial (every row of a log is one; in service an impression is, a click is not);
    told: whether it enters a history; counted: whether it is an event of the log at all; labels and number columns by name.
    """

    time: float
    position: int
    user_id: str
    item_id: str
    event: str
    value: float = math.nan
    labels: Mapping[str, float] = {}
    context: Mapping[str, Any] = {}
    shown: bool = True
    told: bool = True
    event_id: str = ""
    counted: bool = True


class Signal(NamedTuple):
    """What aggregates read of an event: several windows of one count share it."""

    kind: str
    of: str
    events: tuple[str, ...] | None

    @classmethod
    def read_by(cls, a: AggregateConfig) -> Signal:
        """The signal of a declaration."""
        shape = {"min": "number", "max": "number", "sum": "number", "last": "value", "first": "value", "match": "value"}.get(a.kind, a.kind)
        if a.kind in LISTED and a.kind != "distinct":
            return cls("told" if a.events is None else "value", a.reads, a.events)
        return cls("value" if a.kind == "distinct" else shape, "" if a.kind in ("count", "recency") else a.reads, a.events)


@dataclass(frozen=True)
class Counted:
    """One aggregate, compiled. `prior` is a rate's, fitted where the declaration states none."""

    name: str
    config: AggregateConfig
    monoid: Any
    signal: int
    prior: float = 0.0

    def final(self, amounts: Sequence[Any], last: Any, at: Any) -> Any:
        """The raw value of merged amounts, for numbers and for arrays alike; amounts are NaN or 0 where nothing counts."""
        kind, a = self.config.kind, self.config
        if kind == "rate":
            return (amounts[1] + a.strength * self.prior) / np.maximum(amounts[0] + a.strength, 1e-12)
        if kind == "mean":
            return amounts[1] / amounts[0] if np.ndim(amounts[0]) or amounts[0] else math.nan
        return at - last if kind == "recency" else amounts[0]

    @property
    def nothing(self) -> tuple[float, ...]:
        """The amounts of no event."""
        return {"rate": (0.0, 0.0), "mean": (0.0, 0.0), "min": (math.nan,), "max": (math.nan,), "recency": ()}.get(self.config.kind, (0.0,))

    def told(self, got: Any, at: Instant) -> Any:
        """The raw value of what the monoid gave: a float, or a list's values."""
        if not isinstance(self.monoid, Tally):
            return got
        if got is None:
            return float(self.final(self.nothing, math.nan, at.time))
        return float(self.final(got.amounts, got.last, at.time))


class GroupState(NamedTuple):
    """newest: time of the newest event; pending: the events since, their values by signal; settled: a state per aggregate."""

    newest: float
    pending: tuple[Event, ...]
    settled: tuple[Any, ...]


@dataclass(frozen=True)
class Group:
    """The aggregates of one key; itself a monoid, whose value is the raw value of each."""

    key: tuple[str, ...]
    features: tuple[Counted, ...]
    signals: tuple[Signal, ...]
    lateness_s: float
    most_pending: int = MOST_PENDING

    def init(self) -> GroupState:
        return GroupState(-math.inf, (), self._empty)

    @cached_property
    def _empty(self) -> tuple[Any, ...]:
        return tuple(f.monoid.init() for f in self.features)

    def apply(self, state: GroupState, event: Event) -> GroupState:
        """Take an event whose value is a tuple by signal, None where it says nothing to it."""
        return self.take(state, (event,))

    def take(self, state: GroupState, events: Sequence[Event]) -> GroupState:
        """`apply` of one event after another, in one pass: what settles does not depend on how they are parcelled."""
        pending = state.pending
        if len(events) > 1:
            events = sorted(events, key=ORDER)
        together = (*pending, *events)
        if pending and ORDER(pending[-1]) > ORDER(events[0]):
            together = tuple(sorted(together, key=ORDER))
        return self._settled(max(state.newest, events[-1].time), together, state.settled)

    def merge(self, a: GroupState, b: GroupState) -> GroupState:
        settled = tuple(f.monoid.merge(x, y) for f, x, y in zip(self.features, a.settled, b.settled, strict=True))
        pending = tuple(sorted((*a.pending, *b.pending), key=ORDER))
        return self._settled(max(a.newest, b.newest), pending, settled)

    def value(self, state: GroupState, at: Instant) -> tuple[Any, ...]:
        return self.pooled([state], at)

    def pooled(self, states: Sequence[GroupState], at: Instant) -> tuple[Any, ...]:
        """The value of several keys together (an item of several tags): of their merged amounts."""
        return tuple(f.told(self.got(i, f, states, at), at) for i, f in enumerate(self.features))

    def got(self, i: int, f: Counted, states: Sequence[GroupState], at: Instant) -> Any:
        """What aggregate i of these states gives at an instant, before it is made a number: a part, a list, or a count."""
        got = None
        for state in states:
            seen = _said(f.signal, state.pending[: bisect_left(state.pending, at, key=ORDER)])
            one = f.monoid.value(f.monoid.take(state.settled[i], seen) if seen else state.settled[i], at)
            got = one if got is None else _pool(f.monoid, got, one)
        return f.monoid.value(f.monoid.init(), at) if got is None else got

    def closed(self, state: GroupState, at: Instant) -> tuple[GroupState, float]:
        """(The state of what came before `at`, with nothing pending; the first time at which a value of `state` may be another than
        at `at`, decays apart, though no event comes: Unix seconds.)"""
        n = bisect_left(state.pending, at, key=ORDER)
        until = state.pending[n].time if n < len(state.pending) else math.inf
        settled = self._taken(state.settled, state.pending[:n]) if n else state.settled
        for f, held in zip(self.features, settled, strict=True):
            if not isinstance(f.monoid, Ends):
                until = min(until, f.monoid.stands_until(held, at.time))
        return GroupState(state.newest, (), settled), until

    def _settled(self, newest: float, pending: tuple[Event, ...], settled: tuple[Any, ...]) -> GroupState:
        horizon = newest - self.lateness_s
        n = bisect_right(pending, horizon, key=_TIME) if pending and pending[0].time <= horizon else 0
        n = max(n, len(pending) - self.most_pending)
        if n <= 0:
            return GroupState(newest, pending, settled)
        taken = self._taken(settled, pending[:n])
        return GroupState(
            newest, pending[n:], tuple([f.monoid.settled(held, horizon) for f, held in zip(self.features, taken, strict=True)])
        )

    def _taken(self, settled: tuple[Any, ...], events: Sequence[Event]) -> tuple[Any, ...]:
        """States of the aggregates with what events say to them."""
        said = [_said(i, events) for i in range(len(self.signals))]
        return tuple(
            [f.monoid.take(held, mine) if (mine := said[f.signal]) else held for f, held in zip(self.features, settled, strict=True)]
        )


def _said(signal: int, events: Sequence[Event]) -> list[Event]:
    """What events say to one signal."""
    return [Event(time, position, said) for time, position, value in events if (said := value[signal]) is not None]


def _pool(monoid: Any, a: Part | None, b: Part | None) -> Part | None:
    if a is None or b is None:
        return a or b
    return monoid.combined((a, b))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Plan:
    """Everything declared, compiled: a group per key in the order of declaration, and the crosses over them."""

    aggregates: Aggregates
    groups: tuple[Group, ...]
    lateness_s: float
    priors: dict[str, float] = field(default_factory=dict)

    @property
    def crosses(self) -> dict[str, AggregateConfig]:
        """ratio, product and concat by name."""
        return {name: a for name, a in self.aggregates.items() if a.kind in CROSSED}


def compiled(aggregates: Aggregates, *, priors: Mapping[str, float], lateness_s: float, offset_s: float, gap_s: float) -> Plan:
    """The plan of a declaration. `priors`: name of a rate -> the mean it is drawn to, where it states none."""
    by_key: dict[tuple[str, ...], dict[str, AggregateConfig]] = {}
    for name, a in aggregates.items():
        if a.kind not in CROSSED:
            by_key.setdefault(("user",) if a.kind == "match" else a.key, {})[name] = a
    groups = []
    for key, named in by_key.items():
        signals = tuple(dict.fromkeys(Signal.read_by(a) for a in named.values()))
        features = tuple(
            Counted(name, a, monoid_of(a, offset_s, gap_s), signals.index(Signal.read_by(a)), _prior(name, a, priors))
            for name, a in named.items()
        )
        groups.append(Group(key, features, signals, lateness_s))
    return Plan(aggregates, tuple(groups), lateness_s, dict(priors))


def _prior(name: str, a: AggregateConfig, priors: Mapping[str, float]) -> float:
    return a.prior if a.prior is not None else float(priors.get(name, 0.0))


def monoid_of(a: AggregateConfig, offset_s: float, gap_s: float) -> Tally | Ends | Distinct:
    """The monoid of one declaration."""
    bucket_s, buckets = a.bucketing or (0.0, 0)
    if a.kind in ("last", "first", "match"):
        return Ends(a.n, newest=a.kind != "first")
    if a.kind == "distinct":
        return Distinct(a.cap, bucket_s, buckets, offset_s)
    op: Any = a.kind if a.kind in ("min", "max") else "add"
    return Tally(op, a.half_life_s, bucket_s, buckets, a.until, offset_s, gap_s)
