"""Honest offline evaluation: every channel, every stage and the whole funnel on the same held-out events.

Full catalogue, what was seen filtered out, users' state as of the instant before their held-out events. The rows come
with what the cut of each stage loses, so a weak funnel shows where it is weak.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from recsys.core import UNKNOWN, Candidates, Queries
from recsys.errors import RayfunnelError
from recsys.funnel import Funnel
from recsys.metrics import Relevant, at_k, coverage, hits, interval, long_tail_share, mean_of_users, spearman_rows

CHUNK = 256
KS = (5, 10, 20)
SHOWN = ("ndcg", "recall", "hit", "mrr")
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """Users' states and what they did next: queries(rows) gives the state of n of the B users, relevant their item sets."""

    queries: Callable[[np.ndarray], Queries]
    relevant: Relevant
    warm: np.ndarray
    """(B,) bool: the user had a history at that instant."""

    def __len__(self) -> int:
        return len(self.relevant)


@dataclass
class Row:
    """One line of the report: per-user metrics and what it took."""

    model: str
    values: dict[str, np.ndarray]
    ranked: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)

    def metrics(self, users: np.ndarray | None = None) -> dict[str, float]:
        """Means over users who have held-out items (those of the mask, if given)."""
        return {name: mean_of_users(v if users is None else v[users]) for name, v in self.values.items()}


@dataclass
class Report:
    """What `rayfunnel evaluate` prints and writes."""

    protocol: str
    rows: list[Row]
    stage_recall: dict[str, float]
    spearman: float
    users: int
    warm: np.ndarray
    n_items: int
    item_counts: np.ndarray

    def keep(self, models: Sequence[str] | None) -> None:
        """Keep the rows of these names alone; RayfunnelError names one that is not there, and those that are."""
        if models is None:
            return
        known = [row.model for row in self.rows]
        if absent := [name for name in models if name not in known]:
            raise RayfunnelError(f"The report has no row '{absent[0]}'. Rows: {', '.join(known)}.")
        self.rows = [row for row in self.rows if row.model in models]

    def as_json(self) -> dict[str, Any]:
        """{"protocol", "rows": [{"model", "metrics", "seconds", "interval"}], ...}: keys others rely on."""
        return {
            "protocol": self.protocol,
            "users": self.users,
            "warm_users": int(self.warm.sum()),
            "rows": [
                {
                    "model": row.model,
                    "metrics": row.metrics() | self._beyond(row),
                    "warm": row.metrics(self.warm) if 0 < self.warm.sum() < self.users else None,
                    "interval": {"ndcg@10": list(interval(row.values["ndcg@10"]))},
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
            "stage_recall": self.stage_recall,
            "coarse_fine_spearman": self.spearman,
        }

    def _beyond(self, row: Row) -> dict[str, float]:
        top = row.ranked[:, :10]
        return {"coverage@10": coverage(top, self.n_items), "long_tail@10": mean_of_users(long_tail_share(top, self.item_counts))}


def evaluate_funnel(
    funnel: Funnel,
    held_out: HeldOut,
    item_counts: np.ndarray,
    *,
    protocol: str,
    ks: Sequence[int] = KS,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Rows: each channel, merged, coarse, fine (re-rank off) and funnel (re-rank on); one pass over the held-out users."""
    width = max(ks)
    ranked: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, float] = {}
    survivors: dict[str, list[float]] = {}
    agreement: list[np.ndarray] = []

    def timed(name: str, call: Callable[..., T], *args: Any) -> T:
        start = time.perf_counter()
        out = call(*args)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return out

    for start in range(0, len(held_out), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(held_out)))
        queries = held_out.queries(rows)
        relevant = _subset(held_out.relevant, rows)
        for name, channel in funnel.channels.items():
            items, _ = timed(name, channel.recall, queries, width)
            ranked.setdefault(name, []).append(_padded(items, width))
        merged = timed("merged", funnel.recall, queries)
        stages: dict[str, Candidates] = {"merged": merged}
        stages["coarse"] = timed("coarse", funnel.coarse_rank, queries, merged)
        if funnel.ranker is not None:
            agreement.append(
                spearman_rows(stages["coarse"].scores, _scored(funnel.fine_scores(queries, stages["coarse"]), stages["coarse"]))
            )
            stages["fine"] = timed("fine", funnel.fine_rank, queries, stages["coarse"])
            stages["funnel"] = timed("funnel", funnel.rerank, queries, stages["fine"])
        for name, c in stages.items():
            ranked.setdefault(name, []).append(_padded(c.items, width))
            survivors.setdefault(name, []).extend(_found(c.items, relevant))
        if progress is not None:
            progress(len(rows))
    out = []
    for name, parts in ranked.items():
        lists = np.concatenate(parts)
        values = {m: v for m, v in at_k(lists, held_out.relevant, ks).items() if m.split("@")[0] in SHOWN}
        out.append(Row(name, values, lists, {"predict": seconds[name]}))
    spearman = mean_of_users(np.concatenate(agreement)) if agreement else float("nan")
    loss = {name: float(np.mean(found)) for name, found in survivors.items()}
    return Report(protocol, out, loss, spearman, len(held_out), held_out.warm, len(funnel.items), item_counts)


def _padded(items: np.ndarray, width: int) -> np.ndarray:
    out = np.full((len(items), width), UNKNOWN, np.int32)
    out[:, : min(width, items.shape[1])] = items[:, :width]
    return out


def _subset(relevant: Relevant, rows: np.ndarray) -> Relevant:
    return Relevant.of([relevant.items[relevant.indptr[r] : relevant.indptr[r + 1]] for r in rows])


def _found(items: np.ndarray, relevant: Relevant) -> list[float]:
    """Per user, the share of relevant items that are among these candidates."""
    some = relevant.sizes > 0
    share: list[float] = (hits(items, relevant).sum(1)[some] / relevant.sizes[some]).tolist()
    return share


def _scored(scores: np.ndarray, c: Candidates) -> np.ndarray:
    return np.where(c.items == UNKNOWN, -np.inf, scores)
