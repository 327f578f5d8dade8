"""One micro-batch on its way through the funnel, and what answers when a stage is late, broken or gone.

Stages that live in this process run together in one hop to a worker thread; stages of their own are called by handle.
A stage that does not deliver in its time is replaced by the next rung (fine -> coarse order -> recall order -> popular);
the answer names it. A row is answered at its own deadline with what is known by then, whatever the batch still does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from deployments.resilience import Deadline, Degraded, Reason, Seldom, called_twice, reason_of
from recsys.core import Candidates, Queries, Used
from recsys.errors import VersionAbsentError
from recsys.features.store import UserState
from recsys.funnel import STAGES, Funnel, FunnelRequest, PageItem
from recsys.page import LeftOut
from recsys.recall.cold_start import Rung, rung_of
from recsys.serve_config import TimeoutsConfig

log = logging.getLogger(__name__)

STEPS = ("queries", *STAGES, "page")
PAGE = len(STEPS) - 1
LOOK_S = 0.02
"""How often a batch that takes long is looked at: the thread moves its time limit with every stage, and waking the loop for
each would cost every batch what only a late one needs."""

ReadStates = Callable[[Sequence[str]], Awaitable[list[UserState]]]
OnBatch = Callable[[int, Mapping[str, float], Sequence[Degraded]], None]
OnPage = Callable[["Shown"], None]


class StageCall(Protocol):
    """A stage that runs elsewhere. Raises VersionAbsentError where that version is not held there."""

    def __call__(self, version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Awaitable[Candidates]: ...


class Answer(NamedTuple):
    """A page and how it came about. timings: stage -> milliseconds; cold_start: the rung of a new user (see recall.cold_start)."""

    items: list[PageItem]
    version: str
    degraded: tuple[Degraded, ...]
    timings: Mapping[str, float]
    cold_start: Rung | None = None
    left_out: Sequence[LeftOut] = ()
    """Pins that it does not have, where the request asks for explanations."""


@dataclass(slots=True, eq=False)
class Row:
    """One request of a micro-batch, its deadline, and the future that its caller awaits."""

    request: FunnelRequest
    deadline: Deadline
    answer: asyncio.Future[Answer]
    batch: Batch | None = None
    request_id: str = ""
    """Names the page in the log of impressions; empty: it is not logged."""
    variant: str = ""
    """What it was part of there."""


class Shown(NamedTuple):
    """An answered page: that of query `b` of its batch."""

    row: Row
    page: list[PageItem]
    used: Used | None
    b: int
    funnel: Funnel
    degraded: tuple[Degraded, ...]
    cold_start: Rung | None = None


class View(NamedTuple):
    """What a batch knows at one moment. Replaced as a whole, so that another thread may read it at any time."""

    rows: list[Row]
    queries: Queries | None
    candidates: Candidates | None
    degraded: tuple[Degraded, ...]
    pages: list[list[PageItem]]

    def still_waiting(self) -> View:
        """Without the rows that were answered already (their deadline passed) or whose caller left."""
        alive = [b for b, row in enumerate(self.rows) if not row.answer.done()]
        return self if len(alive) == len(self.rows) else self.take(alive)

    def take(self, at: Sequence[int]) -> View:
        """The view of these rows alone."""
        queries = self.queries.take(at) if self.queries is not None else None
        candidates = self.candidates.take(at) if self.candidates is not None else None
        return View([self.rows[b] for b in at], queries, candidates, self.degraded, [])


@dataclass(slots=True, eq=False)
class Batch:
    """The state of one descent: the step under way, the instant by which it must deliver, and the last finished view.

    `owner` counts who may write: a thread that was given up on finds another number than its own, and stops.
    """

    funnel: Funnel
    view: View
    timings: dict[str, float]
    step: int = 0
    limit: float = 0.0
    owner: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def deadline(self) -> Deadline:
        """That of the row with the most time left: a batch waits for the latest."""
        return max((row.deadline for row in self.view.rows), default=Deadline(0.0))


class Ladder:
    """Takes micro-batches of one gateway replica through the funnel. `elsewhere` holds the stages of their own deployment."""

    def __init__(
        self,
        *,
        read_states: ReadStates,
        elsewhere: Mapping[str, StageCall],
        timeouts_ms: TimeoutsConfig,
        executor: Executor,
        on_batch: OnBatch | None = None,
        on_page: OnPage | None = None,
    ) -> None:
        self._on_page = on_page
        self._read_states, self._elsewhere, self._executor, self._on_batch = read_states, elsewhere, executor, on_batch
        self._seldom = Seldom()
        self._timeout_s: dict[str, float] = {name: ms / 1000 for name, ms in timeouts_ms.model_dump().items()}

    async def recommend(self, funnels: Sequence[Funnel], rows: list[Row]) -> None:
        """Fulfil every row's answer with the first of `funnels` whose version all stages hold: one version a batch."""
        timings: dict[str, float] = {}
        noted = await self.fill_states(rows, timings)
        for funnel in funnels:
            batch = Batch(funnel, View(rows, None, None, noted, []).still_waiting(), timings)
            try:
                await self._descend(batch)
            except VersionAbsentError as error:
                self._seldom.warn("version", f"Not every stage holds version {funnel.version}; the batch runs under another.", error)
                continue
            return
        self._fulfil(_without(Batch(funnels[0], View(rows, None, None, noted, []).still_waiting(), timings), "recall", "unavailable"))

    async def fill_states(self, rows: Sequence[Row], timings: dict[str, float]) -> tuple[Degraded, ...]:
        """One read of user state for the whole batch; without an answer in time, the bundle's own history stands (stale)."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s["user_state"]):
                states = await self._read_states([row.request.user_id for row in rows])
        except Exception as error:  # noqa: BLE001  no fault of the store may fail a recommendation: the answer names it
            self._seldom.warn("user_state", "User state is stale.", error)
            return (Degraded("user_state", "stale", reason_of(error)),)
        finally:
            timings["user_state"] = 1000 * (time.perf_counter() - started)
        for row, state in zip(rows, states, strict=True):
            row.request.events, row.request.refused, row.request.seen = state.events, state.refused, state.seen
            row.request.counters = state.counters
            if state.profile:
                row.request.profile = {**state.profile, **row.request.profile}
        return ()

    async def _descend(self, batch: Batch) -> None:
        for row in batch.view.rows:
            row.batch = batch
        while batch.step < len(STEPS) and batch.view.rows:
            call = self._elsewhere.get(STEPS[batch.step])
            await (self._here(batch) if call is None else self._there(batch, call))
        self._fulfil(batch)

    # ---- stages in this process -----------------------------------------------------------------------------------

    async def _here(self, batch: Batch) -> None:
        """Run the steps up to the next stage of its own in one hop to a thread; give up on the one that is late."""
        until = next((i for i in range(batch.step, len(STEPS)) if STEPS[i] in self._elsewhere), len(STEPS))
        batch.owner += 1
        batch.limit = batch.deadline().at
        work = asyncio.get_running_loop().run_in_executor(self._executor, self._work, batch, batch.owner, until)
        while not work.done():
            await asyncio.wait({work}, timeout=min(LOOK_S, max(0.0, batch.limit - time.monotonic())))
            with batch.lock:  # the thread moves on, or is given up on, never both
                if work.done() or time.monotonic() < batch.limit:
                    continue
                batch.owner += 1
            _without(batch, STEPS[batch.step], "timeout")
            return
        work.result()

    def _work(self, batch: Batch, owner: int, until: int) -> None:
        while batch.step < until:
            view, name = batch.view.still_waiting(), STEPS[batch.step]
            batch.limit = batch.deadline().sooner(self._timeout_s.get(name, 60.0)).at
            started = time.perf_counter()
            try:
                view = _taken(batch.funnel, name, view) if view.rows else view
                error: Exception | None = None
            except Exception as caught:
                if name == "page":
                    raise
                log.exception("Stage %s failed; the next rung answers.", name)
                error = caught
            with batch.lock:
                if batch.owner != owner:
                    return
                batch.timings[name] = 1000 * (time.perf_counter() - started)
                if error is None:
                    batch.view, batch.step = view, batch.step + 1
                else:
                    _without(batch, name, reason_of(error))

    # ---- stages of their own --------------------------------------------------------------------------------------

    async def _there(self, batch: Batch, call: StageCall) -> None:
        name = STEPS[batch.step]
        view = batch.view.still_waiting()
        if not view.rows or view.queries is None:
            batch.view, batch.step = view, PAGE
            return
        batch.view, queries, candidates = view, view.queries, view.candidates
        used = candidates.used if candidates is not None else None
        sent = replace(candidates, used=None) if candidates is not None else None  # the log's values stay here
        started = time.perf_counter()
        try:
            candidates = await called_twice(
                lambda left_s: call(batch.funnel.version, queries, sent, left_s), batch.deadline().sooner(self._timeout_s[name])
            )
        except VersionAbsentError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a remote stage meets, the next rung answers
            self._seldom.warn(name, f"Stage {name} did not deliver; the next rung answers.", error)
            _without(batch, name, reason_of(error))
        else:
            candidates.used = candidates.used or used
            batch.view, batch.step = _received(view, candidates), batch.step + 1
        finally:
            batch.timings[name] = 1000 * (time.perf_counter() - started)

    # ---- answers --------------------------------------------------------------------------------------------------

    def _fulfil(self, batch: Batch) -> None:
        if len(batch.view.pages) != len(batch.view.rows):
            batch.view = _taken(batch.funnel, "page", batch.view)
        _, queries, candidates, degraded, pages = batch.view
        used = candidates.used if candidates is not None else None
        for b, (row, page) in enumerate(zip(batch.view.rows, pages, strict=True)):
            if not row.answer.done():
                rung = rung_of(candidates, b)
                asked = row.request.explain and queries is not None and (row.request.pins or batch.funnel.config.rules.pins)
                left_out = batch.funnel.pins_left_out(queries, b, row.request.pins, page) if asked and queries is not None else ()
                row.answer.set_result(Answer(page, batch.funnel.version, degraded, batch.timings, rung, left_out))
                if row.request_id and self._on_page is not None:
                    self._on_page(Shown(row, page, used, b, batch.funnel, degraded, rung))
        if self._on_batch is not None:
            self._on_batch(len(batch.view.rows), batch.timings, degraded)

    def answer_early(self, row: Row, funnel: Funnel) -> None:
        """The row's deadline has come: answer with what its batch knows by now, or with what is popular."""
        if row.answer.done():
            return
        if row.batch is None:
            unread = (Degraded("user_state", "stale", "timeout"),)  # what the user had or refused live is not known yet
            batch = Batch(funnel, View([row], None, None, unread, []), {})
            step = "recall"
        else:
            with row.batch.lock:
                view, step = row.batch.view, STEPS[row.batch.step] if row.batch.step < PAGE else "page"
            alone = view.take([view.rows.index(row)]) if row in view.rows else View([row], None, None, view.degraded, [])
            batch = replace(row.batch, view=alone, timings=dict(row.batch.timings), lock=threading.Lock())
        self._fulfil(_without(batch, step, "timeout") if step != "page" else batch)


# ---- steps and their rungs ----------------------------------------------------------------------------------------


def _taken(funnel: Funnel, name: str, view: View) -> View:
    """The view after one more step."""
    if view.queries is None:
        queries = funnel.queries([row.request for row in view.rows])
        queries.logged = np.array([bool(row.request_id) for row in view.rows])
        return view._replace(queries=queries)
    if name == "recall":
        return _received(view, funnel.recall(view.queries))
    if view.candidates is None:
        raise RuntimeError(f"Step {name} came before recall.")
    if name == "coarse_rank":
        return _received(view, funnel.coarse_rank(view.queries, view.candidates))
    if name == "fine_rank":
        return _received(view, funnel.fine_rank(view.queries, view.candidates))
    if name == "rerank":
        return _received(view, funnel.rerank(view.queries, view.candidates))
    return view._replace(pages=funnel.page(view.queries, view.candidates))


def _received(view: View, candidates: Candidates) -> View:
    lost = tuple(Degraded(channel, "partial", "error") for channel in candidates.lost)
    candidates.lost = ()  # told once
    return view._replace(candidates=candidates, degraded=view.degraded + lost)


def _without(batch: Batch, name: str, reason: Reason) -> Batch:
    """The batch as if `name` had been passed by the next rung of the ladder."""
    view, funnel = batch.view, batch.funnel
    if name in ("queries", "recall") or view.candidates is None:
        queries = view.queries or funnel.queries([_bare(row.request) for row in view.rows])
        note = Degraded("recall", "popular", reason)
        batch.view, batch.step = View(view.rows, queries, funnel.popular(queries), (*view.degraded, note), []), PAGE
        return batch
    assert view.queries is not None  # noqa: S101  candidates come from queries
    k = int(view.queries.k.max(initial=1))
    if name == "coarse_rank":
        note, keep = Degraded(name, "recall_order", reason), max(funnel.config.coarse_rank.keep, k)
    elif name == "fine_rank":
        unranked = any(d.stage == "coarse_rank" for d in view.degraded)
        note, keep = Degraded(name, "recall_order" if unranked else "coarse_order", reason), max(funnel.config.fine_rank.keep, k)
    else:
        note, keep = Degraded(name, "default", reason), k
    batch.view = view._replace(candidates=_head(view.candidates, keep), degraded=(*view.degraded, note))
    batch.step = STEPS.index(name) + 1
    return batch


def _head(candidates: Candidates, keep: int) -> Candidates:
    if candidates.width <= keep:
        return candidates
    order = np.broadcast_to(np.arange(keep), (len(candidates), keep))
    return candidates.reordered(order, candidates.scores[:, :keep])


def _bare(request: FunnelRequest) -> FunnelRequest:
    """The request without what may have broken it; what must not come back still does not."""
    return FunnelRequest(
        request.user_id,
        request.k,
        request.at,
        refused=request.refused,
        seen=[*request.seen, *(event.item_id for event in request.events)],
        exclude=request.exclude,
        explain=request.explain,
        filter=request.filter,
        pins=request.pins,
    )
