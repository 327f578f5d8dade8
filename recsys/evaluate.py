"""Honest offline evaluation: every channel, every stage, the whole funnel and the baselines on the same held-out events.

Full catalogue (but for protocol ncf, whose figures are labelled `sampled`), what was seen filtered out, users' state as of
the instant before their held-out events. The rows come with what the cut of each stage loses, so a weak funnel shows where
it is weak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from recsys.core import UNKNOWN
from recsys.data.interactions import Interactions
from recsys.funnel import Funnel
from recsys.held_out import HeldOut
from recsys.judging import STAGES, Judge, Judged, tasks
from recsys.metrics import (
    Relevant,
    at_k,
    coverage,
    diversity_by_users,
    gini,
    hits,
    long_tail_share,
    mean_of_users,
    novelty,
    popularity,
    popularity_lift,
)
from recsys.report import KINDS, Report, Row

KS = (5, 10, 20)
SHOWN = ("ndcg", "recall", "hit", "mrr", "precision", "f1", "map")
CURVES = ("ndcg", "recall")
DEPTH = 10
"""Length of list that measures beyond accuracy are taken at."""
BINS = 5
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Cost:
    """Seconds and MiB (peak above what was resident) that fitting took; NaN: not measured here."""

    seconds: float
    mib: float


@dataclass(frozen=True)
class Rows:
    """What is known of rows beside their lists: kind and fitting cost by name, which repeat another, which are absent and why."""

    kinds: Mapping[str, str] = field(default_factory=dict)
    fits: Mapping[str, Cost] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def evaluate_funnel(
    funnel: Funnel,
    held_out: HeldOut,
    item_counts: np.ndarray,
    *,
    protocol: str,
    ks: Sequence[int] = KS,
    progress: Progress | None = None,
) -> Report:
    """Rows: each channel, merged, coarse, fine (re-rank off) and funnel (re-rank on); one pass over the held-out users.

    item_counts (I,) are the events of each item in training.
    """
    stages = STAGES if funnel.ranker is not None else STAGES[:2]
    judge = Judge(funnel.channels, max(ks), len(funnel.items), funnel=funnel, stages=stages)
    return report(judge_here(judge, held_out, progress), held_out, item_counts, protocol=protocol, ks=ks)


def judge_here(judge: Judge, held_out: HeldOut, progress: Progress | None = None) -> Judged:
    """All chunks of the held-out users, one after the other, in this process."""
    parts = []
    for make in tasks(held_out, judge.n_items):
        task = make()
        parts.append(judge(task))
        if progress is not None:
            progress(len(task.relevant))
    return Judged.joined(parts)


def report(
    judged: Judged,
    held_out: HeldOut,
    item_counts: np.ndarray,
    *,
    protocol: str,
    ks: Sequence[int] = KS,
    rows: Rows = Rows(),
    item_users: sparse.csr_matrix | None = None,
) -> Report:
    """From lists to figures. item_users: see `users_of_items`; without it, diversity is left out."""
    seen = _histories(held_out)
    history, history_bins = bins(held_out.had if len(held_out.had) else np.zeros(len(held_out), np.int64), "users")
    wanted, popularity_bins = bins(item_counts[held_out.relevant.items], "items")
    seconds = _cumulative(judged.seconds)
    found = []
    for name in (*judged.ranked, *rows.same):
        source = rows.same.get(name, name)
        lists = judged.ranked[source]
        every = at_k(lists, held_out.relevant, sorted({*ks, *range(1, max(ks) + 1)}))
        values = {f"{m}@{k}": every[f"{m}@{k}"] for k in ks for m in SHOWN}
        values |= _beyond(lists, item_counts, seen, item_users)
        fit = rows.fits.get(source)
        lead = every[f"ndcg@{DEPTH if DEPTH in ks else ks[0]}"]
        caught = hits(lists[:, :DEPTH], held_out.relevant)
        found.append(
            Row(
                name,
                values,
                _of_all(lists, len(item_counts)),
                {"fit": fit.seconds if fit else float("nan"), "predict": seconds[source]},
                {"fit": fit.mib if fit else float("nan"), "predict": judged.mib[source]},
                rows.kinds.get(name, "stage" if name in STAGES else "channel"),
                rows.same.get(name),
                {m: [mean_of_users(every[f"{m}@{k}"]) for k in range(1, max(ks) + 1)] for m in CURVES},
                [mean_of_users(lead[history == b]) for b in range(len(history_bins))],
                _caught_by_bin(lists, caught, held_out.relevant, wanted, len(popularity_bins)),
            )
        )
    found.sort(key=lambda row: KINDS.index(row.kind))
    return Report(
        protocol,
        found,
        len(held_out),
        held_out.warm,
        len(item_counts),
        sampled=held_out.given is not None,
        stage_recall={name: mean_of_users(v) for name, v in judged.kept.items()},
        spearman=mean_of_users(judged.agreement),
        ks=tuple(ks),
        history_bins=history_bins,
        popularity_bins=popularity_bins,
        skipped=dict(rows.skipped),
    )


def users_of_items(known: Interactions) -> sparse.csr_matrix:
    """(I, U) csr of who had an item, rows of unit length: what two items have in common without any model."""
    had = known.positives().matrix().T.tocsr().astype(np.float64)
    had.data /= np.repeat(np.sqrt(np.maximum(np.diff(had.indptr), 1)), np.diff(had.indptr))
    return had


def _beyond(lists: np.ndarray, counts: np.ndarray, seen: np.ndarray | None, item_users: sparse.csr_matrix | None) -> dict[str, np.ndarray]:
    top = lists[:, :DEPTH]
    out = {
        f"novelty@{DEPTH}": novelty(top, counts),
        f"long_tail@{DEPTH}": long_tail_share(top, counts),
        f"popularity@{DEPTH}": popularity(top, counts),
    }
    if seen is not None:
        out[f"popularity_lift@{DEPTH}"] = popularity_lift(top, seen, counts)
    if item_users is not None:
        parts = [diversity_by_users(top[a : a + 4_096], item_users) for a in range(0, len(top), 4_096)]
        out[f"diversity@{DEPTH}"] = np.concatenate(parts) if parts else np.empty(0)
    return out


def _of_all(lists: np.ndarray, n_items: int) -> dict[str, float]:
    top = lists[:, :DEPTH]
    return {f"coverage@{DEPTH}": coverage(top, n_items), f"gini@{DEPTH}": gini(top, n_items)}


def _histories(held_out: HeldOut) -> np.ndarray | None:
    """(B, L) item rows of each user's history, as the service would see it."""
    parts = [held_out.queries(np.arange(a, min(a + 1_024, len(held_out)))).history for a in range(0, len(held_out), 1_024)]
    if not parts:
        return None
    width = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, ((0, 0), (width - p.shape[1], 0)), constant_values=UNKNOWN) for p in parts])


def bins(values: np.ndarray, what: str) -> tuple[np.ndarray, list[dict[str, int]]]:
    """(n,) counts -> the bin of each, and the bins: 0 by itself where it occurs, the rest in up to five of about equal size."""
    positive = values[values > 0]
    edges = np.unique(np.quantile(positive, np.linspace(0, 1, BINS + 1)[1:-1], method="lower")) if len(positive) else np.empty(0)
    at = np.where(values > 0, 1 + np.searchsorted(edges, values, side="left"), 0)
    used, at = np.unique(at, return_inverse=True)
    bins = [{"from": int(values[at == b].min()), "to": int(values[at == b].max()), what: int((at == b).sum())} for b in range(len(used))]
    return at, bins


def _caught_by_bin(lists: np.ndarray, caught: np.ndarray, relevant: Relevant, wanted: np.ndarray, n: int) -> list[float]:
    """Share of the sought items of each bin that stand in the first ten of their users' lists. wanted: the bin of each."""
    users = np.repeat(np.arange(len(relevant)), relevant.sizes)
    span = int(max(lists.max(initial=0), relevant.items.max(initial=0))) + 1
    b, slot = np.nonzero(caught)
    found = np.isin(users * span + relevant.items, b * span + lists[b, slot])
    total, got = np.bincount(wanted, minlength=n), np.bincount(wanted, found, minlength=n)
    return [float(g / t) if t else float("nan") for g, t in zip(got, total, strict=True)]


def _cumulative(seconds: Mapping[str, float]) -> dict[str, float]:
    """A stage's row takes what all stages up to it take."""
    out, so_far = dict(seconds), 0.0
    for name in STAGES:
        if name in out:
            so_far += out[name]
            out[name] = so_far
    return out
