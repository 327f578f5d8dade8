"""Consumers as a process of their own: in this process, or as Ray actors that are restarted where they die.

An actor is a process with an event loop that runs one `Ingest`; which partitions it owns is settled by leases in the store, so
nobody assigns them, and an actor that is killed, restarted or moved needs no one to tell it where it was.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from redis import exceptions as faults
from redis.asyncio import Redis

from cluster.event_log import EventLog, RedisLog
from cluster.ingest import Ingest
from cluster.ingest_status import PartitionStatus, memory, status, summary
from cluster.live_plan import loader
from cluster.redis_store import connected, reason, redacted
from recsys.config import Config
from recsys.errors import RayfunnelError, StoreUnavailableError
from recsys.ingest_config import KafkaLogConfig

log = logging.getLogger(__name__)

MOST_RESTARTS = -1
"""For ever: Ray's word for it."""


def log_of(config: Config) -> Callable[[Redis], EventLog]:
    """The event log that the configuration names, one reader a call."""
    told = config.ingest.log
    if isinstance(told, KafkaLogConfig):
        from cluster.kafka_log import KafkaLog

        return lambda _: KafkaLog(told, config.store.partitions)
    return lambda redis: RedisLog(redis, config.store.prefix)


class IngestStatus:
    """The status of a configuration's ingestion, over a connection of its own."""

    def __init__(self, config: Config, url: str) -> None:
        self._config, self._url = config, url
        self._redis: Redis | None = None
        self._log: EventLog | None = None

    async def read(self) -> dict[str, Any]:
        """See `ingest_status.summary`. StoreUnavailableError where the store does not answer."""
        found = summary(await self.partitions())
        assert self._redis is not None  # noqa: S101 - connected by the line above
        return found | {"memory": await memory(self._redis)}

    async def partitions(self) -> list[PartitionStatus]:
        """See `ingest_status.status`."""
        try:
            if self._redis is None or self._log is None:
                self._redis = connected(self._url, timeout_s=5.0)
                self._log = log_of(self._config)(self._redis)
            return await status(self._config, self._redis, self._log)
        except (faults.RedisError, OSError) as fault:
            raise StoreUnavailableError(f"The feature store at {redacted(self._url)} {reason(fault, 5.0)}") from fault

    async def close(self) -> None:
        """Release the connection."""
        if self._log is not None:
            await self._log.close()
        if self._redis is not None:
            await self._redis.aclose()


def consumer(config: Config, url: str) -> Ingest:
    """One process's consumers of a configuration."""
    return Ingest(config, url, loader(config), log_of=log_of(config))


def run_here(config: Config, url: str) -> None:
    """Consume in this process until Ctrl-C or SIGTERM; what is applied is in Parquet then."""

    async def whole() -> None:
        ingest = consumer(config, url)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ingest.stop)
        await ingest.run()

    asyncio.run(whole())


class Consumers:
    """The body of an actor: it consumes from the moment it is made."""

    def __init__(self, config: Config, url: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._config, self._url = config, url
        self._ingest: Ingest | None = None
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Begin, once; an actor that was restarted begins again when it is next asked how it is."""
        async with self._starting:
            if self._task is None:
                self._ingest = await asyncio.to_thread(consumer, self._config, self._url)
                self._task = asyncio.create_task(self._ingest.run())

    async def check(self) -> dict[str, Any]:
        """What it owns. RayfunnelError where it has ended by itself."""
        await self.start()
        assert self._task is not None and self._ingest is not None  # noqa: S101 - started
        if self._task.done():
            raise RayfunnelError(f"The consumers have ended ({self._task.exception() if not self._task.cancelled() else 'cancelled'}).")
        return {"name": self._ingest.name, "partitions": sorted(self._ingest.held.owned)}

    async def stop(self) -> None:
        """End in order."""
        if self._ingest is not None and self._task is not None:
            self._ingest.stop()
            await self._task


def run_actors(config: Config, url: str, actors: int, *, until: Callable[[], bool] = lambda: False) -> None:
    """Consume in so many Ray actors, looked after until `until` says so or Ctrl-C comes. A dead one is restarted by Ray."""
    import ray

    made = ray.remote(Consumers).options(max_restarts=MOST_RESTARTS, max_task_retries=-1, num_cpus=0.1)
    handles = [made.remote(config, url) for _ in range(actors)]
    try:
        while not until():
            for handle in handles:
                try:
                    ray.get(handle.check.remote(), timeout=30)
                except (ray.exceptions.RayError, RayfunnelError) as error:
                    log.warning("A consumer did not answer: %s", error)
            time.sleep(1.0)
    except KeyboardInterrupt:
        log.info("stopping")
    finally:
        ray.wait([handle.stop.remote() for handle in handles], num_returns=len(handles), timeout=30)
        for handle in handles:
            ray.kill(handle)
