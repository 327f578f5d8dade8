"""Markov transitions: what people did soon after this item, looked up for the last few things a user did.

A baseline that beats many published sequence models. Unlike ItemCF it knows direction: after the first part comes the
second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt
from scipy import sparse

from recsys.core import FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import NotFittedError
from recsys.recall.links import Decay, ItemLinks, recency
from recsys.recall.neighbors import UsePast, taken_by
from recsys.recall.order import LOW, descending


class MarkovConfig(FrozenConfig):
    type: Literal["markov"] = "markov"
    """What people did next after the newest events."""
    window: PositiveInt = 10
    """How many events later a transition may end."""
    gap_decay: float = Field(0.8, gt=0, le=1)
    """A transition over one more event counts this much less; 1: all alike."""
    popularity: NonNegativeFloat = 0.3
    """Power of an item's events by which its incoming transitions are divided: 0 favours what is popular, 1 what is special."""
    neighbors: PositiveInt = 200
    """Strongest transitions kept per item."""
    newest: PositiveInt = 20
    """Newest events of the history that count."""
    decay: Decay = 0.8
    use_past: UsePast = True

    def build(self) -> Markov:
        """The channel, not yet fitted."""
        return Markov(self)

    def load(self, folder: Path, _funnel: object = None) -> Markov:
        """The channel that was saved in `folder`."""
        return Markov.load(folder, self)


class Markov:
    """score(user, j) = sum over the newest events i of decay ** (events since) * T_ij.

    T_ij = sum over the log of gap_decay ** (steps from i to j - 1), divided by the root of i's and the power of j's events.
    """

    name = "markov"

    def __init__(self, config: MarkovConfig) -> None:
        self.config = config
        self._links: ItemLinks | None = None

    @property
    def links(self) -> ItemLinks:
        """From an item to what follows it."""
        if self._links is None:
            raise NotFittedError("Markov has no transitions yet. Call fit(interactions) first.")
        return self._links

    def fit(self, interactions: Interactions) -> Self:
        """Count the transitions of each user's positives, in order of time."""
        user, item = sequences(interactions, use_past=self.config.use_past)
        n = interactions.n_items
        table = sparse.csr_matrix((n, n), dtype=np.float32)
        for gap in range(1, min(self.config.window, len(item) - 1) + 1):
            same = user[gap:] == user[:-gap]
            step = (item[:-gap][same], item[gap:][same])
            weight = np.full(len(step[0]), self.config.gap_decay ** (gap - 1), np.float32)
            table = table + sparse.coo_matrix((weight, step), shape=(n, n)).tocsr()
        events = np.maximum(np.bincount(item, minlength=n), 1).astype(np.float64)
        table = sparse.diags_array(events**-0.5) @ table @ sparse.diags_array(events**-self.config.popularity)
        self._links = strongest_links(table.tocsr(), self.config.neighbors)
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that most often follow the newest events."""
        c = self.config
        weights = recency(queries, newest=c.newest, decay=c.decay)
        return self.links.recall(queries.history[:, -c.newest :], weights[:, -c.newest :], queries.exclude, k, queries.allowed)

    def save(self, folder: Path) -> None:
        """Write `links/`."""
        self.links.save(folder / "links")

    @classmethod
    def load(cls, folder: Path, config: MarkovConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        self._links = ItemLinks.load(folder / "links")
        return self


def sequences(interactions: Interactions, *, use_past: bool) -> tuple[np.ndarray, np.ndarray]:
    """(n,) user and (n,) item rows of the positives, by user, oldest first; what came before the log stands before it."""
    user, item = taken_by(interactions, use_past=use_past)
    order = np.argsort(user, kind="stable")
    return user[order], item[order]


def strongest_links(table: sparse.csr_matrix, keep: int) -> ItemLinks:
    """The `keep` largest entries of each row of an (n, n) csr, without the diagonal."""
    table.setdiag(0)
    table.eliminate_zeros()
    row = np.repeat(np.arange(table.shape[0], dtype=np.int64), np.diff(table.indptr))
    keys = descending(table.data) | table.indices.astype(np.uint64)
    order = np.lexsort((keys, row))
    place = np.arange(len(order)) - np.repeat(table.indptr[:-1], np.diff(table.indptr))
    order = order[place < keep]
    kept = np.minimum(np.diff(table.indptr), keep)
    indptr = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return ItemLinks(indptr, (keys[order] & LOW).astype(np.int32), table.data[order].astype(np.float32))
