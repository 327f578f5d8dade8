"""From ranked candidates to the answer: ids, titles, which channels found each item, and how it came to its place."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recsys.core import UNKNOWN, Candidates, Queries, Vocabulary
from recsys.delta import Delta
from recsys.rerank.rules import REASONS, RULES


class PageItem(NamedTuple):
    """One item of an answer. `explain` holds {rank, score} per channel under `channels` and per stage under `stages`, and what rules did."""

    item_id: str
    score: float
    sources: list[str]
    title: str | None
    explain: dict[str, Any] | None
    propensity: float = 1.0
    """The probability with which it stands at its place; below 1 where places are explored."""


class LeftOut(NamedTuple):
    """A pin that a page does not have, and why."""

    item_id: str
    place: int
    reason: str


def pages(
    queries: Queries, candidates: Candidates, *, items: Vocabulary, titles: pa.Array | None, delta: Delta | None
) -> list[list[PageItem]]:
    """B answers, each with at most its query's k items, in the order of `candidates`. titles are by item row, those of `delta` go first.

    The score of an item is the fine score, before re-rank (or that of the last rung that ordered it).
    """
    known = (candidates.items != UNKNOWN) & (np.arange(candidates.width)[None, :] < queries.k[:, None])
    rows = candidates.items[known]
    ids, scores = items.outside(rows), candidates.scores[known].tolist()
    inside = np.where(rows < len(items), rows, UNKNOWN)
    called = titles.take(pa.array(inside, mask=inside < 0)).to_pylist() if titles is not None else [None] * len(ids)
    if delta is not None:
        called = [delta.title(row, title) for row, title in zip(rows.tolist(), called, strict=True)]
    bits = ((candidates.channel_ranks > 0) << np.arange(len(candidates.channels))).sum(2)[known].tolist()
    names = {m: [c for i, c in enumerate(candidates.channels) if m >> i & 1] for m in set(bits)}
    chance = candidates.trail[RULES][1][known].tolist() if RULES in candidates.trail else [1.0] * len(ids)
    flat = [PageItem(i, s, names[m], t, None, p) for i, s, m, t, p in zip(ids, scores, bits, called, chance, strict=True)]
    if queries.explain:
        where = np.argwhere(known)
        flat = [item._replace(explain=_explained(candidates, int(b), int(n))) for item, (b, n) in zip(flat, where, strict=True)]
    ends = np.cumsum(known.sum(1)).tolist()
    return [flat[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _explained(c: Candidates, b: int, n: int) -> dict[str, Any]:
    stages: dict[str, Any] = {s: {"rank": int(r[b, n]), "score": float(v[b, n])} for s, (r, v) in c.trail.items() if s != RULES}
    recalled = {
        name: {"rank": int(c.channel_ranks[b, n, i]), "score": float(c.channel_scores[b, n, i])}
        for i, name in enumerate(c.channels)
        if c.channel_ranks[b, n, i] > 0
    }
    told: dict[str, Any] = {"channels": recalled, "stages": stages}
    if RULES in c.trail:
        codes, chance = c.trail[RULES]
        told |= {"rule": REASONS[codes[b, n]], "propensity": float(chance[b, n])}
    return told
