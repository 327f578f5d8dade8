"""Joining concurrent requests into micro-batches: at once when idle, with company when busy.

`serve.batch` waits for company even where none can come; here a request on an idle replica leaves in the same turn of
the event loop, and requests gather only while earlier batches are under way. Batches hold one lane (version, depth), so
that everything in a batch may be computed together.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)


class Waiting(Protocol):
    """A row of a batch: whoever runs the batch fulfils its `answer`."""

    answer: asyncio.Future


R = TypeVar("R", bound=Waiting)


class MicroBatcher(Generic[R]):
    """Runs `run(lane, rows)` over rows of one lane, at most `at_once` batches at a time, each of at most `max_size` rows.

    While a batch is under way, a new one leaves when it is full or its oldest row has waited `wait_s`, and a place is free.
    A row whose caller has left is not run. `run` fulfils the rows' answers; an exception of `run` goes to those still open.
    """

    def __init__(self, run: Callable[[Hashable, list[R]], Awaitable[None]], *, max_size: int, wait_s: float, at_once: int) -> None:
        self._run, self._max_size, self._wait_s, self._at_once = run, max_size, wait_s, at_once
        self._lanes: dict[Hashable, deque[R]] = {}
        self._running: set[asyncio.Task] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._leaving = False
        # A batch belongs to no request: in a request's context, Serve would cancel the batch's calls when that one client leaves.
        self._context = contextvars.Context()

    @property
    def under_way(self) -> int:
        """Batches that have left and not come back."""
        return len(self._running)

    def put(self, lane: Hashable, row: R) -> None:
        """Queue a row; its `answer` will be fulfilled."""
        queue = self._lanes.setdefault(lane, deque())
        queue.append(row)
        if len(self._running) >= self._at_once:
            return  # the batch that comes back first takes it along
        loop = asyncio.get_running_loop()
        if not self._running or len(queue) >= self._max_size:
            if not self._leaving:
                # call_soon, not now: requests that arrived in the same turn of the loop leave together.
                self._leaving = True
                loop.call_soon(self._leave, context=self._context)
        elif self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._leave, context=self._context)

    def _leave(self) -> None:
        self._leaving = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._lanes and len(self._running) < self._at_once:
            lane = next(iter(self._lanes))
            queue = self._lanes.pop(lane)
            rows: list[R] = []
            while queue and len(rows) < self._max_size:
                row = queue.popleft()
                if not row.answer.done():
                    rows.append(row)
            if queue:
                self._lanes[lane] = queue  # behind the other lanes: none starves
            if rows:
                task = asyncio.get_running_loop().create_task(self._one(lane, rows))
                self._running.add(task)
                task.add_done_callback(self._back)

    async def _one(self, lane: Hashable, rows: list[R]) -> None:
        try:
            await self._run(lane, rows)
        except Exception as error:
            log.exception("A micro-batch failed.")
            for row in rows:
                if not row.answer.done():
                    row.answer.set_exception(error)
        for row in rows:
            if not row.answer.done():
                row.answer.set_exception(RuntimeError("A micro-batch ended without an answer for this row."))

    def _back(self, task: asyncio.Task) -> None:
        self._running.discard(task)
        if self._lanes:
            self._leave()

    async def drain(self) -> None:
        """Wait until nothing is queued or under way."""
        while self._running or self._lanes:
            await asyncio.sleep(0.005)
