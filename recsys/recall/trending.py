"""What is being taken more than usual: the recent window against the time before it.

score(i) = (recent_i + m) / (expected_i + m), with expected_i = R (before_i + m) / (N + m I): what item i would have had of the
R recent events, had it kept its share of the N events before. m events smooth both, so that 3 against 1 says little and 300
against 100 much. Only what rises (score above 1) is recalled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, PositiveFloat

from recsys.core import UNKNOWN, FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import NotFittedError
from recsys.recall.popular import first_of

log = logging.getLogger(__name__)


class TrendingConfig(FrozenConfig):
    type: Literal["trending"] = "trending"
    """What is taken more now than it used to be."""
    window_h: PositiveFloat = 24.0
    """Hours before the end of the log that count as now."""
    baseline_h: PositiveFloat | None = 336.0
    """Hours before the window that now is compared with; null: all of the log before it."""
    smoothing: PositiveFloat = 10.0
    """Events that every item is given beforehand, m above. More: larger items, fewer surprises."""
    window_share: float = Field(0.1, gt=0, lt=1)
    """A log without times: its newest share counts as now."""

    def build(self) -> Trending:
        """The channel, not yet fitted."""
        return Trending(self)

    def load(self, folder: Path, _funnel: object = None) -> Trending:
        """The channel that was saved in `folder`."""
        return Trending.load(folder, self)


class Trending:
    """One list for everybody, as of the end of the log."""

    name = "trending"

    def __init__(self, config: TrendingConfig) -> None:
        self.config = config
        self._scores: np.ndarray | None = None
        self._order = np.empty(0, np.int32)

    @property
    def scores(self) -> np.ndarray:
        """(I,) float32: how many times what was expected an item has; 0 where it does not rise."""
        if self._scores is None:
            raise NotFittedError("Trending has no scores yet. Call fit(interactions) first.")
        return self._scores

    def fit(self, interactions: Interactions) -> Self:
        """Compare the window at the end of the log with what lies before it."""
        c, positives = self.config, interactions.positives()
        n, time = interactions.n_items, positives.time
        if interactions.has_time:
            end = float(interactions.time[-1]) if len(interactions) else 0.0
            now = time > end - 3600 * c.window_h
            before = ~now & (time > end - 3600 * (c.window_h + (c.baseline_h or np.inf)))
        else:
            log.info("trending: the log has no times, so its newest %g counts as now", c.window_share)
            now = np.arange(len(time)) >= round(len(time) * (1 - c.window_share))
            before = ~now
        recent = np.bincount(positives.item[now], minlength=n).astype(np.float64)
        if not before.any():
            log.info("trending: nothing lies before the last %g hours to compare with; it counts what is recent", c.window_h)
            return self._rank(recent.astype(np.float32))
        m, base = c.smoothing, np.bincount(positives.item[before], minlength=n)
        expected = recent.sum() * (base + m) / (base.sum() + m * n)
        ratio = (recent + m) / (expected + m)
        return self._rank(np.where(ratio > 1, ratio, 0).astype(np.float32))

    def _rank(self, scores: np.ndarray) -> Self:
        self._scores = scores
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        self._order = order[: int((scores > 0).sum())]
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that rise most."""
        items = first_of(self._order, queries, k)
        return items, np.where(items == UNKNOWN, -np.inf, self.scores[items] if len(self.scores) else 0).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write scores.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "scores.npy", self.scores)

    @classmethod
    def load(cls, folder: Path, config: TrendingConfig) -> Self:
        """Read what `save` wrote."""
        return cls(config)._rank(np.load(folder / "scores.npy"))
