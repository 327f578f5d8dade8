"""How far the ladder leads new users, learnt: the users of validation are asked for as if they came for the first time.

What is popular most of them had long ago, and are not shown again: the models look better than they are for newcomers, so that a
weight which helps even here is safe to take. A split by time alone is learnt from: the last item but one of each user, or any row
drawn at random, is even less what newcomers begin with.

The recall and the ranker answer once; every weight after that is a mix of two arrays. As with the merge's weights the gain is
cross-validated, chosen on half of the users and measured on the other, and what was configured stays unless the gain is clear
of its standard error. Rungs on which too few stand keep what was configured: no log knows of interests that nobody declared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from recsys.blending import CHUNK, Questions
from recsys.core import UNKNOWN, Candidates, Queries
from recsys.funnel import Funnel
from recsys.metrics import at_k, interval, mean_of_users
from recsys.recall.cold_start import RUNGS, ColdStartConfig, Rung, mixed

SPLITS = ("time", "parts")
MOST = 2_000
"""Users asked for: enough for a standard error of NDCG@10 near .003."""
FEWEST = 50
"""Users on a rung, below which its weight is not learnt."""
GRID = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
TOP = 10


@dataclass(frozen=True)
class Learnt:
    """Of one rung: NDCG@10 of its users by each weight of GRID and by what was configured, what was chosen, and the cross-validated gain."""

    rung: Rung
    users: int
    by_weight: dict[float, float]
    weight: float
    gain: float
    low: float
    taken: bool

    def told(self) -> str:
        """In a sentence."""
        curve = ", ".join(f"{w:g}: {v:.4f}" for w, v in self.by_weight.items())
        verdict = f"{self.weight:g} is taken" if self.taken else "not clear of its standard error: what was configured stays"
        return f"new users on rung '{self.rung}' ({self.users:,} asked), NDCG@10 by weight of its channel: {curve}; gain {self.gain:+.4f}, {verdict}"


def strangers(funnel: Funnel, queries: Queries) -> Queries:
    """The same users without a history, by an id that nobody has seen; their rows of the user table stay, and what they had stays excluded."""
    out = queries.take(np.arange(len(queries)))
    out.history = np.full((len(out), 1), UNKNOWN, np.int32)
    out.history_times = np.full((len(out), 1), np.nan)
    out.memo["fields"] = funnel.space.estranged(funnel.user_fields(out), out, np.ones(len(out), bool))
    return out


def learn(funnel: Funnel, asked: Questions, given: ColdStartConfig, *, seed: int = 0) -> list[Learnt]:
    """The weight of each rung on which enough users stand. The funnel must know nothing of what is sought."""
    whole = copy.copy(funnel)
    most = funnel.config.recall.merge.limit
    whole.config = funnel.config.model_copy(
        update={
            "coarse_rank": funnel.config.coarse_rank.model_copy(update={"keep": most}),  # a cut would depend on the weights
            "fine_rank": funnel.config.fine_rank.model_copy(update={"keep": most}),
            "cold_start": given.model_copy(update={"weights": {}, "below": max(given.below, 1)}),
        }
    )
    B = len(asked.relevant)
    rungs = np.zeros(B, np.int16)
    weights = (*GRID, *sorted(set(given.weights.values()) - set(GRID)))
    tops = np.full((len(weights), B, TOP), UNKNOWN, np.int32)
    for start in range(0, B, CHUNK):
        at = np.arange(start, min(start + CHUNK, B))
        queries = strangers(whole, asked.ask(at))
        ranked = whole.fine_rank(queries, whole.coarse_rank(queries, whole.recall(queries)))
        if ranked.cold is not None:
            rungs[at] = np.where(ranked.cold[:, 1] == UNKNOWN, 0, ranked.cold[:, 0])
        for w, weight in enumerate(weights):
            first = _first(ranked, weight)
            tops[w, at, : first.shape[1]] = first
    values = np.array([at_k(top, asked.relevant, (TOP,))[f"ndcg@{TOP}"] for top in tops])  # (W, B)
    users = np.unique(asked.groups)
    half = np.isin(asked.groups, np.random.default_rng(seed).permutation(users)[: len(users) // 2])
    out = []
    for n, rung in enumerate(RUNGS, start=1):
        on = (rungs == n) & ~np.isnan(values[0])
        if len(np.unique(asked.groups[on])) >= FEWEST:
            out.append(_chosen(rung, weights, values[:, on], half[on], weights.index(given.weights.get(rung, 0.0))))
    return out


def _first(ranked: Candidates, weight: float) -> np.ndarray:
    """(B, <= TOP) items in the order of the mix."""
    rows = np.flatnonzero(ranked.cold[:, 1] != UNKNOWN) if ranked.cold is not None else np.empty(0, np.int64)
    by = mixed(ranked, ranked.scores, rows, np.full(len(rows), weight)) if len(rows) else ranked.scores
    items: np.ndarray = ranked.ranked(ranked.scores, TOP, stage=ranked.stage, by=by).items
    return items


def _chosen(rung: Rung, weights: tuple[float, ...], values: np.ndarray, half: np.ndarray, given: int) -> Learnt:
    """values (W, n) NDCG@10 by weight and user; half (n,) bool splits the users."""
    change = np.full(values.shape[1], np.nan)
    for chosen_on, judged_on in ((half, ~half), (~half, half)):
        if chosen_on.any() and judged_on.any():
            best = int(values[:, chosen_on].mean(1).argmax())
            change[judged_on] = values[best, judged_on] - values[given, judged_on]
    low, high = interval(change)
    gain = mean_of_users(change)
    clear = bool(np.isfinite(low) and gain > (high - low) / 2 / 1.96)
    best = int(values.mean(1).argmax())
    by_weight = {w: float(v) for w, v in zip(weights, values.mean(1), strict=True)}
    return Learnt(rung, values.shape[1], by_weight, weights[best], gain, low, clear and best != given)


def taken(found: list[Learnt], given: ColdStartConfig) -> ColdStartConfig:
    """The configuration with the weights that did clearly better."""
    return given.model_copy(update={"weights": {**given.weights, **{one.rung: one.weight for one in found if one.taken}}})
