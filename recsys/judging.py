"""What each row of a report answers to a batch of held-out users: lists, what each stage kept, and what it took.

One `Judge` holds everything that answers. It is asked chunk by chunk, here or on the workers of a cluster; chunks are put
together in order, and equal chunks give equal answers wherever they were computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from recsys.allowed import Allowed, Mask
from recsys.core import UNKNOWN, Candidates, Queries, Recaller
from recsys.funnel import Funnel
from recsys.held_out import HeldOut
from recsys.memory import PeakMemory
from recsys.metrics import Relevant, hits, spearman_rows

CHUNK = 256
MASKED = 64_000_000
"""Most (users, items) of the bitmaps of one chunk, where users are asked to rank given items."""
STAGES = ("merged", "coarse", "fine", "funnel")
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """B held-out users as arrays: their states (and with the whole history), what is sought, and the items to rank, if given."""

    queries: Queries
    whole: Queries
    relevant: Relevant
    given: np.ndarray | None = None


@dataclass
class Judged:
    """Answers: ranked name -> (B, width) item rows; kept stage -> (B,) share of what is sought among its candidates; agreement
    (B,) coarse-fine rank correlation; seconds and mib name -> what answering took."""

    ranked: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    agreement: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """The chunks in order as one."""
        names = parts[0].ranked if parts else {}
        return cls(
            {n: np.concatenate([p.ranked[n] for p in parts]) for n in names},
            {n: np.concatenate([p.kept[n] for p in parts]) for n in (parts[0].kept if parts else {})},
            np.concatenate([p.agreement for p in parts]) if parts else np.empty(0),
            {n: sum(p.seconds[n] for p in parts) for n in (parts[0].seconds if parts else {})},
            {n: max(p.mib[n] for p in parts) for n in (parts[0].mib if parts else {})},
        )


@dataclass(frozen=True)
class Judge:
    """channels: row name -> fitted channel; those of `on_whole` see the whole history. funnel: what the stages run on, and
    `stages` which of merged, coarse, fine, funnel are rows; width: how deep lists are judged."""

    channels: Mapping[str, Recaller]
    width: int
    n_items: int
    on_whole: frozenset[str] = frozenset()
    funnel: Funnel | None = None
    stages: tuple[str, ...] = ()

    def __call__(self, task: Task) -> Judged:
        """Answer one chunk."""
        out = Judged({}, {}, np.empty(0))
        queries, whole = (self._ready(q, task.given) for q in (task.queries, task.whole))
        for name, channel in self.channels.items():
            asked = whole if name in self.on_whole else queries
            items, scores = _measured(out, name, channel.recall, asked, self.width)
            if asked.allowed is not None:
                items, _ = asked.allowed.kept(items, scores)
            out.ranked[name] = _padded(items, self.width)
        if self.funnel is not None and self.stages:
            self._stages(self.funnel, queries, task.relevant, out)
        else:
            out.agreement = np.full(len(queries), np.nan)
        return out

    def _ready(self, queries: Queries, given: np.ndarray | None) -> Queries:
        """As deep as the report looks, and allowed the given items only."""
        k = np.full(len(queries), self.width, np.int32)
        if given is None:
            return replace(queries, k=k, memo={})
        masks = []
        for row in given:
            mask = np.zeros(self.n_items, bool)
            mask[row[row != UNKNOWN]] = True
            masks.append(Mask(mask))
        return replace(queries, k=k, memo={}, allowed=Allowed(tuple(masks), np.arange(len(given))))

    def _stages(self, funnel: Funnel, queries: Queries, relevant: Relevant, out: Judged) -> None:
        """merged, coarse, fine (re-rank off) and funnel (re-rank on), as far down as asked."""
        found: dict[str, Candidates] = {"merged": _measured(out, "merged", funnel.recall, queries)}
        out.agreement = np.full(len(queries), np.nan)
        if self._reaches("coarse"):
            found["coarse"] = _measured(out, "coarse", funnel.coarse_rank, queries, found["merged"])
        if self._reaches("fine") and funnel.ranker is not None:
            coarse = found["coarse"]
            fine = np.where(coarse.items == UNKNOWN, -np.inf, funnel.fine_scores(queries, coarse))
            out.agreement = spearman_rows(coarse.scores, fine)
            found["fine"] = _measured(out, "fine", funnel.fine_rank, queries, coarse)
            if self._reaches("funnel"):
                found["funnel"] = _measured(out, "funnel", funnel.rerank, queries, found["fine"])
        for name, candidates in found.items():
            out.kept[name] = _share(candidates.items, relevant)
            if name in self.stages:
                out.ranked[name] = _padded(candidates.items, self.width)

    def _reaches(self, stage: str) -> bool:
        return any(STAGES.index(s) >= STAGES.index(stage) for s in self.stages)


def tasks(held_out: HeldOut, n_items: int) -> list[Callable[[], Task]]:
    """The held-out users in chunks, each made when it is called for."""
    size = CHUNK if held_out.given is None else max(1, min(CHUNK, MASKED // max(n_items, 1)))
    return [_chunk(held_out, np.arange(a, min(a + size, len(held_out)))) for a in range(0, len(held_out), size)]


def _chunk(held_out: HeldOut, rows: np.ndarray) -> Callable[[], Task]:
    def make() -> Task:
        queries = held_out.queries(rows)
        whole = queries if held_out.whole is None else _trimmed(held_out.whole(rows))
        r = held_out.relevant
        relevant = Relevant.of([r.items[r.indptr[b] : r.indptr[b + 1]] for b in rows])
        return Task(queries, whole, relevant, None if held_out.given is None else held_out.given[rows])

    return make


def _trimmed(queries: Queries) -> Queries:
    """Without the empty slots that no history of the chunk fills."""
    longest = int((queries.history != UNKNOWN).sum(1).max(initial=0))
    start = queries.history.shape[1] - longest
    return replace(queries, history=queries.history[:, start:], history_times=queries.history_times[:, start:])


def _measured(out: Judged, name: str, call: Callable[..., T], *args: Any) -> T:
    with PeakMemory() as memory:
        start = time.perf_counter()
        found = call(*args)
        out.seconds[name] = time.perf_counter() - start
    out.mib[name] = memory.mib
    return found


def _padded(items: np.ndarray, width: int) -> np.ndarray:
    out = np.full((len(items), width), UNKNOWN, np.int32)
    out[:, : min(width, items.shape[1])] = items[:, :width]
    return out


def _share(items: np.ndarray, relevant: Relevant) -> np.ndarray:
    """(B,) share of what is sought that is among these candidates; NaN where nothing is."""
    size = np.where(relevant.sizes > 0, relevant.sizes, np.nan)
    share: np.ndarray = hits(items, relevant).sum(1) / size
    return share
