"""The configuration of ingestion: who reads the event log, how often what it makes is written, and where the log lies.

The values are plain data; `cluster.ingest` turns them into consumers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_serializer

from recsys.config_faults import Secrets, masked
from recsys.core import FrozenConfig


class RedisLogConfig(FrozenConfig):
    """The event log as streams of the feature store: nothing else to run."""

    type: Literal["redis"] = "redis"
    """Streams of the feature store."""


class KafkaLogConfig(FrozenConfig):
    """The event log as a topic of Kafka, with as many partitions as the store; needs the package confluent-kafka."""

    type: Literal["kafka"] = "kafka"
    """A topic of Kafka."""
    servers: str
    """Brokers to begin with: host:9092,host:9092."""
    topic: str = "rayfunnel-events"
    """Created with store.partitions partitions where it is missing. Its retention must outlast what is not in Parquet yet."""
    options: Annotated[dict[str, str], Secrets()] = Field(default_factory=dict, repr=False)
    """Further settings of librdkafka, such as security.protocol; passwords by ${VARIABLE}. What is named a password, secret, token or
    key is never printed or kept."""

    @field_serializer("options", when_used="json")
    def _masked(self, options: dict[str, str]) -> dict[str, str]:
        return masked(options)


EventLogConfig = Annotated[RedisLogConfig | KafkaLogConfig, Field(discriminator="type")]


class IngestConfig(FrozenConfig):
    """The consumers of the event log: they keep feature state, item-side counters and the Parquet partitions for training."""

    with_service: bool = True
    """Run them as a part of the service. Off: `rayfunnel ingest` runs them."""
    replicas: NonNegativeInt = 1
    """Processes that share the partitions between them. Each uses up to one CPU."""
    log: EventLogConfig = RedisLogConfig()
    """Where events are kept in order: redis (streams of the feature store) or kafka."""
    batch: PositiveInt = 1_000
    """Most events of one partition in one step."""
    linger_ms: NonNegativeFloat = 20.0
    """How long a step waits for company: longer costs freshness of counters, and saves CPU. Histories do not wait for it."""
    lease_s: PositiveFloat = 5.0
    """How long a silent owner keeps a partition: the longest that a killed one's partitions rest."""
    items_every_s: PositiveFloat = 0.5
    """How often item-side counters take what is new."""
    snapshot_every_s: PositiveFloat = 5.0
    """How often item-side counters are published to rankers; less often where there are so many that it would take a tenth of the time."""
    trending_half_life_h: PositiveFloat = 6.0
    """How fast an event is forgotten in what is trending now."""
    parquet_every_s: PositiveFloat = 60.0
    """How long an event may wait for Parquet."""
    parquet_rows: PositiveInt = 100_000
    """Most rows of a Parquet file, and how many waiting ones are written at once. Small files are merged into larger ones."""
    keep_h: NonNegativeFloat = 1.0
    """How long an event stays in the stream after it is in Parquet."""
    catch_up_events: NonNegativeInt = 1_000_000
    """Where a version declares an aggregate anew: most events of a partition, the newest since the version was made, that are read once more for it."""
    cached_users: PositiveInt = 20_000
    """Users whose counters a consumer keeps decoded."""
    item_keys: PositiveInt = 200_000
    """Item-side keys that one partition holds; those without an event for longest leave first. About 300 bytes each in the store."""
    dead_letters: PositiveInt = 10_000
    """Records that could not be read are kept with the reason, so many per partition."""
