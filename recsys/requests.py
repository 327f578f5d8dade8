"""From a request in outside terms to a query in rows: ids become rows, and the training log's history goes on with live events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from recsys.allowed import Condition, Filter
from recsys.config import Config
from recsys.core import UNKNOWN, Query, Vocabulary, Wishes
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
    user; seen_indptr (U + 1,) and seen_items: every item the user has had, ascending.
    """

    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray
    seen_indptr: np.ndarray
    seen_items: np.ndarray

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(self._fields, self, strict=True):
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))

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


def query_of(r: FunnelRequest, *, users: Vocabulary, items: Vocabulary, past: Past, config: Config) -> Query:
    """The query of one request. Ids that nobody knows are left out; what was seen is excluded where the configuration says so."""
    user = users.row(r.user_id)
    had, times = past.history(user)
    against = config.recall.not_interested
    unwanted = [row for e in r.events if e.event in against and (row := items.row(e.item_id)) != UNKNOWN]
    live = [(row, e.time_ms / 1000) for e in r.events if e.event not in against and (row := items.row(e.item_id)) != UNKNOWN]
    if unwanted:  # what was taken and then refused triggers nothing either
        live = [(row, time) for row, time in live if row not in unwanted]
        kept = ~np.isin(had, unwanted)
        had, times = had[kept], times[kept]
    if live:
        had, times = _continued(had, times, live)
    exclude = [*unwanted, *(row for i in r.exclude if (row := items.row(i)) != UNKNOWN)]
    seen = np.empty(0, np.int32)
    if config.recall.exclude_seen:
        seen = past.seen(user)
        exclude += [row for row, _ in live]
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
