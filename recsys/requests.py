"""From a request in outside terms to a query in rows: ids become rows, and the training log's history goes on with live events."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from recsys.allowed import Condition, Filter
from recsys.config import Config
from recsys.core import UNKNOWN, Query, Vocabulary, Wishes
from recsys.features.refusals import still_refused
from recsys.features.store import StoredEvent
from recsys.rerank.diversity import Caps


@dataclass(slots=True)
class FunnelRequest:
    """One request in outside terms: ids are the caller's, `events` the user's live history (oldest first); `filter` is what
    `Funnel.filters.parse` made of the caller's."""

    user_id: str
    k: int
    at: float
    events: Sequence[StoredEvent] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    """Item id -> time_ms of what the user refused, as the store holds it."""
    seen: Collection[str] = ()
    """Items that fell off the live history, as the store holds them."""
    context: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    explain: bool = False
    filter: Filter | None = None
    counters: bytes = b""
    """The user's packed counters, as the store holds them; without them the bundle's stand."""
    diversity: float | None = None
    """0 keeps the order of relevance, 1 only avoids likeness; None: as configured."""
    boosts: Sequence[tuple[Condition, float]] = ()
    """Conditions and what the scores of items that hold are multiplied with."""
    pins: Sequence[tuple[str, int]] = ()
    """Item ids and their places on the page, from 1."""
    caps: Caps = ()
    """Caps over the configured ones: (column, at most, window)."""
    novelty: tuple[float, float] | None = None
    """Weight and half-life in hours, in place of the configured ones."""


class Past(NamedTuple):
    """What the training log knows of each user: lists by user row, memory-mapped in a loaded bundle.

    indptr (U + 1,); items (S,) item rows and times (S,) Unix seconds, oldest first, the newest `history.length` of each
    user, what was refused later among them; seen_indptr (U + 1,) and seen_items: every item the user has had, ascending;
    refused_indptr (U + 1,), refused_items and refused_times (Unix seconds, NaN: unknown): see features.refusals. A bundle of
    before these has none.
    """

    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray
    seen_indptr: np.ndarray
    seen_items: np.ndarray
    refused_indptr: np.ndarray
    refused_items: np.ndarray
    refused_times: np.ndarray

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(self._fields, self, strict=True):
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> Self:
        held = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in cls._fields if (folder / f"{n}.npy").exists()}
        nothing = {"refused_indptr": np.zeros_like(held["indptr"]), "refused_items": np.empty(0, np.int32)}
        return cls(**nothing | {"refused_times": np.empty(0)} | held)

    def history(self, user: int) -> tuple[np.ndarray, np.ndarray]:
        """A user's items and their times, oldest first; empty for UNKNOWN."""
        if user == UNKNOWN:
            return np.empty(0, np.int32), np.empty(0, np.float64)
        a, b = self.indptr[user], self.indptr[user + 1]
        return self.items[a:b], self.times[a:b]

    def seen(self, user: int) -> np.ndarray:
        """Every item a user has had, ascending; empty for UNKNOWN."""
        if user == UNKNOWN:
            return np.empty(0, np.int32)
        return self.seen_items[self.seen_indptr[user] : self.seen_indptr[user + 1]]

    def refused(self, user: int) -> dict[int, float]:
        """What a user refused: item row -> Unix seconds; nothing for UNKNOWN."""
        if user == UNKNOWN:
            return {}
        a, b = self.refused_indptr[user], self.refused_indptr[user + 1]
        return dict(zip(self.refused_items[a:b].tolist(), self.refused_times[a:b].tolist(), strict=True)) if b > a else {}


def query_of(r: FunnelRequest, *, users: Vocabulary, items: Vocabulary, past: Past, config: Config) -> Query:
    """The query of one request. Ids that nobody knows are left out; what was refused is excluded, what was seen where the
    configuration says so. The history is that of training: the newest events, without those of refused items."""
    user = users.row(r.user_id)
    had, times = past.history(user)
    refusals, history = config.data.refusals, config.features.history
    live = [(row, e.time_ms / 1000) for e in r.events if e.event not in refusals and (row := items.row(e.item_id)) != UNKNOWN]
    if live:
        had, times = _continued(had, times, live)
    unwanted: list[int] = []
    if refused := _refused(r, items, past.refused(user), refusals):
        rows = still_refused(refused, r.at, items, history)
        unwanted = rows.tolist()
        had, times = had[-history.length :], times[-history.length :]  # the newest first: refusals make a history shorter
        kept = ~np.isin(had, rows)  # what was taken and then refused triggers nothing either
        had, times = had[kept], times[kept]
    exclude = [*unwanted, *(row for i in r.exclude if (row := items.row(i)) != UNKNOWN)]
    seen = np.empty(0, np.int32)
    if config.recall.exclude_seen:
        seen = past.seen(user)
        exclude += [*(row for i in r.seen if (row := items.row(i)) != UNKNOWN), *(row for row, _ in live)]
    return Query(
        user_id=r.user_id,
        user=user,
        k=r.k,
        at=r.at,
        items=had,
        times=times,
        context=r.context,
        profile=r.profile,
        exclude=np.concatenate([seen, np.array(exclude, np.int32)]) if exclude else seen,
        explain=r.explain,
        filter=((*(r.filter or ()), *config.rules.filter) or None),
        state=r.counters,
        wishes=_wishes(r, items, unwanted),
    )


def _refused(r: FunnelRequest, items: Vocabulary, known: dict[int, float], refusals: Sequence[str]) -> dict[int, float]:
    """Item row -> when it was refused last, by the training log and live."""
    told = [*r.refused.items(), *((e.item_id, e.time_ms) for e in r.events if e.event in refusals)]
    for item_id, time_ms in told:
        if (row := items.row(item_id)) != UNKNOWN:
            known[row] = max(time_ms / 1000, known.get(row, -math.inf))
    return known


def _continued(items: np.ndarray, times: np.ndarray, live: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """A training-log history continued by live events; one that the log already holds is not told twice."""
    told = set(zip(items.tolist(), times.tolist(), strict=True))
    new = [pair for pair in live if pair not in told]
    if not new:
        return items, times
    all_items = np.concatenate([items, np.array([i for i, _ in new], np.int32)])
    all_times = np.concatenate([times, np.array([t for _, t in new], np.float64)])
    # A log without times sorts before everything live: NaN would sort last.
    order = np.argsort(np.nan_to_num(all_times, nan=-np.inf), kind="stable")
    return all_items[order], all_times[order]


def _wishes(r: FunnelRequest, items: Vocabulary, unwanted: list[int]) -> Wishes | None:
    if r.diversity is None and r.novelty is None and not (r.boosts or r.pins or r.caps or unwanted):
        return None
    pins = tuple((row, place) for item, place in r.pins if (row := items.row(item)) != UNKNOWN)
    return Wishes(r.diversity, tuple(r.boosts), pins, tuple(dict.fromkeys(unwanted)), tuple(r.caps), r.novelty)
