"""What the merge's weights are learnt from: the base funnel's lists for users of the window and of validation, never the test.

A question is asked as the test will ask it: leave-one-out by single moments, time by users at their first event of the part,
a split at random by users with all that base knows of them.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recsys.core import UNKNOWN, Queries
from recsys.data.split import Split
from recsys.funnel import Funnel
from recsys.held_out import after_training, before_first
from recsys.metrics import Relevant
from recsys.moments import Moments
from recsys.prepared import Prepared
from recsys.recall.blend import Blend, LearnConfig, Progress, learn
from recsys.recall.merge import ChannelResult, MergeConfig

log = logging.getLogger(__name__)
CHUNK = 512


class Questions(NamedTuple):
    """B questions: their queries by rows, the relevant items of each, and (B,) whose they are."""

    ask: Callable[[np.ndarray], Queries]
    relevant: Relevant
    groups: np.ndarray


def questions(prepared: Prepared, moments: Moments, base: np.ndarray, rows: np.ndarray, *, most: int, seed: int) -> Questions:
    """At most `most` questions about the positives at log positions `rows`, of which `base` (E,) knows nothing."""
    rows = np.sort(rows[prepared.log.positive[rows]])
    if prepared.split.by == "leave_one_out":
        if len(rows) > most:
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        wanted = [
            [] if item in had else [item]
            for start in range(0, len(rows), CHUNK)
            for item, had in zip(
                prepared.log.item[rows[start : start + CHUNK]].tolist(), moments.queries(rows[start : start + CHUNK]).exclude, strict=True
            )
        ]
        return Questions(lambda at: moments.queries(rows[at]), Relevant.of(wanted), prepared.log.user[rows])
    sought = np.zeros(len(prepared.log), bool)
    sought[rows] = True
    ask = after_training if prepared.split.by == "random" else before_first
    stand_in = replace(prepared, split=Split(base, np.zeros_like(sought), sought, prepared.split.by))
    held_out = ask(stand_in, moments, most=most, seed=seed)
    return Questions(held_out.queries, held_out.relevant, held_out.users)


def lists(funnel: Funnel, asked: Questions, merge: MergeConfig) -> list[ChannelResult]:
    """Every channel's ((B, k) items, (B, k) scores) for all questions, -1 and -inf where it has no more."""
    B = len(asked.relevant)
    out: list[ChannelResult] = []
    for name in funnel.channels:
        k = min(merge.quota_of(name), len(funnel.items))
        out.append((np.full((B, k), UNKNOWN, np.int32), np.full((B, k), -np.inf, np.float32)))
    for start in range(0, B, CHUNK):
        at = np.arange(start, min(start + CHUNK, B))
        queries = asked.ask(at)
        for (items, scores), channel in zip(out, funnel.channels.values(), strict=True):
            found, values = channel.recall(queries, items.shape[1])
            items[at, : found.shape[1]], scores[at, : found.shape[1]] = found, values
    return out


def blend(
    funnel: Callable[[], Funnel],
    asked: Callable[[int], Questions],
    given: MergeConfig,
    folder: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Blend:
    """The learnt blend, from `folder` where it was learnt already."""
    kept = folder / "blend.json"
    if kept.exists():
        return Blend.from_json(json.loads(kept.read_text()))
    config, base = LearnConfig(), funnel()
    about = asked(config.max_users)
    found = learn(
        tuple(base.channels), lists(base, about, given), about.relevant, given, config, groups=about.groups, seed=seed, progress=progress
    )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".blend-{uuid.uuid4().hex[:8]}.json"
    unfinished.write_text(json.dumps(found.as_json(), indent=1))
    unfinished.replace(kept)
    return found


def told(found: Blend) -> list[str]:
    """The blend in sentences: what each channel is worth by itself, its weight, and the gain."""
    low, high = found.interval
    verdict = "taken" if found.taken else "not clear of its standard error: what was configured stays"
    weights = ", ".join(f"{name} {weight:g} (alone {found.alone.get(name, float('nan')):.4f})" for name, weight in found.weights.items())
    return [
        f"merge weights ({found.method}; NDCG@10 of each channel alone): {weights}",
        f"merged NDCG@10 {found.before['ndcg@10']:.4f} -> {found.after['ndcg@10']:.4f}, gain {found.gain:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"recall at the limit {found.before['recall']:.4f} -> {found.after['recall']:.4f}; cross-validated over {found.users:,} users, "
        f"{found.tried:,} settings: {verdict}",
    ]
