"""What the gateway does with a request once HTTP is out of the way: batches it, sends it down the ladder, stores events.

Nothing here knows of Ray or of HTTP, so that all of it is tested as plain Python.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import orjson

from deployments.appending import Appender
from deployments.batching import MicroBatcher
from deployments.catalogue import CatalogueWrites
from deployments.checks import check_id, check_ids, check_k, parsed
from deployments.event_bodies import event_of, events_in, unix_now
from deployments.impressions import ImpressionLog
from deployments.ladder import Answer, Ladder, Row, Shown, StageCall
from deployments.live_items import ItemsFollower
from deployments.live_rules import RulesDesk
from deployments.lookup import Lookups
from deployments.monitoring import Monitor
from deployments.resilience import Deadline, Degraded, called_twice, reason_of
from deployments.rollout import Rollout
from deployments.schemas import EXCLUDE, RANK, RECOMMEND, PageBody, RankBody, RecommendBody
from recsys.core import Candidates, Queries
from recsys.errors import RequestError, StoreError, VersionAbsentError
from recsys.features.live_items import ItemLog, MemoryItemLog, check_declared
from recsys.features.store import FeatureStore, NewEvent, UserState
from recsys.funnel import Funnel, FunnelRequest, PageItem
from recsys.serve_config import ServeConfig

log = logging.getLogger(__name__)

AT_ONCE = {True: 2, False: 6}
"""Micro-batches under way at once, by whether all stages are here. Here they share the interpreter, and a second one only
hides the wait for the store; elsewhere a batch mostly waits for other processes."""


class RankCall(Protocol):
    """The fine stage over given items, elsewhere."""

    def __call__(self, version: str, queries: Queries, item_ids: list[list[str]], left_s: float) -> Awaitable[Candidates]: ...


class SimilarCall(Protocol):
    """An item's neighbours, elsewhere."""

    def __call__(self, version: str, item_id: str, k: int, left_s: float) -> Awaitable[list[tuple[str, float]]]: ...


class SimilarUsersCall(Protocol):
    """The neighbours of the user of a batch of one, elsewhere."""

    def __call__(self, version: str, queries: Queries, k: int, left_s: float) -> Awaitable[list[tuple[str, float]]]: ...


class Service:
    """The gateway of one process. `elsewhere` are the stages of their own deployment; all others run in this process."""

    def __init__(
        self,
        config: ServeConfig,
        rollout: Rollout,
        store: FeatureStore,
        *,
        elsewhere: Mapping[str, StageCall] | None = None,
        rank_elsewhere: RankCall | None = None,
        similar_elsewhere: SimilarCall | None = None,
        similar_users_elsewhere: SimilarUsersCall | None = None,
        monitor: Monitor | None = None,
        why_not: Callable[[str], Awaitable[str | None]] | None = None,
        impressions: ImpressionLog | None = None,
        items: ItemLog | None = None,
        follower: ItemsFollower | None = None,
        append_batch: int = 2_000,
        events: Sequence[str] | None = None,
        out_of_range: Callable[[float], str | None] | None = None,
        ingest_status: Callable[[], Awaitable[dict[str, Any]]] | None = None,
        counters_state: Callable[[], dict[str, Any]] | None = None,
        stage_states: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        self.config, self.rollout, self.store = config, rollout, store
        items = items or MemoryItemLog()
        self.catalogue = CatalogueWrites(rollout, store, items, config.limits)
        self.rules = RulesDesk(rollout, items, follower, config.limits)
        self.lookups = Lookups(rollout, store, config.limits)
        self._follower, self._event_names, self._out_of_range = follower, events, out_of_range
        self._appender = Appender(store, most=append_batch)
        self._ingest_status, self._counters_state, self._stage_states = ingest_status, counters_state, stage_states
        self._impressions = impressions
        self._rank_elsewhere, self._similar_elsewhere = rank_elsewhere, similar_elsewhere
        self._similar_users_elsewhere = similar_users_elsewhere
        self._monitor, self._why_not = monitor or Monitor(), why_not
        at_once = AT_ONCE[not elsewhere]
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="funnel")
        self._ladder = Ladder(
            read_states=self._read_states,
            elsewhere=elsewhere or {},
            timeouts_ms=config.timeouts_ms,
            executor=self._pool,
            on_batch=self._monitor.batch,
            on_page=self._log_page,
        )
        self._batcher: MicroBatcher[Row] = MicroBatcher(
            self._run, max_size=config.micro_batch.max_size, wait_s=config.micro_batch.wait_ms / 1000, at_once=at_once
        )

    # ---- recommend ------------------------------------------------------------------------------------------------

    async def recommend(self, raw: bytes, request_id: str) -> bytes:
        """The answer of POST /v1/recommend as JSON. Raises RequestError."""
        started = time.perf_counter()
        body: RecommendBody = parsed(RECOMMEND, raw)
        limits = self.config.limits
        check_k(body.k, limits)
        self._check(body)
        check_ids("exclude", body.exclude, limits, EXCLUDE)
        for n, pin in enumerate(body.pins):
            check_id(f"pins.{n}.item_id", pin.item_id, limits)
        funnel = self.rollout.funnel()
        if body.features:
            check_declared(body.features, funnel.profile_columns, field="features", whose="user")
        request = FunnelRequest(
            body.user_id,
            body.k,
            unix_now(),
            context=body.context,
            profile=body.features,
            exclude=body.exclude,
            explain=body.explain,
            filter=funnel.filters.parse(body.filter) if body.filter else None,
            diversity=body.diversity,
            boosts=[
                (one, b.factor)
                for n, b in enumerate(body.boosts)
                for one in funnel.filters.parse(b.filter, where=f"boosts.{n}.filter") or ()
            ],
            pins=[(p.item_id, p.place) for p in body.pins],
            caps=tuple((funnel.cap_column(c.column, f"caps.{n}.column"), c.at_most, c.window) for n, c in enumerate(body.caps)),
            novelty=_novelty(body, funnel),
        )
        variant = body.variant or self.config.variant
        answer = await self._answered(funnel, request, self._deadline(body.timeout_ms), (body.request_id or request_id, variant))
        if self._follower is not None:
            self._follower.note(item.item_id for item in answer.items)
        self._monitor.request("recommend", time.perf_counter() - started)
        if answer.cold_start is not None:
            self._monitor.new_user(answer.cold_start)
        return _shown(answer, body.request_id or request_id, variant, started, _ignored(body, funnel))

    def _log_page(self, shown: Shown) -> None:
        """A sampled page goes to the log of impressions; a fault there must not reach the answers."""
        if self._impressions is None:
            return
        try:
            self._impressions.put(shown)
        except Exception:
            self._impressions.failed += 1
            log.exception("A page could not be logged.")

    async def _answered(self, funnel: Funnel, request: FunnelRequest, deadline: Deadline, named: tuple[str, str]) -> Answer:
        """`named` are the request id and the variant."""
        loop = asyncio.get_running_loop()
        row = Row(request, deadline, loop.create_future())
        if self._impressions is not None and self._impressions.wants(named[0]):
            row.request_id, row.variant = named
        # What shares a batch shares the version, the depth of its stages and whether ranks are noted on the way.
        self._batcher.put((funnel.version, funnel.lane(request.k), request.explain), row)
        timer = loop.call_later(deadline.left_s, self._ladder.answer_early, row, funnel)
        try:
            return await row.answer
        finally:
            timer.cancel()

    async def _run(self, lane: Hashable, rows: list[Row]) -> None:
        version = lane[0] if isinstance(lane, tuple) else ""
        held = [version, *(v for v in self.rollout.promoted if v != version)]
        funnels = []
        for name in held:
            try:
                funnels.append(self.rollout.funnel(name))
            except VersionAbsentError:  # let go of between the request and its batch
                continue
        await self._ladder.recommend(funnels, rows)

    async def _read_states(self, user_ids: Sequence[str]) -> list[UserState]:
        return await self.store.read(user_ids, timeout_s=self.config.timeouts_ms.user_state / 1000)

    # ---- rank -----------------------------------------------------------------------------------------------------

    async def rank(self, raw: bytes, request_id: str) -> bytes:
        """The answer of POST /v1/rank as JSON: the given items that are known, by fine score. Raises RequestError."""
        started = time.perf_counter()
        body: RankBody = parsed(RANK, raw)
        self._check(body)
        if not body.item_ids:
            raise RequestError("empty_list", "'item_ids' holds no item. Send at least one.", field="item_ids")
        check_ids("item_ids", body.item_ids, self.config.limits, self.config.limits.k)
        funnel = self.rollout.funnel()
        if body.features:
            check_declared(body.features, funnel.profile_columns, field="features", whose="user")
        request = FunnelRequest(
            body.user_id, len(body.item_ids), unix_now(), context=body.context, profile=body.features, explain=body.explain
        )
        answer = await self._ranked(request, body.item_ids, self._deadline(body.timeout_ms))
        self._monitor.request("rank", time.perf_counter() - started)
        variant = body.variant or self.config.variant
        return _shown(answer, body.request_id or request_id, variant, started, _ignored(body, funnel))

    async def _ranked(self, request: FunnelRequest, item_ids: list[str], deadline: Deadline) -> Answer:
        timings: dict[str, float] = {}
        row = Row(request, deadline, asyncio.get_running_loop().create_future())
        degraded = await self._ladder.fill_states([row], timings)
        error: Exception = VersionAbsentError("No version is held.")
        for version in self.rollout.promoted:
            begun = time.perf_counter()
            try:
                funnel = self.rollout.funnel(version)
                items = await self._ranked_under(funnel, request, item_ids, deadline)
            except VersionAbsentError as absent:
                error = absent
                continue
            except Exception as caught:  # noqa: BLE001  whatever the fine stage meets, the caller gets the items in the order given
                log.warning("The fine stage did not rank the given items: %s", caught or type(caught).__name__)
                error = caught
                break
            timings["fine_rank"] = 1000 * (time.perf_counter() - begun)
            return Answer(items, version, degraded, timings)
        funnel = self.rollout.funnel()
        known = [i for i in dict.fromkeys(item_ids) if funnel.shows(funnel.items.row(i))]
        given = [PageItem(i, 0.0, [], None, None) for i in known]
        return Answer(given, funnel.version, (*degraded, Degraded("fine_rank", "recall_order", reason_of(error))), timings)

    async def _ranked_under(self, funnel: Funnel, request: FunnelRequest, item_ids: list[str], deadline: Deadline) -> list[PageItem]:
        queries = await self._in_thread(lambda: funnel.queries([request]), deadline)
        elsewhere = self._rank_elsewhere
        if elsewhere is None:
            candidates = await self._in_thread(lambda: funnel.rank(queries, [item_ids]), deadline)
        else:
            candidates = await called_twice(lambda left_s: elsewhere(funnel.version, queries, [item_ids], left_s), deadline)
        return funnel.page(queries, candidates)[0]

    # ---- similar --------------------------------------------------------------------------------------------------

    async def similar(self, item_id: str, k: int, request_id: str) -> bytes:
        """The answer of GET /v1/items/{id}/similar as JSON. Raises RequestError (404 for an unknown item)."""
        check_id("item_id", item_id, self.config.limits)
        check_k(k, self.config.limits)
        funnel, deadline = self.rollout.funnel(), self._deadline(None)
        if not funnel.shows(funnel.items.row(item_id)):
            raise RequestError("unknown_item", f"Item '{item_id[:80]}' is not in version {funnel.version}.", field="item_id", status=404)
        elsewhere = self._similar_elsewhere

        async def nearest() -> list[tuple[str, float]]:
            if elsewhere is None:
                here: list[tuple[str, float]] = await self._in_thread(lambda: funnel.similar(item_id, k), deadline)
                return here
            return await called_twice(lambda left_s: elsewhere(funnel.version, item_id, k, left_s), deadline)

        found = await _neighbours("an item", nearest)
        items = [{"item_id": i, "score": s} for i, s in found]
        return orjson.dumps({"request_id": request_id, "item_id": item_id, "items": items, "model_version": funnel.version})

    async def similar_users(self, user_id: str, k: int, request_id: str) -> bytes:
        """The answer of GET /v1/users/{id}/similar as JSON, by what the user did until now. Raises RequestError (404: nobody to compare)."""
        check_id("user_id", user_id, self.config.limits)
        check_k(k, self.config.limits)
        funnel, deadline = self.rollout.funnel(), self._deadline(None)
        row = Row(FunnelRequest(user_id, k, unix_now()), deadline, asyncio.get_running_loop().create_future())
        degraded = await self._ladder.fill_states([row], {})
        elsewhere = self._similar_users_elsewhere

        async def nearest() -> list[tuple[str, float]]:
            queries = await self._in_thread(lambda: funnel.queries([row.request]), deadline)
            funnel.check_similar_users(queries)
            if elsewhere is None:
                here: list[tuple[str, float]] = await self._in_thread(lambda: funnel.similar_users(queries, k), deadline)
                return here
            return await called_twice(lambda left_s: elsewhere(funnel.version, queries, k, left_s), deadline)

        found = await _neighbours("a user", nearest)
        return orjson.dumps(
            {
                "request_id": request_id,
                "user_id": user_id,
                "users": [{"user_id": u, "score": s} for u, s in found],
                "model_version": funnel.version,
                "degraded": [note.shown() for note in degraded],
            }
        )

    # ---- events ---------------------------------------------------------------------------------------------------

    async def events(self, raw: bytes) -> bytes:
        """The answer of POST /v1/events as JSON, after the accepted ones are on disk. Raises RequestError, StoreUnavailableError."""
        started = time.perf_counter()
        # 10,000 events take tens of milliseconds to check: too long for the event loop.
        large = len(raw) > 32_768
        events, rejected = await asyncio.to_thread(self._checked, raw) if large else self._checked(raw)
        accepted = duplicates = 0
        if events:
            result = await self._appender.append(events)
            accepted, duplicates = result.accepted, result.duplicates
        self._monitor.events(accepted, duplicates, len(rejected), self._strangers(events))
        self._monitor.request("events", time.perf_counter() - started)
        return orjson.dumps({"accepted": accepted, "duplicates": duplicates, "rejected": rejected})

    def _checked(self, raw: bytes) -> tuple[list[NewEvent], list[dict[str, Any]]]:
        """What may be stored, and the rejections. One event that came alone is refused as a whole."""
        body = events_in(raw)
        rows = body if isinstance(body, list) else [body]
        if not rows:
            raise RequestError("empty_list", "The list holds no event. Send at least one.")
        if len(rows) > (most := self.config.limits.events_per_call):
            raise RequestError("too_many_events", f"{len(rows)} events came; at most {most} are taken in one call. Send them in parts.")
        events: list[NewEvent] = []
        rejected: list[dict[str, Any]] = []
        now_s = unix_now()
        for index, row in enumerate(rows):
            try:
                event = event_of(row, self.config.limits, now_s, sent=len(raw), known=self._event_names, out_of_range=self._out_of_range)
                events.append(event)
            except RequestError as error:
                if not isinstance(body, list):
                    raise
                rejected.append({"index": index, "code": error.code, "message": str(error)})
        return events, rejected

    def _strangers(self, events: Sequence[NewEvent]) -> int:
        items = self.rollout.funnel().items
        return sum(items.row(e.item_id) < 0 for e in events[:100])

    # ---- state ----------------------------------------------------------------------------------------------------

    async def version(self) -> dict[str, Any]:
        """The body of GET /v1/version: of this replica, and of every replica of the stages that run elsewhere."""
        rollout = self.rollout
        live = {"item_counters": self._counters_state()} if self._counters_state is not None else {}
        return (
            live
            | {
                "version": rollout.current,
                "aliases": rollout.aliases,
                "held": rollout.held,
                "refused": rollout.refused,
                "topology": self.config.topology.model_dump(),
                "data_plane": self.config.data_plane,
            }
            | ({"items": self._follower.state()} if self._follower is not None else {})
            | ({"impressions": self._impressions.state()} if self._impressions is not None else {})
            | ({"stages": await self._stage_states()} if self._stage_states is not None else {})
        )

    async def ingest(self) -> dict[str, Any]:
        """The body of GET /v1/ingest: how far the consumers of the event log are. Raises RequestError (404), StoreError."""
        if self._ingest_status is None:
            raise RequestError("not_found", "This service has no consumers of events.", status=404)
        return await self._ingest_status()

    async def check_ready(self) -> str:
        """The version that answers, once every stage elsewhere has held it. Raises RequestError (503) until then."""
        funnel = self.rollout.funnel()
        if self._why_not is not None and (why := await self._why_not(funnel.version)) is not None:
            raise RequestError("starting", f"The service is starting: {why}.", status=503)
        self._why_not = None  # a stage that is lost later is the ladder's business: pages go on
        return funnel.version

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """Run blocking work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _in_thread(self, work: Callable[[], Any], deadline: Deadline) -> Any:
        return await asyncio.wait_for(self.in_thread(work), deadline.left_s)

    def _deadline(self, wanted_ms: float | None) -> Deadline:
        return Deadline.after(min(wanted_ms or self.config.deadline_ms, self.config.deadline_ms) / 1000)

    def _check(self, body: PageBody) -> None:
        check_id("user_id", body.user_id, self.config.limits)
        if body.request_id is not None:
            check_id("request_id", body.request_id, self.config.limits)

    async def warm(self) -> None:
        """Connect to the store, so that the first request does not wait for it beyond its time-out."""
        try:
            await self.store.read([""], timeout_s=5.0)
        except StoreError as error:
            log.warning("The feature store is not there yet; recommendations go on without live events. %s", error)

    async def close(self) -> None:
        """Finish what is under way, write what waits, and end the threads."""
        await self._batcher.drain()
        if self._impressions is not None:
            await self._impressions.stop()
        self.rollout.stop()
        if self._follower is not None:
            await asyncio.to_thread(self._follower.stop)
        self._pool.shutdown(wait=False)
        await self.store.close()


async def _neighbours(whose: str, nearest: Callable[[], Awaitable[list[tuple[str, float]]]]) -> list[tuple[str, float]]:
    """What `nearest` finds. Its faults that are not the caller's become a RequestError (503)."""
    try:
        return await nearest()
    except RequestError:
        raise
    except Exception as error:
        log.warning("Neighbours of %s are not to be had: %s", whose, error or type(error).__name__)
        raise RequestError("unavailable", "The neighbours cannot be looked up at the moment. Try again.", status=503) from error


def _novelty(body: RecommendBody, funnel: Funnel) -> tuple[float, float] | None:
    if (wish := body.novelty) is None:
        return None
    return wish.weight, wish.half_life_h or funnel.config.rules.novelty.half_life_h


def _ignored(body: RecommendBody | RankBody, funnel: Funnel) -> list[str] | None:
    """Names of a request's context that nothing reads, where it asks to be explained."""
    return [name for name in body.context if name not in funnel.context_names] if body.explain else None


def _shown(answer: Answer, request_id: str, variant: str, started: float, ignored: list[str] | None) -> bytes:
    timings = {name: round(ms, 3) for name, ms in answer.timings.items()}
    timings["total"] = round(1000 * (time.perf_counter() - started), 3)
    return orjson.dumps(
        {
            "request_id": request_id,
            "items": [_item(item) for item in answer.items],
            "model_version": answer.version,
            "variant": variant,
            "degraded": [note.shown() for note in answer.degraded],
            "timings_ms": timings,
        }
        | ({} if ignored is None else {"ignored": ignored})
        | ({} if answer.cold_start is None else {"cold_start": answer.cold_start})
        | ({"pins_left_out": [pin._asdict() for pin in answer.left_out]} if answer.left_out else {})
    )


def _item(item: PageItem) -> dict[str, Any]:
    shown: dict[str, Any] = {"item_id": item.item_id, "score": item.score, "sources": item.sources}
    if item.title is not None:
        shown["title"] = item.title
    if item.explain is not None:
        shown["explain"] = item.explain
    return shown
