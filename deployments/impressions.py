"""The log of impressions of one gateway replica: sampled by request id, written beside the answers, never before them.

What is to be logged waits in memory, bounded: beyond the bound it is dropped and counted, so that a slow disk costs impressions
and not answers. A thread writes files that are whole or not there; a kill costs what waited, `flush_s` at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from deployments.ladder import Shown
from recsys.core import Used, id_hash
from recsys.data.event_files import opened
from recsys.data.whole_files import put_whole
from recsys.impressions import Impression, impression, picked, table_of
from recsys.serve_config import ImpressionsConfig

log = logging.getLogger(__name__)
_SPAN = 1 << 32


def sampled(request_id: str, share: float) -> bool:
    """Whether a request's page is logged: the same for every replica and repetition of a request id."""
    return share > 0 and id_hash(f"impression:{request_id}") % _SPAN < share * _SPAN


class ImpressionLog:
    """`folder` is where files go, a path or a URI. Used from the event loop; `stop` as well."""

    def __init__(self, folder: str | Path, config: ImpressionsConfig) -> None:
        self.folder, self.config = str(folder), config
        self.logged = self.dropped = self.failed = 0
        self._waiting: deque[tuple[Shown, Used | None]] = deque()
        self._replica, self._files = uuid.uuid4().hex[:8], 0
        self._task: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    def wants(self, request_id: str) -> bool:
        """Whether this request's page is to be logged."""
        return sampled(request_id, self.config.sample)

    def put(self, shown: Shown) -> None:
        """Take one answered page, and of its batch what it needs; the record is made in the thread that writes it."""
        if len(self._waiting) >= self.config.most_waiting:
            self.dropped += 1
            return
        rows = shown.funnel.items.rows([item.item_id for item in shown.page])
        self._waiting.append((shown._replace(used=None), picked(shown.used, shown.b, rows)))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write_on())

    async def _write_on(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self.config.flush_s)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. A disk that refuses costs these impressions, counted in `failed`."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not waiting:
            return
        try:
            await asyncio.to_thread(self._write, waiting)
            self.logged += len(waiting)
        except Exception:
            self.failed += len(waiting)
            log.exception("%d impressions could not be written to '%s'.", len(waiting), self.folder)

    def _write(self, waiting: Sequence[tuple[Shown, Used | None]]) -> None:
        table = table_of([_record(shown, seen) for shown, seen in waiting])
        fs, folder = opened(self.folder)  # here, as an object store may be slow to answer, or away
        fs.create_dir(folder, recursive=True)
        self._files += 1
        name = f"{int(time.time() * 1000):013d}-{self._replica}-{self._files:06d}.parquet"
        put_whole(fs, folder, name, lambda path: pq.write_table(table, path, filesystem=fs, compression="zstd"))

    async def stop(self) -> None:
        """Write what waits and end."""
        self._ending.set()
        if self._task is not None:
            await self._task  # not cancelled: a write that is under way is waited for
        await self.flush()

    def state(self) -> dict[str, int]:
        """Counts since this replica began."""
        return {"logged": self.logged, "waiting": len(self._waiting), "dropped": self.dropped, "failed": self.failed}


def _record(shown: Shown, seen: Used | None) -> Impression:
    funnel, row = shown.funnel, shown.row
    degraded = [note.stage for note in shown.degraded]
    return impression(
        row.request,
        row.request_id,
        shown.page,
        seen,
        version=funnel.version,
        variant=row.variant,
        cold_start=shown.cold_start,
        degraded=degraded,
    )
