"""Many channels' lists become one list of candidates per query, without duplicates and with provenance.

Nothing here loops over queries or items: a batch is sorted once by (query, item), and what each channel said of an
item ends up side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from recsys.core import UNKNOWN, Candidates, FrozenConfig
from recsys.recall.order import best_first, by_key

ChannelResult: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A channel's answer: ((B, k) int32 items, (B, k) float32 scores), best first."""

MAX_RANK = 32_767  # channel_ranks are int16


class MergeConfig(FrozenConfig):
    method: Literal["rank", "rrf", "min_max"] = "min_max"
    """How an item's places in the channels become one score, summed over channels times their weights. `min_max`: the channel's
    own scores, scaled to 0..1 within the query. `rrf`: 1 / (rrf_k + rank) (Cormack et al., 2009). `rank`: from 1 for a channel's
    first down towards 0 at its quota."""
    rrf_k: NonNegativeFloat = 60.0
    """Flattens reciprocal ranks: the larger, the less the very first places count."""
    limit: PositiveInt = 500
    """Candidates kept per query."""
    quota: PositiveInt = 200
    """Items taken from each channel that `quotas` does not name."""
    quotas: dict[str, PositiveInt] = Field(default_factory=dict)
    """Items taken from a channel, by its name."""
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Weight of a channel, by its name; 1 where absent."""
    learn: bool = False
    """Learn weights and method on validation data when the recommender is trained. Those above are the start, and what stays
    where nothing does clearly better."""
    minimum_share: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Share of `limit` that a channel's first items are sure of, by its name; together at most 1."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (total := sum(self.minimum_share.values())) > 1 + 1e-9:
            raise ValueError(f"minimum_share of all channels is {total:g} together; it can be 1 at most, the whole of limit.")
        if (top := max([self.quota, *self.quotas.values()])) > MAX_RANK:
            raise ValueError(f"a quota is {top}; {MAX_RANK} is the most, because ranks travel as 16-bit numbers.")
        return self

    def quota_of(self, channel: str) -> int:
        """Items to ask of a channel."""
        return self.quotas.get(channel, self.quota)

    def at_depth(self, depth: int) -> Self:
        """This, but letting at least `depth` items of each channel and of all together through: for pages deeper than usual."""
        if depth <= min([self.limit, self.quota, *self.quotas.values()]):
            return self
        quotas = {c: min(max(q, depth), MAX_RANK) for c, q in self.quotas.items()}
        return self.model_copy(update={"limit": max(self.limit, depth), "quota": min(max(self.quota, depth), MAX_RANK), "quotas": quotas})

    def sure_of(self, channel: str) -> int:
        """How many first places of a channel are never cut."""
        return int(self.minimum_share.get(channel, 0.0) * self.limit + 1e-9)


class _Slots(NamedTuple):
    """The channels' lists side by side: (B, M) items and scores; of each of the M columns its channel and rank."""

    items: np.ndarray
    scores: np.ndarray
    channel: np.ndarray
    rank: np.ndarray


def merge(channels: Sequence[str], results: Sequence[ChannelResult], config: MergeConfig, *, n_queries: int) -> Candidates:
    """C channels' ((B, k_c) items, (B, k_c) scores), each best first -> Candidates, at most `config.limit` per query.

    Ties go to the smaller item row. A score that is not finite makes its slot empty. A minimum share counts a channel's
    first places; what a channel leaves of it is free for all. n_queries is B, also where no channel answered anything.
    """
    names = tuple(channels)
    quotas = [min(config.quota_of(c), result[0].shape[1]) for c, result in zip(names, results, strict=True)]
    if not sum(quotas) or not n_queries:
        return Candidates.empty(n_queries, names)
    slots = _Slots(
        np.concatenate([items[:, :q] for (items, _), q in zip(results, quotas, strict=True)], axis=1),
        np.concatenate([scores[:, :q] for (_, scores), q in zip(results, quotas, strict=True)], axis=1).astype(np.float32, copy=False),
        np.repeat(np.arange(len(names)), quotas),
        np.concatenate([np.arange(1, q + 1, dtype=np.int16) for q in quotas]),
    )
    M = slots.items.shape[1]
    filled = np.flatnonzero((slots.items >= 0) & np.isfinite(slots.scores))
    if not filled.size:
        return Candidates.empty(n_queries, names)
    gains = _gains(names, quotas, slots, config).ravel()
    sure = slots.rank <= np.array([config.sure_of(c) for c in names])[slots.channel]  # (M,)

    # One sort by (query, item) brings the slots of an item together, in the order of the channels.
    span = int(slots.items.max()) + 1
    keys = filled // M * span + slots.items.ravel()[filled]
    order = by_key(keys, n_queries * span)
    keys, at = keys[order], filled[order]
    new = np.concatenate([[True], keys[1:] != keys[:-1]])
    starts = np.flatnonzero(new)  # (U,): one entry per distinct (query, item)
    query = keys[starts] // span
    column = np.arange(len(starts)) - np.searchsorted(query, np.arange(n_queries))[query]  # place within its query

    dense = np.full((n_queries, int(column.max()) + 1), -np.inf, np.float32)  # (B, W), items ascending
    dense[query, column] = np.add.reduceat(gains[at], starts)
    reserved = np.zeros(dense.shape, bool)
    reserved[query, column] = np.logical_or.reduceat(sure[at % M], starts)
    place = _places(dense, reserved, config.limit)  # (B, W): where an entry goes, or -1
    kept = place >= 0
    scores = np.full((n_queries, int(place.max()) + 1), -np.inf, np.float32)  # (B, N)
    scores[np.nonzero(kept)[0], place[kept]] = dense[kept]
    slot_place = place[query, column][np.cumsum(new) - 1]
    return _candidates(names, slots, scores, at[slot_place >= 0], slot_place[slot_place >= 0])


def _gains(names: tuple[str, ...], quotas: list[int], slots: _Slots, config: MergeConfig) -> np.ndarray:
    """What each of the (B, M) slots adds to its item's score."""
    weight = np.array([config.weights.get(c, 1.0) for c in names], np.float32)[slots.channel]
    if config.method == "rrf":
        gain = 1 / (config.rrf_k + slots.rank.astype(np.float32))
    elif config.method == "rank":
        gain = 1 - (slots.rank - 1) / np.array([config.quota_of(c) for c in names], np.float32)[slots.channel]
    else:
        gain = _min_max(quotas, slots)
    gains: np.ndarray = np.broadcast_to((gain * weight).astype(np.float32), slots.items.shape)
    return gains


def _min_max(quotas: list[int], slots: _Slots) -> np.ndarray:
    """Each channel's scores scaled to 0..1 within the query; a channel whose scores are all one gives 1 to each."""
    scaled = np.ones(slots.items.shape, np.float32)
    valid = (slots.items >= 0) & np.isfinite(slots.scores)
    for stop, q in zip(np.cumsum(quotas), quotas, strict=True):
        part, ok = slots.scores[:, stop - q : stop], valid[:, stop - q : stop]
        if q:
            low = np.where(ok, part, np.inf).min(1, keepdims=True)
            low = np.where(np.isfinite(low), low, 0)  # no slot of the query is filled
            part = np.where(ok, part, low) - low
            high = part.max(1, keepdims=True)
            np.divide(part, high, out=scaled[:, stop - q : stop], where=ok & (high > 0))
    return scaled


def _places(dense: np.ndarray, reserved: np.ndarray, limit: int) -> np.ndarray:
    """(B, W) merged scores, -inf where empty -> (B, W) place of each entry in its query's list, -1 where it is cut or empty."""
    B, W = dense.shape
    order = best_first(dense, W)
    place = np.broadcast_to(np.arange(W), (B, W))
    if limit < W and reserved.any():
        # Those who are sure of their place take it first; the rest share what remains, and all stand by score again.
        sure = np.take_along_axis(reserved, order, 1)
        keep = sure | (np.cumsum(~sure, 1) <= limit - sure.sum(1, keepdims=True))
        place = np.where(keep, np.cumsum(keep, 1) - 1, limit)
    out = np.empty((B, W), np.int64)
    np.put_along_axis(out, order, place, 1)
    out[(out >= limit) | np.isneginf(dense)] = -1
    return out


def _candidates(names: tuple[str, ...], slots: _Slots, scores: np.ndarray, at: np.ndarray, place: np.ndarray) -> Candidates:
    """Lay out the kept slots: `at` are their flat positions in (B, M), `place` where their items stand in the lists."""
    B, N = scores.shape
    query, slot = np.divmod(at, slots.items.shape[1])
    channel = slots.channel[slot]
    items = np.full((B, N), UNKNOWN, np.int32)
    channel_scores = np.full((B, N, len(names)), np.nan, np.float32)
    channel_ranks = np.zeros((B, N, len(names)), np.int16)
    items[query, place] = slots.items.ravel()[at]
    channel_scores[query, place, channel] = slots.scores.ravel()[at]
    channel_ranks[query, place, channel] = slots.rank[slot]
    return Candidates(items, scores, names, channel_scores, channel_ranks)
