"""Skew: the feature values that pages were ranked by, computed once more from the log, as of what each page says that it knew.

A page names the instant of its item snapshot, and up to which entry of every partition of the event log that snapshot and its
user's counters count. The batch road over exactly those events must give the values that were logged: a feature that differs is
computed by two codes somewhere, or its state is not what the log says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.core import UNKNOWN, Queries, Vocabulary
from recsys.data.interactions import Interactions
from recsys.features.asof import Asked, AsOf, Raw
from recsys.features.groups import Group
from recsys.features.inputs import AggregateInputs, Live
from recsys.features.keys import key_text
from recsys.funnel import Funnel, FunnelRequest

TOLERANCE = 1e-5
"""Largest difference of an input (of order 1, float32) that is not a mismatch."""


@dataclass
class Skew:
    """Of one feature: values compared and different, the largest difference, and one page where it was."""

    compared: int = 0
    mismatches: int = 0
    largest: float = 0.0
    example: str = ""


@dataclass
class Report:
    """By feature, and how many pages were compared or could not be."""

    features: dict[str, Skew] = field(default_factory=dict)
    pages: int = 0
    without: int = 0
    """Pages that carry no values: the version declares no aggregates, or its fine rank did not answer here."""
    mixed: int = 0
    """Pages whose item side is left out: consumers had cut its parts at several places, so that no one state of the log is meant."""

    @property
    def mismatches(self) -> int:
        """Of all features."""
        return sum(s.mismatches for s in self.features.values())


@dataclass(frozen=True)
class Came:
    """A log and where its rows came in: partition (E,) of the event log, -1 for a row of the log's own files, and position (E,)."""

    log: Interactions
    told: np.ndarray
    partition: np.ndarray
    position: np.ndarray

    @classmethod
    def of_files(cls, log: Interactions, told: np.ndarray) -> Came:
        """A log of which nothing came in live."""
        nowhere = np.full(len(log), UNKNOWN)
        return cls(log, told, nowhere, nowhere)

    def counted(self, upto: Mapping[int, int]) -> np.ndarray:
        """(E,) bool: the rows of files, and those below a partition's position."""
        ends = np.zeros(max([*upto, int(self.partition.max(initial=0))]) + 1, np.int64)
        for partition, n in upto.items():
            ends[partition] = n
        known: np.ndarray = (self.partition < 0) | (self.position < ends[np.maximum(self.partition, 0)])
        return known


@dataclass(frozen=True)
class Seen:
    """The batch road as far as one owner's counters count: the log's rows below `cut` of `asof` happened until an instant."""

    asof: AsOf
    at: float

    @property
    def cut(self) -> int:
        """How many of the rows that had come in had happened."""
        return int(np.searchsorted(self.asof.log.time, self.at, "right"))


@dataclass(frozen=True)
class AsLogged:
    """A Source over a log: item-side keys as of a snapshot, which is also their instant; a user's as of his counters."""

    inputs: AggregateInputs
    mine: Seen
    items: Seen

    def query_values(self, queries: Queries) -> Raw:
        """See features.inputs.Source."""
        raw = self._values(queries, np.full(len(queries), UNKNOWN), np.arange(len(queries)), self.inputs.groups(pairs=False))
        return {n: x for n, x in raw.items() if self.inputs.plan.aggregates[n].kind != "match"}

    def pair_values(self, queries: Queries, items: np.ndarray) -> Raw:
        """See features.inputs.Source."""
        B, N = items.shape
        at, flat = np.repeat(np.arange(B), N), items.reshape(-1)
        raw = self._values(queries, flat, at, self.inputs.groups(pairs=True))
        matches = [n for n, a in self.inputs.plan.aggregates.items() if a.kind == "match"]
        if matches:
            own = tuple(g for g in self.inputs.groups(pairs=False) if g.key == ("user",))
            lists = self._values(queries, np.full(B, UNKNOWN), np.arange(B), own)
            raw |= {n: np.repeat(lists[n], N, axis=0) for n in matches}
        return self.inputs.matched(raw, lambda of: self.mine.asof.value_codes(of, queries.users[at], flat, self._context(queries, at)))

    def _values(self, queries: Queries, items: np.ndarray, at: np.ndarray, groups: tuple[Group, ...]) -> Raw:
        out: Raw = {}
        context = self._context(queries, at)
        for group in groups:
            seen = self.mine if "user" in group.key else self.items
            n = len(at)
            asked = Asked(queries.users[at], items, np.full(n, seen.at), np.full(n, seen.cut), context, queries.at[at])
            out |= seen.asof.values(asked, (group,))
        return out

    def _context(self, queries: Queries, at: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, column in self.mine.asof.context.items():
            index = column.index
            found[name] = np.array([index.get(key_text(c.get(name)), -1) for c in queries.contexts], np.int64)[at]
        return found

    def context_texts(self, of: str) -> Any:
        """The texts of a context column."""
        return self.mine.asof.context[of]


def compared(
    impressions: pa.Table, funnel: Funnel, came: Came, report: Report | None = None, *, trained: Mapping[int, int] | None = None
) -> Report:
    """Compare the pages of the funnel's version with the log, which holds every event that they may have counted.

    `trained`: up to where in the event log (partition -> position) the version was trained; nothing for a version of files alone.
    """
    report = report or Report()
    rows = [r for r in impressions.to_pylist() if r["model_version"] == funnel.version]
    kept = [r for r in rows if r["query_features"] or r["item_features"]]
    report.without += len(rows) - len(kept)
    if funnel.live is None:
        report.without += len(kept)
        return report
    road = _Road.of(funnel, funnel.live, came, trained or {})
    for row in kept:
        _compare(row, funnel, road, report)
    return report


@dataclass
class _Road:
    """The batch road over the whole log in the rows of one version, users and items that it does not know behind its own."""

    live: Live
    users: Vocabulary
    came: Came
    asof: AsOf
    trained: Mapping[int, int]
    _held: tuple[Any, AsOf] | None = None

    @classmethod
    def of(cls, funnel: Funnel, live: Live, came: Came, trained: Mapping[int, int]) -> _Road:
        log = came.log
        users, items = _continued(funnel.users, log.users), _continued(Vocabulary(funnel.items.ids), log.items)
        columns = live.inputs.columns.padded(len(users) - len(funnel.users), len(items) - len(funnel.items))
        inputs = replace(live.inputs, columns=columns)
        ours = replace(log, users=users, items=items, user=users.rows(log.users.ids)[log.user], item=items.rows(log.items.ids)[log.item])
        asof = AsOf(inputs.plan, ours, columns, came.told, offset_s=inputs.config.utc_offset_s)
        return cls(Live(inputs, live.source, items), users, came, asof, trained)

    def of_items(self, counted: Sequence[int] | None, at: float) -> Seen:
        """As of an item snapshot. Mostly it counts all that had happened; where it does not, the road is laid anew without the rest."""
        known = self.came.counted(self.trained if counted is None else dict(enumerate(counted)))
        if known[: Seen(self.asof, at).cut].all():
            return Seen(self.asof, at)
        key = None if counted is None else tuple(counted)
        if self._held is None or self._held[0] != key:
            self._held = key, self.asof.where(known)
        return Seen(self._held[1], at)

    def of_user(self, user: int, counted: int | None, at: float) -> Seen:
        """As of a user's counters, at the instant of a request."""
        mine = np.flatnonzero(self.asof.log.user == user)
        came = self.came
        if counted is None:
            known = came.counted(self.trained)[mine]
        else:
            known = (came.partition[mine] < 0) | (came.position[mine] < counted)
        if known[self.asof.log.time[mine] <= at].all():
            return Seen(self.asof, at)
        mask = np.zeros(len(self.asof.log), bool)
        mask[mine[known]] = True
        return Seen(self.asof.where(mask), at)


def _continued(ours: Vocabulary, theirs: Vocabulary) -> Vocabulary:
    """Our ids, and behind them those of theirs that we do not have."""
    new = theirs.ids.filter(pa.array(ours.rows(theirs.ids) == UNKNOWN))
    return Vocabulary(pa.concat_arrays([ours.ids, new])) if len(new) else ours


def _compare(row: dict[str, Any], funnel: Funnel, road: _Road, report: Report) -> None:
    if row["user_counted"] == UNKNOWN:
        report.without += 1
        return
    request = FunnelRequest(row["user_id"], max(len(row["items"]), 1), row["at_s"], context=json.loads(row["context"]))
    queries = funnel.queries([request])
    queries.users = np.array([road.users.row(row["user_id"])], np.int32)
    mixed = row["snapshot_counted"] == []
    counted, at = (None, -np.inf) if mixed or row["snapshot_s"] is None else (row["snapshot_counted"], row["snapshot_s"])
    source = AsLogged(road.live.inputs, road.of_user(int(queries.users[0]), row["user_counted"], row["at_s"]), road.of_items(counted, at))
    live = replace(road.live, source=source)
    report.pages += 1
    report.mixed += mixed
    items = live.item_rows(row["items"])[None, :]
    asked = (row["query_features"], live.query_fields(queries), ()), (row["item_features"], live.pair_fields(queries, items), row["items"])
    for logged, found, of in asked:
        for name, values in logged:
            if mixed and _of_items(road.live.inputs, name):
                continue
            skew = report.features.setdefault(name, Skew())
            was, now = np.asarray(values, np.float64), np.asarray(found[name], np.float64).reshape(-1)
            apart = np.abs(was - now) if was.shape == now.shape else np.full(len(was), np.inf)
            skew.compared += len(was)
            wrong = ~(apart <= TOLERANCE)
            if wrong.any():
                skew.mismatches += int(wrong.sum())
                if float(apart.max()) > skew.largest:
                    skew.largest, skew.example = (
                        float(apart.max()),
                        f"{row['request_id']} ({_told(was, now, wrong, of)}; counters of {row['snapshot_s']})",
                    )


def _told(was: np.ndarray, now: np.ndarray, wrong: np.ndarray, items: Sequence[str]) -> str:
    """The first value that differs: what was logged, what the log gives, and of which of the page's items it is."""
    if was.shape != now.shape:
        return f"{len(was)} values, now {len(now)}"
    at = int(np.argmax(wrong))
    of = f" of item {items[at * len(items) // len(was)]}" if items else ""
    return f"{was[at]:g}{of}, now {now[at]:g}"


def _of_items(inputs: AggregateInputs, name: str) -> bool:
    """Whether a value reads the item snapshot, by itself or through a part."""
    a = inputs.plan.aggregates.get(name)
    if a is None:
        return False
    return any(_of_items(inputs, p) for p in a.parts) if a.parts else a.kind != "match" and "user" not in a.key
