"""The configuration of `rayfunnel retrain`: what is held out of the new events, how far training goes on, what passes the gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from recsys.core import FrozenConfig

GateMetric = Literal["ndcg@5", "ndcg@10", "ndcg@20", "recall@10", "recall@20", "hit@10", "mrr@10"]


class GateConfig(FrozenConfig):
    """What a retrained version must show against the serving one, both asked about the same newest held-out events."""

    metric: GateMetric = "ndcg@10"
    """Mean over users, of the page before it is cut to a request's k."""
    at_least: float = -0.5
    """Least mean difference (new minus serving), in standard errors of the paired difference. Below 0 lets through what is as good
    but for chance: new ids and fresh counters are worth something too. 2 asks for proof that it is better."""
    users: PositiveInt = 5_000
    """Users asked at most, drawn at random."""


class RetrainConfig(FrozenConfig):
    """`rayfunnel retrain`: go on from the serving version with the events that came since."""

    min_events: PositiveInt = 100
    """Fewer new events than this are left to the next time."""
    held_out: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the new events, the newest of them, that both versions are judged on."""
    valid: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the new events, those before, that early stopping looks at. What is left is learnt from first."""
    epochs: PositiveInt = 2
    """Passes over the new events and the replayed ones, where training goes on from the serving version's weights."""
    replay: NonNegativeFloat = 2.0
    """Old positives replayed beside each new one, drawn at random, so that what is old is not forgotten."""
    learning_rate: PositiveFloat = 0.3
    """Share of the configured learning rates that is in force where training goes on."""
    click_window_h: PositiveFloat = 24.0
    """How long after a logged page an event of its request, or after an `impression` a click of its item, still makes that item a
    positive for the fine ranker."""
    gate: GateConfig = GateConfig()
    """What must hold for a version to be published and promoted."""
