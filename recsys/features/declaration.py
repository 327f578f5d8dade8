"""The `features` section of a configuration: ids, history, aggregates, and the defaults of every declared column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field as Bound
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr

from recsys.core import FrozenConfig
from recsys.data.columns import Combiner
from recsys.data.sources import AGAINST
from recsys.features.aggregates import AggregateConfig


class IdConfig(FrozenConfig):
    dim: PositiveInt | None = None
    """Width of the id's embedding (default: features.dim)."""
    min_count: PositiveInt | None = None
    """Ids with fewer training events share the unknown rows (default: features.min_count)."""
    hash_buckets: PositiveInt | None = None
    """Rows for unknown and rare ids (default: features.hash_buckets)."""


class HistoryConfig(FrozenConfig):
    length: PositiveInt = 50
    """Newest events kept per user, in the examples and in the store."""
    recent: NonNegativeInt = 5
    """The newest few of them are pooled once more by themselves, as feature `recent`: what a user does now. 0: no such feature."""
    events: tuple[str, ...] | None = None
    """Event types that enter a user's history. Default: all but impression, view and what data.refusals names."""
    refused: PositiveInt = 500
    """Newest refused items kept per user, beside the history and whatever its length."""
    refused_days: PositiveFloat = 365.0
    """Days after which a refusal is forgotten, by the time of its event. One that the user repeats begins anew."""
    seen: NonNegativeInt = 1_000
    """Newest items kept per user of those that fell off the history, for recall.exclude_seen alone: with that off none are. Whoever did
    no more than `length` things costs nothing. Others take the id and 10 bytes an item, and at the limit up to a quarter more: with
    ids of 7 characters 0.9 kB after 100 events, 16 kB after 1,000 and never more than 22 kB."""
    combiner: Combiner = "mean"
    """How the history's item embeddings become one; none keeps each, for models that attend."""

    _refusals: tuple[str, ...] = PrivateAttr(default=AGAINST)

    def refusing(self, events: Sequence[str]) -> Self:
        """The same with these types of events as refusals: they are declared in data.refusals, which both roads read."""
        if self._refusals == tuple(events):
            return self
        out = self.model_copy()
        out._refusals = tuple(events)
        return out

    def refuses(self, event: str) -> bool:
        """Whether an event of this type refuses its item."""
        return event in self._refusals

    def admits(self, event: str) -> bool:
        """Whether an event of this type enters the history: a refusal never does."""
        if self.refuses(event):
            return False
        return event in self.events if self.events is not None else event not in {"impression", "view"}

    @property
    def refused_s(self) -> float:
        """`refused_days` in seconds."""
        return self.refused_days * 86_400.0


class FeaturesConfig(FrozenConfig):
    dim: PositiveInt = 16
    """Width of an embedding whose column states none."""
    min_count: PositiveInt = 1
    """Values seen less often share the unknown rows, where a column states no min_count."""
    hash_buckets: PositiveInt = 1
    """Rows for unknown values, where a column states none."""
    user_id: IdConfig = IdConfig()
    """The user's own id as a feature."""
    item_id: IdConfig = IdConfig()
    """The item's own id as a feature; the history shares its table."""
    history: HistoryConfig = HistoryConfig()
    """What of a user's past a model sees."""
    aggregates: dict[str, AggregateConfig] = Bound(default_factory=dict)
    """Counters, rates, lists and crosses of past events, as inputs of the fine ranker: name -> {kind, key, window, ...}, such as
    `item_ctr: {kind: rate, key: item, window: 7d}` or `user_tag_ctr: {kind: rate, key: [user, tag], until: day}`. Kinds: count,
    sum, mean, rate, min, max, recency, last, first, distinct, match, ratio, product, concat; see recsys/features/aggregates.py."""
    utc_offset_h: float = Bound(default=0.0, ge=-14, le=14)
    """How many hours the days of `until: day` and the hours and weekdays of keys are ahead of UTC."""
    lateness_s: NonNegativeFloat = 300.0
    """How late an event may come and still find its exact place in the aggregates; later ones are counted all the same."""

    @property
    def utc_offset_s(self) -> float:
        """`utc_offset_h` in seconds."""
        return self.utc_offset_h * 3_600.0
