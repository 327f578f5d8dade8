"""The store and its consumers on a cluster of three primaries and their replicas: what is spread, what dies, and what moves meanwhile."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from redis.crc import key_slot

from cluster.event_log import RedisLog
from cluster.ingest import Ingest
from cluster.ingest_run import IngestStatus
from cluster.redis_items import RedisItemLog
from cluster.redis_store import RedisStore, connected
from cluster.snapshots import SnapshotReader
from recsys.config import Config
from recsys.errors import StoreUnavailableError
from recsys.features.live_items import ItemChange
from recsys.features.store import NewEvent, partition_of
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
from tests.cluster.valkey_cluster import Node, ValkeyCluster, cluster_of_three, wait
from tests.cluster.valkey_process import SECRET

P = 4
"""Partitions: their slots lie on all three primaries."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[ValkeyCluster]:
    with cluster_of_three(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def three(whole: ValkeyCluster) -> Iterator[ValkeyCluster]:
    """The cluster, whole again behind whatever a test did to it."""
    yield whole
    whole.repair()


def key(config: Config, partition: int, part: str = "log") -> str:
    return f"{config.store.prefix}:{{{partition}}}:{part}"


def replicated(config: Config, n: int = 1, **settings) -> Config:
    return config.model_copy(update={"store": config.store.model_copy(update={"replicas_acked": n, **settings})})


class Teller:
    """Sends events one by one, each until it is accepted: what a client of POST /v1/events does about a 503."""

    def __init__(self, store: RedisStore) -> None:
        self.store, self.refused, self.accepted = store, 0, list[NewEvent]()

    async def tell(self, events: list[NewEvent]) -> None:
        for event in events:
            while True:
                try:
                    await self.store.append([event])
                    break
                except StoreUnavailableError:
                    self.refused += 1
                    await asyncio.sleep(0.02)
            self.accepted.append(event)

    async def read(self) -> None:
        """Reads beside it, as recommendations do: an answer or StoreUnavailableError, and nothing else."""
        while True:
            with suppress(StoreUnavailableError):
                await self.store.read([f"u{n}" for n in range(6)], timeout_s=1.0)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def consuming(config: Config, url: str, *, items: bool = True):
    """Consumers at work, and a store to tell events to; behind it all of them are counted and in Parquet."""
    store, ingest, status = RedisStore(url, config.store, config.history), Ingest(config, url, load), IngestStatus(config, url)
    run, teller = asyncio.create_task(ingest.run()), Teller(store)
    reading = asyncio.create_task(teller.read())

    async def caught_up() -> bool:
        try:
            said = await status.read()
        except StoreUnavailableError:
            return False
        return said["events"] >= len(teller.accepted) and not (said["lag"] or (items and said["items_lag"]) or said["parquet_lag"])

    try:
        yield teller
        await until(caught_up, patience_s=30)
        assert not reading.done(), reading.exception()
    finally:
        reading.cancel()
        ingest.stop()
        await run
        await status.close()
        await store.close()


def test_partitions_lie_on_three_nodes_and_all_is_as_on_one(three, tmp_path):
    config = config_of(tmp_path, partitions=P, snapshot_every_s=0.01)
    assert len({three.owner(key(config, p)).port for p in range(P)}) == 3

    async def scenario():
        events = some_events(120)
        await told(config, three.url, events)
        ingest = Ingest(config, three.url, load)
        await archived_all(ingest)
        await same_as_the_batch_road(config, three.url, tmp_path)
        assert await ingest.publish() == P
        client = connected(three.url)
        assert await SnapshotReader(client, config.store.prefix, P).read() == P
        log = RedisLog(client, config.store.prefix)
        assert sum(end.total for end in await log.ends(P)) == sum(await log.firsts(P)) == 120, "trimmed behind Parquet"
        store = RedisStore(three.url, config.store, config.history)
        await store.change_profiles({f"u{n}": {"age": n} for n in range(6)})
        assert [s.profile for s in await store.read([f"u{n}" for n in range(6)], timeout_s=5.0)] == [{"age": n} for n in range(6)]
        await store.ping()
        await store.close()
        await client.aclose()
        await ingest.give_free()
        await ingest.close()
        each_is_in_parquet_once(tmp_path, events)

    asyncio.run(scenario())
    items = RedisItemLog(three.url, config.store)
    items.change([ItemChange(f"i{n}", {"x": n}) for n in range(600)])
    assert [r.columns for r in items.since(0).records] == [{"x": n} for n in range(600)]
    items.show({"i1": 2})
    assert items.shown() == {"i1": 2}
    items.close()


@pytest.mark.parametrize("way", ["key by key", "at once"])
def test_a_slot_moves_to_another_node_while_its_partition_is_written_and_counted(three, tmp_path, way):
    """Key by key the scripts, whose keys are in two places for a while, are sent elsewhere (ASK) or told to try again."""
    config = replicated(config_of(tmp_path, partitions=P))
    events = some_events(300)
    where = partition_of("u0", P)
    slot = key_slot(key(config, where).encode())

    async def scenario():
        async with consuming(config, three.url) as teller:
            await teller.tell(events[:100])
            source = three.owner(key(config, where))
            target = next(n for n in three.primaries() if n is not source)
            telling = asyncio.create_task(teller.tell(events[100:]))
            await asyncio.to_thread(by_key if way == "key by key" else at_once, source, target, slot)
            await telling
            await asyncio.to_thread(wait, lambda: three.owner(key(config, where)) is target, "the slot has moved")
        await same_as_the_batch_road(config, three.url, tmp_path)

    def by_key(source: Node, target: Node, slot: int) -> None:
        target.tell("CLUSTER", "SETSLOT", slot, "IMPORTING", source.name)
        source.tell("CLUSTER", "SETSLOT", slot, "MIGRATING", target.name)
        while keys := source.tell("CLUSTER", "GETKEYSINSLOT", slot, 3):
            source.tell("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "AUTH", SECRET, "KEYS", *keys)
        for node in (target, source):
            node.tell("CLUSTER", "SETSLOT", slot, "NODE", target.name)

    def at_once(source: Node, target: Node, slot: int) -> None:
        source.tell("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.name)

    asyncio.run(scenario())
    each_is_in_parquet_once(tmp_path, events)


@pytest.mark.parametrize("acked", [0, 1])
def test_a_primary_killed_under_load_is_replaced_and_nothing_that_was_replicated_is_lost(three, tmp_path, acked):
    config = replicated(config_of(tmp_path, partitions=P), acked)
    events = some_events(400)

    async def scenario():
        async with consuming(config, three.url) as teller:
            await teller.tell(events[:150])
            victim = three.owner(key(config, partition_of("u0", P)))
            heir = three.replica_of(victim)
            telling = asyncio.create_task(teller.tell(events[150:]))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(victim.signal, signal.SIGKILL)
            await telling
            assert (await asyncio.to_thread(heir.tell, "ROLE"))[0] == b"master"
            assert teller.refused > 0, "the primary was never away"
        await same_as_the_batch_road(config, three.url, tmp_path)

    if acked:  # its replica is the one that must take part: the cluster has to be whole again before events are accepted
        asyncio.run(with_repair(three, scenario))
    else:
        asyncio.run(scenario())
    each_is_in_parquet_once(tmp_path, events)


def hold(replica: Node, primary: Node) -> None:
    """Nothing more reaches a replica. Its connection is closed as well, or the host would keep for it what the primary sends."""
    replica.signal(signal.SIGSTOP)
    primary.tell("CLIENT", "KILL", "TYPE", "replica")


async def with_repair(three: ValkeyCluster, scenario) -> None:
    """Run a scenario while whoever is killed is started again, as an operator's supervisor would."""
    ended = threading.Event()

    def supervise() -> None:
        while not ended.wait(0.2):
            for node in three.nodes:
                if node.process is not None and node.process.poll() is not None and promoted(three, node):
                    node.start()

    watching = asyncio.create_task(asyncio.to_thread(supervise))
    try:
        await scenario()
    finally:
        ended.set()
        await watching


def promoted(three: ValkeyCluster, dead: Node) -> bool:
    """Whether somebody has taken a dead node's slots."""
    alive = next(node for node in three.nodes if node.process is not None and node.process.poll() is None)
    mine = [line.split() for line in alive.tell("CLUSTER", "NODES").decode().splitlines() if line.startswith(dead.name)]
    return all(len(line) <= 8 for line in mine)


def test_an_event_that_no_replica_has_is_refused_each_time_and_a_failover_then_loses_and_repeats_nothing(three, tmp_path):
    """The replica is held still, so that the primary alone has what is told; then it dies and the replica takes its place."""
    config = replicated(config_of(tmp_path, partitions=P), append_timeout_ms=1_000.0)
    events = some_events(240)
    where = partition_of("u0", P)

    async def scenario():
        async with consuming(config, three.url) as teller:
            await teller.tell(events[:120])
            victim = three.owner(key(config, where))
            heir = three.replica_of(victim)
            mine = [e for e in events[120:] if partition_of(e.user_id, P) == where]
            assert mine
            hold(heir, victim)
            for _ in range(2):  # the second finds the event in its place, and must not count it as told on that ground
                with pytest.raises(StoreUnavailableError, match=r"did not reach its replicas \(store.replicas_acked: 1, answered: 0\)"):
                    await teller.store.append(mine[:3])
            with pytest.raises(StoreUnavailableError, match=r"did not (reach its replicas|answer within)"):
                await teller.store.change_profiles({"u0": {"age": 1}})
            assert victim.tell("XLEN", key(config, where)) >= 3, "the primary has them all the same"
            await asyncio.sleep(0.2)  # consumers see the events, and none of them may count
            victim.signal(signal.SIGKILL)
            heir.signal(signal.SIGCONT)
            await asyncio.to_thread(three.wait_for_promotion, heir)
            await teller.tell(events[120:])
        await same_as_the_batch_road(config, three.url, tmp_path)

    asyncio.run(with_repair(three, scenario))
    each_is_in_parquet_once(tmp_path, events)


def test_without_waiting_for_replicas_a_failover_may_lose_the_last_events_and_ingestion_goes_on_behind_them(three, tmp_path):
    """As above, but events are confirmed while the replica is held still: they are gone, if consumers did not bring them to Parquet."""
    config = config_of(tmp_path, partitions=P, keep_h=9.0)
    events = some_events(240)
    where = partition_of("u0", P)

    async def scenario():
        async with consuming(config, three.url, items=False) as teller:  # item sides may have counted what is gone
            await teller.tell(events[:120])
            victim = three.owner(key(config, where))
            heir = three.replica_of(victim)
            hold(heir, victim)
            await teller.tell(events[120:180])
            await asyncio.sleep(0.3)
            victim.signal(signal.SIGKILL)
            heir.signal(signal.SIGCONT)
            await asyncio.to_thread(three.wait_for_promotion, heir)
            teller.accepted = []
            await teller.tell(events[180:])

    asyncio.run(with_repair(three, scenario))
    found = archived(tmp_path)["event_id"].to_pylist()
    assert len(found) == len(set(found))
    lost = {e.event_id for e in events} - set(found)
    risked = {e.event_id for e in events[120:180] if partition_of(e.user_id, P) == where}
    assert lost <= risked


def test_a_node_that_starts_anew_without_scripts_and_nodes_that_forget_them_stop_no_step(three, tmp_path):
    config = config_of(tmp_path, partitions=P)
    events = some_events(200)

    async def scenario():
        async with consuming(config, three.url) as teller:
            await teller.tell(events[:80])
            telling = asyncio.create_task(teller.tell(events[80:]))
            for node in three.primaries():
                await asyncio.to_thread(node.tell, "SCRIPT", "FLUSH")
            restarted = three.owner(key(config, 0))
            restarted.signal(signal.SIGKILL)
            restarted.start()  # sooner than the others would replace it
            await telling
        await same_as_the_batch_road(config, three.url, tmp_path)

    asyncio.run(with_repair(three, scenario))
    each_is_in_parquet_once(tmp_path, events)


def test_many_callers_and_the_item_log_meet_nothing_but_unavailable_while_a_primary_dies(three, tmp_path):
    config = config_of(tmp_path, partitions=P)
    victim = three.owner(key(config, partition_of("u0", P)))

    async def scenario():
        store, log = RedisStore(three.url, config.store, config.history), RedisItemLog(three.url, config.store)
        ended = asyncio.Event()

        async def call(n: int) -> None:
            while not ended.is_set():
                with suppress(StoreUnavailableError):
                    await store.append([e._replace(event_id=f"{n}-{e.event_id}") for e in some_events(20, n)])
                    await store.read([f"u{i}" for i in range(6)], timeout_s=0.3)
                await asyncio.sleep(0)

        async def change() -> None:
            n = 0
            while not ended.is_set():
                with suppress(StoreUnavailableError):
                    await asyncio.to_thread(log.change, [ItemChange(f"i{n}", {"x": n})])
                    n += 1

        calls = [asyncio.create_task(call(n)) for n in range(40)] + [asyncio.create_task(change())]
        await asyncio.sleep(0.2)
        items = three.owner(f"{config.store.prefix}:{{items}}:held")
        for node in {items.port: items, victim.port: victim}.values():
            heir = three.replica_of(node)
            node.signal(signal.SIGKILL)
            await asyncio.to_thread(three.wait_for_promotion, heir)
            node.start()
        await asyncio.to_thread(three.settle)
        ended.set()
        await asyncio.gather(*calls)
        assert (await store.append([some_events(1)[0]._replace(event_id="last")])).accepted == 1
        position = await asyncio.to_thread(log.change, [ItemChange("last", {})])
        held = {r.item_id for r in log.since(0).records}
        assert "last" in held
        assert position > 0
        log.close()
        await store.close()

    asyncio.run(scenario())
