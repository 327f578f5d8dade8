"""The event log on Kafka, on librdkafka's own mock broker: the store's contract, and consumers that count each event once."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import NamedTuple

import pytest

from cluster.event_log import End
from cluster.ingest import Ingest
from cluster.ingest_status import status
from cluster.kafka_log import KafkaLog, KafkaStore, ensure_topic
from cluster.redis_store import connected
from recsys.errors import ConfigError, StoreUnavailableError
from recsys.features.store import partition_of
from recsys.ingest_config import KafkaLogConfig
from tests.cluster.consumers import archived_all, config_of, each_is_in_parquet_once, load, same_as_the_batch_road, some_events, until
from tests.cluster.valkey_process import SECRET

admin = pytest.importorskip("confluent_kafka.admin", reason="optional: pip install confluent-kafka")
PARTITIONS = 4
"""What the mock broker gives every topic."""
_topics = itertools.count()


@pytest.fixture(scope="module")
def broker():
    """host:port of a broker inside this process."""
    cluster = admin.AdminClient({"test.mock.num.brokers": "1", "log_level": 0})
    (found,) = cluster.list_topics(timeout=10).brokers.values()
    yield f"{found.host}:{found.port}"
    del cluster


def topic(broker: str) -> KafkaLogConfig:
    """A topic of its own; the mock broker makes what is asked for, but cannot be told to."""
    name = f"events{next(_topics)}"
    admin.AdminClient({"bootstrap.servers": broker}).list_topics(name, timeout=10)
    return KafkaLogConfig(servers=broker, topic=name)


def test_events_told_again_and_consumers_that_die_change_nothing(broker, url, tmp_path):
    config = config_of(tmp_path, partitions=PARTITIONS, lease_s=0.2)
    log = topic(broker)
    events = some_events(120)

    async def scenario():
        store = KafkaStore(url, log, config.store, config.history)
        assert await store.append(events[:50]) == (50, 0)
        assert await store.append(events[40:80]) == (30, 10), "what is known is not produced again"
        redis, append = connected(url), store._append

        async def away(*_):
            raise StoreUnavailableError("the store went away between the two")

        store._append = away
        with pytest.raises(StoreUnavailableError):
            await store.append(events[80:100])
        store._append = append
        assert await store.append(events[80:]) == (40, 0), "20 of them stand in the topic twice now"
        ingests = [Ingest(config, url, load, log_of=lambda _: KafkaLog(log, PARTITIONS, patience_ms=500)) for _ in range(2)]
        await ingests[0].lead()
        for _ in range(3):
            await ingests[0].count_users()
        await ingests[0].count_items()
        await ingests[0].archiving.all()
        await ingests[0].close()  # a kill
        await asyncio.sleep(0.25)
        reader = KafkaLog(log, PARTITIONS)

        async def caught_up():
            await archived_all(ingests[1])
            said = await status(config, redis, reader)
            return (sum(s.events for s in said), sum(s.lag for s in said), sum(s.parquet_lag for s in said)) == (140, 0, 0)

        await until(caught_up, patience_s=60)
        await ingests[1].count_items()
        assert sum(s.parquet_rows for s in await status(config, redis, reader)) == 120
        await reader.close()
        await same_as_the_batch_road(config, url, tmp_path)
        (state,) = await store.read(["u1"], timeout_s=5.0)
        assert [e.event_id for e in state.events] == [e.event_id for e in events if e.user_id == "u1" and e.event != "view"][-50:]
        await ingests[1].close()
        await store.close()
        await redis.aclose()

    asyncio.run(scenario())
    each_is_in_parquet_once(tmp_path, events)


class Message(NamedTuple):
    """A record as confluent_kafka hands it over."""

    at: int
    fault: str | None = None

    def error(self) -> str | None:
        return self.fault

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self.at

    def value(self) -> bytes:
        return b"{}"

    def timestamp(self) -> tuple[int, int]:
        return 1, 17


class Trimmed:
    """A consumer of a partition whose oldest entry is `first`, which nobody can make the mock broker forget."""

    def __init__(self, first: int, offsets: list[int]) -> None:
        self.first, self.offsets, self.end = first, offsets, offsets[-1] + 1
        self.start = -1

    def assign(self, starts: list[object]) -> None:
        (start,) = starts
        self.start = start.offset

    def consume(self, most: int, _: float) -> list[Message]:
        here = [at for at in self.offsets if at >= self.start][:most]
        self.start = here[-1] + 1 if here else self.start
        return [Message(at) for at in here]

    def get_watermark_offsets(self, _: object, timeout: float) -> tuple[int, int]:
        assert timeout > 0
        return self.first, self.end


@pytest.mark.parametrize(
    ("after", "first", "offsets", "told"),
    [
        ("4", 9, [9, 10], "has forgotten 4 entries, from offset 5 on"),  # 5 to 8
        ("8", 9, [9, 10], None),
        ("", 9, [9, 10], None),  # who begins misses nothing
        ("4", 0, [6, 7], None),  # offset 5 ends a producer's transaction
    ],
)
def test_what_retention_forgot_before_it_was_read_is_told_and_is_no_lag(caplog, after, first, offsets, told):
    """Of offsets 0 to 10 the topic holds those from `first` on. Whoever has read the last one is behind by nothing."""
    log = KafkaLog(KafkaLogConfig(servers="nowhere:1", topic="events"), 1)
    log._consumer = Trimmed(first, offsets)

    async def scenario():
        with caplog.at_level(logging.WARNING, logger="cluster.kafka_log"):
            page = (await log.read({0: after}, 10))[0]
        assert [int(entry.position) for entry in page] == offsets
        (end,) = await log.ends(1)
        assert end == End(offsets[-1] + 1, first)
        assert end.behind(page[-1].position, len(page)) == 0

    asyncio.run(scenario())
    warned = [record.getMessage() for record in caplog.records if record.name == "cluster.kafka_log"]
    assert [told in line for line in warned] == ([True] if told else [])


def test_a_fault_among_messages_loses_none_of_those_beside_it():
    """Three messages came, the first of them a fault: the two others were taken from the consumer and are read again."""
    log = KafkaLog(KafkaLogConfig(servers="nowhere:1", topic="events"), 1)
    consumer = log._consumer = Trimmed(0, [0, 1, 2])
    consume, faults = consumer.consume, ["broken"]

    def faulty(most: int, wait_s: float) -> list[Message]:
        return [m._replace(fault=faults.pop()) if faults else m for m in consume(most, wait_s)]

    consumer.consume = faulty

    async def scenario():
        with pytest.raises(StoreUnavailableError, match=r"refuses \(broken\)"):
            await log.read({0: ""}, 10)
        assert [entry.position for entry in (await log.read({0: ""}, 10))[0]] == ["0", "1", "2"]

    asyncio.run(scenario())


def test_a_lag_counts_what_can_still_be_read():
    """A topic that holds offsets 40 to 99: all 60 for who begins or has read up to 9, 30 for who has read up to 69. A stream of the
    store counts all that it ever took, whatever its positions are."""
    topic = End(100, 40)
    assert [topic.behind(at, n) for at, n in (("", 0), ("9", 10), ("69", 30), ("99", 60))] == [60, 60, 30, 0]
    assert [End(100).behind(at, n) for at, n in (("", 0), ("1700-3", 70), ("1700-9", 100))] == [100, 30, 0]


def test_a_topic_of_another_size_is_refused(broker):
    log = topic(broker)
    with pytest.raises(ConfigError, match=r"has 4 partitions, store.partitions says 7\. Name another topic, or set store.partitions: 4\."):
        ensure_topic(log, PARTITIONS)
        ensure_topic(log, 7)


def test_marks_of_many_partitions_are_asked_for_on_a_cluster_too(broker, node, tmp_path):
    """Six users in four partitions are four slots: one MGET of their marks would be refused."""
    config, log, events = config_of(tmp_path, partitions=PARTITIONS), topic(broker), some_events(30)
    assert len({partition_of(e.user_id, PARTITIONS) for e in events}) > 1

    async def scenario():
        where = f"redis+cluster://:{SECRET}@127.0.0.1:{node}"
        store = KafkaStore(where, log, config.store, config.history)
        assert await store.append(events[:20]) == (20, 0)
        assert await store.append(events) == (10, 20)
        await store.close()
        ingest = Ingest(config, where, load, log_of=lambda _: KafkaLog(log, PARTITIONS, patience_ms=500))

        async def all_in_parquet():
            await archived_all(ingest)
            return sum(owned.archive.manifest.n for owned in ingest.held.owned.values()) == 30

        await until(all_in_parquet)
        await same_as_the_batch_road(config, where, tmp_path)
        await ingest.close()

    asyncio.run(scenario())
    each_is_in_parquet_once(tmp_path, events)
