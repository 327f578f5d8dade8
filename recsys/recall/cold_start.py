"""Cold start: who leads the page of a user without a history, the models or what is known of him before he has done anything.

The ladder; a new user stands on the first rung that knows something of him:
    interests   content, by what his profile or the request's context declares (likes, genres, a category he came to)
    segment     what is popular with his kind: by a user column of his profile, or a column of the context
    content     what is made of the same things as the few that he took, where `below` is above 1
    popular     what is popular with everybody
The rung's channel leads: its scores and the models' are each scaled to 0..1 within the query and mixed by the rung's weight, at
every cut and in the order of the page. Weight 0 leaves all to the models, 1 gives the channel's own order. A page names its rung.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from recsys.core import UNKNOWN, Candidates, FrozenConfig, Queries, Recaller
from recsys.recall.content import Content
from recsys.recall.merge import ChannelResult
from recsys.recall.popular import Popular
from recsys.recall.popular_segment import SegmentPopular

Rung = Literal["interests", "segment", "content", "popular"]
RUNGS: tuple[Rung, ...] = ("interests", "segment", "content", "popular")
Share = Annotated[float, Field(ge=0, le=1)]


def _by_default() -> dict[Rung, float]:
    return {"interests": 0.5}


class ColdStartConfig(FrozenConfig):
    below: NonNegativeInt = 1
    """A user with fewer events than this in his history is new; 0: nobody is."""
    ladder: tuple[Rung, ...] = RUNGS
    """A new user stands on the first of these that knows something of him: interests that his profile or the context declares
    (channel content), his segment (popular_segment), the few items he took (content), everybody (popular). A rung without its
    channel under recall.channels is passed over."""
    weights: dict[Rung, Share] = Field(default_factory=_by_default)
    """How much of a new user's order is that of his rung's channel, 0 to 1, the rest being the models'; 0 where absent."""
    learn: bool = True
    """Choose the weight of each rung when the recommender is trained, where the log is split by time: the users of validation are asked
    for as if they were new. Those above stay where nothing does clearly better or fewer than 50 users stand on the rung."""


def stand(
    queries: Queries, config: ColdStartConfig, channels: Mapping[str, Recaller], found: Mapping[str, ChannelResult]
) -> np.ndarray | None:
    """(B, 2) int16: the rung of each query as its place in RUNGS from 1, and the leading channel's number among `found`; (0, -1) for a
    user who is not new. None where nobody is. A rung whose channel has no item for the query, as under a filter, is passed over.
    """
    new = np.flatnonzero((queries.history != UNKNOWN).sum(1) < config.below)
    if not len(new):
        return None
    asked, numbers = queries.take(new), {name: n for n, name in enumerate(found)}
    out = np.tile(np.array([0, UNKNOWN], np.int16), (len(queries), 1))
    open_ = np.ones(len(new), bool)
    for rung in config.ladder:
        for name, channel in channels.items():
            if not open_.any():
                return out
            knows = _knows(rung, channel, asked)
            if knows is not None and name in found and found[name][0].shape[1]:
                knows = knows & open_ & (found[name][0][new, 0] != UNKNOWN)
                out[new[knows]] = RUNGS.index(rung) + 1, numbers[name]
                open_ &= ~knows
    out[new[open_]] = RUNGS.index("popular") + 1, UNKNOWN  # nobody has an item: an empty page, or the models' own
    return out


def _knows(rung: Rung, channel: Recaller, queries: Queries) -> np.ndarray | None:
    """(B,) of whom a channel knows what a rung asks for; None where it is no channel of that rung."""
    if rung == "interests" and isinstance(channel, Content):
        return channel.declares(queries)
    if rung == "segment" and isinstance(channel, SegmentPopular):
        found: np.ndarray = channel.segments(queries) != UNKNOWN
        return found
    if rung == "content" and isinstance(channel, Content):
        known: np.ndarray = (queries.history != UNKNOWN).any(1)
        return known
    if rung == "popular" and isinstance(channel, Popular):
        return np.ones(len(queries), bool)
    return None


def rung_of(candidates: Candidates | None, b: int) -> Rung | None:
    """The rung of one query; None for a user who is not new, and where no recall was made."""
    if candidates is None or candidates.cold is None or not candidates.cold[b, 0]:
        return None
    return RUNGS[int(candidates.cold[b, 0]) - 1]


def led(candidates: Candidates, scores: np.ndarray, config: ColdStartConfig) -> np.ndarray | None:
    """(B, N) what orders the candidates that the models gave these (B, N) scores: for a new user the mix with his rung's channel, for
    others the scores. None where the scores alone do."""
    if candidates.cold is None or not candidates.width:
        return None
    by_rung = np.array([0.0, *(config.weights.get(rung, 0.0) for rung in RUNGS)])
    weight = np.where(candidates.cold[:, 1] == UNKNOWN, 0.0, by_rung[candidates.cold[:, 0]])
    rows = np.flatnonzero(weight)
    return mixed(candidates, scores, rows, weight[rows]) if len(rows) else None


def mixed(candidates: Candidates, scores: np.ndarray, rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(B, N) scores, in which `rows` (n,) are mixed with their leading channel's by weights (n,)."""
    assert candidates.cold is not None  # noqa: S101 - asked by those who saw it
    lead = candidates.cold[rows, 1].astype(np.int64)
    filled = candidates.items[rows] != UNKNOWN
    recalled = candidates.channel_ranks[rows, :, lead] > 0  # (n, N)
    w = weight[:, None].astype(np.float32)
    mix = (1 - w) * _scaled(scores[rows], filled) + w * np.where(recalled, _scaled(candidates.channel_scores[rows, :, lead], recalled), 0)
    out = scores.astype(np.float32)
    out[rows] = np.where(filled, mix, -np.inf)
    return out


def _scaled(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(n, N) float32 shares of the way from 0, or from the row's smallest where that is below, to the row's largest."""
    known = valid & np.isfinite(scores)
    low = np.where(known, scores, 0).min(1, keepdims=True)
    above = np.where(known, scores, low) - low
    high = above.max(1, keepdims=True)
    out: np.ndarray = np.divide(above, high, out=np.zeros(above.shape, np.float32), where=high > 0, casting="unsafe")
    return out
