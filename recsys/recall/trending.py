"""What is being taken more than usual: the recent window against the time before it.

score(i) = (recent_i + m) / (expected_i + m), with expected_i = R (before_i + m) / (N + m I): what item i would have had of the
R recent events, had it kept its share of the N events before. m events smooth both, so that 3 against 1 says little and 300
against 100 much. Only what rises (score above 1) is recalled.

The recent events are those at the end of the training log until a service tells of later ones (`follow`): then they are its
own, decayed counts, against the same time before.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

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

    live_events: NonNegativeFloat = 100.0
    """In service: recent events, decayed, from which on they replace what was recent when the version was trained."""

    def build(self) -> Trending:
        """The channel, not yet fitted."""
        return Trending(self)

    def load(self, folder: Path, _funnel: object = None) -> Trending:
        """The channel that was saved in `folder`."""
        return Trending.load(folder, self)


class Ranked(NamedTuple):
    """scores (I,) float32: how many times what was expected an item has, 0 where it does not rise; order (n,) rows that rise, highest
    first; at: Unix seconds of the live counts that they are of, None for the training log's."""

    scores: np.ndarray
    order: np.ndarray
    at: float | None = None


class Trending:
    """One list for everybody, as of the end of the log, or of now where a service follows its events."""

    name = "trending"

    def __init__(self, config: TrendingConfig) -> None:
        self.config = config
        self.ranked: Ranked | None = None
        self.trained: Ranked | None = None
        self.baseline: np.ndarray | None = None

    @property
    def scores(self) -> np.ndarray:
        """(I,) float32, see Ranked."""
        return self._ready().scores

    def _ready(self) -> Ranked:
        if self.ranked is None:
            raise NotFittedError("Trending has no scores yet. Call fit(interactions) first.")
        return self.ranked

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
        base = np.bincount(positives.item[before], minlength=n).astype(np.float64)
        self.baseline = base + recent  # what lies before the events of a service
        if not before.any():
            log.info("trending: nothing lies before the last %g hours to compare with; it counts what is recent", c.window_h)
            self.ranked = self.trained = _ordered(recent, None)
        else:
            self.ranked = self.trained = _ordered(_rising(recent, base, c.smoothing), None)
        return self

    def follow(self, recent: np.ndarray, at: float) -> bool:
        """Take the decayed counts (I,) of live events at a time in place of the training log's end; False where they are too few, and
        that stands. Thread-safe: a batch under way keeps the list that it began with."""
        if self.baseline is None or len(recent) != len(self.baseline) or recent.sum() < self.config.live_events:
            self.ranked = self.trained
            return False
        self.ranked = _ordered(_rising(recent, self.baseline, self.config.smoothing), at)
        return True

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that rise most."""
        scores, order, _ = self._ready()
        items = first_of(order, queries, k)
        return items, np.where(items == UNKNOWN, -np.inf, scores[items] if len(scores) else 0).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write scores.npy and baseline.npy."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "scores.npy", (self.trained or self._ready()).scores)
        if self.baseline is not None:
            np.save(folder / "baseline.npy", self.baseline.astype(np.float32))

    @classmethod
    def load(cls, folder: Path, config: TrendingConfig) -> Self:
        """Read what `save` wrote."""
        out = cls(config)
        out.ranked = out.trained = _ordered(np.load(folder / "scores.npy"), None)
        if (folder / "baseline.npy").exists():
            out.baseline = np.load(folder / "baseline.npy")
        return out


def _rising(recent: np.ndarray, before: np.ndarray, m: float) -> np.ndarray:
    """(I,) float64 the ratio of the formula above, 0 where it does not exceed 1."""
    expected = recent.sum() * (before + m) / (before.sum() + m * len(before))
    ratio = (recent + m) / (expected + m)
    return np.where(ratio > 1, ratio, 0)


def _ordered(scores: np.ndarray, at: float | None) -> Ranked:
    scores = scores.astype(np.float32)
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    return Ranked(scores, order[: int((scores > 0).sum())], at)
