"""The weights of the merge, learnt: a search over the channels' weights and the method, judged on users it has not seen.

The channels answer once; every setting after that is a product of arrays. The trap: the best of a thousand settings looks
good on the users it was chosen on. So the gain that is reported is cross-validated: chosen on half of the users, measured
on the other half, both ways; and what was configured stays unless that gain is clear of its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from recsys.core import UNKNOWN, FrozenConfig
from recsys.metrics import Relevant, at_k, hits, interval, mean_of_users
from recsys.recall.merge import ChannelResult, MergeConfig, merge

Method = Literal["rank", "rrf", "min_max"]
METHODS: tuple[Method, ...] = ("min_max", "rrf", "rank")
STEPS = (0.0, 0.5, 0.75, 1.4, 2.5)
"""What a weight is multiplied with, to see whether that is better."""
FROM_NOTHING = (0.1, 0.5)
"""What a weight of 0 becomes instead."""
TOP = 10
DEPTH = 50
"""Items of each channel that the search looks at: who stands below that in every channel rarely reaches the first ten."""
TOLERANCE = 1e-6
Progress = Callable[[int], None]
"""Told how many settings were tried since it was told last."""


class LearnConfig(FrozenConfig):
    max_users: PositiveInt = 2_000
    """Users whose validation events are looked at, drawn at random: enough for a standard error of NDCG@10 near .003."""
    restarts: NonNegativeInt = 1
    """Starts at random weights, beside those from the configured ones, from equal ones and from each channel foremost."""
    loss: float = 0.005
    """How much recall at `limit` may fall for a better head: what the merge loses, no later stage brings back."""


@dataclass(frozen=True)
class Blend:
    """What was learnt. Figures are means over users of NDCG@10 and of recall at `limit`, before and after, cross-validated."""

    method: Method
    weights: dict[str, float]
    taken: bool
    """Whether this replaces what was configured: its gain is clear of the standard error."""
    before: dict[str, float]
    after: dict[str, float]
    gain: float
    interval: tuple[float, float]
    """95 % of the gain in NDCG@10, over users."""
    users: int
    tried: int
    alone: dict[str, float] = field(default_factory=dict)
    """NDCG@10 of each channel by itself, on the same users."""

    def config(self, given: MergeConfig) -> MergeConfig:
        """The merge in force: the learnt one, or what was given where that did no better."""
        return given.model_copy(update={"method": self.method, "weights": dict(self.weights)}) if self.taken else given

    def as_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """What `as_json` gave."""
        return cls(**{**document, "interval": tuple(document["interval"])})


class _Setting(NamedTuple):
    method: Method
    weights: np.ndarray
    ndcg: float


class Slate:
    """B users' candidates as arrays: what every channel adds to every item, by method, and which items are relevant.

    Only items among the first DEPTH of some channel are laid out; `merged` is the real merge of all.

    gains[method] (B, W, C) float32; items of a user ascend along W, so equal scores go to the smaller row, as in `merge`.
    """

    def __init__(self, channels: Sequence[str], results: Sequence[ChannelResult], relevant: Relevant, config: MergeConfig) -> None:
        B, C = len(relevant), len(channels)
        self.channels, self.relevant, self.config, self.results = tuple(channels), relevant, config, list(results)
        whole = config.model_copy(update={"limit": max(1, sum(r[0].shape[1] for r in results)), "minimum_share": {}})
        found = merge(channels, [(items[:, :DEPTH], scores[:, :DEPTH]) for items, scores in results], whole, n_queries=B)
        order = np.argsort(np.where(found.items == UNKNOWN, np.iinfo(np.int32).max, found.items), axis=1, kind="stable")
        self.items = np.take_along_axis(found.items, order, 1)  # (B, W)
        self.filled = self.items != UNKNOWN
        self.hit = hits(self.items, relevant)
        self.gains: dict[Method, np.ndarray] = {}
        for method in METHODS:
            parts = np.zeros((*self.items.shape, C), np.float32)
            for c, name in enumerate(channels):
                alone = whole.model_copy(update={"method": method, "weights": {n: float(n == name) for n in channels}})
                got = merge(channels, results, alone, n_queries=B)
                parts[:, :, c] = _looked_up(self.items, got.items, got.scores)
            self.gains[method] = parts

    def take(self, rows: np.ndarray) -> Slate:
        """The same of some of the users."""
        out = object.__new__(Slate)
        out.channels, out.config = self.channels, self.config
        out.results = [(items[rows], scores[rows]) for items, scores in self.results]
        sizes, at = self.relevant.sizes[rows], self.relevant.indptr
        out.relevant = Relevant(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([self.relevant.items[at[r] : at[r + 1]] for r in rows]) if len(rows) else self.relevant.items[:0],
        )
        out.items, out.filled, out.hit = self.items[rows], self.filled[rows], self.hit[rows]
        out.gains = {method: parts[rows] for method, parts in self.gains.items()}
        return out

    def ndcg(self, method: Method, weights: np.ndarray) -> np.ndarray:
        """(B,) NDCG@10 of every user under (C,) weights; NaN for one without relevant items."""
        scores = self.gains[method] @ weights.astype(np.float32)  # (B, W)
        scores[~self.filled] = -np.inf
        k = min(TOP, scores.shape[1])
        if k == 0:
            return np.where(self.relevant.sizes > 0, 0.0, np.nan)
        # Only hits can count: a hit's place is one more than those above it, and those beside it with a smaller row.
        b, w = np.nonzero(self.hit)
        mine = scores[b, w][:, None]
        above = (scores[b] > mine).sum(1) + ((scores[b] == mine) & (np.arange(scores.shape[1])[None, :] < w[:, None])).sum(1)
        gain = np.where(above < TOP, 1 / np.log2(above + 2), 0.0)
        sizes = self.relevant.sizes
        ideal = np.concatenate([[np.nan], np.cumsum(1 / np.log2(np.arange(2, TOP + 2)))])[np.minimum(sizes, TOP)]
        values: np.ndarray = np.bincount(b, gain, minlength=len(sizes)) / ideal
        return values

    def merged(self, method: Method, weights: np.ndarray) -> np.ndarray:
        """(B, limit) items of the real merge under these weights."""
        named = dict(zip(self.channels, weights.tolist(), strict=True))
        config = self.config.model_copy(update={"method": method, "weights": named})
        items: np.ndarray = merge(self.channels, self.results, config, n_queries=len(self.relevant)).items
        return items

    def judged(self, method: Method, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(B,) NDCG@10 and recall at `limit` of the real merge."""
        items = self.merged(method, weights)
        sizes = self.relevant.sizes
        head = at_k(items[:, :TOP], self.relevant, (TOP,))[f"ndcg@{TOP}"]
        return {"ndcg@10": head, "recall": hits(items, self.relevant).sum(1) / np.where(sizes > 0, sizes, np.nan)}


def learn(
    channels: Sequence[str],
    results: Sequence[ChannelResult],
    relevant: Relevant,
    given: MergeConfig,
    config: LearnConfig,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Blend:
    """Search weights and method for the C channels' lists ((B, k_c) items, scores) against B sets of relevant items.

    `groups` (B,) says which rows are one user's, so that none is on both sides of the cross-validation; equal seeds give equal
    weights. `given` is what was configured: the start, and what stays where nothing is clearly better.
    """
    slate = Slate(channels, results, relevant, given)
    rng = np.random.default_rng(seed)
    users = np.unique(groups) if groups is not None else np.arange(len(relevant))
    half = np.isin(groups if groups is not None else users, rng.permutation(users)[: len(users) // 2])
    start = np.array([given.weights.get(name, 1.0) for name in channels])
    search = _Search(config, given.method, start, np.random.default_rng([seed, 1]).uniform(0, 1, (config.restarts, len(start))), progress)
    before = slate.judged(given.method, start)
    after = {name: np.full(len(relevant), np.nan) for name in before}
    for chosen_on, judged_on in ((~half, half), (half, ~half)):
        if not judged_on.any():
            continue
        best = search.best(slate.take(np.flatnonzero(chosen_on))) if chosen_on.any() else _Setting(given.method, start, 0.0)
        part = slate.take(np.flatnonzero(judged_on))
        for name, values in part.judged(*best[:2]).items():
            after[name][judged_on] = values
    best = search.best(slate)
    weights = np.round(best.weights / max(best.weights.max(), 1e-12), 3)
    change = after["ndcg@10"] - before["ndcg@10"]
    low, high = interval(change)
    gain = mean_of_users(change)
    clear = np.isfinite(low) and gain > (high - low) / 2 / 1.96  # one standard error
    return Blend(
        best.method,
        dict(zip(channels, weights.tolist(), strict=True)),
        bool(clear),
        {name: mean_of_users(values) for name, values in before.items()},
        {name: mean_of_users(values) for name, values in after.items()},
        gain,
        (low, high),
        len(users),
        search.tried,
        {name: mean_of_users(at_k(items, relevant, (TOP,))[f"ndcg@{TOP}"]) for name, (items, _) in zip(channels, results, strict=True)},
    )


def _looked_up(items: np.ndarray, among: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(B, W) items -> their (B, W) scores in the lists `among` (B, N), 0 where they are not there."""
    span = int(max(items.max(initial=0), among.max(initial=0))) + 2
    b, n = np.nonzero(among != UNKNOWN)
    keys = b * span + among[b, n]
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], scores[b, n][order]
    wanted = np.arange(len(items))[:, None] * span + items
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    found = (keys[at] == wanted) & (items != UNKNOWN) if len(keys) else np.zeros(items.shape, bool)
    return np.where(found, values[at] if len(keys) else 0, 0).astype(np.float32)


class _Search:
    """Coordinate ascent from several starts, for every method."""

    def __init__(self, config: LearnConfig, method: Method, start: np.ndarray, restarts: np.ndarray, progress: Progress | None) -> None:
        self.config, self.method, self.start, self.progress, self.tried = config, method, start, progress, 0
        C = len(start)
        foremost = np.full((C, C), 0.1) + 0.9 * np.eye(C)
        self.starts = [start, *([np.ones(C)] if (start != 1).any() else []), *restarts]
        self.foremost = list(foremost)

    def best(self, slate: Slate) -> _Setting:
        """The setting with the highest NDCG@10 among those that keep recall at `limit`."""
        floor = mean_of_users(slate.judged(self.method, self.start)["recall"]) - self.config.loss
        given = self._at(slate, self.method, self.start)
        peaks = [given]
        for method in METHODS:
            begun = [self._at(slate, method, weights) for weights in self.starts]
            begun.append(max((self._at(slate, method, weights) for weights in self.foremost), key=lambda s: s.ndcg))
            peaks += [self._climb(slate, setting) for setting in begun]
        # What is cheap to know orders them; the real merge has the last word on what is lost.
        for setting in sorted(peaks, key=lambda s: -s.ndcg):
            if mean_of_users(slate.judged(setting.method, setting.weights)["recall"]) >= floor:
                return setting
        return given

    def _at(self, slate: Slate, method: Method, weights: np.ndarray) -> _Setting:
        self.tried += 1
        if self.progress is not None:
            self.progress(1)
        value = mean_of_users(slate.ndcg(method, weights))
        return _Setting(method, weights, value if np.isfinite(value) else 0.0)

    def _climb(self, slate: Slate, setting: _Setting) -> _Setting:
        """One weight at a time, each to the best of its neighbours, until a round changes nothing."""
        for _ in range(3):
            before = setting.ndcg
            for c in range(len(setting.weights)):
                here = setting.weights[c]
                for value in [here * step for step in STEPS] if here > 0 else FROM_NOTHING:
                    weights = setting.weights.copy()
                    weights[c] = value
                    if weights.max() > 0:
                        tried = self._at(slate, setting.method, weights / weights.max())
                        if tried.ndcg > setting.ndcg + TOLERANCE:
                            setting = tried
            if setting.ndcg <= before + TOLERANCE:
                break
        return setting
