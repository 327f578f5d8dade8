"""Aggregates of many instants in one go, before they are asked for lot by lot: for a road that has to be set out on, such as Ray.

The values of all instants are held until they are encoded: 8 bytes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.core import Queries
from recsys.features.asof import Asked, Raw
from recsys.features.inputs import Live, LogSource

Lots = Callable[[], Iterable[tuple[Queries, np.ndarray]]]
"""Gives the lots anew each time: B moments, and (B, N) rows of the items they ask for, -1 in empty slots."""
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Answered:
    """The Source of one lot whose values are known."""

    log: LogSource
    of_queries: Raw
    of_pairs: Raw

    def query_values(self, queries: Queries) -> Raw:  # noqa: ARG002 - of this lot
        """See inputs.Source."""
        return self.log.of_queries(self.of_queries)

    def pair_values(self, queries: Queries, items: np.ndarray) -> Raw:
        """See inputs.Source."""
        return self.log.of_pairs(self.of_pairs, self.of_queries, self.log.asked(queries).paired(items), items.shape[1])

    def context_texts(self, of: str) -> Any:
        """The texts of a context column."""
        return self.log.context_texts(of)


def counted(live: Live, lots: Lots) -> Iterator[tuple[Fields, Fields]]:
    """Per lot its query fields, (B, …) each, and its pair fields, (B, N, W) each; by the source's road where it has one."""
    source = live.source
    if not isinstance(source, LogSource) or source.road is None:
        for queries, items in lots():
            yield live.query_fields(queries), live.pair_fields(queries, items)
        return
    moments, pairs = [], []
    for queries, items in lots():
        moments.append(asked := source.asked(queries))
        pairs.append(asked.paired(items))
    if not moments:
        return
    of_queries = source.road(source.asof, Asked.joined(moments), live.inputs.groups(pairs=False))
    of_pairs = source.road(source.asof, Asked.joined(pairs), live.inputs.groups(pairs=True))
    q = p = 0
    for queries, items in lots():
        q_end, p_end = q + len(queries), p + items.size
        lot = Answered(source, {n: x[q:q_end] for n, x in of_queries.items()}, {n: x[p:p_end] for n, x in of_pairs.items()})
        known = Live(live.inputs, lot, live.items)
        yield known.query_fields(queries), known.pair_fields(queries, items)
        q, p = q_end, p_end
