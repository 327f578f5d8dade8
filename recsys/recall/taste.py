"""A user as the mean of the vectors of what he took: the simplest model that turns a history into a query."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from recsys.core import Queries, Query
from recsys.data.interactions import Interactions


class RowVectors(Protocol):
    """(n, d) float32 vectors by item row: an array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


TYPICAL = 256
"""Users that an approximate index is tuned on."""
NEWEST = 50


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, d) -> the same directions with length 1; zeros stay zeros."""
    length = np.sqrt((vectors * vectors).sum(1, keepdims=True))
    out: np.ndarray = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return out


def tastes(vectors: RowVectors, history: np.ndarray, weights: np.ndarray, besides: np.ndarray | None = None) -> np.ndarray:
    """(I, d) vectors, (B, L) rows of them and their weights -> (B, d) float32 unit vectors, NaN where nothing is known.

    besides (B, d) is added to each weighted sum. Rows outside of the vectors count as empty. Each query is summed by itself, over
    its own events alone, so that it has one vector in any batch.
    """
    out = np.full((len(history), vectors.shape[1]), np.nan, np.float32)
    for b, (items, weight) in enumerate(zip(history, weights, strict=True)):
        used = (items >= 0) & (items < len(vectors)) & (weight > 0)
        mean = weight[used] @ vectors[items[used]]
        if besides is not None:
            mean = mean + besides[b]
        length = float(np.sqrt((mean * mean).sum()))
        if length > 0:
            out[b] = mean / length
    return out


def typical_users(interactions: Interactions, seed: int = 0) -> Queries:
    """Some users of the log with the newest of their history, as they will ask: what an approximate index is tuned on."""
    positives = interactions.positives()
    indptr, order = positives.by_user()
    users = np.flatnonzero(np.diff(indptr))
    if len(users) > TYPICAL:
        users = np.sort(np.random.default_rng(seed).choice(users, TYPICAL, replace=False))
    batch = []
    for user, name in zip(users.tolist(), interactions.users.outside(users), strict=True):
        mine = order[indptr[user] : indptr[user + 1]][-NEWEST:]
        times = positives.time[mine] if interactions.has_time else np.full(len(mine), np.nan)
        at = float(interactions.time[-1]) if interactions.has_time else 0.0
        batch.append(Query(name, user, at=at, items=positives.item[mine], times=times))
    return Queries.of(batch, history_length=NEWEST)
