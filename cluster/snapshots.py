"""Snapshots of the item side as they stand in the store: read by whoever ranks, in the background, and only what is new."""

from __future__ import annotations

import struct
import time

from redis.asyncio import Redis

from recsys.features.snapshot import Part, unpacked_snapshot

_NUMBER = struct.Struct("<Q")


class SnapshotReader:
    """Keeps the newest snapshot of every partition. `parts`: partition -> snapshot."""

    def __init__(self, redis: Redis, prefix: str, partitions: int) -> None:
        self._redis, self._keys = redis, [f"{prefix}:{{{p}}}:snapshot" for p in range(partitions)]
        self._numbers: dict[int, int] = {}
        self.parts: dict[int, Part] = {}

    async def read(self) -> int:
        """Fetch what changed; gives how many did. Faults are the client's own; StoreError for a damaged one."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in self._keys:
                pipe.getrange(key, 0, _NUMBER.size - 1)
            heads = await pipe.execute()
        numbers = {p: _NUMBER.unpack(head)[0] for p, head in enumerate(heads) if len(head) == _NUMBER.size}
        news = [p for p, number in numbers.items() if self._numbers.get(p) != number]
        for p in news:
            held = await self._redis.get(self._keys[p])
            if held is not None:
                self.parts[p] = unpacked_snapshot(held[_NUMBER.size :])
                self._numbers[p] = _NUMBER.unpack_from(held)[0]
        return len(news)

    @property
    def staleness_s(self) -> float | None:
        """How old the oldest part is; None where there is none."""
        return time.time() - min(part.at for part in self.parts.values()) if self.parts else None
