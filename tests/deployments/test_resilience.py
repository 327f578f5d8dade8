"""Deadlines, the one retry, the stand-in, and the words for what went wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from deployments.resilience import Deadline, Preferred, called_twice, reason_of
from recsys.core import Queries
from recsys.errors import StoreUnavailableError, VersionAbsentError

QUERIES = Queries.of([], history_length=1)


def test_a_deadline_counts_down_and_stops_at_zero() -> None:
    assert 0.9 < Deadline.after(1).left_s <= 1
    assert Deadline.after(-1).left_s == 0
    assert Deadline.after(-1).passed
    assert Deadline.after(9).sooner(1).left_s <= 1
    assert Deadline.after(1).sooner(9).left_s <= 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "timeout"),
        (ActorDiedError(), "unavailable"),
        (VersionAbsentError("v"), "unavailable"),
        (StoreUnavailableError("gone"), "unavailable"),
        (BackPressureError(1, 1), "overload"),
        (ValueError("x"), "error"),
    ],
)
def test_every_error_has_a_word(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def scripted(*outcomes: object) -> tuple[Callable[..., Awaitable[str]], list[float]]:
    """A call that gives or raises these in turn; with the seconds it was left."""
    left: list[float] = []

    async def call(*args: object) -> str:
        left.append(float(args[-1]))  # type: ignore[arg-type]
        outcome = outcomes[len(left) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, float):
            await asyncio.sleep(outcome)
        return str(outcome)

    return call, left


def test_a_dead_replica_is_asked_twice_within_one_deadline() -> None:
    call, left = scripted(ActorDiedError(), "done")
    assert asyncio.run(called_twice(call, Deadline.after(5))) == "done"
    assert len(left) == 2
    assert left[1] <= left[0] <= 5


def test_an_error_of_the_stage_itself_is_not_retried() -> None:
    call, left = scripted(ValueError("bug"), "done")
    with pytest.raises(ValueError, match="bug"):
        asyncio.run(called_twice(call, Deadline.after(5)))
    assert len(left) == 1


def test_no_call_is_made_past_the_deadline() -> None:
    call, left = scripted("done")
    with pytest.raises(TimeoutError):
        asyncio.run(called_twice(call, Deadline(time.monotonic() - 1)))
    assert left == []


class TestStandIn:
    def test_the_first_answers_while_it_can(self) -> None:
        first, _ = scripted("gpu")
        second, asked = scripted("cpu")
        assert asyncio.run(Preferred(first, second)("v1", QUERIES, None, 5.0)) == "gpu"
        assert asked == []

    @pytest.mark.parametrize("outcome", [ActorDiedError(), BackPressureError(1, 1), VersionAbsentError("v"), 30.0])
    def test_the_second_answers_for_one_that_is_gone_full_behind_or_late(self, outcome: object) -> None:
        first, _ = scripted(outcome)
        second, asked = scripted("cpu")
        assert asyncio.run(Preferred(first, second)("v1", QUERIES, None, 0.2)) == "cpu"
        assert asked[0] <= 0.2

    def test_the_first_rests_after_a_failure_and_then_gets_its_chance(self) -> None:
        async def claim() -> list[str]:
            first, _ = scripted(ActorDiedError(), "gpu again")
            second, _ = scripted("cpu", "cpu")
            call = Preferred(first, second, rest_s=0.05)
            answers = [await call("v1", QUERIES, None, 5.0), await call("v1", QUERIES, None, 5.0)]
            await asyncio.sleep(0.06)
            return [*answers, await call("v1", QUERIES, None, 5.0)]

        assert asyncio.run(claim()) == ["cpu", "cpu", "gpu again"]
