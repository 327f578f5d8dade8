"""What is trending follows the events of the service: consumers count, snapshots carry, every loaded version's channel takes over."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np

from cluster.ingest import Ingest
from cluster.redis_store import connected
from cluster.snapshots import SnapshotReader
from deployments.live_counters import CountersFollower
from recsys.core import Queries, Query, Vocabulary
from recsys.data.interactions import Interactions
from recsys.features.counting import Counting, trending_plan
from recsys.features.keys import KeyColumns
from recsys.features.snapshot import decayed_counts, packed_snapshot, unpacked_snapshot
from recsys.features.store import NewEvent
from recsys.features.stream import Stream
from recsys.recall.trending import Trending, TrendingConfig
from tests.cluster.consumers import DATA, config_of, drained, told

ITEMS = Vocabulary(["a", "b", "c", "d"])
USERS = Vocabulary(["u0"])
DAY = 86_400.0


def trained(**settings) -> Trending:
    """a is taken 6 times before and 2 in the last day, b 2 and 4, c and d never: b rises, when the log ends."""
    taken = [(0, 0.0)] * 6 + [(1, 0.0)] * 2 + [(0, 5 * DAY)] * 2 + [(1, 5 * DAY)] * 4
    log = Interactions.of([0] * 14, [i for i, _ in taken], [t for _, t in taken], users=USERS, items=ITEMS)
    return TrendingConfig(**{"smoothing": 1.0, "live_events": 8.0} | settings).build().fit(log)


def asked(channel: Trending, k: int = 4) -> list[int]:
    query = Query("u0", 0, k, 0.0, np.empty(0, np.int32), np.empty(0), {}, {}, np.empty(0, np.int32))
    return [int(i) for i in channel.recall(Queries.of([query], history_length=5), k)[0][0] if i >= 0]


def test_the_list_of_training_is_worked_out_by_hand():
    """R = 6, N = 8, I = 4: expected a 6 * 7/12 = 3.5, b 6 * 3/12 = 1.5, c and d .5; ratios a 3/4.5, b 5/2.5, c and d 1/1.5."""
    channel = trained()
    np.testing.assert_allclose(channel.scores, [0, 2, 0, 0])
    assert asked(channel) == [1]
    assert channel.ranked.at is None


def test_live_counts_replace_it_by_hand():
    """Before: a 8, b 6 (N = 14, with m I = 18); live a 1, b 2, c 9 (R = 12): expected a 6, b 14/3, c and d 2/3; ratio c 10/(5/3) = 6."""
    channel = trained()
    assert channel.follow(np.array([1.0, 2.0, 9.0, 0.0]), at=77.0)
    np.testing.assert_allclose(channel.scores, [0, 0, 6, 0])
    assert asked(channel) == [2]
    assert channel.ranked.at == 77.0


def test_few_live_events_leave_the_list_of_training(tmp_path):
    channel = trained()
    assert not channel.follow(np.array([0.0, 0.0, 7.9, 0.0]), at=77.0)
    assert asked(channel) == [1]
    assert channel.follow(np.array([0.0, 0.0, 8.0, 0.0]), at=78.0)
    assert not channel.follow(np.zeros(4), at=79.0)
    assert asked(channel) == [1], "a night without events"
    channel.follow(np.array([0.0, 0.0, 8.0, 0.0]), at=78.0)
    channel.save(tmp_path)
    again = Trending.load(tmp_path, channel.config)
    assert asked(again) == [1], "a bundle holds what was trained"
    assert again.follow(np.array([1.0, 2.0, 9.0, 0.0]), at=77.0)
    np.testing.assert_allclose(again.scores, [0, 0, 6, 0], rtol=1e-6)


def test_parts_of_two_times_are_weighed_as_of_the_older():
    """Half-life 6 h: 4 events of b counted 6 h after the older part's time were 8 then; z is nobody's item."""
    plan = trending_plan(6.0)
    parts = {}
    for p, (item, n, at) in enumerate((("a", 3, 1e9), ("b", 4, 1e9 + 6 * 3600), ("z", 5, 1e9))):
        stream = Stream(plan, USERS, ITEMS, KeyColumns())
        for k in range(n):
            event = NewEvent("u0", item, "click", round(1000 * at), None, str(k))
            row = Counting.of("", None, None, DATA, config_of(".").history, trending_half_life_h=6.0).read(event, k)
            for number, key, touched in stream.touched(row):
                stream.add(stream.of_items, number, key, touched)
        parts[p] = unpacked_snapshot(packed_snapshot(plan, stream.of_items, at, [n]))
    counts, at = decayed_counts(parts, plan.groups[0], ITEMS)
    np.testing.assert_allclose(counts, [3, 8, 0, 0])
    assert at == 1e9
    assert decayed_counts({}, plan.groups[0], ITEMS)[1] == 0.0


def test_events_of_the_service_reach_the_channel_and_their_age_is_told(valkey, tmp_path):
    """Nine likes of c: it trends in every version that is loaded, one without aggregates among them."""
    config, url = config_of(tmp_path, snapshot_every_s=0.01), valkey.url
    now = round(1000 * time.time())
    one, other = trained(), trained(live_events=100.0)
    funnels = [SimpleNamespace(version=v, live=None, items=ITEMS, channels={"trending": t}) for v, t in (("v1", one), ("v2", other))]
    follower = CountersFollower(config, url, lambda: funnels)

    async def scenario():
        events = [NewEvent(f"u{k}", "c", "click", now, None, f"e{k}") for k in range(9)]
        await told(config, url, [*events, NewEvent("u0", "d", "impression", now, None, "shown")])
        ingest = Ingest(
            config, url, lambda held: None if held else Counting.of("", None, None, DATA, config.history, trending_half_life_h=6.0)
        )
        redis = connected(url)
        reader = SnapshotReader(redis, config.store.prefix, config.store.partitions)
        assert follower.state() == {"staleness_s": None, "trending_staleness_s": None, "versions": []}
        follower.apply(reader)
        assert asked(one) == [1], "nothing was published"
        await drained(ingest)
        await ingest.publish()
        await reader.read()
        follower._round += 1
        follower.apply(reader)
        await ingest.close()
        await redis.aclose()

    asyncio.run(scenario())
    assert asked(one) == [2]
    assert asked(other) == [1], "its configuration wants a hundred events"
    state = follower.state()
    assert state["versions"] == ["v1", "v2"]
    assert 0 <= state["trending_staleness_s"] < 60
