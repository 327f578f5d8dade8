"""Item-side counters in this process, and what is trending: the consumers' snapshots are fetched in the background and put into
every loaded version.

A request never reads a counter: it takes the snapshot that its version holds, whole, whose age is reported (`state`). Where
none was ever published, or the store is away, the bundle's own stands. Partitions are published one after another: until all
show one instant the snapshot of before stands, unless one of them stays behind or is never published: then its keys keep the bundle's counters.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from redis import exceptions as faults

from cluster.redis_store import connected
from cluster.snapshots import SnapshotReader
from deployments.resilience import Seldom
from recsys.config import Config
from recsys.errors import RayfunnelError, StoreError
from recsys.features.counting import trending_plan
from recsys.features.snapshot import Bundled, decayed_counts, item_snapshot
from recsys.features.states import StateSource
from recsys.funnel import Funnel
from recsys.recall.trending import Trending

log = logging.getLogger(__name__)
BEHIND = 3
"""For so many times the interval of snapshots partitions may differ; then the others' are taken without those that stay behind."""
_FAULTS = (faults.RedisError, OSError, TimeoutError, StoreError)


class CountersFollower:
    """A thread that keeps the item side of `funnels()` up to date. One per process that ranks or recalls."""

    def __init__(self, config: Config, url: str, funnels: Callable[[], list[Funnel]], *, poll_s: float | None = None) -> None:
        self._config, self._url, self._funnels = config, url, funnels
        self._poll_s = poll_s or min(1.0, config.ingest.snapshot_every_s)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._applied: dict[str, tuple[int, Bundled | None]] = {}
        self._trending = trending_plan(config.ingest.trending_half_life_h).groups[0]
        self._trends: dict[str, float] = {}
        self._round, self._at, self._apart = 0, 0.0, 0.0
        self._seldom = Seldom()

    def start(self) -> None:
        """Begin to follow."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._follow()), name="item-counters", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End within a poll."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def state(self) -> dict[str, Any]:
        """For /v1/version: how old the counters in use are, and what is trending; null where they are the bundle's."""
        now, trends = time.time(), list(self._trends.values())
        return {
            "staleness_s": round(now - self._at, 1) if self._at else None,
            "trending_staleness_s": round(now - min(trends), 1) if trends else None,
            "versions": sorted(self._applied),
        }

    async def _follow(self) -> None:
        redis = connected(self._url, timeout_s=5.0)
        reader = SnapshotReader(redis, self._config.store.prefix, self._config.store.partitions)
        try:
            while not self._stop.is_set():
                try:
                    self._round += bool(await reader.read())
                    self.apply(reader)
                except _FAULTS as fault:
                    self._seldom.warn("counters", "Item-side counters are stale.", fault)
                except (RayfunnelError, ValueError, KeyError) as fault:
                    self._seldom.warn("counters", "A snapshot of counters does not fit a loaded version.", fault)
                except Exception as fault:  # noqa: BLE001  the thread must live: nothing but their age would say that counters stand still
                    self._seldom.warn("unforeseen", "Item-side counters could not be taken over.", fault, traceback=True)
                await asyncio.sleep(self._poll_s)
        finally:
            await redis.aclose()

    def apply(self, reader: SnapshotReader) -> None:
        """Give every loaded version the newest parts, where it does not have them yet."""
        at = sorted(part.at for part in reader.parts.values())
        if not at:
            return
        if at[0] == at[-1] and len(at) == self._config.store.partitions:
            self._apart = 0.0
        else:
            self._apart = self._apart or time.monotonic()
            if time.monotonic() - self._apart < BEHIND * self._config.ingest.snapshot_every_s:
                return
        funnels = self._funnels()
        for funnel in funnels:
            done = self._applied.get(funnel.version)
            if done is not None and done[0] == self._round:
                continue
            source, own = funnel.live.source if funnel.live is not None else None, None
            if isinstance(source, StateSource):
                own = done[1] if done is not None else None
                own = own or Bundled(source.snapshot, source.stream.of_items, source.coder, self._config.store.partitions)
                source.snapshot = item_snapshot(reader.parts, source.inputs, source.coder, own)
            self._trend(reader, funnel)
            self._applied[funnel.version] = (self._round, own)
        self._at = at[0]
        loaded = {funnel.version for funnel in funnels}
        self._applied = {version: done for version, done in self._applied.items() if version in loaded}
        self._trends = {version: at for version, at in self._trends.items() if version in loaded}

    def _trend(self, reader: SnapshotReader, funnel: Funnel) -> None:
        channels = [channel for channel in funnel.channels.values() if isinstance(channel, Trending)]
        if not channels:
            return
        recent, at = decayed_counts(reader.parts, self._trending, funnel.items)
        followed = [channel.follow(recent, at) for channel in channels]
        if any(followed):
            self._trends[funnel.version] = at
        else:
            self._trends.pop(funnel.version, None)
