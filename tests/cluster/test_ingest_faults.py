"""Ingestion while things die: the store killed under load, its memory budget reached, clocks that disagree."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from cluster.embedded import EmbeddedValkey
from cluster.ingest import Ingest
from cluster.ingest_run import Consumers, IngestStatus
from cluster.redis_store import RedisStore, connected
from recsys.data import event_files
from recsys.errors import StoreUnavailableError
from tests.cluster.consumers import (
    archived,
    archived_all,
    config_of,
    each_is_in_parquet_once,
    load,
    same_as_the_batch_road,
    some_events,
    told,
    until,
)
from tests.cluster.valkey_process import kill


def test_no_accepted_event_is_lost_or_counted_twice_while_the_store_is_killed_under_load(tmp_path):
    config = config_of(tmp_path)
    events = some_events(300)

    async def scenario(server):
        url = server.url
        store = RedisStore(url, config.store, config.history)
        ingest = Ingest(config, url, load)
        run = asyncio.create_task(ingest.run())
        refused = 0

        async def tell():
            nonlocal refused
            for event in events:
                while True:
                    try:
                        await store.append([event])
                        break
                    except StoreUnavailableError:  # what POST /v1/events answers 503 to; the client tries again
                        refused += 1
                        await asyncio.sleep(0.01)

        telling = asyncio.create_task(tell())
        for _ in range(2):
            await asyncio.sleep(0.15)
            await asyncio.to_thread(kill, server)
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.check)
        await telling
        status = IngestStatus(config, url)

        async def caught_up():
            said = await status.read()
            return said["events"] == 300 and not (said["lag"] or said["items_lag"] or said["parquet_lag"])

        await until(caught_up, patience_s=60)
        ingest.stop()
        await run
        await status.close()
        await store.close()
        await same_as_the_batch_road(config, url, tmp_path)
        return refused

    with EmbeddedValkey(tmp_path / "store") as server:
        assert asyncio.run(scenario(server)) > 0, "the store was never away"
    each_is_in_parquet_once(tmp_path, events)


def test_a_store_that_was_emptied_goes_on_behind_what_is_in_parquet(tmp_path):
    config = config_of(tmp_path, partitions=2, keep_h=9.0)
    events = some_events(60)

    async def scenario(url):
        redis = connected(url)
        for some in (events[:40], events[40:]):
            await told(config, url, some)
            ingest = Ingest(config, url, load)
            await archived_all(ingest)
            await ingest.close()
            status = IngestStatus(config, url)
            said = await status.read()
            await status.close()
            if some is not events[40:]:
                await redis.flushall()
        await redis.aclose()
        return said

    with EmbeddedValkey(tmp_path / "store") as server:
        said = asyncio.run(scenario(server.url))
    assert (said["events"], said["lag"], said["parquet_lag"], said["parquet_rows"]) == (60, 0, 0, 60)
    each_is_in_parquet_once(tmp_path, events)
    table = archived(tmp_path)
    for p, n in event_files.ends(str(tmp_path / "events")).items():
        mine = [r["position"] for r in table.to_pylist() if r["partition"] == p]
        assert mine == list(range(n)), "positions go on, and none is used twice"


def test_at_the_memory_budget_features_are_forgotten_and_the_log_never_and_it_says_so(tmp_path, caplog):
    """8 MB: histories and counters make room; when the log alone fills it, events are refused with a sentence."""
    config = config_of(tmp_path, partitions=2, batch=500)

    async def scenario(url):
        redis = connected(url)
        store = RedisStore(url, config.store, config.history)
        ingest = Ingest(config, url, load)
        await ingest.lead()
        accepted, said = 0, ""
        for n in range(200):
            many = [
                e._replace(user_id=f"u{n}-{i}", event_id=f"{n}-{i}", context={"tab": "1", "pad": "x" * 300})
                for i, e in enumerate(some_events(250, n))
            ]
            try:
                accepted += (await store.append(many)).accepted
                if n < 10:
                    await ingest.count_users()
            except StoreUnavailableError as fault:
                said = str(fault)
                break
        logged = sum([await redis.xlen(f"{config.store.prefix}:{{{p}}}:log") for p in range(2)])
        with caplog.at_level(logging.WARNING):
            await ingest.lead()
        status = IngestStatus(config, url)
        memory = (await status.read())["memory"]
        await status.close()
        while await ingest.count_users():
            pass
        await ingest.count_items()
        await ingest.archiving.all()
        freed = sum([await redis.xlen(f"{config.store.prefix}:{{{p}}}:log") for p in range(2)])
        after = (await store.append(some_events(5, 999))).accepted
        for one in (store, ingest):
            await one.close()
        await redis.aclose()
        return accepted, said, logged, memory, freed, after

    with EmbeddedValkey(tmp_path / "store", max_memory_mb=8) as server:
        accepted, said, logged, memory, freed, after = asyncio.run(scenario(server.url))
    assert "has reached its maxmemory, and the log is never evicted" in said
    assert logged >= accepted > 2_000
    assert memory["evicted_keys"] > 0
    assert (memory["budget_mb"], memory["policy"]) == (8.0, "volatile-lru")
    assert "never the log. Raise store.memory_mb" in caplog.text
    assert freed < logged, "Parquet and a trimmed log make room again"
    assert after > 0, "and events are taken again"


def test_an_event_ahead_of_the_clock_counts_at_its_time_and_spoils_nothing_behind_it(tmp_path):
    config = config_of(tmp_path, partitions=1)
    now = int(1000 * time.time())
    events = [e._replace(time_ms=now - 100_000 + 1_000 * i, event_id=str(i)) for i, e in enumerate(some_events(40))]
    events[3] = events[3]._replace(time_ms=now + 299_000)  # its sender's clock is five minutes ahead

    async def scenario(url):
        await told(config, url, events)
        ingest = Ingest(config, url, load)
        await archived_all(ingest)
        await ingest.close()
        await same_as_the_batch_road(config, url, tmp_path, at=now / 1000 + 400)

    with EmbeddedValkey(tmp_path / "store") as server:
        asyncio.run(scenario(server.url))


def test_what_nobody_foresaw_is_told_with_its_traceback_and_stops_no_task(url, tmp_path, caplog):
    """Leases are renewed by a task of their own: a task that ended would leave its partitions to nobody."""
    config = config_of(tmp_path)
    events = some_events(40)

    async def scenario():
        await told(config, url, events)
        ingest = Ingest(config, url, load)
        broken = {"users": (ingest._users, "step"), "items": (ingest._items, "step"), "parquet": (ingest.archiving, "write")}
        for name, (part, method) in broken.items():
            setattr(part, method, failing_once(name, getattr(part, method)))
        run = asyncio.create_task(ingest.run())
        status = IngestStatus(config, url)

        async def caught_up():
            said = await status.read()
            return said["events"] == 40 and not (said["lag"] or said["items_lag"] or said["parquet_lag"])

        await until(caught_up)
        ingest.stop()
        await run
        await status.close()
        await same_as_the_batch_road(config, url, tmp_path)

    def failing_once(name, call):
        left = [KeyError(f"planted in {name}")]

        async def step(*given, **named):
            if left:
                raise left.pop()
            return await call(*given, **named)

        return step

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    for name in ("users", "items", "parquet"):
        assert f"ingest {name}: this should not happen" in caplog.text
        assert f"KeyError: 'planted in {name}'" in caplog.text, "with its traceback"
    each_is_in_parquet_once(tmp_path, events)


def test_a_partition_that_goes_while_its_entries_are_read_is_left_alone(url, tmp_path):
    """`lead` gives partitions up while a step awaits the store, as it does for the marks of a log that repeats itself."""
    config = config_of(tmp_path, partitions=2)

    async def scenario():
        await told(config, url, some_events(14))
        ingest, other = Ingest(config, url, load), Ingest(config, url, load)
        await ingest.lead()
        batch = ingest.held.batch

        async def slow(partition, n, entries):
            out = await batch(partition, n, entries)
            if partition in ingest.held.owned:
                await ingest.held.store.renew({partition: ingest.held.owned.pop(partition).claim}, 0.0)
            return out

        ingest.held.batch = slow
        await ingest.count_users()
        assert ingest.held.owned == {}
        await ingest.give_free()
        await archived_all(other)
        await same_as_the_batch_road(config, url, tmp_path)
        assert sum(h.rows for h in await other.held.store.heads(range(2))) == 14
        await ingest.close()
        await other.close()

    asyncio.run(scenario())


@pytest.mark.ray
def test_an_actor_that_is_killed_goes_on_where_it_was(ray_cluster, tmp_path):
    import ray

    config = config_of(tmp_path, lease_s=1.0)
    events = some_events(200)

    async def caught_up(url, n):
        status = IngestStatus(config, url)

        async def done():
            said = await status.read()
            return said["events"] == n and not (said["lag"] or said["parquet_lag"])

        await until(done, patience_s=120)
        await status.close()

    with EmbeddedValkey(tmp_path / "store") as server:
        actor = ray.remote(Consumers).options(max_restarts=-1, max_task_retries=-1, num_cpus=0).remote(config, server.url)
        first = ray.get(actor.check.remote())["name"]
        asyncio.run(told(config, server.url, events[:100]))
        ray.kill(actor, no_restart=False)
        asyncio.run(told(config, server.url, events[50:]))
        assert ray.get(actor.check.remote(), timeout=60)["name"] != first
        asyncio.run(caught_up(server.url, 200))
        ray.get(actor.stop.remote())
        ray.kill(actor)
    each_is_in_parquet_once(tmp_path, events)
