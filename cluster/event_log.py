"""The event log as consumers read it: ordered entries by partition, whatever keeps them. Here: the streams of the feature store.

`cluster.kafka_log` is the other one. A position is the log's own name of an entry; `told_ms` is when the log took it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from redis.asyncio import Redis

from cluster.redis_round import run_script


class Entry(NamedTuple):
    """One record of the log."""

    position: str
    record: bytes
    told_ms: int


class End(NamedTuple):
    """Where a partition ends. total: how many entries it ever took; first: the offset of the oldest one that it holds, in a log whose
    positions are offsets and which forgets by itself; None where positions say nothing and consumers count all entries."""

    total: int
    first: int | None = None

    def behind(self, at: str, n: int) -> int:
        """How many entries stand behind a position ("" is the beginning) that `n` entries were counted up to."""
        return max(0, self.total - (n if self.first is None else max(self.first, int(at or -1) + 1)))


def place(position: str) -> tuple[int, ...]:
    """What positions are ordered by; "" is the beginning."""
    return tuple(map(int, position.split("-"))) if position else ()


class EventLog(Protocol):
    """Read-only but for `trim`. One object for one reader: it may keep a place. Faults are the client's own."""

    repeats: bool
    """Whether a record may stand in it twice (a producer that tried again), so that its consumer must look."""

    async def read(self, after: Mapping[int, str], count: int, *, wait_ms: int = 0) -> dict[int, list[Entry]]:
        """Per partition at most `count` entries behind a position ("" is the beginning); waits for the first of them."""
        ...

    async def ends(self, partitions: int) -> list[End]:
        """Where each partition ends."""
        ...

    async def firsts(self, partitions: int) -> list[int]:
        """How many entries of each partition came before the oldest one that it holds."""
        ...

    async def trim(self, partition: int, position: str, keep_from_ms: int) -> None:
        """Forget entries up to a position, itself included, but none younger than `keep_from_ms`."""
        ...

    async def holds(self, partition: int, after: str, upto: str, n: int) -> bool:
        """Whether it has the `n` entries behind a position up to another one: not where its server lost some and went on without them."""
        ...

    async def go_on(self, partition: int, position: str, n: int) -> None:
        """A log that lost entries up to `position`: what stands behind it, and what comes, is numbered from `n` on."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


_PAGE = 10_000
GO_ON = """
-- KEYS: log. ARGV: position, n. Entries behind the position count from n on, and none gets a position before it.
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[1], 'making', '$', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', KEYS[1], 'making')
end
local last, told = ARGV[1], redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #told, 2 do
  if told[i] == 'last-generated-id' then
    local ms, seq = string.match(told[i + 1], '(%d+)-(%d+)')
    local at_ms, at_seq = string.match(last, '(%d+)-(%d+)')
    ms, seq, at_ms, at_seq = tonumber(ms), tonumber(seq), tonumber(at_ms), tonumber(at_seq)
    if ms > at_ms or ms == at_ms and seq > at_seq then last = told[i + 1] end
  end
end
local behind = #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+')
redis.call('XSETID', KEYS[1], last, 'ENTRIESADDED', ARGV[2] + behind, 'MAXDELETEDID', '0-0')
return behind
"""


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

    async def ends(self, partitions: int) -> list[End]:
        """See EventLog: `entries-added` counts trimmed ones too."""
        return [End(added) for added, _ in await self._lengths(partitions)]

    async def firsts(self, partitions: int) -> list[int]:
        """See EventLog."""
        return [added - length for added, length in await self._lengths(partitions)]

    async def _lengths(self, partitions: int) -> list[tuple[int, int]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for p in range(partitions):
                pipe.xinfo_stream(self._key(p))
            found = await pipe.execute(raise_on_error=False)
        for info in found:  # a stream that is not there is empty; of a server that cannot say, nothing must be concluded
            if isinstance(info, Exception) and "no such key" not in str(info):
                raise info
        return [(0, 0) if isinstance(info, Exception) else (int(info["entries-added"]), int(info["length"])) for info in found]

    async def trim(self, partition: int, position: str, keep_from_ms: int) -> None:
        """See EventLog."""
        ms, seq = (int(part) for part in position.split("-"))
        await self._redis.xtrim(
            self._key(partition), minid=f"{ms}-{seq + 1}" if ms < keep_from_ms else f"{keep_from_ms}-0", approximate=False
        )

    async def holds(self, partition: int, after: str, upto: str, n: int) -> bool:
        """See EventLog: they are counted."""
        found = 0
        while page := await self._redis.xrange(self._key(partition), f"({after or '0-0'}", upto, count=_PAGE):
            found, after = found + len(page), page[-1][0].decode()
        return found >= n

    async def go_on(self, partition: int, position: str, n: int) -> None:
        """See EventLog; the stream is made where there is none."""
        (said,) = await run_script(self._redis, GO_ON, [(1, self._key(partition), position, n)])
        if isinstance(said, Exception):
            raise said

    async def close(self) -> None:
        """The connection is the caller's."""
