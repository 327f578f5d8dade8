"""What the earlier stages say of a candidate, as dense features of the fine ranker.

Per channel: whether it recalled the item, its score against that channel's best among the candidates, and its rank on a
log scale; then the coarse score. The same lines run when examples are drawn and when a request is served.
"""

from __future__ import annotations

import numpy as np

from recsys.core import Candidates
from recsys.features.schema import Field

EVIDENCE = "evidence"
"""The name of the field."""

_DEEPEST = np.log1p(1_000.0)


def evidence_field(n_channels: int) -> Field:
    """The declaration of the dense field that `evidence` fills: 3 columns a channel and one of the coarse stage."""
    return Field(name=EVIDENCE, side="candidate", shape="dense", table="", size=0, dim=0, width=3 * n_channels + 1)


def evidence(candidates: Candidates) -> np.ndarray:
    """(B, N, 3C + 1) float32. An item that no channel recalled (as when items are given) has zeros and the deepest rank."""
    found = candidates.channel_ranks > 0  # (B, N, C)
    scores = np.where(found, candidates.channel_scores, 0).astype(np.float32)
    best = np.abs(scores).max(axis=1, keepdims=True, initial=1e-9)
    depth = np.where(found, np.log1p(candidates.channel_ranks.astype(np.float32)) / _DEEPEST, 1).astype(np.float32)
    coarse = (
        np.where(np.isfinite(candidates.scores), candidates.scores, 0)
        if candidates.stage == "coarse_rank"
        else np.zeros_like(candidates.scores)
    )
    return np.concatenate([found.astype(np.float32), scores / best, depth, coarse[:, :, None]], axis=2, dtype=np.float32)
