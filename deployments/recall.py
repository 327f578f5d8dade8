"""The recall stage as a deployment: all channels and their merge, and the neighbours of an item or a user."""

from __future__ import annotations

from typing import Any

from deployments.live_counters import CountersFollower
from deployments.stage import Stage
from deployments.store_owner import url_of
from recsys.config import Config
from recsys.core import Candidates, Queries
from recsys.funnel import Funnel


class Recall(Stage):
    """Recalls candidates for a batch of queries."""

    loads = ("recall",)

    def __init__(self, config: Config, threads: int) -> None:
        super().__init__(config, threads)
        self._counters = CountersFollower(config, url_of(config), self.rollout.funnels)  # what is trending now
        self._counters.start()

    async def state(self) -> dict[str, Any]:
        """See `Stage`; and how old the counters are."""
        return await super().state() | {"item_counters": self._counters.state()}

    @staticmethod
    def take(funnel: Funnel, queries: Queries, candidates: Candidates | None) -> Candidates:  # noqa: ARG004  one shape for all stages
        """Candidates are ignored: recall is where they come from."""
        return funnel.recall(queries)

    async def similar(self, version: str, item_id: str, k: int, left_ms: float) -> list[tuple[str, float]]:
        """The k nearest items. Raises RequestError for an unknown item."""
        funnel = self.rollout.funnel(version)
        return await self.in_time(lambda: funnel.similar(item_id, k), left_ms)

    async def similar_users(self, version: str, queries: Queries, k: int, left_ms: float) -> list[tuple[str, float]]:
        """The k users nearest to the one query."""
        funnel = self.rollout.funnel(version)
        return await self.in_time(lambda: funnel.similar_users(queries, k), left_ms)
