"""Whatever a stage does, a request is answered, and the answer says what stood in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments.ladder import Answer, Ladder, Row, StageCall
from deployments.resilience import Deadline, Degraded
from recsys.core import Candidates, Queries
from recsys.errors import StoreUnavailableError, VersionAbsentError
from recsys.features.store import StoredEvent, UserState
from recsys.funnel import FunnelRequest
from recsys.serve_config import TimeoutsConfig
from tests.deployments.standin import StandIn

QUICK = TimeoutsConfig(user_state=50, recall=60, coarse_rank=60, fine_rank=60, rerank=60)


async def no_state(user_ids: Sequence[str]) -> list[UserState]:
    return [UserState() for _ in user_ids]


def ladder(elsewhere: dict[str, StageCall] | None = None, read: Callable[..., Awaitable[list[UserState]]] = no_state) -> Ladder:
    return Ladder(read_states=read, elsewhere=elsewhere or {}, timeouts_ms=QUICK, executor=ThreadPoolExecutor(2))


def row(user: str = "u1", k: int = 3, *, deadline_s: float = 5.0, explain: bool = False, exclude: Sequence[str] = ()) -> Row:
    request = FunnelRequest(user, k, time.time(), explain=explain, exclude=exclude)
    return Row(request, Deadline.after(deadline_s), asyncio.get_running_loop().create_future())


def answers(funnels: Any, *, on: Callable[[], Ladder] = ladder, rows: int = 1) -> list[Answer]:
    """What `rows` equal requests get."""

    async def ask() -> list[Answer]:
        batch = [row() for _ in range(rows)]
        await on().recommend(funnels if isinstance(funnels, list) else [funnels], batch)
        return [r.answer.result() for r in batch]

    return asyncio.run(ask())


def ids(answer: Answer) -> list[str]:
    return [i.item_id for i in answer.items]


def local(funnel: StandIn, name: str) -> StageCall:
    """A stage that runs elsewhere: the stand-in's own, behind an await."""

    async def call(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
        await asyncio.sleep(0)
        stage = {
            "recall": lambda q, _: funnel.recall(q),
            "coarse_rank": funnel.coarse_rank,
            "fine_rank": funnel.fine_rank,
            "rerank": funnel.rerank,
        }
        return stage[name](queries, candidates)

    return call


def test_a_whole_descent_gives_what_the_funnel_gives() -> None:
    funnel = StandIn()
    [answer] = answers(funnel)
    assert ids(answer) == ["i40", "i42", "i44"]  # coarse keeps 99 … 40; fine puts the even ones first, by number
    assert answer.version == funnel.version
    assert answer.degraded == ()
    assert set(answer.timings) == {"user_state", "queries", "recall", "coarse_rank", "fine_rank", "rerank", "page"}


@pytest.mark.parametrize("own", [("recall",), ("fine_rank",), ("recall", "coarse_rank", "fine_rank", "rerank"), ("coarse_rank", "rerank")])
def test_every_topology_gives_the_same_page(own: tuple[str, ...]) -> None:
    funnel = StandIn()
    [answer] = answers(funnel, on=lambda: ladder({name: local(funnel, name) for name in own}))
    assert answer.items == answers(funnel)[0].items
    assert answer.degraded == ()


@pytest.mark.parametrize(
    ("stage", "rung", "page"),
    [
        ("recall", "popular", ["i99", "i98", "i97"]),
        ("coarse_rank", "recall_order", ["i0", "i2", "i4"]),  # the fine stage still ranks what recall gave
        ("fine_rank", "coarse_order", ["i99", "i98", "i97"]),
        ("rerank", "default", ["i40", "i42", "i44"]),
    ],
)
@pytest.mark.parametrize("how", ["broken", "late"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_next_rung_answers_for_a_stage(stage: str, rung: str, page: list[str], how: str, where: str) -> None:
    funnel = StandIn(break_at=stage) if how == "broken" else StandIn(slow_at=stage, slow_s=0.3)

    async def late(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
        if how == "broken":
            raise ValueError("broken")
        await asyncio.sleep(5)
        raise AssertionError

    [answer] = answers(funnel, on=lambda: ladder({stage: late} if where == "elsewhere" else {}))
    note = "recall" if stage == "recall" else stage
    assert answer.degraded == (Degraded(note, rung, "error" if how == "broken" else "timeout"),)  # type: ignore[arg-type]
    assert ids(answer) == page


def test_recall_order_is_left_where_both_rankers_fail() -> None:
    async def broken(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
        raise ValueError("broken")

    [answer] = answers(StandIn(), on=lambda: ladder({"coarse_rank": broken, "fine_rank": broken}))
    assert [d.rung for d in answer.degraded] == ["recall_order", "recall_order"]
    assert ids(answer) == ["i0", "i1", "i2"]


def test_a_request_whose_parts_cannot_be_read_gets_what_is_popular() -> None:
    class Picky(StandIn):
        def queries(self, requests: Sequence[FunnelRequest]) -> Queries:
            if any(r.context for r in requests):
                raise ValueError("strange context")
            return super().queries(requests)

    async def ask() -> Answer:
        one = row(exclude=["i98"])
        one.request.context = {"device": object()}
        await ladder().recommend([Picky()], [one])
        return one.answer.result()

    answer = asyncio.run(ask())
    assert ids(answer) == ["i99", "i97", "i96"]
    assert answer.degraded == (Degraded("recall", "popular", "error"),)


class TestUserState:
    def test_live_events_reach_the_queries(self) -> None:
        async def read(user_ids: Sequence[str]) -> list[UserState]:
            return [UserState([StoredEvent("i40", "click", 0, None, "e")]) for _ in user_ids]

        [answer] = answers(StandIn(), on=lambda: ladder(read=read))
        assert ids(answer) == ["i42", "i44", "i46"]

    def test_what_fell_off_the_history_does_not_come_back_on_any_rung(self) -> None:
        async def read(user_ids: Sequence[str]) -> list[UserState]:
            return [UserState([StoredEvent("i99", "click", 0, None, "e")], seen={"i40", "i98"}) for _ in user_ids]

        class Picky(StandIn):
            def queries(self, requests: Sequence[FunnelRequest]) -> Queries:
                if any(r.events for r in requests):
                    raise ValueError("strange events")
                return super().queries(requests)

        [whole], [bare] = answers(StandIn(), on=lambda: ladder(read=read)), answers(Picky(), on=lambda: ladder(read=read))
        assert ids(whole) == ["i38", "i42", "i44"]
        assert (ids(bare), bare.degraded) == (["i97", "i96", "i95"], (Degraded("recall", "popular", "error"),))

    @pytest.mark.parametrize(("error", "reason"), [(StoreUnavailableError("gone"), "unavailable"), (ValueError("odd"), "error")])
    def test_a_store_that_fails_leaves_a_stale_state(self, error: Exception, reason: str) -> None:
        async def read(user_ids: Sequence[str]) -> list[UserState]:
            raise error

        [answer] = answers(StandIn(), on=lambda: ladder(read=read))
        assert answer.degraded == (Degraded("user_state", "stale", reason),)  # type: ignore[arg-type]
        assert ids(answer) == ["i40", "i42", "i44"]

    def test_a_store_that_hangs_costs_its_time_out_and_no_more(self) -> None:
        async def read(user_ids: Sequence[str]) -> list[UserState]:
            await asyncio.sleep(30)
            raise AssertionError

        [answer] = answers(StandIn(), on=lambda: ladder(read=read))
        assert answer.degraded == (Degraded("user_state", "stale", "timeout"),)

    def test_it_is_read_once_for_the_whole_batch(self) -> None:
        calls = []

        async def read(user_ids: Sequence[str]) -> list[UserState]:
            calls.append(list(user_ids))
            return [UserState() for _ in user_ids]

        answers(StandIn(), on=lambda: ladder(read=read), rows=3)
        assert calls == [["u1", "u1", "u1"]]


class TestRetries:
    def test_a_stage_whose_replica_died_is_called_once_more(self) -> None:
        funnel, calls = StandIn(), []

        async def dies_once(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
            calls.append(left_s)
            if len(calls) == 1:
                raise ActorDiedError
            return await local(funnel, "recall")(version, queries, candidates, left_s)

        [answer] = answers(funnel, on=lambda: ladder({"recall": dies_once}))
        assert len(calls) == 2
        assert answer.degraded == ()

    def test_a_stage_that_stays_away_is_unavailable(self) -> None:
        async def gone(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
            raise ActorDiedError

        [answer] = answers(StandIn(), on=lambda: ladder({"fine_rank": gone}))
        assert answer.degraded == (Degraded("fine_rank", "coarse_order", "unavailable"),)

    def test_a_late_call_is_cancelled(self) -> None:
        class Response:
            """As Serve's: an awaitable with cancel()."""

            cancelled = False

            def cancel(self) -> None:
                Response.cancelled = True

            def __await__(self) -> Any:
                return asyncio.sleep(30).__await__()

        answers(StandIn(), on=lambda: ladder({"fine_rank": lambda *_: Response()}))  # type: ignore[dict-item,return-value]
        assert Response.cancelled

    def test_a_batch_runs_under_a_version_that_all_stages_hold(self) -> None:
        old, new = StandIn("v000001-aaaaaaaa"), StandIn("v000002-bbbbbbbb")
        asked = []

        async def only_old(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
            asked.append(version)
            if version != old.version:
                raise VersionAbsentError("not held")
            return await local(old, "fine_rank")(version, queries, candidates, left_s)

        both = answers([new, old], on=lambda: ladder({"fine_rank": only_old}), rows=2)
        assert {a.version for a in both} == {old.version}  # the whole batch, and it says so
        assert asked == [new.version, new.version, old.version]  # another replica may hold it: asked twice

    def test_without_any_version_that_all_hold_popular_answers(self) -> None:
        async def none(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
            raise VersionAbsentError("not held")

        [answer] = answers(StandIn(), on=lambda: ladder({"recall": none}))
        assert answer.degraded == (Degraded("recall", "popular", "unavailable"),)


class TestDeadlines:
    def test_a_row_is_answered_at_its_deadline_with_what_is_known(self) -> None:
        async def ask() -> tuple[Answer, Answer]:
            funnel = StandIn()
            seen: list[int] = []

            async def slow(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
                seen.append(len(queries))
                await asyncio.sleep(0.05)
                return await local(funnel, "fine_rank")(version, queries, candidates, left_s)

            async def counted(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
                seen.append(len(queries))
                return await local(funnel, "rerank")(version, queries, candidates, left_s)

            hasty, patient, to = row(), row(), ladder({"fine_rank": slow, "rerank": counted})
            asyncio.get_running_loop().call_later(0.02, to.answer_early, hasty, funnel)
            await to.recommend([funnel], [hasty, patient])
            assert seen == [2, 1]  # the row that has its answer is not ranked further
            return hasty.answer.result(), patient.answer.result()

        early, full = asyncio.run(ask())
        assert ids(early) == ["i99", "i98", "i97"]
        assert early.degraded == (Degraded("fine_rank", "coarse_order", "timeout"),)
        assert ids(full) == ["i40", "i42", "i44"]
        assert full.degraded == ()

    def test_a_row_that_never_left_the_queue_gets_what_is_popular(self) -> None:
        async def ask() -> Answer:
            waiting = row()
            ladder().answer_early(waiting, StandIn())  # type: ignore[arg-type]
            return waiting.answer.result()

        answer = asyncio.run(ask())
        assert ids(answer) == ["i99", "i98", "i97"]
        assert answer.degraded == (Degraded("user_state", "stale", "timeout"), Degraded("recall", "popular", "timeout"))

    def test_a_caller_that_leaves_is_dropped_between_stages(self) -> None:
        async def ask() -> list[int]:
            funnel, seen = StandIn(), []

            async def recall(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
                leaving.answer.cancel()
                return funnel.recall(queries)

            async def fine(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Candidates:
                seen.append(len(queries))
                return await local(funnel, "fine_rank")(version, queries, candidates, left_s)

            leaving, staying = row(), row("u2")
            await ladder({"recall": recall, "fine_rank": fine}).recommend([funnel], [leaving, staying])
            assert ids(staying.answer.result()) == ["i40", "i42", "i44"]
            return seen

        assert asyncio.run(ask()) == [1]


def test_a_channel_that_recall_lost_is_named() -> None:
    class Lossy(StandIn):
        def recall(self, queries: Queries) -> Candidates:
            found = super().recall(queries)
            found.lost = ("two",)
            return found

    [answer] = answers(Lossy())
    assert answer.degraded == (Degraded("two", "partial", "error"),)
