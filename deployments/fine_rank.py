"""The fine ranking stage as a deployment: the ranker with every feature, for candidates and for given items."""

from __future__ import annotations

from typing import Any

from deployments.live_counters import CountersFollower
from deployments.stage import Stage, needed
from deployments.store_owner import url_of
from recsys.config import Config
from recsys.core import Candidates, Queries
from recsys.funnel import Funnel


class FineRank(Stage):
    """Scores candidates; user features are computed once per query."""

    loads = ("coarse_rank", "fine_rank")  # given items (/v1/rank) pass the coarse stage on their way, like recalled ones

    def __init__(self, config: Config, threads: int) -> None:
        super().__init__(config, threads)
        self._counters = CountersFollower(config, url_of(config), self.rollout.funnels)
        self._counters.start()

    async def state(self) -> dict[str, Any]:
        """See `Stage`; and how old the counters are."""
        return await super().state() | {"item_counters": self._counters.state()}

    @staticmethod
    def take(funnel: Funnel, queries: Queries, candidates: Candidates | None) -> Candidates:
        """Candidates in fine order, with what the ranker saw of the pages that will be logged."""
        out = funnel.fine_rank(queries, needed(candidates))
        out.used = out.used.where(queries.logged) if out.used is not None else None
        return out

    async def rank(self, version: str, queries: Queries, item_ids: list[list[str]], left_ms: float) -> Candidates:
        """Given items in fine order; unknown ones are left out."""
        funnel = self.rollout.funnel(version)
        out = await self.in_time(lambda: funnel.rank(queries, item_ids), left_ms)
        out.used = None  # its pages are not logged
        return out
