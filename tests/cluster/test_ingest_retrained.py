"""A version made from the event log itself takes over: each event is counted once, in its states or on top of them. By hand.

One user `u0`, one item `i0`, one partition. The training log holds 2 of u0's clicks on i0; 3 come in live and are taken by a
retrained version; 4 more come before it is promoted and 1 after: 10 in all, whatever was where when the versions changed.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.ingest import Ingest
from cluster.redis_store import RedisStore, connected
from recsys.features.aggregates import AggregateConfig
from recsys.features.counting import Counting
from recsys.features.covered import Covered, packed_since, unpacked_since
from recsys.features.generate import Instant
from recsys.features.groups import Plan, Row, compiled
from recsys.features.store import NewEvent
from recsys.features.stream import Stream
from tests.cluster.consumers import COLUMNS, DATA, ITEMS, USERS, archived_all, config_of, drained, told

START = 1_600_000_000.0
OLD = {"user_n": {"kind": "count", "key": "user"}, "item_n": {"kind": "count", "key": "item"}}
NEW = OLD | {"user_shop_n": {"kind": "count", "key": ["user", "shop"]}, "shop_n": {"kind": "count", "key": "shop"}}


def plan_of(declared: dict) -> Plan:
    aggregates = {name: AggregateConfig.model_validate(a) for name, a in declared.items()}
    return compiled(aggregates, priors={}, lateness_s=0.0, offset_s=0.0, gap_s=1_800.0)


def version(name: str, declared: dict, clicks: int, covered: Covered) -> Counting:
    """A version whose training log held so many clicks of u0 on i0."""
    stream = Stream(plan_of(declared), USERS, ITEMS, COLUMNS)
    for n in range(clicks):
        stream.apply(Row(time=START + n, position=n, user_id="u0", item_id="i0", event="click"))
    return Counting.of(
        name,
        stream.plan,
        stream,
        DATA,
        config_of(".").history,
        trending_half_life_h=6.0,
        seed_user=lambda user_id: dict(stream.of_user.get(user_id, {})),
        covered=covered,
    )


def clicks(first: int, n: int, user: str = "u0") -> list[NewEvent]:
    return [NewEvent(user, "i0", "click", int(1000 * START) + 60_000 * k, None, f"{user}-{k}", None, None) for k in range(first, first + n)]


async def counted(config, url, declared: dict, user: str = "u0") -> dict[str, float]:
    """Every declared count of a user and i0 as the store has it; absent where it has no state."""
    store = RedisStore(url, config.store, config.history)
    (held,) = await store.read([user], timeout_s=5.0)
    await store.close()
    stream = Stream(plan_of(declared), USERS, ITEMS, COLUMNS)
    stream.of_user = {user: stream.unpack(held.counters)}
    redis = connected(url)
    values = [v for p in range(config.store.partitions) for v in await redis.hvals(f"{config.store.prefix}:{{{p}}}:items")]
    await redis.aclose()
    stream.of_items = stream.unpack(b"".join(values))
    return stream.values(user, "i0", {}, Instant(time.time(), 1 << 62))


def swap(ingest: Ingest, to: Counting) -> None:
    ingest._load = lambda held: to if held != to.version else None


FIRST = version("v1", OLD, 2, Covered(None, 1000 * START + 1_000))
"""Trained on a file that ended long before the event log began."""


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("declared", [OLD, NEW], ids=["same declarations", "new declarations"])
def test_each_event_counts_once_when_a_retrained_version_takes_over(url, tmp_path, declared, partitions):
    config = config_of(tmp_path, partitions=partitions)

    async def scenario():
        ingest = Ingest(config, url, lambda held: FIRST if held != "v1" else None)
        await told(config, url, clicks(0, 3))
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 5.0, "item_n": 5.0}
        await ingest.archiving.all()
        taken = {p: o.archive.manifest.n for p, o in ingest.held.owned.items()}
        retrained = version("v2", declared, 5, Covered(taken))  # 2 of the file, 3 of the log
        await told(config, url, clicks(3, 4))
        await archived_all(ingest)
        swap(ingest, retrained)
        await ingest.reload()
        await told(config, url, clicks(7, 1))
        await drained(ingest)
        assert await counted(config, url, declared) == dict.fromkeys(declared, 10.0)
        # another process takes over, and knows nothing but what the store says
        await ingest.give_free()
        await ingest.close()
        after = Ingest(config, url, lambda held: retrained if held != "v2" else None)
        await told(config, url, clicks(8, 1))
        await drained(after)
        assert await counted(config, url, declared) == dict.fromkeys(declared, 11.0)
        await after.close()

    asyncio.run(scenario())


def test_what_a_versions_states_hold_is_not_counted_again_where_the_store_lost_its_counters(url, tmp_path):
    """The log is there from the beginning, the counters and positions are not: 3 of its 4 events are in the seeds."""
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        await told(config, url, clicks(0, 4) + clicks(0, 1, "u1"))
        retrained = version("v2", OLD, 5, Covered({0: 3}))
        ingest = Ingest(config, url, lambda held: retrained if held != "v2" else None)
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 6.0, "item_n": 7.0}  # u1's click is of i0 too
        assert (await counted(config, url, OLD, "u1"))["user_n"] == 1.0
        await ingest.give_free()
        await ingest.close()
        # what the item side began with is known to the next owner: it is at entry 5 of 5 and counts one more
        after = Ingest(config, url, lambda held: retrained if held != "v2" else None)
        await told(config, url, clicks(4, 1))
        await drained(after)
        assert await counted(config, url, OLD) == {"user_n": 7.0, "item_n": 8.0}
        await after.close()

    asyncio.run(scenario())


def test_a_user_all_of_whose_events_are_in_the_seeds_is_left_to_the_version(url, tmp_path):
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        await told(config, url, clicks(0, 3))
        retrained = version("v2", OLD, 5, Covered({0: 3}))
        ingest = Ingest(config, url, lambda held: retrained if held != "v2" else None)
        await drained(ingest)
        store = RedisStore(url, config.store, config.history)
        (held,) = await store.read(["u0"], timeout_s=5.0)
        assert held.counters == b""
        assert (await counted(config, url, OLD))["item_n"] == 5.0
        await told(config, url, clicks(3, 1))
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 6.0, "item_n": 6.0}
        await store.close()
        await ingest.close()

    asyncio.run(scenario())


def test_an_overlapping_file_covers_what_the_log_took_before_it_ended(url, tmp_path):
    """A version of a file that ended now: the log's events until now stand in it, one that comes in late does not."""
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        await told(config, url, clicks(0, 3))
        await asyncio.sleep(0.02)
        from_file = version("v1", OLD, 5, Covered(None, 1000 * time.time()))
        await asyncio.sleep(0.02)
        await told(config, url, clicks(3, 1))  # happened long ago, came in now
        ingest = Ingest(config, url, lambda held: from_file if held != "v1" else None)
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 6.0, "item_n": 6.0}
        await ingest.close()

    asyncio.run(scenario())


def test_events_counted_before_there_was_a_version_are_caught_up_with(url, tmp_path):
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        nothing = Counting.of("", None, None, DATA, config.history, trending_half_life_h=6.0)
        ingest = Ingest(config, url, lambda held: None if held else nothing)
        await told(config, url, clicks(0, 3))
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 0.0, "item_n": 0.0}
        swap(ingest, FIRST)
        await ingest.reload()
        await drained(ingest)
        assert await counted(config, url, OLD) == {"user_n": 5.0, "item_n": 5.0}
        await ingest.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("where", ["read", "of_user", "of_items", "add_items"])
def test_an_event_that_a_new_declaration_cannot_take_is_passed_over_in_catching_up(url, tmp_path, caplog, where):
    """Of 4 clicks, 2 in Parquet and 2 behind it, the version cannot count the second: 2 of the training log and 3 are left."""
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        nothing = Counting.of("", None, None, DATA, config.history, trending_half_life_h=6.0)
        ingest = Ingest(config, url, lambda held: None if held else nothing)
        await told(config, url, clicks(0, 2))
        await archived_all(ingest)
        await told(config, url, clicks(2, 2))
        await drained(ingest)
        odd = version("v1", OLD, 2, Covered(None, 1000 * START + 1_000))
        call = getattr(odd, where)

        def broken(*given):
            told_at = (
                min((e.time for told in given[1].values() for e in told), default=0)
                if where == "add_items"
                else given[0].time_ms / 1000
                if where == "read"
                else given[0].time
            )
            if told_at == START + 60:
                raise ZeroDivisionError("planted")
            return call(*given)

        setattr(odd, where, broken)
        swap(ingest, odd)
        await ingest.reload()
        await drained(ingest)
        found = await counted(config, url, OLD)
        await ingest.close()
        return found

    short = {"read": {"user_n", "item_n"}, "of_user": {"user_n"}, "of_items": {"item_n"}, "add_items": {"item_n"}}[where]
    assert asyncio.run(scenario()) == {name: 5.0 if name in short else 6.0 for name in OLD}
    assert "entry=1 is passed over in catching up: It could not be counted (ZeroDivisionError: planted)." in caplog.text


def test_a_declaration_that_goes_and_comes_back_is_not_behind(url, tmp_path):
    """v2 counts by shop, v1 does not: what came while v1 was back is counted when v2 is, too."""
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        ingest = Ingest(config, url, lambda held: FIRST if held != "v1" else None)
        await told(config, url, clicks(0, 3))
        await archived_all(ingest)
        second = version("v2", NEW, 5, Covered({0: 3}))
        for turn, (counting, declared) in enumerate(((second, NEW), (FIRST, OLD), (second, NEW))):
            swap(ingest, counting)
            await ingest.reload()
            await told(config, url, clicks(3 + turn, 1))
            await archived_all(ingest)
            assert await counted(config, url, declared) == dict.fromkeys(declared, 6.0 + turn)
        await ingest.close()

    asyncio.run(scenario())


def test_what_is_covered_comes_back_from_text():
    since = {b"abcd": Covered({0: 3, 2: 5}), b"\0\1\2\3": Covered(None, 17.0), b"none": Covered()}
    again = unpacked_since(packed_since(since))
    assert again == since
    assert [again[b"abcd"].holds(p, n, 0) for p, n in ((0, 2), (0, 3), (1, 0), (2, 4))] == [True, False, False, True]
    assert [again[b"\0\1\2\3"].holds(0, 99, ms) for ms in (17, 18)] == [True, False]
    assert not again[b"none"].holds(0, 0, 0)
    assert unpacked_since(None) == {}
