"""From an item to other items, with weights: what ItemCF, EASE, Markov and the realtime trigger look up when they serve.

A user's score of an item is the sum over the history of link weight times history weight. Work and memory of a query
grow with its links, never with users x items.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt
from scipy import sparse

from recsys.allowed import Allowed
from recsys.core import UNKNOWN, Queries
from recsys.recall.order import EMPTY, LOW, best_first, descending, scores_of

Newest = Annotated[PositiveInt | None, Field(description="Newest events of the history that count; null: all that the query brings.")]
Decay = Annotated[
    float, Field(gt=0, le=1, description="An event of the history counts this much less than the next newer one; 1: all alike.")
]
HalfLife = Annotated[
    PositiveFloat | None, Field(description="Hours in which an event of the history loses half its weight; null: it keeps it.")
]
PRODUCT_BELOW = 20_000
"""Catalogues smaller than this sum links by a sparse product into one array per query, larger ones by a sort of the links. By
catalogue, not by batch: the two round differently, and an answer must not depend on its batch."""
MAX_LINKS = 4_000_000
"""Most links that are summed at once; larger batches go in parts."""


@dataclass(frozen=True)
class ItemLinks:
    """Item i links to items[indptr[i]:indptr[i + 1]], strongest first, ties by smaller row, with float32 weights.

    A weight below 0 speaks against an item; only items whose weights sum up above 0 are recalled.
    """

    indptr: np.ndarray
    items: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, neighbors: np.ndarray, weights: np.ndarray) -> Self:
        """From (I, N) int32 rows, strongest first and -1 in empty slots, and their (I, N) weights."""
        filled = neighbors != UNKNOWN
        indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
        return cls(indptr, neighbors[filled].astype(np.int32), weights[filled].astype(np.float32))

    @classmethod
    def dense(cls, weights: np.ndarray, keep: int | None = None) -> Self:
        """From an (I, I) float32 matrix: the `keep` weights of each row that are furthest from 0; absent: all but zeros."""
        n = len(weights)
        keep = min(n, keep if keep is not None else n)
        kept = np.sort(best_first(np.abs(weights), keep), axis=1)
        values = np.take_along_axis(weights, kept, 1)
        order = best_first(values, keep)
        values, items = np.take_along_axis(values, order, 1), np.take_along_axis(kept, order, 1)
        return cls.of(np.where(values == 0, UNKNOWN, items).astype(np.int32), values)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def reversed(self, keep: int | None = None) -> Self:
        """The same links from their other end, strongest first; with `keep`, only so many of each item."""
        n = len(self)
        source = np.repeat(np.arange(n, dtype=np.int32), np.diff(self.indptr))
        keys = descending(self.weights) | source.astype(np.uint64)
        other = sparse.csr_matrix((keys, self.items, self.indptr), shape=(n, n)).tocsc()  # a counting sort by their other end
        keys, size = other.data, np.diff(other.indptr)
        for low, high in pairwise(other.indptr.tolist()):
            keys[low:high].sort()
        if keep is not None:
            keys = keys[np.arange(len(keys)) - np.repeat(other.indptr[:-1], size) < keep]
            size = np.minimum(size, keep)
        indptr = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        return type(self)(indptr, (keys & LOW).astype(np.int32), scores_of(keys))

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """(I, I) csr of the weights, on the same memory."""
        indptr = self.indptr.astype(np.int32) if len(self.items) < 2**31 else self.indptr
        return sparse.csr_matrix((self.weights, self.items, indptr), shape=(len(self), len(self)))

    def strongest(self, items: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> their k strongest links as ((B, k') items, (B, k') weights), -1 / -inf where there are fewer."""
        none = np.empty((len(items), 0), np.int32) if exclude is None else exclude
        return self.recall(items[:, None], np.ones((len(items), 1), np.float32), none, k)

    def recall(
        self, history: np.ndarray, weights: np.ndarray, exclude: np.ndarray, k: int, allowed: Allowed | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the largest sums of weights linked from each history.

        history (B, L) item rows and their weights (B, L) (0: no trigger); exclude (B, E) rows that must not come back,
        allowed (`queries.allowed`) those that may. -1 and rows beyond the catalogue count as empty. Gives ((B, k') items, (B, k') float32 scores), best first, ties to the
        smaller row, -1 / -inf at the end.
        """
        B, n = len(history), len(self)
        used = (history >= 0) & (history < n) & (weights > 0)
        safe = np.where(used, history, 0)
        lengths = np.where(used, self.indptr[safe + 1] - self.indptr[safe], 0) if n else np.zeros(history.shape, np.int64)
        parts = []
        at = 0
        # Products also bound their (queries, items) array, sorts the number of (query, item) keys, to 32 bits.
        most = max(1, (MAX_LINKS if n < PRODUCT_BELOW else 2**32 - 1) // max(n, 1))
        ends = np.cumsum(lengths.sum(1))
        while at < B:
            stop = int(np.searchsorted(ends, (ends[at - 1] if at else 0) + MAX_LINKS, side="right"))
            stop = min(max(stop, at + 1), at + most, B)
            rows = slice(at, stop)
            parts.append(
                self._recall_part(
                    history[rows], weights[rows], lengths[rows], exclude[rows], k, allowed=None if allowed is None else allowed[rows]
                )
            )
            at = stop
        width = max((items.shape[1] for items, _ in parts), default=0)
        out, scores = np.full((B, width), UNKNOWN, np.int32), np.full((B, width), -np.inf, np.float32)
        at = 0
        for items, values in parts:
            out[at : at + len(items), : items.shape[1]], scores[at : at + len(items), : items.shape[1]] = items, values
            at += len(items)
        return out, scores

    def _recall_part(
        self, history: np.ndarray, weights: np.ndarray, lengths: np.ndarray, exclude: np.ndarray, k: int, *, allowed: Allowed | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if not lengths.any() or not k:
            return np.empty((len(history), 0), np.int32), np.empty((len(history), 0), np.float32)
        by_product = len(self) < PRODUCT_BELOW
        ranked = (self._by_product if by_product else self._by_sort)(history, weights, lengths, exclude, allowed)
        if k < ranked.shape[1] // 4:
            ranked = np.partition(ranked, k, axis=1)[:, :k]
        ranked.sort(axis=1)
        ranked = ranked[:, :k]
        ranked = ranked[:, : int((ranked != EMPTY).sum(1).max(initial=0))]
        items = ranked.astype(np.uint32).view(np.int32)  # the low half; of EMPTY it is -1
        return items, np.where(ranked == EMPTY, np.float32(-np.inf), scores_of(ranked))

    def _by_product(
        self, history: np.ndarray, weights: np.ndarray, lengths: np.ndarray, exclude: np.ndarray, allowed: Allowed | None
    ) -> np.ndarray:
        """Sums by a sparse product into (B, I) keys of `descending` and item."""
        B, n = len(history), len(self)
        used = lengths > 0
        indptr = np.concatenate([[0], np.cumsum(used.sum(1))]).astype(np.int32)
        sums = (sparse.csr_matrix((weights[used].astype(np.float32), history[used], indptr), shape=(B, n)) @ self.matrix).toarray()
        row, column = np.nonzero((exclude >= 0) & (exclude < n))
        sums[row, exclude[row, column]] = 0
        if allowed is not None:
            allowed.bar(sums, 0)
        ranked = descending(sums)
        ranked |= np.arange(n, dtype=np.uint64)
        ranked[sums <= 0] = EMPTY
        return ranked

    def _by_sort(
        self, history: np.ndarray, weights: np.ndarray, lengths: np.ndarray, exclude: np.ndarray, allowed: Allowed | None
    ) -> np.ndarray:
        """Sums by sorting the links of the batch into (B, W) keys of `descending` and item: nothing is as large as the catalogue."""
        B, n = len(history), len(self)
        slot = np.flatnonzero(lengths)
        size = lengths.ravel()[slot]
        stops = np.cumsum(size)
        link = np.repeat(self.indptr[history.ravel()[slot]] - (stops - size), size)
        link += np.arange(stops[-1])  # (links,)
        values = self.weights[link] * np.repeat(weights.ravel()[slot].astype(np.float32), size)
        keys = self.items[link].astype(np.int64) + np.repeat(slot // history.shape[1] * n, size)  # query * n + item
        if allowed is not None:
            here = allowed.admits(*np.divmod(keys, n))
            keys, values = keys[here], values[here]
        row, column = np.nonzero((exclude >= 0) & (exclude < n))
        keys = np.concatenate([keys, row * n + exclude[row, column]])
        values = np.concatenate([values, np.full(len(row), -np.inf, np.float32)])  # what is barred sums up to -inf
        # The value's bits ride below the key: one sort of plain integers, and nothing to gather afterwards.
        packed = keys.astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= values.view(np.uint32)
        packed.sort()
        if not len(packed):
            return np.empty((B, 0), np.uint64)
        key, values = (packed >> np.uint64(32)).astype(np.uint32), packed.astype(np.uint32).view(np.float32)
        starts = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
        sums = np.add.reduceat(values, starts)
        query, item = np.divmod(key[starts][sums > 0], np.uint32(n))
        width = np.bincount(query, minlength=B)
        ranked = np.full((B, int(width.max(initial=0))), EMPTY)
        ranked[query, np.arange(len(query)) - np.repeat(np.cumsum(width) - width, width)] = descending(sums[sums > 0]) | item.astype(
            np.uint64
        )
        return ranked

    def save(self, folder: Path) -> None:
        """Write indptr.npy, items.npy and weights.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("indptr", "items", "weights"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        # asarray: a plain view of the map, whose indexing does not pay for the memmap subclass.
        return cls(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("indptr", "items", "weights")))


def recency(
    queries: Queries, *, newest: int | None = None, decay: float = 1.0, half_life_h: float | None = None, window_h: float | None = None
) -> np.ndarray:
    """(B, L) float32 weight of each history event: decay ** (events since) * 0.5 ** (age / half-life).

    Zero beyond the `newest` events and for what happened more than `window_h` before the query. An event without a time has no
    age: it neither fades nor leaves the window. An event after the query counts as of now.
    """
    B, L = queries.history.shape
    since = np.arange(L - 1, -1, -1)  # 0 for the newest
    weight = np.broadcast_to(np.where(since < (L if newest is None else newest), decay**since, 0.0), (B, L))
    if half_life_h is not None or window_h is not None:
        age_h = np.nan_to_num(np.maximum(queries.at[:, None] - queries.history_times, 0)) / 3600
        if half_life_h is not None:
            weight = weight * 0.5 ** (age_h / half_life_h)
        if window_h is not None:
            weight = weight * (age_h <= window_h)
    return weight.astype(np.float32)
