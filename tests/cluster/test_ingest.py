"""Consumers of the event log: what they count is the streaming road's, whatever repeats, dies or cannot be read."""

from __future__ import annotations

import asyncio
import random
import time

import orjson
import pytest

from cluster.event_log import RedisLog
from cluster.ingest import Ingest
from cluster.ingest_status import dead_letters, status
from cluster.redis_store import connected
from cluster.snapshots import SnapshotReader
from recsys.features import counting as counting_module
from recsys.features import stream
from recsys.features.generate import Instant
from recsys.features.groups import Row
from recsys.features.packed import digest
from recsys.features.store import to_record
from tests.cluster.consumers import (
    END,
    PLAN,
    archived,
    archived_all,
    batch_road,
    config_of,
    counting,
    drained,
    each_is_in_parquet_once,
    held,
    load,
    same_as_the_batch_road,
    same_values,
    some_events,
    told,
)


def test_counters_in_the_store_are_those_of_the_streaming_road(url, tmp_path):
    config = config_of(tmp_path)

    async def scenario():
        await told(config, url, some_events(300))
        ingest = Ingest(config, url, load)
        await archived_all(ingest)
        await same_as_the_batch_road(config, url, tmp_path)
        await ingest.close()

    asyncio.run(scenario())


def test_duplicates_late_events_and_random_kills_change_nothing(url, tmp_path):
    """Consumers are dropped in the middle of whatever they do, and new ones go on from what the store says."""
    config = config_of(tmp_path, lease_s=0.05)
    rng = random.Random(1)
    events = some_events(400, 1, late_s=300)

    async def scenario():
        kills = 0
        sent = 0
        while sent < len(events) or kills < 12:
            ingest = Ingest(config, url, load)
            run = asyncio.create_task(ingest.run())
            for _ in range(rng.randrange(1, 6)):
                step = events[sent : sent + 20]
                sent += len(step)
                await told(config, url, step + rng.sample(events[: sent or 1], min(sent, 5)))
                await asyncio.sleep(rng.uniform(0, 0.03))
            run.cancel()  # wherever it is
            await asyncio.gather(run, return_exceptions=True)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await ingest.close()
            kills += 1
        await asyncio.sleep(0.1)
        last = Ingest(config_of(tmp_path, prefix=config.store.prefix, keep_h=1.0), url, load)
        await archived_all(last)
        await last.close()
        await same_as_the_batch_road(config, url, tmp_path)
        return kills

    assert asyncio.run(scenario()) >= 12
    each_is_in_parquet_once(tmp_path, events)


def test_an_older_owner_changes_nothing_once_another_has_the_partition(url, tmp_path):
    config = config_of(tmp_path, partitions=1, lease_s=0.05)

    async def scenario():
        await told(config, url, some_events(30))
        old, new = Ingest(config, url, load), Ingest(config, url, load)
        await old.lead()
        assert await old.count_users() == 7
        await asyncio.sleep(0.1)  # the lease of the old one runs out while it does not know
        await new.lead()
        assert list(new.held.owned) == [0]
        before = await old.held.store.heads([0])
        old._take = lambda p: asyncio.sleep(0)  # it must not simply take the partition back
        assert await old.count_users() == 0
        assert await old.held.store.heads([0]) == before
        assert old.held.owned == {}
        await drained(new)
        assert (await new.held.store.heads([0]))[0].rows == 30
        await old.close()
        await new.close()

    asyncio.run(scenario())


def test_a_step_whose_answer_was_lost_is_not_applied_twice(url, tmp_path):
    config = config_of(tmp_path, partitions=1)

    async def scenario():
        await told(config, url, some_events(7))
        ingest = Ingest(config, url, load)
        await ingest.lead()
        apply = ingest.held.store.apply

        async def lost(steps):
            await apply(steps)
            raise TimeoutError("the line went dead")

        ingest.held.store.apply = lost
        with pytest.raises(TimeoutError):
            await ingest.count_users()
        ingest.held.store.apply = apply
        await drained(ingest)
        await archived_all(ingest)
        await same_as_the_batch_road(config, url, tmp_path)
        assert (await ingest.held.store.heads([0]))[0].rows == 7
        await ingest.close()

    asyncio.run(scenario())


def test_what_cannot_be_read_is_a_dead_letter_with_its_reason_and_stops_nobody(url, tmp_path):
    config = config_of(tmp_path, partitions=1)
    good = some_events(3)
    future = good[0]._replace(time_ms=9_000_000_000_000, event_id="f")
    poison = {
        b"not json": "This is no record of an event",
        orjson.dumps([2, "u", "i"]): "version 2",
        orjson.dumps([1, "u"]): "This is no record of an event",
        orjson.dumps([1, "", "i1", "click", 5, None, "e", None, {}]): "'user_id' is '', expected text that is not empty.",
        orjson.dumps([1, "u1", "i\0k", "click", 5, None, "e", None, {}]): "'item_id' holds a NUL; expected at most 1024 bytes",
        orjson.dumps([1, "u" * 1_025, "i", "click", 5, None, "e", None, {}]): "'user_id' has 1025 bytes; expected at most 1024 bytes",
        orjson.dumps([1, "u1", 7, "click", 5, None, "e", None, {}]): "'item_id' is 7",
        orjson.dumps([1, "u1", "i", "click", "now", None, "e", None, {}]): "'time_ms' is 'now'",
        orjson.dumps([1, "u1", "i", "click", 5, "3", "e", None, {}]): "'value' is '3'",
        orjson.dumps([1, "u1", "i", "click", 5, None, "e", None, [1]]): "'context' is [1]",
        orjson.dumps([1, "u1", "i", "click", 5, 1e39, "e", None, {}]): "'value' is 1e+39, which is beyond what a value may be, 3.4e38.",
        b"": "This is no record of an event",
        to_record(future): "ahead of the clock that logged it",
    }

    async def scenario():
        redis = connected(url)
        await told(config, url, good[:1])
        for record in poison:
            await redis.xadd(f"{config.store.prefix}:{{0}}:log", {"e": record})
        await told(config, url, good[1:])
        ingest = Ingest(config, url, load)
        await archived_all(ingest)
        (head,) = await ingest.held.store.heads([0])
        assert (head.rows, head.dead, head.n) == (3, len(poison), 3 + len(poison))
        letters = await dead_letters(config, redis, 100)
        assert {letter["record"].encode() for letter in letters} == set(poison)
        for letter in letters:
            assert poison[letter["record"].encode()] in letter["why"], letter
        (said,) = await status(config, redis, RedisLog(redis, config.store.prefix))
        assert (said.lag, said.items_lag, said.dead, said.parquet_rows) == (0, 0, len(poison), 3)
        await ingest.close()
        await redis.aclose()

    asyncio.run(scenario())
    table = archived(tmp_path)
    assert table["event_id"].to_pylist() == [e.event_id for e in good]
    assert table["position"].to_pylist() == [0, len(poison) + 1, len(poison) + 2], "positions count dead letters too"


@pytest.mark.parametrize("tab", ["x" * 70_000, "a\0b", "é" * 513], ids=["as long as a page", "with a NUL", "of 1,026 bytes"])
def test_a_text_that_no_key_can_hold_is_missing_and_its_event_counts_under_the_other_keys(url, tmp_path, tab):
    config = config_of(tmp_path, partitions=1)
    events = some_events(20)
    events[7] = events[7]._replace(context={"tab": tab})

    async def scenario():
        redis = connected(url)
        await told(config, url, events)
        ingest = Ingest(config, url, load)
        await archived_all(ingest)
        (said,) = await status(config, redis, RedisLog(redis, config.store.prefix))
        assert (said.lag, said.items_lag, said.dead, said.parquet_rows) == (0, 0, 0, 20)
        await same_as_the_batch_road(config, url, tmp_path)
        await ingest.close()
        await redis.aclose()

    asyncio.run(scenario())


def test_an_event_that_a_line_of_ours_cannot_take_is_buried_and_its_user_goes_on(url, tmp_path):
    config = config_of(tmp_path, partitions=1)
    events = some_events(9)

    async def scenario():
        await told(config, url, events)
        ingest = Ingest(config, url, load)
        taken = ingest.held.counting.users.taken

        def broken(states, told):
            if any(event.position == 4 for (number, _), mine in told.items() for event in mine if number == 2):
                raise ZeroDivisionError("planted")
            return taken(states, told)

        ingest.held.counting.users.taken = broken
        await drained(ingest)
        (head,) = await ingest.held.store.heads([0])
        assert (head.rows, head.dead, head.n) == (8, 1, 9)
        user = events[4].user_id
        counted = (await held(config, url)).values(user, "i0", {}, Instant(END, 1 << 62))["n"]
        assert counted == sum(e.user_id == user for e in events) - 1, "wholly or not at all"
        await ingest.close()

    asyncio.run(scenario())


def test_an_event_that_no_key_of_an_item_can_take_stops_neither_its_item_nor_the_others(url, tmp_path):
    config = config_of(tmp_path, partitions=1)
    events = some_events(9)

    async def scenario():
        await told(config, url, events)
        ingest = Ingest(config, url, load)
        taken = ingest.held.counting.items.taken

        def broken(states, told):
            if any(event.position == 4 for mine in told.values() for event in mine):
                raise ZeroDivisionError("planted")
            return taken(states, told)

        ingest.held.counting.items.taken = broken
        await drained(ingest)
        found = (await held(config, url)).values
        newest = {i: found("u0", f"i{i}", {}, Instant(END, 1 << 62))["newest_value"] for i in range(5)}
        for i in range(5):
            clicks = [e for n, e in enumerate(events) if e.item_id == f"i{i}" and e.event == "click" and e.value is not None and n != 4]
            assert newest[i] == tuple(e.value for e in clicks[-2:])
        await ingest.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("parcel", [1, 4, 40])
def test_a_user_of_many_keys_keeps_those_with_the_newest_events_however_they_come(monkeypatch, parcel):
    monkeypatch.setattr(stream, "MOST_KEYS", 2)
    monkeypatch.setattr(counting_module, "MOST_KEYS", 2)
    one, states, written = counting(), {}, set()
    group = next(n for n, g in enumerate(one.users.plan.groups) if g.key == ("user", "tags"))
    tagged = ["i0", "i1", "i3", "i4", "i0", "i3"]  # a b, b, a c, c, a b, a c
    rows = [Row(float(1_000 * n), n, "u0", item, "click") for n, item in enumerate(tagged)]
    for a in range(0, len(rows), parcel):
        changed, gone = one.add_user(states, [t for row in rows[a : a + parcel] for t in one.of_user(row)])
        assert not changed & gone
        assert changed <= states.keys()
        assert not gone & states.keys()
        written = (written - gone) | changed
    assert {key for number, key in states if number == group} == {("u0", "a"), ("u0", "c")}
    assert written == states.keys(), "what the store was told is what is held"


def test_the_log_is_trimmed_only_behind_parquet_and_every_item_side(url, tmp_path):
    config = config_of(tmp_path, partitions=2)
    events = some_events(40)

    async def scenario():
        redis = connected(url)
        await told(config, url, events)

        async def entries():
            return sum([await redis.xlen(f"{config.store.prefix}:{{{p}}}:log") for p in range(2)])

        ingest = Ingest(config, url, load)
        await ingest.lead()
        while await ingest.count_users():
            pass
        await ingest.archiving.all()
        assert await entries() == 40, "the item side has not read it"
        await ingest.count_items()
        await ingest.archiving.all()
        assert await entries() == 0
        more = some_events(3, 9)
        await told(config, url, more)
        await ingest.count_users()
        await ingest.count_items()
        assert await entries() == 3, "not in Parquet yet"
        await ingest.archiving.all()
        assert await entries() == 0
        await ingest.close()
        await redis.aclose()
        return more

    more = asyncio.run(scenario())
    each_is_in_parquet_once(tmp_path, events + more)


def test_counters_that_the_store_had_to_forget_are_told_again_by_who_knows_them(url, tmp_path):
    config = config_of(tmp_path, partitions=1)
    events = some_events(40)

    async def scenario():
        redis = connected(url)
        await told(config, url, events[:30])
        ingest = Ingest(config, url, load)
        await drained(ingest)
        for part in [f"s:{u}" for u in ("u0", "u1", "u2")] + ["items"]:
            assert await redis.delete(f"{config.store.prefix}:{{0}}:{part}") == 1  # what eviction does
        await told(config, url, events[30:])
        await drained(ingest)
        await ingest.count_items()
        await ingest.archiving.all()
        await ingest.close()
        await redis.aclose()
        touched = {e.user_id for e in events[30:]}
        batch = batch_road(archived(tmp_path), at=END)
        known = {key: values for key, values in batch.items() if key[0] in touched | {"u3", "u4", "u5"}}
        same_values(await held(config, url), known, at=END)

    asyncio.run(scenario())


def test_partitions_are_shared_and_a_killed_ones_are_taken_over(url, tmp_path):
    config = config_of(tmp_path, partitions=4, lease_s=0.3)

    async def scenario():
        one, two = Ingest(config, url, load), Ingest(config, url, load)
        await one.lead()
        assert len(one.held.owned) == 4
        await two.lead()
        await one.lead()
        await two.lead()
        assert (len(one.held.owned), len(two.held.owned)) == (2, 2)
        assert set(one.held.owned) | set(two.held.owned) == {0, 1, 2, 3}
        await one.close()  # a kill: its leases stay
        await asyncio.sleep(0.35)
        await two.lead()
        assert len(two.held.owned) == 4
        await two.give_free()
        three = Ingest(config, url, load)
        await three.lead()
        assert len(three.held.owned) == 4, "what was given free can be taken at once"
        await two.close()
        await three.close()

    asyncio.run(scenario())


def test_snapshots_give_rankers_the_values_of_the_item_side(url, tmp_path):
    config = config_of(tmp_path, snapshot_every_s=0.01)

    async def scenario():
        await told(config, url, some_events(200))
        ingest = Ingest(config, url, load)
        await drained(ingest)
        assert await ingest.publish() == 3
        await ingest.close()
        redis = connected(url)
        reader = SnapshotReader(redis, config.store.prefix, 3)
        assert await reader.read() == 3
        assert await reader.read() == 0, "nothing newer"
        await redis.aclose()
        return reader.parts, await held(config, url)

    parts, live = asyncio.run(scenario())
    counts = {key: n for part in parts.values() for key, n in zip(*columns_of(part, 1), strict=True)}
    by_hand = {f"i{i}": sum(e.item_id == f"i{i}" and e.event in ("click", "like") for e in some_events(200)) for i in range(5)}
    assert counts.keys() == by_hand.keys()
    assert sorted(counts, key=counts.get) == sorted(counts, key=lambda i: counts[i])
    # every declared value of the item side, as the states say it at the snapshot's time
    at = min(part.at for part in parts.values())
    for number, group in enumerate(PLAN.groups):
        if "user" in group.key:
            continue
        held_keys = {k for n, k in live.of_items if n == number}
        shown = {
            tuple(k.split("\0"))
            for part in parts.values()
            if digest(group) in part.tables
            for k in part.tables[digest(group)]["key"].to_pylist()
        }
        assert shown == held_keys, group.key
    assert abs(at - time.time()) < 60


def test_a_snapshot_says_how_far_it_counts_also_when_it_is_due_in_the_middle_of_a_step(url, tmp_path):
    config = config_of(tmp_path, snapshot_every_s=0.01, batch=1_000)

    async def scenario():
        events = some_events(260)
        await told(config, url, events[:200])
        ingest = Ingest(config, url, load)
        await drained(ingest)
        await told(config, url, events[200:])
        while await ingest.count_users():
            pass
        count, due = ingest.held.store.count, []

        async def slow(steps):
            due.append(asyncio.create_task(ingest.publish()))  # the states hold the 60 new events, the positions do not yet
            await asyncio.sleep(0.1)
            return await count(steps)

        ingest.held.store.count = slow
        await ingest.count_items()
        assert [await task for task in due] == [3]
        await ingest.close()
        redis = connected(url)
        reader = SnapshotReader(redis, config.store.prefix, 3)
        await reader.read()
        await redis.aclose()
        return [sum(part.counted) for part in reader.parts.values()]

    assert asyncio.run(scenario()) == [260, 260, 260]


def columns_of(part, _width):
    """(items, amounts) of what is trending."""
    declared = {digest(g) for g in PLAN.groups}
    (table,) = [t for mark, t in part.tables.items() if mark not in declared]
    return table["key"].to_pylist(), table["0.0"].to_pylist()
