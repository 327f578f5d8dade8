"""A funnel whose answers can be worked out in the head, and a registry of such funnels.

Items are i0 … i99. Recall gives 0, 1, 2, …; coarse rank turns the order round; fine rank puts even items first, each by
number; re-rank leaves the order. Column `parity` of the items is even or odd. So the page of a user who has seen nothing begins i0, i2, i4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from recsys.core import Candidates, Queries, Query, Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.errors import BundleError, RequestError
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters
from recsys.funnel import FunnelRequest, PageItem

N = 100


class StandIn:
    """The interface of recsys.funnel.Funnel. `break_at` and `slow_at` name a stage that raises, or sleeps `slow_s`."""

    def __init__(self, version: str = "v000001-aaaaaaaa", *, break_at: str = "", slow_at: str = "", slow_s: float = 0.2) -> None:
        self.version, self.break_at, self.slow_at, self.slow_s = version, break_at, slow_at, slow_s
        self.items = Vocabulary([f"i{n}" for n in range(N)])
        self.users = Vocabulary([f"u{n}" for n in range(10)])
        self.config = SimpleNamespace(
            rules=SimpleNamespace(pins=()), coarse_rank=SimpleNamespace(keep=50), fine_rank=SimpleNamespace(keep=20)
        )
        self.batches: list[int] = []
        self.profile_columns = {"age": ColumnConfig(kind="number"), "country": ColumnConfig(kind="category")}
        self.context_names = {"device", *self.profile_columns}
        parity = {"parity": ["even", "odd"] * (N // 2)}
        self.filters = Filters(Catalogue.of({"parity": ColumnConfig(kind="category")}, parity, N), self.items)

    def _at(self, stage: str) -> None:
        if stage == self.break_at:
            raise ValueError(f"{stage} is broken")
        if stage == self.slow_at:
            time.sleep(self.slow_s)

    def lane(self, k: int) -> int:
        return max(k, 20)

    def queries(self, requests: Sequence[FunnelRequest]) -> Queries:
        self._at("queries")
        self.batches.append(len(requests))
        rows = [
            Query(
                r.user_id,
                self.users.row(r.user_id),
                r.k,
                r.at,
                items=np.array([self.items.row(e.item_id) for e in r.events], np.int32),
                times=np.array([e.time_ms / 1000 for e in r.events]),
                exclude=np.array([self.items.row(i) for i in (*r.exclude, *r.seen, *(e.item_id for e in r.events))], np.int32),
                explain=r.explain,
                filter=r.filter,
            )
            for r in requests
        ]
        return Queries.of(rows, history_length=50)

    def _all(self, queries: Queries, width: int) -> Candidates:
        B = len(queries)
        items = np.broadcast_to(np.arange(width, dtype=np.int32), (B, width)).copy()
        gone = (items[:, :, None] == queries.exclude[:, None, :]).any(2)
        if queries.filters is not None:
            gone |= self.filters.allowed(queries.filters).kept(items, items.astype(np.float32))[0] < 0
        scores = np.where(gone, -np.inf, -items).astype(np.float32)
        items[gone] = -1
        found = Candidates(items, scores, ("one", "two"), np.zeros((B, width, 2), np.float32), np.ones((B, width, 2), np.int16))
        return found.ranked(scores, width, stage="recall")

    def recall(self, queries: Queries) -> Candidates:
        self._at("recall")
        return self._all(queries, N)

    def coarse_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        self._at("coarse_rank")
        return candidates.ranked(candidates.items.astype(np.float32), 60, stage="coarse_rank")

    def fine_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        self._at("fine_rank")
        return candidates.ranked(1000.0 * (candidates.items % 2 == 0) - candidates.items, 60, stage="fine_rank")

    def rerank(self, queries: Queries, candidates: Candidates) -> Candidates:
        self._at("rerank")
        return candidates

    def popular(self, queries: Queries) -> Candidates:
        return self._all(queries, N).ranked(np.arange(N, dtype=np.float32)[None, :] * np.ones((len(queries), 1)), N, stage="popular")

    def recommend(self, queries: Queries) -> Candidates:
        return self.rerank(queries, self.fine_rank(queries, self.coarse_rank(queries, self.recall(queries))))

    def rank(self, queries: Queries, item_ids: Sequence[Sequence[str]]) -> Candidates:
        self._at("rank")
        rows = np.array([[r for i in item_ids[0] if (r := self.items.row(i)) >= 0]], np.int32)
        given = Candidates(
            rows, np.zeros(rows.shape, np.float32), (), np.zeros((*rows.shape, 0), np.float32), np.zeros((*rows.shape, 0), np.int16)
        )
        return given.ranked(-rows.astype(np.float32), rows.shape[1], stage="fine_rank")

    def shows(self, row: int) -> bool:
        return row >= 0

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        row = self.items.row(item_id)
        if row < 0:
            raise RequestError("unknown_item", "unknown", status=404)
        return [(f"i{row + n}", 1.0 / n) for n in range(1, k + 1) if row + n < N]

    def check_similar_users(self, queries: Queries) -> None:
        if queries.users[0] < 0 and not queries.history.size:
            raise RequestError("unknown_user", "unknown", field="user_id", status=404)

    def similar_users(self, queries: Queries, k: int) -> list[tuple[str, float]]:
        self._at("similar_users")
        return [(f"{queries.user_ids[0]}, {queries.history.shape[1]} events, {n}", 1.0 / n) for n in range(1, k + 1)]

    def page(self, queries: Queries, candidates: Candidates) -> list[list[PageItem]]:
        pages = []
        for b in range(len(queries)):
            rows = [int(i) for i in candidates.items[b] if i >= 0][: int(queries.k[b])]
            pages.append([PageItem(f"i{i}", float(i), ["one"], None, {"of": self.version} if queries.explain else None) for i in rows])
        return pages


class StandInRegistry:
    """Versions by name: a funnel, or an error that its loading raises."""

    root = "here"

    def __init__(self, **versions: StandIn | Exception) -> None:
        self.held: dict[str, StandIn | Exception] = dict(versions)
        self.named: dict[str, str] = {}

    def aliases(self) -> dict[str, str]:
        return dict(self.named)

    def local_copy(self, name: str) -> str:
        if name not in self.held:
            raise BundleError(f"no version {name}")
        return name

    def load(self) -> Callable[[str], StandIn]:
        def load(name: str) -> StandIn:
            found = self.held[name]
            if isinstance(found, Exception):
                raise found
            return found

        return load
