"""The gateway deployment: the HTTP edge, the stages that run inside it, and the handles of those that do not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.ingest_run import IngestStatus
from cluster.kafka_log import feature_store
from cluster.redis_items import RedisItemLog
from cluster.registry_url import open_registry
from deployments.edge import Edge
from deployments.impressions import ImpressionLog
from deployments.ladder import StageCall
from deployments.live_counters import CountersFollower
from deployments.live_items import ItemsFollower
from deployments.monitoring import ServeMonitor
from deployments.replica_log import log_with_serve
from deployments.resilience import Preferred
from deployments.rollout import Rollout, loader
from deployments.service import Service
from deployments.stage import pin_threads
from deployments.store_owner import url_of
from recsys.config import Config
from recsys.core import Candidates, Queries
from recsys.funnel import STAGES

log = logging.getLogger(__name__)

STAND_IN = "recall_stand_in"
"""The deployment that recalls on CPUs where the recall node has GPUs."""
READY_S = 5.0
"""How long all replicas of a stage may take to say which versions they hold."""
STATE_S = 1.0
"""How long they may take to say how they are: GET /v1/version waits for it."""


class Handles:
    """The stages of their own deployment, as the calls that the service makes. Arrays travel by value: ids and scores only."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        # Plain pickle: cloudpickle looks at every object for code to take along, and there is none.
        self._handles = {name: h.options(request_serialization="pickle", response_serialization="pickle") for name, h in handles.items()}

    def stages(self) -> dict[str, StageCall]:
        """The stages of their own deployment; recall with its stand-in, where it has one."""
        calls: dict[str, StageCall] = {name: self._call(name) for name in self._handles if name != STAND_IN}
        if STAND_IN in self._handles:
            calls["recall"] = Preferred(calls["recall"], self._call(STAND_IN))
        return calls

    def _call(self, name: str) -> StageCall:
        handle = self._handles[name]

        def run(version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> Awaitable[Candidates]:
            found: Awaitable[Candidates] = handle.run.remote(version, queries, candidates, 1000 * left_s)
            return found

        return run

    def rank(self, version: str, queries: Queries, item_ids: list[list[str]], left_s: float) -> Awaitable[Candidates]:
        """The fine stage over given items."""
        found: Awaitable[Candidates] = self._handles["fine_rank"].rank.remote(version, queries, item_ids, 1000 * left_s)
        return found

    def similar(self, version: str, item_id: str, k: int, left_s: float) -> Awaitable[list[tuple[str, float]]]:
        """An item's neighbours, by the recall stage."""
        found: Awaitable[list[tuple[str, float]]] = self._handles[STAND_IN if STAND_IN in self._handles else "recall"].similar.remote(
            version, item_id, k, 1000 * left_s
        )
        return found

    def similar_users(self, version: str, queries: Queries, k: int, left_s: float) -> Awaitable[list[tuple[str, float]]]:
        """A user's neighbours, by the recall stage."""
        handle = self._handles[STAND_IN if STAND_IN in self._handles else "recall"]
        found: Awaitable[list[tuple[str, float]]] = handle.similar_users.remote(version, queries, k, 1000 * left_s)
        return found

    async def states(self) -> dict[str, Any]:
        """What each replica of each stage says of itself; of one that does not answer in time, the fault's name."""
        said = await asyncio.gather(*(self._state(name) for name in self._handles))
        return dict(zip(self._handles, said, strict=True))

    async def _state(self, name: str) -> list[Any]:
        try:
            said = await self._handles[name].broadcast("state").results_async(timeout_s=STATE_S, return_exceptions=True)
        except Exception as error:  # noqa: BLE001  a stage that is away must not hide the rest
            return [type(error).__name__]
        return [type(one).__name__ if isinstance(one, BaseException) else one for one in said]

    async def why_not(self, version: str) -> str | None:
        """Why the stages cannot serve a version yet; None where every replica of each holds it."""
        for name, handle in self._handles.items():
            said = await handle.broadcast("holds", version).results_async(timeout_s=READY_S, return_exceptions=True)
            stood_in_for = name == "recall" and STAND_IN in self._handles
            if not said and not stood_in_for:
                return f"{name}: no replica yet"
            if fault := next(filter(None, said), None):
                return f"{name}: {fault}"
        return None


@serve.ingress()
class Gateway:
    """One replica of the HTTP API."""

    def __init__(
        self, config: Config, handles: dict[str, DeploymentHandle], store: DeploymentHandle | None, ingest: DeploymentHandle | None = None
    ) -> None:
        pin_threads(config.serve.stages.gateway.threads)
        log_with_serve()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._config, self._owner, self._ingest, self._handles = config, store, ingest, Handles(handles)
        here = tuple(name for name in STAGES if name not in handles)
        items = RedisItemLog(url_of(config), config.store)
        follower = ItemsFollower(items, poll_s=config.serve.items_poll_s)
        follower.start()
        self._rollout = Rollout(
            open_registry(config.place("registry")),
            follower.loading(loader(*here), config.rules, config.rerank),
            poll_s=config.serve.registry_poll_s,
            ready=self._why_not if handles else None,
        )
        self._rollout.start()
        counters = CountersFollower(config, url_of(config), self._rollout.funnels) if {"recall", "fine_rank"} & {*here} else None
        if counters is not None:
            counters.start()
        self._counters = counters
        self._ingest_status = IngestStatus(config, url_of(config))
        self._service = Service(
            config.serve,
            self._rollout,
            feature_store(url_of(config), config.ingest.log, config.store, config.history),
            elsewhere=self._handles.stages(),
            rank_elsewhere=self._handles.rank if "fine_rank" in handles else None,
            similar_elsewhere=self._handles.similar if "recall" in handles else None,
            similar_users_elsewhere=self._handles.similar_users if "recall" in handles else None,
            monitor=ServeMonitor(),
            why_not=self._handles.why_not if handles else None,
            stage_states=self._handles.states if handles else None,
            impressions=ImpressionLog(f"{config.root}/impressions", config.serve.impressions),
            items=items,
            follower=follower,
            append_batch=config.store.append_batch,
            events=config.data.event_names,
            out_of_range=config.data.interactions.out_of_range,
            ingest_status=self._ingest_status.read,
            counters_state=counters.state if counters is not None else None,
        )

    def __serve_build_asgi_app__(self) -> Edge:
        return Edge(self._service)

    async def check_health(self) -> None:
        """Called by Serve, first before the replica takes requests. Raises where the registry is no longer watched."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            await self._service.warm()
        if not self._rollout.alive:
            raise RuntimeError("The rollout watcher has ended.")

    async def __del__(self) -> None:
        """Called by Serve when the replica is to end, and no more requests come: what waits is written, threads end."""
        if (service := getattr(self, "_service", None)) is None:  # it never came to be
            return
        await service.close()
        await self._ingest_status.close()
        if self._counters is not None:
            await asyncio.to_thread(self._counters.stop)

    def _why_not(self, version: str) -> str | None:
        if self._loop is None:
            return "the gateway is starting"
        return asyncio.run_coroutine_threadsafe(self._handles.why_not(version), self._loop).result(2 * READY_S)
