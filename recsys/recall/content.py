"""Content: items made of the same things as those of the history, for items and users that nobody has met yet.

A user is the mean of what he took, newer events counting more, and of the interests that his profile declares. An item needs
no event, only a row in the item table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from recsys.core import FrozenConfig, Queries, Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, NotFittedError
from recsys.features.catalogue import LISTED, Catalogue, Values, texts_of
from recsys.recall.content_space import ContentSpace
from recsys.recall.links import Decay, HalfLife, recency
from recsys.recall.taste import RowVectors, tastes, typical_users, unit
from recsys.recall.vector import IndexKind, RecallGoal, VectorConfig, VectorIndex

log = logging.getLogger(__name__)

ONE = frozenset({"id", "category"})
"""Kinds of which an item has one value."""
NOBODYS = Values(Vocabulary([]), np.zeros(1, np.int64), np.empty(0, np.int32))
"""Of an interest that the user table does not hold: only requests and profiles may declare it."""


class ContentConfig(FrozenConfig):
    type: Literal["content"] = "content"
    """What is made of the same things as the history: tags, words, numbers, given vectors. New items and users have answers."""
    columns: dict[str, NonNegativeFloat] | None = None
    """Item column -> its weight. null: every declared item column, weight 1."""
    interests: dict[str, str] = Field(default_factory=dict)
    """User or context column -> item column that it speaks of, such as likes: genres. Columns read from one name in both tables need no
    line, nor does an item column's own name in a profile or a context: `features: {genres: [Comedy]}` declares an interest."""
    interest_weight: NonNegativeFloat = 1.0
    """A declared interest counts like so many newest events, so that it leads while there are few."""
    dim: PositiveInt = 128
    """Floats that all values and words are folded into; as many or fewer are kept as they are."""
    decay: Decay = 0.95
    half_life_h: HalfLife = None
    kind: IndexKind = "auto"
    """How vectors are searched; see the channel two_tower."""
    recall_goal: RecallGoal = 0.98

    def build(self) -> Content:
        """The channel, not yet fitted."""
        return Content(self)

    def load(self, folder: Path, _funnel: object = None) -> Content:
        """The channel that was saved in `folder`."""
        return Content.load(folder, self)


class Content:
    """score(user, item) = cosine of the item and the weighted mean of the history and the declared interests."""

    name = "content"

    def __init__(self, config: ContentConfig) -> None:
        self.config = config
        self._space: ContentSpace | None = None
        self._index: VectorIndex | None = None
        self._declared: dict[str, tuple[str, ColumnConfig]] = {}
        """User column -> the item column it speaks of, and how its cells are read."""
        self._interests: dict[str, Values] = {}

    @property
    def space(self) -> ContentSpace:
        """What turns columns into vectors."""
        if self._space is None:
            raise NotFittedError("Content has no vectors yet. Call fit(interactions, items, users) first.")
        return self._space

    @property
    def index(self) -> VectorIndex:
        """The items' vectors."""
        if self._index is None:
            raise NotFittedError("Content has no vectors yet. Call fit(interactions, items, users) first.")
        return self._index

    def fit(self, interactions: Interactions, items: Catalogue, users: Catalogue | None = None) -> Self:
        """Vectors of all items of the catalogue. ConfigError where a named column is not declared, or none is."""
        c, users = self.config, users if users is not None else Catalogue(interactions.n_users)
        known = {*items.values, *items.numbers, *items.vectors}
        if unknown := sorted({*(c.columns or {}), *c.interests.values()} - known):
            raise ConfigError(f"recall channel content names '{unknown[0]}', which no item column declares. Known: {_listed(known)}.")
        if unknown := sorted(set(c.interests) - {*users.values, *interactions.context}):
            raise ConfigError(
                f"recall channel content: interests names '{unknown[0]}', no user column of values and no context column. "
                f"Known: {_listed([*users.values, *interactions.context])}."
            )
        weights: Mapping[str, float] = c.columns if c.columns is not None else dict.fromkeys(known, 1.0)
        if not any(weights.values()):
            raise ConfigError(
                "recall channel content has no item column to compare by. Declare data.items.columns, or take the channel out."
            )
        self._space = ContentSpace.fit(items, weights, c.dim)
        listed = {name for name in self._space.blocks if items.columns[name].kind in LISTED}
        for name, target in (_alike(users, items) | c.interests).items():
            if target in listed:
                self._declared[name] = (target, users.columns.get(name, items.columns[target]))
                self._interests[name] = users.values.get(name, NOBODYS)
        for name in sorted(listed - set(self._declared)):  # a request may name what items have: genres: [Comedy]
            self._declared[name], self._interests[name] = (name, items.columns[name]), NOBODYS
        vectors = self._space.items(items)
        typical = typical_users(interactions)
        asked = tastes(vectors, typical.history, recency(typical, decay=c.decay))
        self._index = VectorConfig(kind=c.kind, recall_goal=c.recall_goal).build().fit(vectors, asked)
        told = ", ".join(f"{name}={block.width}" for name, block in self._space.blocks.items())
        from_table = [name for name, held in self._interests.items() if held is not NOBODYS]
        log.info("content vectors: %d floats of %s; interests: %s", self._space.width, told, _listed(from_table))
        return self

    def user_vectors(self, queries: Queries, vectors: RowVectors | None = None) -> np.ndarray:
        """(B, width) float32 unit vectors; NaN where neither history nor profile says anything. `vectors` replace the index's."""
        weights = recency(queries, decay=self.config.decay, half_life_h=self.config.half_life_h)
        return tastes(self.index.vectors() if vectors is None else vectors, queries.history, weights, self._interest(queries))

    def item_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n, width) vectors of (n,) item rows."""
        return self.index.rows(rows)

    def vectors_of(self, items: Catalogue, towered: np.ndarray | None) -> np.ndarray:  # noqa: ARG002  one shape for all
        """(n, width) vectors of items that came later."""
        return self.space.later(items)

    def _interest(self, queries: Queries) -> np.ndarray | None:
        """(B, width) what profiles and contexts declare, else the user table; None where no column speaks of interests."""
        if not self._declared:
            return None
        out = np.zeros((len(queries), self.space.width), np.float32)
        for b, user in enumerate(queries.users.tolist()):
            told = {**queries.contexts[b], **queries.profiles[b]}
            for name, (target, column) in self._declared.items():
                held = self._interests[name]
                if name in told:
                    cells = told[name] if isinstance(told[name], list | tuple) and column.kind in ONE else [told[name]]
                    values = list(dict.fromkeys(text for cell in cells for text in texts_of(column, cell)))  # one may like several
                elif 0 <= user < len(held.indptr) - 1:
                    values = held.known.outside(held.codes[held.indptr[user] : held.indptr[user + 1]])
                else:
                    continue
                out[b] += self.space.of_values(target, values)
        return self.config.interest_weight * unit(out)

    def declares(self, queries: Queries) -> np.ndarray:
        """(B,) bool: whose profile, context or row of the user table names an interest that some item shares."""
        interest = self._interest(queries)
        return np.zeros(len(queries), bool) if interest is None else np.asarray(interest.any(1))

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items most alike."""
        return self.nearest(self.user_vectors(queries), queries, k)

    def nearest(self, vectors: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items nearest to given (B, width) vectors."""
        return self.index.recall_vectors(vectors, queries.exclude, k, queries.allowed)

    def similar(self, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> ((B, k') most alike other items, (B, k') cosines)."""
        return self.index.similar(items, k)

    def save(self, folder: Path) -> None:
        """Write the index, `space/` and the declared `interests/`."""
        self.index.save(folder)
        self.space.save(folder / "space")
        columns = {name: column for name, (_, column) in self._declared.items()}
        Catalogue(0, columns, dict(self._interests)).save(folder / "interests")
        (folder / "interests" / "targets.txt").write_text("\n".join(target for target, _ in self._declared.values()), "utf-8")

    @classmethod
    def load(cls, folder: Path, config: ContentConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        self._space = ContentSpace.load(folder / "space")
        self._index = VectorIndex.load(folder, VectorConfig(kind=config.kind, recall_goal=config.recall_goal))
        held = Catalogue.load(folder / "interests")
        self._interests = held.values
        targets = (folder / "interests" / "targets.txt").read_text("utf-8").split("\n")
        self._declared = {name: (target, column) for target, (name, column) in zip(targets, held.columns.items(), strict=False)}
        return self


def _alike(users: Catalogue, items: Catalogue) -> dict[str, str]:
    """User column -> item column where both are read from a file column of one name."""
    sources = {column.source(name): name for name, column in items.columns.items() if name in items.values}
    return {name: sources[c.source(name)] for name, c in users.columns.items() if name in users.values and c.source(name) in sources}


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
