"""Joining of concurrent POST /v1/events: who shares a round, and who hears of what went wrong."""

from __future__ import annotations

import asyncio

import pytest

from deployments.appending import Appender
from recsys.errors import StoreError, StoreUnavailableError
from recsys.features.store import MemoryStore
from tests.contracts_store import event


class Slow(MemoryStore):
    """A store whose rounds take as long as `gate` is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.sizes = asyncio.Event(), []
        self.fault: Exception | None = None

    async def append_all(self, calls):
        self.sizes.append([len(c) for c in calls])
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return await super().append_all(calls)


def asked(scenario, *, most: int = 10) -> None:
    async def whole() -> None:
        store = Slow()
        await scenario(store, Appender(store, most=most))

    asyncio.run(whole())


def some(n: int, user: str = "u"):
    return [event(user, f"i{i}", i) for i in range(n)]


def test_callers_that_come_during_a_round_share_the_next_one_and_each_hears_of_its_own_events():
    async def scenario(store, appender):
        first = asyncio.create_task(appender.append(some(2)))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(appender.append(some(3, user))) for user in ("u", "v", "w")]
        await asyncio.sleep(0.01)
        assert store.sizes == [[2]], "an idle appender sends at once"
        store.gate.set()
        assert await first == (2, 0)
        assert [await r for r in rest] == [(1, 2), (3, 0), (3, 0)]
        assert store.sizes == [[2], [3, 3, 3]]

    asked(scenario)


def test_a_round_is_bounded_and_a_large_call_stays_whole():
    async def scenario(store, appender):
        store.gate.set()
        sizes = (4, 4, 4, 25, 1)
        await asyncio.gather(*(appender.append(some(n, f"u{i}")) for i, n in enumerate(sizes)))
        assert store.sizes == [[4, 4], [4], [25], [1]]

    asked(scenario)


def test_a_store_that_is_away_fails_every_caller_of_the_round_and_the_next_round_is_tried():
    async def scenario(store, appender):
        store.fault = StoreUnavailableError("away")
        store.gate.set()
        said = await asyncio.gather(*(appender.append(some(1, u)) for u in "abc"), return_exceptions=True)
        assert [type(s) for s in said] == [StoreUnavailableError] * 3
        store.fault = None
        assert await appender.append(some(1, "a")) == (1, 0)

    asked(scenario)


def test_an_event_that_cannot_be_stored_fails_its_own_caller_alone():
    async def scenario(store, appender):
        bad = [event("b", "i", 1, "bad", context={"x": object()})]
        first = asyncio.create_task(appender.append(some(1, "first")))
        await asyncio.sleep(0)
        rest = [asyncio.create_task(appender.append(told)) for told in (some(2, "a"), bad, some(2, "c"))]
        store.gate.set()
        assert await first == (1, 0)
        said = await asyncio.gather(*rest, return_exceptions=True)
        assert said[0] == said[2] == (2, 0)
        assert isinstance(said[1], StoreError)

    asked(scenario)


def test_a_caller_that_leaves_takes_nobody_with_it():
    async def scenario(store, appender):
        first = asyncio.create_task(appender.append(some(1, "a")))
        await asyncio.sleep(0)
        second = asyncio.create_task(appender.append(some(1, "b")))
        await asyncio.sleep(0)
        first.cancel()
        store.gate.set()
        assert await second == (1, 0)
        assert await store.append(some(1, "a")) == (0, 1), "what was on its way is written"
        with pytest.raises(asyncio.CancelledError):
            await first

    asked(scenario)
