"""A funnel stage as a deployment of its own: a thin shell round a pure call, for the versions it holds."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from cluster.redis_items import RedisItemLog
from cluster.registry_url import open_registry
from deployments.live_items import ItemsFollower
from deployments.replica_log import log_with_serve
from deployments.resilience import Deadline
from deployments.rollout import Rollout, loader
from deployments.store_owner import url_of
from recsys.config import Config
from recsys.core import Candidates, Queries
from recsys.funnel import Funnel

T = TypeVar("T")


def pin_threads(threads: int) -> None:
    """Keep torch, Faiss and BLAS from starting a thread per core in every replica: on a shared host they only fight.

    The products of a micro-batch are small: OpenBLAS' threads spent twenty times the CPU of the product on waiting for
    each other.
    """
    import faiss
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    threadpool_limits(threads)


class Stage(ABC):
    """Base of the stage deployments. `loads` are the parts of a bundle that the stage needs."""

    loads: ClassVar[tuple[str, ...]]

    def __init__(self, config: Config, threads: int) -> None:
        pin_threads(threads)
        log_with_serve()
        # One thread: a batch uses the CPUs it was given, the next one waits without fighting it for the interpreter.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._items = follower = ItemsFollower(RedisItemLog(url_of(config), config.store), poll_s=config.serve.items_poll_s)
        follower.start()
        load = follower.loading(loader(*self.loads), config.rules, config.rerank)
        self.rollout = Rollout(open_registry(config.place("registry")), load, poll_s=config.serve.registry_poll_s)
        self.rollout.start()

    def check_health(self) -> None:
        """Called by Serve. Raises where the registry is no longer watched."""
        if not self.rollout.alive:
            raise RuntimeError("The rollout watcher has ended.")

    async def holds(self, version: str) -> str:
        """'' where the version is held; else why not. A stage process tells this to every gateway that wants to switch."""
        if version in self.rollout.held:
            return ""
        return self.rollout.refused.get(version, "still loading")

    async def state(self) -> dict[str, Any]:
        """What this replica holds and how old its live knowledge is, for /v1/version of the gateway."""
        return {"held": self.rollout.held, "items": self._items.state()}

    async def run(self, version: str, queries: Queries, candidates: Candidates | None, left_ms: float) -> Candidates:
        """The stage's answer for a batch. Raises VersionAbsentError, and TimeoutError where its turn came too late."""
        funnel = self.rollout.funnel(version)
        return await self.in_time(lambda: self.take(funnel, queries, candidates), left_ms)

    async def in_time(self, work: Callable[[], T], left_ms: float) -> T:
        """Run blocking work beside the event loop, which must stay free for health checks and routing.

        Raises TimeoutError where its turn comes after its caller has stopped waiting.
        """
        deadline = Deadline.after(left_ms / 1000)

        def begun() -> T:
            if deadline.passed:
                raise TimeoutError(f"The batch waited longer than its {left_ms:.0f} ms.")
            return work()

        return await asyncio.get_running_loop().run_in_executor(self._pool, begun)

    @staticmethod
    @abstractmethod
    def take(funnel: Funnel, queries: Queries, candidates: Candidates | None) -> Candidates:
        """The pure call of this stage."""


def needed(candidates: Candidates | None) -> Candidates:
    """Candidates, for the stages that cannot do without."""
    if candidates is None:
        raise ValueError("This stage ranks candidates; it was sent none. Run recall first.")
    return candidates
