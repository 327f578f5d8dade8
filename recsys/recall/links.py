"""From an item to other items, with weights: what ItemCF, EASE, Markov and the realtime trigger look up when they serve.

A user's score of an item is the sum over the history of link weight times history weight. Work and memory of a query
grow with its links, never with users x items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy import sparse

from recsys.core import UNKNOWN, Queries
from recsys.recall.order import best_first, by_key

DENSE_BELOW = 6_000
"""Catalogues smaller than this sum into one array per query, larger ones sort the links. By catalogue, not by batch: the two
round differently, and an answer must not depend on its batch."""
MAX_LINKS = 4_000_000
"""Most links that are summed at once; larger batches go in parts."""


@dataclass(frozen=True)
class ItemLinks:
    """Item i links to items[indptr[i]:indptr[i + 1]], strongest first, ties by smaller row, with float32 weights above 0."""

    indptr: np.ndarray
    items: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, neighbors: np.ndarray, weights: np.ndarray) -> Self:
        """From (I, N) int32 rows, strongest first and -1 in empty slots, and their (I, N) weights."""
        filled = neighbors != UNKNOWN
        indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
        return cls(indptr, neighbors[filled].astype(np.int32), weights[filled].astype(np.float32))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def reversed(self) -> Self:
        """The same links from their other end, strongest first."""
        n = len(self)
        source = np.repeat(np.arange(n, dtype=np.int32), np.diff(self.indptr))
        order = np.lexsort((source, -self.weights, self.items))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(self.items, minlength=n))]).astype(np.int64)
        return type(self)(indptr, source[order], self.weights[order])

    def matrix(self) -> sparse.csr_matrix:
        """(I, I) csr of the weights."""
        return sparse.csr_matrix((self.weights, self.items, self.indptr), shape=(len(self), len(self)))

    def strongest(self, items: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> their k strongest links as ((B, k') items, (B, k') weights), -1 / -inf where there are fewer."""
        none = np.empty((len(items), 0), np.int32) if exclude is None else exclude
        return self.recall(items[:, None], np.ones((len(items), 1), np.float32), none, k)

    def recall(self, history: np.ndarray, weights: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the largest sums of weights linked from each history.

        history (B, L) item rows and their weights (B, L) (0: no trigger); exclude (B, E) rows that must not come back. -1 and
        rows beyond the catalogue count as empty. Gives ((B, k') items, (B, k') float32 scores), best first, ties to the
        smaller row, -1 / -inf at the end.
        """
        B, n = len(history), len(self)
        used = (history >= 0) & (history < n) & (weights > 0)
        safe = np.where(used, history, 0)
        lengths = np.where(used, self.indptr[safe + 1] - self.indptr[safe], 0) if n else np.zeros(history.shape, np.int64)
        parts = []
        at = 0
        # Dense parts also bound their (queries, items) array.
        most = max(1, MAX_LINKS // max(n, 1)) if n < DENSE_BELOW else B
        ends = np.cumsum(lengths.sum(1))
        while at < B:
            stop = int(np.searchsorted(ends, (ends[at - 1] if at else 0) + MAX_LINKS, side="right"))
            stop = min(max(stop, at + 1), at + most, B)
            rows = slice(at, stop)
            parts.append(self._recall_part(history[rows], weights[rows], lengths[rows], exclude[rows], k))
            at = stop
        width = max((items.shape[1] for items, _ in parts), default=0)
        out, scores = np.full((B, width), UNKNOWN, np.int32), np.full((B, width), -np.inf, np.float32)
        at = 0
        for items, values in parts:
            out[at : at + len(items), : items.shape[1]], scores[at : at + len(items), : items.shape[1]] = items, values
            at += len(items)
        return out, scores

    def _recall_part(
        self, history: np.ndarray, weights: np.ndarray, lengths: np.ndarray, exclude: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        B, n = len(history), len(self)
        slot = np.flatnonzero(lengths)
        if not slot.size or not k:
            return np.empty((B, 0), np.int32), np.empty((B, 0), np.float32)
        size = lengths.ravel()[slot]
        stops = np.cumsum(size)
        link = np.arange(stops[-1]) + np.repeat(self.indptr[history.ravel()[slot]] - (stops - size), size)  # (links,)
        keys = self.items[link] + np.repeat(slot // history.shape[1] * n, size)
        values = self.weights[link] * np.repeat(weights.ravel()[slot].astype(np.float32), size)
        row, column = np.nonzero((exclude >= 0) & (exclude < n))
        barred = row * n + exclude[row, column]
        if n < DENSE_BELOW:
            sums = np.bincount(keys, values, minlength=B * n).astype(np.float32)
            sums[barred] = 0
            table = np.where(sums > 0, sums, np.float32(-np.inf)).reshape(B, n)
            order = best_first(table, k)
            found = np.take_along_axis(table, order, 1)
            return _trim(np.where(np.isneginf(found), UNKNOWN, order).astype(np.int32), found)
        return _sorted_sums(np.concatenate([keys, barred]), np.concatenate([values, np.full(len(barred), -np.inf, np.float32)]), B, n, k)

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


def _sorted_sums(keys: np.ndarray, values: np.ndarray, B: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum values of equal keys (query * n + item), and take the k largest positive sums of each query."""
    order = by_key(keys, B * n)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sums = np.add.reduceat(values[order].astype(np.float64), starts).astype(np.float32)
    query, item = np.divmod(keys[starts], n)
    column = np.arange(len(starts)) - np.searchsorted(query, np.arange(B))[query]
    table = np.full((B, int(column.max()) + 1), -np.inf, np.float32)  # items ascending in each row
    items = np.full(table.shape, UNKNOWN, np.int32)
    table[query, column], items[query, column] = sums, item
    best = best_first(table, k)
    found = np.take_along_axis(table, best, 1)
    return _trim(np.where(np.isneginf(found), UNKNOWN, np.take_along_axis(items, best, 1)), found)


def _trim(items: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut columns that are empty in every row."""
    width = int((items != UNKNOWN).sum(1).max(initial=0))
    return items[:, :width], scores[:, :width]


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
