"""Consumers of the event log: each partition has one owner, and what an owner does to it is one fenced, atomic step after another.

An owner reads its partitions' entries in batches and writes users' counters, dead letters and the position in one step
(`ingest_users`); counts item-side keys of its partitions over the logs of all, and publishes them for rankers (`ingest_items`);
writes Parquet and trims the log behind it (`ingest_archive`). Partitions are held by leases, so any number of processes may
run, in the service or beside it: a killed one's partitions are taken over after `lease_s`, and a step that it still had in
its hands changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from redis import exceptions as faults
from redis.asyncio import Redis

from cluster.archive import Archive
from cluster.catch_up import CatchUp
from cluster.event_log import EventLog, RedisLog
from cluster.ingest_archive import Archiving
from cluster.ingest_items import ItemHop
from cluster.ingest_status import memory
from cluster.ingest_users import UserHop
from cluster.owned import Holding, Owned
from cluster.partition import Claim, FencedError, PartitionStore
from cluster.redis_round import Kept
from cluster.redis_store import connected, redacted
from recsys.config import Config
from recsys.errors import RayfunnelError
from recsys.features.counting import Counting

log = logging.getLogger(__name__)

IDLE_MS = 200
"""How long a reader waits for the first new entry before it looks around."""
RELOAD_S = 5.0
_FAULTS = (faults.RedisError, OSError, TimeoutError, RayfunnelError)


class Ingest:
    """One process's consumers. `load(version)` gives the declaration in force, or None where it is that of `version`; it blocks."""

    def __init__(
        self,
        config: Config,
        url: str,
        load: Callable[[str], Counting | None],
        *,
        log_of: Callable[[Redis], EventLog] | None = None,
        name: str | None = None,
    ) -> None:
        settings, store = config.ingest, config.store
        self.settings, self.prefix, self.name = settings, store.prefix, name or uuid.uuid4().hex
        self._redis, self._load = connected(url), load
        make = log_of or (lambda redis: RedisLog(redis, store.prefix))
        self._logs = [make(self._redis) for _ in range(4)]
        counting = load("")
        if counting is None:
            raise ValueError("load('') must give a declaration.")
        partitions = PartitionStore(
            self._redis,
            store.prefix,
            ttl_s=math.ceil(store.user_ttl_h * 3600),
            mark_ttl_s=math.ceil(store.duplicate_ttl_h * 3600),
            dead_letters=settings.dead_letters,
            kept=Kept(redacted(url), store.append_timeout_ms / 1000, replicas=store.replicas_acked),
        )
        self.held = Holding(config, partitions, counting, repeats=self._logs[0].repeats)
        past = CatchUp(self.held, self._logs[3])
        self._users, self._items = UserHop(self.held, self._logs[0], past), ItemHop(self.held, self._logs[1], past)
        self.archiving = Archiving(self.held, self._logs[2])
        self._ending = asyncio.Event()
        self._warned: dict[str, float] = {}
        self._evicted: int | None = None

    # ---- life -----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Consume until `stop`; then Parquet is written up to date and the partitions are given free."""
        work: tuple[tuple[str, Callable[[], Awaitable[Any]], float], ...] = (
            ("lease", self.lead, self.settings.lease_s / 3),
            ("users", self._users_paced, 0.0),
            ("items", self.count_items, self.settings.items_every_s),
            ("parquet", self.archiving.due, min(1.0, self.settings.parquet_every_s)),
            ("snapshots", self._items.publish, min(0.5, self.settings.snapshot_every_s)),
            ("version", self.reload, RELOAD_S),
        )
        await self._well("lease", self.lead)
        tasks = [asyncio.create_task(self._loop(*what)) for what in work]
        await self._ending.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._well("parquet", self.archiving.all)
        await self._well("lease", self.give_free)
        await self.close()

    def stop(self) -> None:
        """Let `run` end."""
        self._ending.set()

    async def close(self) -> None:
        """Release connections, and nothing else: what a kill would leave."""
        for reader in self._logs:
            await reader.close()
        await self._redis.aclose()

    async def _loop(self, name: str, work: Callable[[], Awaitable[Any]], every_s: float) -> None:
        wait = every_s
        while True:
            await asyncio.sleep(wait)
            wait = every_s if await self._well(name, work) else max(every_s, 0.2)

    async def _well(self, name: str, work: Callable[[], Awaitable[Any]]) -> bool:
        """Whether it went well; a fault is told once in ten seconds, and everything is tried again.

        What nobody foresaw as well: a task that ended would leave its partitions to nobody, as their leases are still renewed; and
        the next owner would meet the same entries. What is held in memory is read anew after any fault.
        """
        try:
            await work()
        except Exception as fault:
            kind = f"{name} {type(fault).__name__}"
            if time.monotonic() - self._warned.get(kind, -math.inf) > 10.0:
                self._warned[kind] = time.monotonic()
                if isinstance(fault, _FAULTS):
                    log.warning("ingest %s: %s It is tried again.", name, fault or type(fault).__name__)
                else:
                    log.exception("ingest %s: this should not happen. It is tried again.", name)
            return False
        return True

    # ---- the work -------------------------------------------------------------------------------------------------------

    async def _users_paced(self) -> None:
        began = time.monotonic()
        await self.count_users(wait_ms=IDLE_MS)
        await asyncio.sleep(max(0.0, self.settings.linger_ms / 1000 - (time.monotonic() - began)))

    async def count_users(self, *, wait_ms: int = 0) -> int:
        """One step of the first hop; gives how many entries were applied."""
        if not self.held.owned:
            await asyncio.sleep(wait_ms / 1000)
            return 0
        try:
            answers = await self._users.step(wait_ms=wait_ms)
        except BaseException:  # a cancelled step as well: it may have been applied or not
            for owned in self.held.owned.values():
                owned.users.clear()
            raise
        await self._sort_out(answers)
        return sum(n for n in answers.values() if isinstance(n, int))

    async def count_items(self) -> int:
        """Steps of the second hop until nothing is left; gives how many changed a partition."""
        done = 0
        while True:
            try:
                answers = await self._items.step()
            except BaseException:
                for owned in self.held.owned.values():
                    owned.items = None
                raise
            await self._sort_out(answers)
            applied = sum(isinstance(n, int) for n in answers.values())
            if not applied:
                return done
            done += applied

    async def publish(self) -> int:
        """Publish the snapshots that are due; gives how many."""
        return await self._items.publish()

    async def _sort_out(self, answers: dict[int, Exception | int]) -> None:
        """What to do about partitions whose step was not applied: nothing that we hold in memory of them is sure any more."""
        for partition, answer in answers.items():
            if isinstance(answer, FencedError):
                log.info("ingest partition=%d is taken anew: %s", partition, answer)
                self.held.owned.pop(partition, None)
                await self._take(partition)
            elif isinstance(answer, Exception):
                if (owned := self.held.owned.get(partition)) is not None:
                    owned.users.clear()
                    owned.items = None
                raise answer

    async def reload(self) -> None:
        """Take up the declaration of a version that was promoted meanwhile."""
        found = await asyncio.to_thread(self._load, self.held.counting.version)
        if found is not None:
            log.info("ingest counts by version=%s (was %s)", found.version, self.held.counting.version or "none")
            self.held.counting = found
            for owned in self.held.owned.values():
                owned.users.clear()
                owned.items, owned.caught_up = None, False

    # ---- leases -----------------------------------------------------------------------------------------------------------

    async def lead(self) -> None:
        """Keep what is ours, and take a fair share of what nobody has."""
        members, now, owned = f"{self.prefix}:consumers", time.time(), self.held.owned
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zadd(members, {self.name: now + self.settings.lease_s})
            pipe.zremrangebyscore(members, "-inf", now)
            pipe.zcard(members)
            *_, alive = await pipe.execute(raise_on_error=False)  # a server out of memory takes no member: leases hold anyway
        self._tell_of_evictions((await memory(self._redis))["evicted_keys"])
        alive = alive if isinstance(alive, int) else 1
        kept = await self.held.store.renew({p: o.claim for p, o in owned.items()}, self.settings.lease_s)
        for p, ours in kept.items():
            if not ours:
                log.warning("ingest partition=%d was taken over by another consumer", p)
                owned.pop(p, None)
        share = math.ceil(self.held.partitions / max(1, alive))
        for p in sorted(owned, reverse=True)[: max(0, len(owned) - share)]:
            await self.held.store.renew({p: owned.pop(p).claim}, 0.0)
        free = [p for p in range(self.held.partitions) if p not in owned]
        first = int(hashlib.blake2b(self.name.encode(), digest_size=4).hexdigest(), 16) % max(1, len(free))
        for p in free[first:] + free[:first]:
            if len(owned) >= share:
                break
            await self._take(p)

    def _tell_of_evictions(self, evicted: int) -> None:
        if self._evicted is not None and evicted > self._evicted:
            log.warning(
                "The feature store is at its memory budget: it forgot %d histories or counters of users who were away for longest, and "
                "never the log. Raise store.memory_mb (maxmemory of a Redis of your own), or lower store.user_ttl_h.",
                evicted - self._evicted,
            )
        self._evicted = evicted

    async def _take(self, partition: int) -> None:
        claim = await self.held.store.claim(partition, self.name, self.settings.lease_s)
        if claim is None:
            return
        archive = Archive(self.held.config.place("events"), partition)
        manifest = await asyncio.to_thread(archive.take, claim.epoch)
        if not claim.at:
            claim = claim._replace(n=(await self._logs[2].firsts(self.held.partitions))[partition])
        lost = manifest.n > claim.n and await self._behind_parquet(partition, claim, archive)
        self.held.owned[partition] = Owned(claim, archive, lost=(manifest.at, manifest.n) if lost else None)
        log.info("ingest partition=%d epoch=%d from entry %d", partition, claim.epoch, claim.n)

    async def _behind_parquet(self, partition: int, claim: Claim, archive: Archive) -> bool:
        """More is in Parquet than the store has counted. Where the log still has it, it is counted again (a store that lost its
        last second); where the log lacks what is in Parquet (it was emptied, or a replica without its end took over), it goes on
        behind Parquet. Whether that is so."""
        manifest, reader = archive.manifest, self._logs[2]
        if await reader.holds(partition, claim.at, manifest.at, manifest.n - claim.n):
            log.warning("ingest partition=%d counts entries %d to %d again: the store has lost them", partition, claim.n, manifest.n)
            return False
        log.warning("ingest partition=%d: the log was lost; it goes on behind entry %d, the last in Parquet", partition, manifest.n)
        await reader.go_on(partition, manifest.at, manifest.n)
        return True

    async def give_free(self) -> None:
        """Leave the partitions to whoever wants them."""
        await self.held.store.renew({p: o.claim for p, o in self.held.owned.items()}, 0.0)
        await self._redis.zrem(f"{self.prefix}:consumers", self.name)
        self.held.owned.clear()
