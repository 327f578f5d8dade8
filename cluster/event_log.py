"""The event log as consumers read it: ordered entries by partition, whatever keeps them. Here: the streams of the feature store.

`cluster.kafka_log` is the other one. A position is the log's own name of an entry; `told_ms` is when the log took it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from redis.asyncio import Redis
from redis.exceptions import ResponseError


class Entry(NamedTuple):
    """One record of the log."""

    position: str
    record: bytes
    told_ms: int


class EventLog(Protocol):
    """Read-only but for `trim`. One object for one reader: it may keep a place. Faults are the client's own."""

    repeats: bool
    """Whether a record may stand in it twice (a producer that tried again), so that its consumer must look."""

    async def read(self, after: Mapping[int, str], count: int, *, wait_ms: int = 0) -> dict[int, list[Entry]]:
        """Per partition at most `count` entries behind a position ("" is the beginning); waits for the first of them."""
        ...

    async def totals(self, partitions: int) -> list[int]:
        """How many entries each partition ever took."""
        ...

    async def firsts(self, partitions: int) -> list[int]:
        """How many entries of each partition came before the oldest one that it holds."""
        ...

    async def trim(self, partition: int, position: str, keep_from_ms: int) -> None:
        """Forget entries up to a position, itself included, but none younger than `keep_from_ms`."""
        ...

    async def go_on(self, partition: int, position: str, n: int) -> None:
        """A log that was lost and begins anew: number what comes from `n` on, behind `position`."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class RedisLog:
    """Streams of the feature store, one a partition."""

    repeats = False

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis, self._prefix = redis, prefix

    def _key(self, partition: int) -> str:
        return f"{self._prefix}:{{{partition}}}:log"

    async def read(self, after: Mapping[int, str], count: int, *, wait_ms: int = 0) -> dict[int, list[Entry]]:
        """See EventLog: one XREAD over all partitions."""
        if not after:
            return {}
        streams: Any = {self._key(p): position or "0-0" for p, position in after.items()}
        partitions = {self._key(p).encode(): p for p in after}
        pages = await self._redis.xread(streams, count=count, block=wait_ms or None)
        return {
            partitions[name]: [
                Entry(position.decode(), fields.get(b"e", b"") if fields else b"", int(position.split(b"-")[0]))
                for position, fields in page
            ]
            for name, page in pages or ()
        }

    async def totals(self, partitions: int) -> list[int]:
        """See EventLog: `entries-added` counts trimmed ones too."""
        return [added for added, _ in await self._lengths(partitions)]

    async def firsts(self, partitions: int) -> list[int]:
        """See EventLog."""
        return [added - length for added, length in await self._lengths(partitions)]

    async def _lengths(self, partitions: int) -> list[tuple[int, int]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for p in range(partitions):
                pipe.xinfo_stream(self._key(p))
            found = await pipe.execute(raise_on_error=False)
        return [(0, 0) if isinstance(info, Exception) else (int(info["entries-added"]), int(info["length"])) for info in found]

    async def trim(self, partition: int, position: str, keep_from_ms: int) -> None:
        """See EventLog."""
        ms, seq = (int(part) for part in position.split("-"))
        await self._redis.xtrim(
            self._key(partition), minid=f"{ms}-{seq + 1}" if ms < keep_from_ms else f"{keep_from_ms}-0", approximate=False
        )

    async def go_on(self, partition: int, position: str, n: int) -> None:
        """See EventLog: the stream is made where there is none, and what it holds counts as entries behind `n`."""
        key = self._key(partition)
        with contextlib.suppress(ResponseError):  # BUSYGROUP: left by one that was killed here
            await self._redis.xgroup_create(key, "making", "$", mkstream=True)
        await self._redis.xgroup_destroy(key, "making")
        last = (await self._redis.xinfo_stream(key))["last-generated-id"].decode()
        newest = max((last, position), key=lambda at: tuple(map(int, at.split("-"))))
        await self._redis.execute_command("XSETID", key, newest, "ENTRIESADDED", n + await self._redis.xlen(key), "MAXDELETEDID", "0-0")

    async def close(self) -> None:
        """The connection is the caller's."""
