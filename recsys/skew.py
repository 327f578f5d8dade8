"""Skew: the feature values that pages were ranked by, computed once more from the log, as of what each page says that it knew.

A page names the instant of its item snapshot and the newest event in its user's counters. The batch road over the log up to
exactly there must give the values that were logged: a feature that differs is computed by two codes somewhere, or its state is
not what the log says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.core import UNKNOWN, Queries
from recsys.data.interactions import Interactions
from recsys.features.asof import Asked, AsOf, Raw
from recsys.features.encoders import spelled
from recsys.features.groups import Group
from recsys.features.inputs import AggregateInputs, Live
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

    @property
    def mismatches(self) -> int:
        """Of all features."""
        return sum(s.mismatches for s in self.features.values())


@dataclass(frozen=True)
class AsLogged:
    """A Source over a log: item-side keys as of a snapshot's instant, a user's as of the newest event that was counted.

    newest (B,) and snapshot (B,): Unix seconds, -inf for none; both instants are counted themselves.
    """

    inputs: AggregateInputs
    asof: AsOf
    newest: np.ndarray
    snapshot: np.ndarray

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
        return self.inputs.matched(raw, lambda of: self.asof.value_codes(of, queries.users[at], flat, self._context(queries, at)))

    def _values(self, queries: Queries, items: np.ndarray, at: np.ndarray, groups: tuple[Group, ...]) -> Raw:
        out: Raw = {}
        context = self._context(queries, at)
        for group in groups:
            mine = "user" in group.key
            until = (self.newest if mine else self.snapshot)[at]
            rows = np.searchsorted(self.asof.log.time, until, "right")
            times = queries.at[at] if mine else until
            out |= self.asof.values(Asked(queries.users[at], items, times, rows, context, queries.at[at]), (group,))
        return out

    def _context(self, queries: Queries, at: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, column in self.asof.context.items():
            index = column.index
            found[name] = np.array([index.get(spelled(c.get(name)), -1) for c in queries.contexts], np.int64)[at]
        return found

    def context_texts(self, of: str) -> Any:
        """The texts of a context column."""
        return self.asof.context[of]


def compared(impressions: pa.Table, funnel: Funnel, log: Interactions, told: np.ndarray, report: Report | None = None) -> Report:
    """Compare the pages of the funnel's version with the log, which holds every event that they may have counted."""
    report = report or Report()
    rows = [r for r in impressions.to_pylist() if r["model_version"] == funnel.version]
    kept = [r for r in rows if r["query_features"] or r["item_features"]]
    report.without += len(rows) - len(kept)
    if funnel.live is None:
        report.without += len(kept)
        return report
    asof = _asof(funnel, funnel.live.inputs, log, told)
    for row in kept:
        _compare(row, funnel, funnel.live, asof, report)
    return report


def _asof(funnel: Funnel, inputs: AggregateInputs, log: Interactions, told: np.ndarray) -> AsOf:
    """The batch road over the log in the rows of the funnel's version."""
    ours = replace(
        log,
        users=funnel.users,
        items=funnel.items,
        user=funnel.users.rows(log.users.outside(np.arange(log.n_users)))[log.user],
        item=funnel.items.rows(log.items.outside(np.arange(log.n_items)))[log.item],
    )
    return AsOf(inputs.plan, ours, inputs.columns, told, offset_s=inputs.config.utc_offset_s)


def _compare(row: dict[str, Any], funnel: Funnel, live: Live, asof: AsOf, report: Report) -> None:
    request = FunnelRequest(row["user_id"], max(len(row["items"]), 1), row["at_s"], context=json.loads(row["context"]))
    queries = funnel.queries([request])
    if queries.users[0] == UNKNOWN:
        report.without += 1  # the batch road numbers users by the version's vocabulary, and this one is not in it
        return
    instants = [np.array([-np.inf if row[name] is None else row[name]]) for name in ("user_newest_s", "snapshot_s")]
    source = AsLogged(live.inputs, asof, *instants)
    road = Live(live.inputs, source, live.items)
    report.pages += 1
    items = funnel.items.rows(row["items"])[None, :]
    for logged, found in ((row["query_features"], road.query_fields(queries)), (row["item_features"], road.pair_fields(queries, items))):
        for name, values in logged:
            skew = report.features.setdefault(name, Skew())
            was, now = np.asarray(values, np.float64), np.asarray(found[name], np.float64).reshape(-1)
            apart = np.abs(was - now) if was.shape == now.shape else np.full(len(was), np.inf)
            skew.compared += len(was)
            wrong = ~(apart <= TOLERANCE)
            if wrong.any():
                skew.mismatches += int(wrong.sum())
                if float(apart.max()) > skew.largest:
                    skew.largest, skew.example = float(apart.max()), f"{row['request_id']} ({was[wrong][0]:g}, now {now[wrong][0]:g})"
