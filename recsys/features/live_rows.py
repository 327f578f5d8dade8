"""Live events as rows of the streaming road: what an event of the log says to the declared aggregates.

The rules are those that a file of events is read by. An event may be an exposure (a rate's trial): in a log of impressions only
an `impression` is, and a click is the hit of one; in any other log every event is a trial of its own, and where such a log names
no events, an `impression` is no event of it and counts nowhere. It is a positive by the
first label's test where that label is of the event's value, else what `sources.is_positive` says of its type. Every other label is the event
type of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from recsys.data.sources import IMPRESSION, DataConfig, LabelConfig, is_positive
from recsys.features.declaration import HistoryConfig
from recsys.features.groups import Row
from recsys.features.store import NewEvent


def row_reader(data: DataConfig, history: HistoryConfig) -> Callable[[NewEvent, int], Row]:
    """A function of an event and its log position."""
    names = list(data.labels)
    values = {"value", "rating", data.interactions.value}
    rule = data.labels[names[0]] if names and data.labels[names[0]].column in values else None
    impressions, refusals = data.impressions, data.refusals
    uncounted = IMPRESSION if data.leaves_out_impressions else None

    def read(event: NewEvent, position: int) -> Row:
        value = math.nan if event.value is None else event.value
        positive = is_positive(event.event, refusals)
        if positive and rule is not None and not math.isnan(value):
            positive = passes(rule, value)
        labels = {"positive": float(positive)}
        if rule is not None:
            labels[names[0]] = float(positive)
        return Row(
            time=event.time_ms / 1000,
            position=position,
            user_id=event.user_id,
            item_id=event.item_id,
            event=event.event,
            value=float(np.float32(value)),  # as the log's are kept; labels ask the value as it came, as of files
            labels=labels,
            context=event.context or {},
            shown=event.event == IMPRESSION or not impressions,
            told=history.admits(event.event),
            event_id=event.event_id,
            counted=event.event != uncounted,
        )

    return read


def passes(rule: LabelConfig, value: float) -> bool:
    """Whether a number passes a label's test, as `cleaning.label` has it."""
    if isinstance(rule.equals, str):
        return str(value) == rule.equals
    if rule.equals is not None:
        return value == float(rule.equals)
    return value >= rule.at_least if rule.at_least is not None else value > 0
