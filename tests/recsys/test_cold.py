"""Cold start on a small real data set: users without events, with one, and an item without any have sensible answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from tests.small import config_of, recipe_of, write_data

AT = 1_700_100_000.0
CHANNELS = "recall.channels={content: {type: content}, popular_segment: {type: popular_segment, by: country, minimum_events: 1}}"


@pytest.fixture(scope="module")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> Funnel:
    """Channels alone, no model. Even users (nl) take even items (red), odd ones (fr) odd items (blue); `cold` is red and has no event."""
    folder: Path = tmp_path_factory.mktemp("cold")
    write_data(folder)
    steps = recipe_of(config_of(folder, CHANNELS))
    found = steps.funnel(np.ones(len(steps.prepared.log), bool), None, None)
    found.channels = {name: found.channels[name] for name in ("content", "popular_segment")}
    return found


def recalled(funnel: Funnel, channel: str, request: FunnelRequest, k: int = 10) -> list[str]:
    items, _ = funnel.channels[channel].recall(funnel.queries([request]), k)
    return funnel.items.outside(items[0][items[0] >= 0])


@pytest.mark.parametrize(("country", "parity"), [("nl", 0), ("fr", 1)])
def test_a_user_without_events_gets_what_his_kind_likes(funnel, country, parity):
    items = recalled(funnel, "popular_segment", FunnelRequest("nobody", 10, AT, profile={"country": country}))
    assert [int(i[1:]) % 2 for i in items] == [parity] * 10
    assert recalled(funnel, "content", FunnelRequest("nobody", 10, AT)) == []  # nothing is known to compare by


def test_a_user_with_one_event_gets_what_is_like_it(funnel):
    event = StoredEvent("i7", "click", int(1000 * (AT - 60)), None, "e")
    items = recalled(funnel, "content", FunnelRequest("nobody", 10, AT, events=[event]))
    assert all(int(i[1:]) % 2 == 1 for i in items)
    assert abs(int(items[0][1:]) - 7) <= 4  # the nearest in price


def test_an_item_without_events_is_recalled_and_filtered_like_any_other(funnel):
    event = StoredEvent("i4", "click", int(1000 * (AT - 60)), None, "e")  # red, price 5, as `cold`
    assert recalled(funnel, "content", FunnelRequest("nobody", 10, AT, events=[event]), 1) == ["cold"]
    red = funnel.filters.parse({"colour": "red", "price": {"max": 6}})
    page = funnel.recall(funnel.queries([FunnelRequest("nobody", 10, AT, events=[event], filter=red)]))
    assert set(funnel.items.outside(page.items[0][page.items[0] >= 0])) == {"i0", "i2", "cold"}
