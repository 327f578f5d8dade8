"""The coarse ranking stage as a deployment: the two-tower dot product over cached item vectors."""

from __future__ import annotations

from deployments.stage import Stage, needed
from recsys.core import Candidates, Queries
from recsys.funnel import Funnel


class CoarseRank(Stage):
    """Keeps the best few hundred of what was recalled."""

    loads = ("coarse_rank",)

    @staticmethod
    def take(funnel: Funnel, queries: Queries, candidates: Candidates | None) -> Candidates:
        """Candidates in coarse order."""
        return funnel.coarse_rank(queries, needed(candidates))
