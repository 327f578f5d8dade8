"""Item factors of a matrix factorization, ready to be searched by inner product with a user's.

Factors differ in length, and graph indexes lose their way among such vectors. One more coordinate, 0 for users, makes all
items one length and leaves every inner product as it is (Bachrach et al., RecSys 2014).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, PositiveFloat

from recsys.core import Queries
from recsys.recall.vector import IndexKind, VectorConfig, VectorIndex

SearchedBy = Annotated[IndexKind, Field(description="How items are searched; see kind of the channel two_tower.")]
FactorScale = Annotated[
    PositiveFloat, Field(description="Length of the factors at the start, about: each is normal with this over sqrt(dim).")
]


class ItemFactors:
    """(I, d) float32 item factors under an index; row r is item row r."""

    def __init__(self, index: VectorIndex) -> None:
        self.index = index

    @classmethod
    def of(cls, factors: np.ndarray, kind: IndexKind, recall_goal: float, users: np.ndarray | None = None) -> Self:
        """Index (I, d) factors; (n, d) users are typical queries, which an approximate index is tuned on."""
        length = (factors.astype(np.float64) ** 2).sum(1)
        rest = np.sqrt(np.maximum(length.max(initial=0) - length, 0)).astype(np.float32)
        index = VectorConfig(kind=kind, recall_goal=recall_goal).build()
        return cls(index.fit(np.column_stack([factors, rest]), None if users is None else _extended(users)))

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, items: np.ndarray) -> np.ndarray:
        """The (n, d) factors of (n,) known item rows."""
        return self.index.rows(items)[:, :-1]

    def recall(self, users: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the largest inner products with (B, d) users; a row of NaN answers nothing."""
        return self.index.recall_vectors(_extended(users), queries.exclude, k, queries.allowed)

    def save(self, folder: Path) -> None:
        """Write the index, which holds the factors."""
        self.index.save(folder)

    @classmethod
    def load(cls, folder: Path, kind: IndexKind, recall_goal: float) -> Self:
        """Read what `save` wrote."""
        return cls(VectorIndex.load(folder, VectorConfig(kind=kind, recall_goal=recall_goal)))


def _extended(users: np.ndarray) -> np.ndarray:
    return np.column_stack([users, np.zeros(len(users), np.float32)])


def newest_of_each(history: np.ndarray, weights: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """(L,) item rows, newest last, and their (L,) weights -> the known items with a weight, each once with that of its newest event.

    Ascending by item, so that what follows does not depend on padding.
    """
    known = (history >= 0) & (history < n_items) & (weights > 0)
    items, weights = history[known][::-1], weights[known][::-1]
    distinct, first = np.unique(items, return_index=True)
    return distinct, weights[first]
