"""Joining concurrent requests into micro-batches: at once when idle, in company when busy.

`serve.batch` waits for company even where none can come; here a request on an idle replica leaves in the same turn of
the event loop, and requests gather only while earlier batches are under way. Batches hold one lane (version, depth), so
that everything in a batch may be computed together.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
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

    An idle batcher sends a row at once. After a batch, the next waits for its callers to come again: it leaves when all have,
    when it is full, or when nobody has come for `wait_s` (or a tenth of what a batch takes, where that is longer). While a batch is under way, another leaves when it is full, or when the one
    under way takes twice as long as usual; else it goes when that comes back: a batch costs far less than its rows alone.
    A row whose caller has left is not run. `run` fulfils the rows' answers; an exception of `run` goes to those still open.
    """

    def __init__(self, run: Callable[[Hashable, list[R]], Awaitable[None]], *, max_size: int, wait_s: float, at_once: int) -> None:
        self._run, self._max_size, self._wait_s, self._at_once = run, max_size, wait_s, at_once
        self._lanes: dict[Hashable, deque[R]] = {}
        self._running: set[asyncio.Task] = set()
        self._timer: asyncio.Handle | None = None
        self._leaving = False
        self._expected = 1
        self._usual_s = 0.0
        self._last_put = 0.0
        # A batch belongs to no request: in a request's context, Serve would cancel the batch's calls when that one client leaves.
        self._context = contextvars.Context()

    def put(self, lane: Hashable, row: R) -> None:
        """Queue a row; its `answer` will be fulfilled."""
        queue = self._lanes.setdefault(lane, deque())
        queue.append(row)
        if self._leaving or len(self._running) >= self._at_once:
            return
        self._last_put = time.monotonic()
        if len(queue) >= (self._max_size if self._running else min(self._expected, self._max_size)):
            self._soon()
        elif self._timer is None:
            self._later()

    def _soon(self) -> None:
        # call_soon, not now: requests that arrived in the same turn of the loop leave together.
        self._leaving = True
        asyncio.get_running_loop().call_soon(self._leave, context=self._context)

    def _later(self) -> None:
        wait_s = max(self._wait_s, 2 * self._usual_s) if self._running else self._quiet_s()
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._waited, context=self._context)

    def _quiet_s(self) -> float:
        return max(self._wait_s, 0.1 * self._usual_s)

    def _waited(self) -> None:
        left_s = self._last_put + self._quiet_s() - time.monotonic()
        if not self._running and left_s > 0:  # somebody came meanwhile: there may be more
            self._timer = asyncio.get_running_loop().call_later(left_s, self._waited, context=self._context)
        else:
            self._leave()

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
                task.add_done_callback(functools.partial(self._back, len(rows)))

    async def _one(self, lane: Hashable, rows: list[R]) -> None:
        began = time.monotonic()
        try:
            await self._run(lane, rows)
        except Exception as error:
            log.exception("A micro-batch failed.")
            for row in rows:
                if not row.answer.done():
                    row.answer.set_exception(error)
        self._usual_s += 0.2 * (time.monotonic() - began - self._usual_s)
        for row in rows:
            if not row.answer.done():
                row.answer.set_exception(RuntimeError("A micro-batch ended without an answer for this row."))

    def _back(self, rows: int, task: asyncio.Task) -> None:
        self._running.discard(task)
        queued = sum(map(len, self._lanes.values()))
        self._expected = rows + queued
        if not queued or self._leaving:
            return
        if self._timer is not None:
            self._timer.cancel()  # it was set behind this batch: the wait is shorter now
            self._timer = None
        self._last_put = time.monotonic()
        if queued >= self._max_size or (rows == 1 and queued == 1):
            self._soon()
        else:
            self._later()

    async def drain(self) -> None:
        """Wait until nothing is queued or under way."""
        while self._running or self._lanes:
            await asyncio.sleep(0.005)
