"""The last order: maximal marginal relevance (Carbonell & Goldstein, 1998) and caps per category.

The page is filled place by place: each takes the item with the best balance of its own score and its likeness to what
stands above it, among those that no cap forbids. Scores stay those of the fine rank; only the order changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt

from recsys.core import UNKNOWN, Candidates, FrozenConfig, Queries
from recsys.errors import ConfigError
from recsys.recall.taste import RowVectors

KEPT, LIFTED, LOWERED, RELAXED, CAPPED = range(5)
REASONS = ("", "moved up for diversity", "moved down for diversity", "a cap gave way to fill the page", "moved down: a cap")
"""What `rerank_with_reasons` says of an item, by code."""

BLOCK = 16_000_000
"""Most similarities held at once (64 MB); larger batches go in parts."""


Caps = tuple[tuple[str, int, int], ...]
"""Caps of a request: (column, at most, window), as in CapConfig."""


class CapConfig(FrozenConfig):
    column: str
    """Item feature whose values are capped, such as category or author."""
    at_most: PositiveInt = 2
    """Items that may share a value within the window. Of a bag (tags, genres) every value counts. Items without a value are free."""
    window: PositiveInt = 10
    """Places in a row within which the cap holds; at or above the length of the page: on the whole page."""


class MMRConfig(FrozenConfig):
    model_config = ConfigDict(populate_by_name=True)

    type: Literal["mmr", "none"] = "mmr"
    """`mmr`: maximal marginal relevance, with caps. `none` leaves the order of the fine rank as it is."""
    lambda_: float = Field(0.8, alias="lambda", ge=0, le=1)
    """Weight of relevance against novelty on the page: 1 keeps the order of relevance, 0 only avoids likeness. In files: lambda."""
    pool: PositiveInt = 100
    """Only so many of the best candidates are considered (or the page, if it is longer)."""
    caps: tuple[CapConfig, ...] = ()
    """At most so many items of one value of a column among so many places in a row. A cap that would leave places empty gives way. Pins
    come after caps and do not count towards them: a page may exceed a cap because of its pins."""

    def build(self, vectors: RowVectors | None, columns: Mapping[str, RowVectors]) -> MMR:
        """With (n_items, d) item vectors (None: no likeness, caps alone) and encoded item columns, (n_items,) or (n_items, W)."""
        return MMR(self, vectors, columns)


class MMR:
    """argmax over what is left of lambda * relevance - (1 - lambda) * largest similarity to what was taken.

    Both are put on one scale first: relevance is min-max scaled within the query's pool, similarity is (1 + cosine) / 2. An
    item without a vector is like nothing (0).
    """

    def __init__(self, config: MMRConfig, vectors: RowVectors | None, columns: Mapping[str, RowVectors]) -> None:
        self.config = config
        self.vectors, self._known = vectors, columns
        faults = [
            f"rerank.caps uses column '{cap.column}', which items do not have. Known: {', '.join(sorted(columns)) or 'none'}."
            for cap in config.caps
            if cap.column not in columns
        ]
        if faults:
            raise ConfigError(faults)
        self.columns = [columns[cap.column] for cap in config.caps]  # (n_items,) or (n_items, W) each

    @property
    def relevance(self) -> float:
        """The weight of relevance of a query that asks for none; `none` leaves the order as it is."""
        return 1.0 if self.config.type == "none" else self.config.lambda_

    def capped(self, caps: Caps) -> MMR:
        """The same with these caps in place of its own; of a column that the items do not have there is nothing to cap."""
        known = tuple(CapConfig(column=c, at_most=n, window=w) for c, n, w in caps if c in self._known)
        return MMR(self.config.model_copy(update={"type": "mmr", "caps": known}), self.vectors, self._known)

    def under(self, caps: Caps | None) -> MMR:
        """What orders a query that asks for these caps: each takes the place of the configured ones of its column."""
        own = () if self.config.type == "none" else tuple((c.column, c.at_most, c.window) for c in self.config.caps)
        if not caps and (own or not self.config.caps):
            return self
        asked = {column for column, _, _ in caps or ()}
        return self.capped((*(cap for cap in own if cap[0] not in asked), *(caps or ())))

    def rerank(self, queries: Queries, candidates: Candidates, k: int) -> Candidates:  # noqa: ARG002  a page hangs on its items alone
        """At most k of the candidates, in page order; `scores` stay the fine scores."""
        return self.rerank_with_reasons(candidates, k)[0]

    def rerank_with_reasons(
        self,
        candidates: Candidates,
        k: int,
        *,
        worth: np.ndarray | None = None,
        lambdas: np.ndarray | None = None,
        caps: Sequence[Caps | None] | None = None,
    ) -> tuple[Candidates, np.ndarray]:
        """The page, and (B, k) int8 codes into REASONS of what became of each of its items.

        worth (B, N), best first, stands for the scores in the balance; lambdas (B,) for the configured weight of relevance; caps, one
        per query, go over the configured ones (see `under`).
        """
        worth = candidates.scores if worth is None else worth
        B, k = len(candidates), min(k, candidates.width)
        lambdas = np.full(B, self.relevance) if lambdas is None else lambdas
        wanted = [c or None for c in caps] if caps is not None else [None] * B
        order, reasons = np.tile(np.arange(k), (B, 1)), np.zeros((B, k), np.int8)
        for one in dict.fromkeys(wanted) if k else ():
            rows = np.array([b for b, w in enumerate(wanted) if w == one])
            order[rows], reasons[rows] = self.under(one)._ordered(candidates.items[rows], worth[rows], k, lambdas[rows])
        return candidates.reordered(order, np.take_along_axis(candidates.scores, order, 1), stage="rerank"), reasons

    def _ordered(self, items: np.ndarray, worth: np.ndarray, k: int, lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_fill` of any number of queries, a block at a time."""
        B, N = items.shape
        pool = min(max(self.config.pool, k), N)
        step = max(1, BLOCK // pool**2)
        parts = [self._fill(items[b : b + step, :pool], worth[b : b + step, :pool], k, lambdas[b : b + step]) for b in range(0, B, step)]
        return np.concatenate([o for o, _ in parts]), np.concatenate([r for _, r in parts])

    def _fill(self, items: np.ndarray, scores: np.ndarray, k: int, lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, P) items, best first, and scores, (B,) weights of relevance -> the k slots of the page and why, (B, k) each."""
        B, P = items.shape
        rows, places = np.arange(B), np.arange(k)
        free = items != UNKNOWN
        empty_slot = free.argmin(1)  # where a list that has ended points to
        worth = np.where(free, lambdas.astype(np.float32)[:, None] * _scaled(scores, free), np.float32(-np.inf))  # (B, P)
        alike = self._similarity(items, lambdas)  # (B, P, P), or None
        if alike is None and not self.columns:
            return np.broadcast_to(places, (B, k)), np.zeros((B, k), np.int8)
        nearest = np.zeros((B, P), np.float32)  # similarity to the most similar item on the page
        caps = [
            _Cap(cap, column[np.maximum(items, 0)].reshape(B, P, -1)) for cap, column in zip(self.config.caps, self.columns, strict=True)
        ]
        order, relaxed, held_back = np.empty((B, k), np.int64), np.zeros((B, k), bool), np.zeros((B, P), bool)
        for n in range(k):
            value = worth - nearest
            ended = np.isneginf(value).all(1)
            if caps:
                forbidden = np.logical_or.reduce([cap.forbidden(n) for cap in caps])
                capped = np.where(forbidden, np.float32(-np.inf), value)
                relaxed[:, n] = np.isneginf(capped).all(1) & ~ended
                first = value.argmax(1)
                value = np.where(relaxed[:, n, None], value, capped)
                held_back[rows, first] |= forbidden[rows, first] & ~relaxed[:, n] & ~ended
            chosen = np.where(ended, empty_slot, value.argmax(1))  # ties: who stood first
            order[:, n] = chosen
            worth[rows, chosen] = -np.inf
            for cap in caps:
                cap.take(n, chosen)
            if alike is not None:
                np.maximum(nearest, alike[rows, chosen], out=nearest)
        lowered = np.where(np.take_along_axis(held_back, order, 1), CAPPED, LOWERED)
        moved = np.where(order > places, LIFTED, np.where(order < places, lowered, KEPT))
        reasons = np.where(np.take_along_axis(free, order, 1), np.where(relaxed, RELAXED, moved), KEPT)
        return order, reasons.astype(np.int8)

    def fit(self, page: np.ndarray, place: int, instead: np.ndarray) -> np.ndarray:
        """(n,) bool: which of (n,) items may stand at `place` of a page (k,), in place of who stands there, without a cap being broken
        that holds as it is. A value that its forerunner has, too, brings nothing that was not there."""
        ok = np.ones(len(instead), bool)
        if not len(instead):
            return ok
        for cap, column in zip(self.config.caps, self.columns, strict=True):
            held = np.asarray(column[np.maximum(page, 0)]).reshape(len(page), -1) * (page != UNKNOWN)[:, None]  # (k, W)
            new = np.asarray(column[instead]).reshape(len(instead), -1)  # (n, W)
            values = np.setdiff1d(new, np.append(held[place], 0))
            has = (held[:, None, :] == values[None, :, None]).any(2)  # (k, V): row 0 is a missing value or padding
            has[place] = False
            width = min(cap.window, len(page))
            first = max(0, place - width + 1)
            windows = [has[a : a + width].sum(0) for a in range(first, min(place, len(page) - width) + 1)]
            full = values[np.max(windows, axis=0) >= cap.at_most] if len(values) else values
            ok &= ~np.isin(new, full).any(1)
        return ok

    def _similarity(self, items: np.ndarray, lambdas: np.ndarray) -> np.ndarray | None:
        """(B, P, P) of (1 - lambda) * (1 + cosine) / 2; 0 where one has no vector. None where nothing has, or nobody asks."""
        if self.vectors is None or (lambdas == 1).all():
            return None
        vectors = self.vectors[np.maximum(items, 0)].astype(np.float32)  # (B, P, d)
        norm = np.sqrt(np.einsum("bpd,bpd->bp", vectors, vectors))
        known = norm > 0
        vectors /= np.where(known, norm, 1)[:, :, None]
        cosine = vectors @ vectors.transpose(0, 2, 1)
        cosine += 1
        cosine *= ((1 - lambdas) / 2).astype(np.float32)[:, None, None]
        if not known.all():
            cosine *= known[:, :, None] & known[:, None, :]
        similarity: np.ndarray = cosine
        return similarity


class _Cap:
    """One cap over a batch: how often each value stands in the current window of each page."""

    def __init__(self, config: CapConfig, values: np.ndarray) -> None:
        self.config = config
        B = len(values)
        self.counted = values > 0  # row 0 is a missing value or padding
        if B * (int(values.max(initial=0)) + 1) > 1_000_000:  # many values in all, few in this batch
            values = np.unique(values, return_inverse=True)[1].reshape(values.shape)
        n_values = int(values.max(initial=0)) + 1
        self.at = values.astype(np.int64) + (np.arange(B) * n_values)[:, None, None]  # (B, P, W) places in `count`
        self.count = np.zeros(B * n_values, np.int64)
        self.taken: list[np.ndarray] = []

    def forbidden(self, n: int) -> np.ndarray:
        """(B, P) bool: whom the cap keeps from place n."""
        if n >= self.config.window:
            self.count[self.taken[n - self.config.window]] -= 1  # an item's values differ from each other
        full: np.ndarray = ((self.count[self.at] >= self.config.at_most) & self.counted).any(2)
        return full

    def take(self, n: int, chosen: np.ndarray) -> None:
        """Count the items that were given place n."""
        rows = np.arange(len(chosen))
        self.taken.append(self.at[rows, chosen][self.counted[rows, chosen]])
        self.count[self.taken[n]] += 1


def _scaled(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(B, P) scores min-max scaled to 0..1 over the valid slots of each row; 0 where all are one."""
    low = np.where(valid, scores, np.inf).min(1, keepdims=True)
    high = np.where(valid, scores, -np.inf).max(1, keepdims=True)
    some = np.isfinite(low) & np.isfinite(high)
    spread = np.where(some & (high > low), high - np.where(some, low, 0), 1)
    scaled: np.ndarray = np.where(valid & some, scores - np.where(some, low, 0), 0) / spread
    return scaled.astype(np.float32)
