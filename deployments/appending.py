"""Joining concurrent POST /v1/events into rounds of the store: at once when idle, in company while a round is under way.

A round costs one sync of the disk whatever it carries, so under load the events of many callers share it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from recsys.errors import StoreError, StoreUnavailableError
from recsys.features.store import AppendResult, FeatureStore, NewEvent


class _Caller(NamedTuple):
    events: Sequence[NewEvent]
    answer: asyncio.Future[AppendResult]


class Appender:
    """One round at a time; a round takes what has come meanwhile, up to `most` events, and whole callers only.

    A caller that has left is told all the same: its events were accepted for writing. What cannot be stored fails its own
    caller alone.
    """

    def __init__(self, store: FeatureStore, *, most: int) -> None:
        self._store, self._most = store, most
        self._waiting: deque[_Caller] = deque()
        self._round: asyncio.Task[None] | None = None
        self._context = contextvars.Context()  # a round belongs to no request: none of them may cancel it
        self.rounds = 0

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        """As FeatureStore.append. Raises StoreUnavailableError where nothing is known to be on disk."""
        loop = asyncio.get_running_loop()
        caller = _Caller(events, loop.create_future())
        self._waiting.append(caller)
        if self._round is None:
            self._round = loop.create_task(self._rounds(), context=self._context)
        return await caller.answer

    async def _rounds(self) -> None:
        try:
            while self._waiting:
                await self._one(self._taken())
        finally:
            self._round = None

    def _taken(self) -> list[_Caller]:
        taken = [self._waiting.popleft()]
        n = len(taken[0].events)
        while self._waiting and n + len(self._waiting[0].events) <= self._most:
            taken.append(self._waiting.popleft())
            n += len(taken[-1].events)
        return taken

    async def _one(self, callers: list[_Caller]) -> None:
        self.rounds += 1
        try:
            results = await self._store.append_all([c.events for c in callers])
        except StoreUnavailableError as error:
            _fail(callers, error)
        except StoreError as error:
            if len(callers) == 1:
                _fail(callers, error)
                return
            for caller in callers:  # somebody's event cannot be written: each by itself, so that the others' are
                await self._one([caller])
        except Exception as error:  # noqa: BLE001  whatever it is, nobody may wait for ever
            _fail(callers, error)
        else:
            for caller, result in zip(callers, results, strict=True):
                if not caller.answer.done():
                    caller.answer.set_result(result)


def _fail(callers: list[_Caller], error: Exception) -> None:
    for caller in callers:
        if not caller.answer.done():
            caller.answer.set_exception(error)
