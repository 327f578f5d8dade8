"""The third part of a consumer: what is applied goes to Parquet, and the log is trimmed behind all that have read it."""

from __future__ import annotations

import asyncio
import time

from cluster.archive import ArchivedRow
from cluster.event_log import Entry, EventLog
from cluster.owned import Holding, Owned

PAGE = 10_000
"""Entries read from the log at once."""


class Archiving:
    """Parquet of the partitions that are held."""

    def __init__(self, held: Holding, log: EventLog) -> None:
        self._held, self._log = held, log
        self._written: dict[int, float] = {}

    async def due(self) -> int:
        """Write the partitions that wait long enough or have enough; gives the rows written."""
        settings, now, rows = self._held.config.ingest, time.monotonic(), 0
        for p, owned in list(self._held.owned.items()):
            waiting = owned.claim.n - owned.archive.manifest.n
            since = self._written.setdefault(p, now)
            if waiting >= settings.parquet_rows or (waiting > 0 and now - since >= settings.parquet_every_s):
                rows += await self.write(p, owned)
                self._written[p] = time.monotonic()
            elif waiting <= 0:
                self._written[p] = now
        return rows

    async def all(self) -> int:
        """Write all that is applied."""
        return sum([await self.write(p, owned) for p, owned in list(self._held.owned.items())])

    async def write(self, partition: int, owned: Owned) -> int:
        """One partition up to what is applied, in files of at most `parquet_rows`, small ones merged; then trim the log behind it."""
        written, settings = 0, self._held.config.ingest
        while (archive := owned.archive).manifest.n < owned.claim.n:
            manifest = archive.manifest
            entries = await self._page(partition, manifest.at, min(settings.parquet_rows, owned.claim.n - manifest.n))
            if not entries:
                break
            batch = await self._held.batch(partition, manifest.n, entries)
            rows = [ArchivedRow(t.event, t.n, t.entry.told_ms) for t in batch.taken]
            if not await self._ours(partition, owned):
                break  # somebody else has it: what counts is theirs to say
            await asyncio.to_thread(archive.append, rows, entries[-1].position, manifest.n + len(entries))
            written += len(rows)
        if run := owned.archive.mergeable(settings.parquet_rows):
            one = await asyncio.to_thread(owned.archive.merge, run)
            if await self._ours(partition, owned):
                await asyncio.to_thread(owned.archive.put_for, run, one)
        await self._trim(partition, owned)
        return written

    async def _ours(self, partition: int, owned: Owned) -> bool:
        return (await self._held.store.renew({partition: owned.claim}, self._held.config.ingest.lease_s))[partition]

    async def _page(self, partition: int, after: str, most: int) -> list[Entry]:
        found: list[Entry] = []
        while len(found) < most:
            page = (await self._log.read({partition: found[-1].position if found else after}, min(PAGE, most - len(found)))).get(partition)
            if not page:
                break
            found += page
        return found

    async def _trim(self, partition: int, owned: Owned) -> None:
        """Only what is in Parquet, counted by every item side that reads this log, and older than `keep_h`."""
        held, manifest = self._held, owned.archive.manifest
        heads = await held.store.heads(range(held.partitions), kept=True)
        if manifest.n and all(head.counted.get(partition, 0) >= manifest.n for head in heads):
            keep_from_ms = int(1000 * (time.time() - 3600 * held.config.ingest.keep_h))
            await self._log.trim(partition, manifest.at, keep_from_ms)
