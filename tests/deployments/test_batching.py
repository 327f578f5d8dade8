"""The micro-batcher joins what runs at the same time, and nothing else."""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass, field

import pytest

from deployments.batching import MicroBatcher


@dataclass
class Waiter:
    value: int
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Recorder:
    """Runs batches of doubling, each as long as `gate` is shut."""

    def __init__(self) -> None:
        self.batches: list[tuple[object, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, lane: object, rows: list[Waiter]) -> None:
        self.batches.append((lane, [r.value for r in rows]))
        await self.gate.wait()
        for row in rows:
            if not row.answer.done():
                row.answer.set_result(2 * row.value)


def batcher(recorder: Recorder, **given: float) -> MicroBatcher[Waiter]:
    settings = {"max_size": 4, "wait_s": 0.0, "at_once": 1} | given
    return MicroBatcher(recorder.run, **settings)  # type: ignore[arg-type]


def put(to: MicroBatcher[Waiter], lane: str, *values: int) -> list[Waiter]:
    rows = [Waiter(v) for v in values]
    for row in rows:
        to.put(lane, row)
    return rows


def test_requests_of_one_turn_of_the_loop_share_a_batch() -> None:
    async def claim() -> None:
        recorder = Recorder()
        rows = put(batcher(recorder), "a", 1, 2, 3)
        assert [await r.answer for r in rows] == [2, 4, 6]
        assert recorder.batches == [("a", [1, 2, 3])]

    asyncio.run(claim())


def test_a_batch_holds_one_lane_and_at_most_its_size() -> None:
    async def claim() -> None:
        recorder = Recorder()
        to = batcher(recorder)
        rows = put(to, "a", 1, 2, 3, 4, 5) + put(to, "b", 9)
        assert [await r.answer for r in rows] == [2, 4, 6, 8, 10, 18]
        assert recorder.batches == [("a", [1, 2, 3, 4]), ("b", [9]), ("a", [5])]  # lanes take turns: none starves

    asyncio.run(claim())


def test_while_all_places_are_taken_requests_gather() -> None:
    async def claim() -> None:
        recorder = Recorder()
        to = batcher(recorder)
        recorder.gate.clear()
        first = put(to, "a", 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        more = put(to, "a", 2) + put(to, "a", 3)
        await asyncio.sleep(0.02)
        assert recorder.batches == [("a", [1])]
        recorder.gate.set()
        assert [await r.answer for r in first + more] == [2, 4, 6]
        assert recorder.batches == [("a", [1]), ("a", [2, 3])]

    asyncio.run(claim())


def test_a_caller_that_left_is_not_run_and_takes_nobody_along() -> None:
    async def claim() -> None:
        recorder = Recorder()
        to = batcher(recorder)
        rows = put(to, "a", 1, 2)
        rows[0].answer.cancel()
        assert await rows[1].answer == 4
        assert recorder.batches == [("a", [2])]

    asyncio.run(claim())


def test_a_caller_that_leaves_while_its_batch_runs_takes_nobody_along() -> None:
    async def claim() -> None:
        recorder = Recorder()
        to = batcher(recorder)
        recorder.gate.clear()
        rows = put(to, "a", 1, 2)
        await asyncio.sleep(0.01)
        rows[0].answer.cancel()
        recorder.gate.set()
        assert await rows[1].answer == 4

    asyncio.run(claim())


def test_a_batch_runs_in_a_context_of_its_own() -> None:
    of_request: contextvars.ContextVar[str] = contextvars.ContextVar("of_request", default="none")
    seen = []

    async def run(lane: object, rows: list[Waiter]) -> None:
        seen.append(of_request.get())
        rows[0].answer.set_result(0)

    async def claim() -> None:
        of_request.set("request 7")  # in it, Serve would cancel the batch's calls when request 7 is cancelled
        await put(MicroBatcher(run, max_size=4, wait_s=0, at_once=1), "a", 1)[0].answer

    asyncio.run(claim())
    assert seen == ["none"]


def test_an_error_of_a_batch_goes_to_its_rows_and_the_next_batch_runs() -> None:
    async def run(lane: object, rows: list[Waiter]) -> None:
        if rows[0].value == 1:
            raise ValueError("broken")
        rows[0].answer.set_result(rows[0].value)

    async def claim() -> None:
        to: MicroBatcher[Waiter] = MicroBatcher(run, max_size=1, wait_s=0, at_once=1)
        bad, good = put(to, "a", 1, 2)
        with pytest.raises(ValueError, match="broken"):
            await bad.answer
        assert await good.answer == 2

    asyncio.run(claim())
