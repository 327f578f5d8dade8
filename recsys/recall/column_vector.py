"""Recall by vectors that came with the data: an item column of kind vector, such as the embedding of a picture or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np

from recsys.core import FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, NotFittedError
from recsys.features.catalogue import Catalogue
from recsys.recall.links import Decay, HalfLife, recency
from recsys.recall.taste import RowVectors, tastes, typical_users, unit
from recsys.recall.vector import IndexKind, RecallGoal, VectorConfig, VectorIndex


class ColumnVectorConfig(FrozenConfig):
    type: Literal["vector"] = "vector"
    """Items whose given vectors lie nearest to those of the history: embeddings made elsewhere feed vector recall."""
    column: str
    """The item column of kind vector. Its vectors are scaled to one length: what counts is the angle."""
    decay: Decay = 0.95
    half_life_h: HalfLife = None
    kind: IndexKind = "auto"
    """How vectors are searched; see the channel two_tower."""
    recall_goal: RecallGoal = 0.98

    def build(self) -> ColumnVector:
        """The channel, not yet fitted."""
        return ColumnVector(self)

    def load(self, folder: Path, _funnel: object = None) -> ColumnVector:
        """The channel that was saved in `folder`."""
        return ColumnVector.load(folder, self)


class ColumnVector:
    """score(user, item) = cosine of the item's vector and the weighted mean of the history's. Items without a vector never come."""

    name = "vector"

    def __init__(self, config: ColumnVectorConfig) -> None:
        self.config = config
        self._index: VectorIndex | None = None
        self._rows = np.empty(0, np.int32)
        """(n,) int32 item rows that have a vector, ascending: row r of the index is item rows[r]."""
        self._place = np.empty(0, np.int32)
        """(I,) int32 row of the index of each item, -1 where it has no vector."""

    @property
    def index(self) -> VectorIndex:
        """The vectors."""
        if self._index is None:
            raise NotFittedError("ColumnVector has no vectors yet. Call fit(interactions, items) first.")
        return self._index

    def fit(self, interactions: Interactions, items: Catalogue, users: Catalogue | None = None) -> Self:  # noqa: ARG002  one shape for all
        """Index the column. ConfigError where it is none of kind vector, or no item has one."""
        name = self.config.column
        if name not in items.vectors:
            known = ", ".join(items.vectors) or "none"
            raise ConfigError(f"recall channel vector: column '{name}' is no item column of kind vector. Known: {known}.")
        vectors = np.asarray(items.vectors[name])
        rows = np.flatnonzero(~np.isnan(vectors).any(1)).astype(np.int32)
        if not len(rows):
            raise ConfigError(
                f"recall channel vector: no item has a vector of {vectors.shape[1]} floats in column '{name}'. Check its dim and separator."
            )
        self._number(rows, items.n)
        self._index = VectorConfig(kind=self.config.kind, recall_goal=self.config.recall_goal).build()
        near, typical = unit(vectors[rows]), typical_users(interactions)
        self._index.fit(near, tastes(near, self._placed(typical.history), recency(typical, decay=self.config.decay)))
        return self

    def _number(self, rows: np.ndarray, n: int) -> None:
        self._rows, self._place = rows, np.full(n, -1, np.int32)
        self._place[rows] = np.arange(len(rows), dtype=np.int32)

    def _placed(self, items: np.ndarray) -> np.ndarray:
        """Item rows of any shape -> rows of the index, -1 where there is none."""
        known = (items >= 0) & (items < len(self._place))
        return np.where(known, self._place[np.where(known, items, 0)], -1).astype(np.int32)

    def user_vectors(self, queries: Queries, vectors: RowVectors | None = None) -> np.ndarray:
        """(B, d) float32 unit vectors; NaN where no item of the history has a vector. `vectors` replace the index's."""
        weights = recency(queries, decay=self.config.decay, half_life_h=self.config.half_life_h)
        if vectors is not None:
            return tastes(vectors, queries.history, weights)
        return tastes(self.index.vectors(), self._placed(queries.history), weights)

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the nearest vectors."""
        return self.nearest(self.user_vectors(queries), queries, k)

    def nearest(self, vectors: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items nearest to given (B, d) vectors."""
        allowed = queries.allowed.of_rows(self._rows) if queries.allowed is not None else None
        return self._outside(*self.index.recall_vectors(vectors, self._placed(queries.exclude), k, allowed))

    def item_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n, d) vectors of (n,) item rows; zeros where an item has none."""
        place = self._placed(rows)
        out = np.zeros((len(rows), int(self.index.index.d)), np.float32)
        out[place >= 0] = self.index.rows(place[place >= 0])
        return out

    def vectors_of(self, items: Catalogue, towered: np.ndarray | None) -> np.ndarray:  # noqa: ARG002  one shape for all
        """(n, d) vectors of items that came later; NaN where one has none."""
        return unit(np.asarray(items.vectors[self.config.column]))

    def _outside(self, items: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(items < 0, -1, self._rows[np.maximum(items, 0)]).astype(np.int32), scores

    def similar(self, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> ((B, k') nearest other items, (B, k') cosines)."""
        return self._outside(*self.index.similar(self._placed(items), k))

    def save(self, folder: Path) -> None:
        """Write the index, rows.npy and n.npy."""
        self.index.save(folder)
        np.save(folder / "rows.npy", self._rows)
        np.save(folder / "n.npy", len(self._place))

    @classmethod
    def load(cls, folder: Path, config: ColumnVectorConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        self._index = VectorIndex.load(folder, VectorConfig(kind=config.kind, recall_goal=config.recall_goal))
        self._number(np.asarray(np.load(folder / "rows.npy", mmap_mode="r")), int(np.load(folder / "n.npy")))
        return self
