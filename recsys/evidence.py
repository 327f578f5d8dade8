"""What the earlier stages say of a candidate, as dense features of the fine ranker.

Per channel: whether it recalled the item, its score against that channel's best among the candidates, and its rank on a
log scale; then the score of the merge against its best, and the coarse score. The same lines run when examples are drawn and when a request is served.
"""

from __future__ import annotations

import numpy as np

from recsys.core import Candidates
from recsys.features.schema import Field

EVIDENCE = "evidence"
"""The name of the field."""

_DEEPEST = np.log1p(1_000.0)


def evidence_field(n_channels: int) -> Field:
    """The declaration of the dense field that `evidence` fills: 3 columns a channel, one of the merge, one of the coarse stage."""
    return Field(name=EVIDENCE, side="candidate", shape="dense", table="", size=0, dim=0, width=3 * n_channels + 2)


def evidence(candidates: Candidates) -> np.ndarray:
    """(B, N, 3C + 2) float32. An item that no channel recalled (as when items are given) has zeros and the deepest rank."""
    found = candidates.channel_ranks > 0  # (B, N, C)
    scores = np.where(found, candidates.channel_scores, 0).astype(np.float32)
    best = np.abs(scores).max(axis=1, keepdims=True, initial=1e-9)
    depth = np.where(found, np.log1p(candidates.channel_ranks.astype(np.float32)) / _DEEPEST, 1).astype(np.float32)
    empty = np.zeros(candidates.scores.shape, np.float32)
    merged = empty if candidates.merged is None else share_of_best(candidates.merged)
    coarse = np.where(np.isfinite(candidates.scores), candidates.scores, 0) if candidates.stage == "coarse_rank" else empty
    parts = [found.astype(np.float32), scores / best, depth, merged[:, :, None], coarse[:, :, None]]
    return np.concatenate(parts, axis=2, dtype=np.float32)


def share_of_best(merged: np.ndarray) -> np.ndarray:
    """(B, N) merged scores, -inf in empty slots -> (B, N) as shares of the row's largest; 0 in empty slots."""
    scores = np.where(np.isfinite(merged), merged, 0)
    share: np.ndarray = scores / np.abs(scores).max(axis=1, keepdims=True, initial=1e-9)
    return share


def unvouched(width: int) -> np.ndarray:
    """(width,) the evidence of an item that no channel recalled: nothing found, no score, the deepest rank."""
    says = np.zeros(width, np.float32)
    channels = (width - 2) // 3
    says[2 * channels : 3 * channels] = 1.0
    return says
