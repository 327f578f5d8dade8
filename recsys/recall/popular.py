"""What most people like now: counts that fade with time, the same list for everybody less what they must not see.

The channel that always answers: for a new user, and as the last rung when others fail.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import PositiveFloat

from recsys.allowed import Mask
from recsys.core import UNKNOWN, FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import NotFittedError
from recsys.recall.order import among

log = logging.getLogger(__name__)


class PopularConfig(FrozenConfig):
    type: Literal["popular"] = "popular"
    """What most people like now."""
    half_life_h: PositiveFloat | None = 336.0
    """Hours before the end of the log in which an event loses half its weight; null: plain counts, as for a log without times."""

    def build(self) -> Popular:
        """The channel, not yet fitted."""
        return Popular(self)

    def load(self, folder: Path, _funnel: object = None) -> Popular:
        """The channel that was saved in `folder`."""
        return Popular.load(folder, self)


class Popular:
    """score(item) = sum over its positives of 0.5 ** (age at the end of the log / half-life)."""

    name = "popular"

    def __init__(self, config: PopularConfig) -> None:
        self.config = config
        self._counts: np.ndarray | None = None
        self._order = np.empty(0, np.int32)

    @property
    def counts(self) -> np.ndarray:
        """(n_items,) float32 decayed counts."""
        if self._counts is None:
            raise NotFittedError("Popular has no counts yet. Call fit(interactions) first.")
        return self._counts

    @property
    def order(self) -> np.ndarray:
        """(n_items,) int32 item rows, most popular first."""
        return self._order

    def fit(self, interactions: Interactions) -> Self:
        """Count the positives of the log."""
        positives = interactions.positives()
        weight = fading(positives, interactions, self.config.half_life_h, self.name)
        return self._rank(np.bincount(positives.item, weight, minlength=interactions.n_items).astype(np.float32))

    def _rank(self, counts: np.ndarray) -> Self:
        self._counts = counts
        self._order = np.argsort(-counts, kind="stable").astype(np.int32)  # best first, ties to the smaller row
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the highest counts; items without any event come last, so k come back if the catalogue has them."""
        counts = self.counts
        items = first_of(self._order, queries, k)
        return items, np.where(items == UNKNOWN, -np.inf, counts[items] if len(counts) else 0).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write counts.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "counts.npy", self.counts)

    @classmethod
    def load(cls, folder: Path, config: PopularConfig) -> Self:
        """Read what `save` wrote."""
        return cls(config)._rank(np.load(folder / "counts.npy"))


def fading(positives: Interactions, interactions: Interactions, half_life_h: float | None, channel: str) -> np.ndarray | None:
    """(E,) weight of each positive by its age at the end of the log; None where all count alike."""
    if half_life_h is None or not len(interactions):
        return None
    if not interactions.has_time:
        log.info("%s counts all events alike (half_life_h=%g has no meaning: the log has no times)", channel, half_life_h)
        return None
    weight: np.ndarray = 0.5 ** ((interactions.time[-1] - positives.time) / 3600 / half_life_h)
    return weight


def first_of(order: np.ndarray, queries: Queries, k: int) -> np.ndarray:
    """The first k items of one order (n,) for each query, less what it must not see: (B, min(k, n)) item rows, -1 at the end."""
    width = min(k, len(order))
    if queries.allowed is None:
        return _unbarred(order, queries.exclude, width)
    items = np.full((len(queries), width), UNKNOWN, np.int32)
    for mask, rows in queries.allowed.groups():
        exclude = queries.exclude[rows]
        some = _unbarred(order if mask is None else _passing(order, mask, width + exclude.shape[1]), exclude, width)
        items[rows, : some.shape[1]] = some
    return items


def _passing(order: np.ndarray, mask: Mask, enough: int) -> np.ndarray:
    """The items of an order that pass a filter, the first `enough` of them or more: most filters need not look at all."""
    deep = 4 * enough
    while True:
        head = order[:deep]
        passing: np.ndarray = head[mask.items[head]]
        if len(passing) >= enough or deep >= len(order):
            return passing
        deep *= 8


def _unbarred(order: np.ndarray, exclude: np.ndarray, k: int) -> np.ndarray:
    n = len(order)
    head = order[: min(k + int((exclude >= 0).sum(1).max(initial=0)), n)]  # deep enough, however the excluded ones lie
    out = among(np.broadcast_to(head, (len(exclude), len(head))), exclude)
    kept = np.argsort(out, axis=1, kind="stable")[:, : min(k, n)]  # what is not barred moves up, in its order
    items: np.ndarray = np.where(np.take_along_axis(out, kept, 1), UNKNOWN, head[kept]).astype(np.int32)
    return items
