"""The event log on Kafka: a topic with the store's partitions, every user's events in one of them.

An event is produced first (acknowledged by all in-sync replicas), then its history is updated: whatever fails in between is told
again by the caller, so an event may stand in the topic twice, and consumers count the first (`repeats`). Positions are offsets
and are kept in the store beside the counters, not in a consumer group: both move in one step. What the topic's retention forgets
before it is read is gone: that is told, and no lag counts it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.event_log import End, Entry
from cluster.redis_store import RedisStore
from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.declaration import HistoryConfig
from recsys.features.store import NewEvent, StoreConfig, partition_of, to_record
from recsys.ingest_config import KafkaLogConfig

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Producer

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0


def client(kind: str, config: KafkaLogConfig, **settings: Any) -> Any:
    """A client of confluent_kafka by the name of its class. ConfigError where the package is missing."""
    try:
        import confluent_kafka
        import confluent_kafka.admin
    except ImportError as error:
        raise ConfigError(
            "ingest.log.type is kafka, which needs a package that is not installed: pip install 'rayfunnel[kafka]'"
        ) from error
    made = {
        "Consumer": confluent_kafka.Consumer,
        "Producer": confluent_kafka.Producer,
        "AdminClient": confluent_kafka.admin.AdminClient,
    }[kind]
    return made({"bootstrap.servers": config.servers, "log_level": 0} | config.options | settings)


def ensure_topic(config: KafkaLogConfig, partitions: int) -> None:
    """Create the topic where it is missing. ConfigError where it has another number of partitions; blocks."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import NewTopic

    admin = client("AdminClient", config)
    try:
        held = admin.list_topics(timeout=_PATIENCE_S).topics
        if config.topic not in held:
            admin.create_topics([NewTopic(config.topic, num_partitions=partitions)])[config.topic].result(_PATIENCE_S)
            held = admin.list_topics(timeout=_PATIENCE_S).topics
    except KafkaException as fault:
        raise StoreUnavailableError(f"Kafka at {config.servers} does not answer ({fault}). It is asked again at the next call.") from fault
    found = len(held[config.topic].partitions) if config.topic in held else partitions
    if found != partitions:
        raise ConfigError(
            f"Topic '{config.topic}' has {found} partitions, store.partitions says {partitions}. Name another topic, or set store.partitions: {found}."
        )


class KafkaLog:
    """One reader: it keeps its place, and goes back where it is asked to."""

    repeats = True

    def __init__(self, config: KafkaLogConfig, partitions: int, *, patience_ms: int = 50) -> None:
        """`patience_ms`: how long a read that need not wait gives the broker to answer at all."""
        self._config, self._partitions, self._patience_ms = config, partitions, patience_ms
        self._consumer: Consumer | None = None
        self._held: dict[int, deque[Entry]] = {}
        self._dropped: dict[int, int] = {}
        self._fetched: dict[int, int] = {}
        self._lock = threading.Lock()

    async def read(self, after: Mapping[int, str], count: int, *, wait_ms: int = 0) -> dict[int, list[Entry]]:
        """See EventLog. StoreUnavailableError where Kafka does not answer."""
        return await asyncio.to_thread(self._read, dict(after), count, wait_ms) if after else {}

    def _read(self, after: Mapping[int, str], count: int, wait_ms: int) -> dict[int, list[Entry]]:
        with self._lock:
            self._place(after)
            if not any(self._held.values()):
                try:
                    self._fetch(count * len(after), max(wait_ms, self._patience_ms) / 1000)
                except StoreUnavailableError:
                    self._held = {}  # the consumer is behind messages that were not kept: the next read goes back to its place
                    raise
            return {p: list(held)[:count] for p in after if (held := self._held.get(p))}

    def _place(self, after: Mapping[int, str]) -> None:
        """Drop what was used; seek where a place is asked for that is not ours."""
        from confluent_kafka import OFFSET_BEGINNING, TopicPartition

        lost = set(after) != set(self._held)
        for p, position in after.items():
            at, held = int(position or -1), self._held.get(p, deque())
            while held and int(held[0].position) <= at:
                self._dropped[p] = int(held.popleft().position)
            lost = lost or at < self._dropped.get(p, -1) or (not held and at + 1 < self._fetched.get(p, 0))
        if lost:
            self._held = {p: deque() for p in after}
            self._dropped = {p: int(position or -1) for p, position in after.items()}
            self._fetched = {p: at + 1 for p, at in self._dropped.items()}
            starts = [TopicPartition(self._config.topic, p, at if at > 0 else OFFSET_BEGINNING) for p, at in self._fetched.items()]
            self._client().assign(starts)

    def _fetch(self, most: int, wait_s: float) -> None:
        from confluent_kafka import KafkaException

        try:
            messages = self._client().consume(1, wait_s)
            if messages:  # a larger number would be waited for
                messages += self._client().consume(min(most, 10_000), 0.01)
        except KafkaException as fault:
            raise StoreUnavailableError(f"Kafka at {self._config.servers} does not answer ({fault}). It is asked again.") from fault
        for message in messages:
            if message.error() is not None:
                raise StoreUnavailableError(f"Kafka at {self._config.servers} refuses ({message.error()}). It is asked again.")
            p, offset = message.partition(), message.offset()
            if p in self._held and offset >= self._fetched.get(p, 0):
                if 0 < self._fetched.get(p, 0) < offset:  # nothing is expected by who reads from the beginning
                    self._tell_of_forgotten(p, self._fetched[p])
                self._held[p].append(Entry(str(offset), message.value() or b"", message.timestamp()[1]))
                self._fetched[p] = offset + 1

    def _tell_of_forgotten(self, partition: int, expected: int) -> None:
        """Warn where the topic begins behind the entry that is due; what a producer's transactions leave out is no loss."""
        first, _ = self._watermarks(partition)
        if first > expected:
            log.warning(
                "ingest partition=%d: topic '%s' has forgotten %d entries, from offset %d on, before they were read here; it goes on behind "
                "them. Raise the topic's retention (retention.ms), or run consumers more often.",
                partition,
                self._config.topic,
                first - expected,
                expected,
            )

    def _watermarks(self, partition: int) -> tuple[int, int]:
        """The offset of the oldest entry, and that of the next one. StoreUnavailableError where Kafka does not answer."""
        from confluent_kafka import KafkaException, TopicPartition

        try:
            found = self._client().get_watermark_offsets(TopicPartition(self._config.topic, partition), timeout=_PATIENCE_S)
        except KafkaException as fault:
            raise StoreUnavailableError(f"Kafka at {self._config.servers} does not answer ({fault}). It is asked again.") from fault
        if found is None:
            raise StoreUnavailableError(f"Kafka at {self._config.servers} did not answer in {_PATIENCE_S:g} s. It is asked again.")
        return max(0, found[0]), max(0, found[1])

    def _client(self) -> Consumer:
        if self._consumer is None:
            ensure_topic(self._config, self._partitions)
            settings = {"group.id": "rayfunnel", "enable.auto.commit": False, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 50}
            self._consumer = client("Consumer", self._config, **settings)
        return self._consumer

    async def ends(self, partitions: int) -> list[End]:
        """See EventLog: the watermarks of the partitions."""

        def asked() -> list[End]:
            with self._lock:
                return [End(end, first) for first, end in map(self._watermarks, range(partitions))]

        return await asyncio.to_thread(asked)

    async def firsts(self, partitions: int) -> list[int]:
        """See EventLog: entries are numbered from the first that was read."""
        return [0] * partitions

    async def trim(self, partition: int, position: str, keep_from_ms: int) -> None:
        """The topic's own retention forgets; nothing to do."""

    async def holds(self, partition: int, after: str, upto: str, n: int) -> bool:  # noqa: ARG002
        """See EventLog: where its end is not before the last of them."""
        return (await self.ends(partition + 1))[partition].total > int(upto)

    async def go_on(self, partition: int, position: str, n: int) -> None:  # noqa: ARG002
        """A topic made anew counts from its own beginning: it cannot be numbered."""
        raise StoreError(
            f"Topic '{self._config.topic}' holds fewer entries of partition {partition} than are in Parquet ({n:,}): it was made anew. "
            "Name another topic and another workdir, or bring it back."
        )

    async def close(self) -> None:
        """Leave."""
        if self._consumer is not None:
            await asyncio.to_thread(self._consumer.close)
            self._consumer = None


class KafkaStore(RedisStore):
    """The FeatureStore whose log is a topic; histories and counters stay in Redis."""

    def __init__(self, url: str, log: KafkaLogConfig, config: StoreConfig | None = None, history: HistoryConfig | None = None) -> None:
        super().__init__(url, config, history)
        self._log_config = log
        self._producer: Producer | None = None

    async def _told(self, events: Sequence[NewEvent]) -> list[bool]:
        """Produce what was never told, then update histories."""
        records = [to_record(event) for event in events]
        homes = [partition_of(e.user_id, self.config.partitions) for e in events]
        async with self._redis.pipeline(transaction=False) as pipe:  # marks of many slots: no MGET
            for p, event in zip(homes, events, strict=True):
                pipe.get(self._mark(p, event))
            marks = await pipe.execute()
        new = [(p, record) for p, record, mark in zip(homes, records, marks, strict=True) if mark is None]
        await asyncio.to_thread(self._produce, new)
        return await self._append(*self._calls(events, lambda _: b""), len(events))

    def _produce(self, records: Sequence[tuple[int, bytes]]) -> None:
        if self._producer is None:
            ensure_topic(self._log_config, self.config.partitions)
            settings = {"acks": "all", "enable.idempotence": True, "linger.ms": 2, "message.timeout.ms": int(self.config.append_timeout_ms)}
            self._producer = client("Producer", self._log_config, **settings)
        failed: list[Any] = []

        def delivered(error: Any, _: object) -> None:
            if error is not None:
                failed.append(error)

        try:
            for partition, record in records:
                self._producer.produce(self._log_config.topic, record, partition=partition, on_delivery=delivered)
        except BufferError as fault:
            failed.append(fault)
        left = self._producer.flush(self.config.append_timeout_ms / 1000)
        if failed or left:
            raise StoreUnavailableError(
                f"Kafka at {self._log_config.servers} did not take {len(failed) + left} of {len(records)} events ({failed[0] if failed else 'no answer'}). "
                "Nothing is confirmed; send again."
            )


def feature_store(url: str, log: object, config: StoreConfig, history: HistoryConfig) -> RedisStore:
    """The store whose event log the configuration names."""
    return KafkaStore(url, log, config, history) if isinstance(log, KafkaLogConfig) else RedisStore(url, config, history)
