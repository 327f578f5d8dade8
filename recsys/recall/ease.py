"""EASE: a linear autoencoder with a closed form (Steck, 2019, arXiv:1905.03375).

B = I - P diag(1 / P_jj) with P = (X'X + lambda I)^-1; score(user, j) = sum over the history of B_ij. The inverse is dense:
memory grows with the square of the catalogue, time with its cube.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import PositiveFloat, PositiveInt
from scipy import linalg

from recsys.core import FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, NotFittedError
from recsys.recall.links import Decay, ItemLinks, Newest, recency
from recsys.recall.neighbors import EventsPerUser, UsePast, incidence


class EASEConfig(FrozenConfig):
    type: Literal["ease"] = "ease"
    """A linear model of the whole history in closed form; for catalogues of up to ten thousand items or so."""
    l2: PositiveFloat = 500.0
    """Ridge penalty, the paper's lambda. Larger: smoother, closer to popularity among co-clicked items."""
    links: PositiveInt | None = 200
    """Weights furthest from 0 that are kept per item of the history. Fewer: less memory and time to serve; null: all."""
    max_gib: PositiveFloat = 4.0
    """Refuse a catalogue whose inverse needs more memory than this."""
    max_events_per_user: EventsPerUser = 1_000
    use_past: UsePast = True
    newest: Newest = None
    decay: Decay = 0.95

    def build(self) -> EASE:
        """The channel, not yet fitted."""
        return EASE(self)

    def load(self, folder: Path, _funnel: object = None) -> EASE:
        """The channel that was saved in `folder`."""
        return EASE.load(folder, self)


class EASE:
    """score(user, item) = sum over the history of B[history item, item]; weights may be negative."""

    name = "ease"

    def __init__(self, config: EASEConfig) -> None:
        self.config = config
        self._links: ItemLinks | None = None

    @property
    def links(self) -> ItemLinks:
        """B by rows: from an item of the history to the items that it speaks for or against."""
        if self._links is None:
            raise NotFittedError("EASE has no weights yet. Call fit(interactions) first.")
        return self._links

    def fit(self, interactions: Interactions) -> Self:
        """Invert the Gram matrix. ConfigError where that needs more than `max_gib`."""
        n, c = interactions.n_items, self.config
        need = 3 * 8 * n * n / 2**30
        if need > c.max_gib:
            raise ConfigError(
                f"EASE on {n:,} items needs {need:.1f} GiB for its inverse, max_gib allows {c.max_gib:g}. Raise it, or use item_cf or ials."
            )
        X = incidence(interactions, values="binary", most_per_user=c.max_events_per_user, use_past=c.use_past)
        gram = (X.T @ X).toarray().astype(np.float64)
        gram[np.diag_indices(n)] += c.l2
        # Symmetric and positive definite, so Cholesky serves; potri fills one triangle.
        factor, _ = linalg.cho_factor(gram, lower=True, overwrite_a=True) if n else (gram, True)
        P, _ = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1) if n else (gram, 0)
        P = np.tril(P) + np.tril(P, -1).T
        B = (-P / np.diag(P)).astype(np.float32)
        np.fill_diagonal(B, 0)
        self._links = ItemLinks.dense(B, c.links)
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the largest sums of weights."""
        weights = recency(queries, newest=self.config.newest, decay=self.config.decay)
        return self.links.recall(queries.history, weights, queries.exclude, k, queries.allowed)

    def save(self, folder: Path) -> None:
        """Write `links/`."""
        self.links.save(folder / "links")

    @classmethod
    def load(cls, folder: Path, config: EASEConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        self._links = ItemLinks.load(folder / "links")
        return self
