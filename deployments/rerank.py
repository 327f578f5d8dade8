"""The re-rank stage as a deployment: diversity and rules over the page."""

from __future__ import annotations

from deployments.stage import Stage, needed
from recsys.core import Candidates, Queries
from recsys.funnel import Funnel


class Rerank(Stage):
    """Chooses the page from the ranked candidates."""

    loads = ("rerank",)

    @staticmethod
    def take(funnel: Funnel, queries: Queries, candidates: Candidates | None) -> Candidates:
        """At most k candidates in page order."""
        return funnel.rerank(queries, needed(candidates))
