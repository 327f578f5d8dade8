"""Every number an evaluation prints: ranked lists against sets, scores against labels, and what lies beyond accuracy.

List metrics return one value per user, so that confidence intervals and paired tests are possible; NaN marks a user
without relevant items, who does not count in a mean. Definitions are those of targets.md: recall is hits / |relevant|
and the ideal of NDCG has min(|relevant|, k) items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from recsys.core import UNKNOWN


@dataclass(frozen=True)
class Relevant:
    """The relevant items of B users: user b's are items[indptr[b]:indptr[b + 1]], each once, in any order."""

    indptr: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[Sequence[int] | np.ndarray | set[int]]) -> Self:
        """From B collections of item rows; repeats count once."""
        unique = [np.unique(np.fromiter(s, np.int64, len(s))) for s in sets]
        indptr = np.zeros(len(unique) + 1, np.int64)
        np.cumsum([len(s) for s in unique], out=indptr[1:])
        return cls(indptr, np.concatenate(unique) if unique else np.empty(0, np.int64))

    @classmethod
    def one(cls, items: np.ndarray) -> Self:
        """One relevant item per user, (B,); -1 means none."""
        present = items != UNKNOWN
        return cls(np.concatenate([[0], np.cumsum(present)]).astype(np.int64), items[present].astype(np.int64))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def sizes(self) -> np.ndarray:
        """|relevant| of each user, (B,)."""
        return np.diff(self.indptr)


def hits(ranked: np.ndarray, relevant: Relevant) -> np.ndarray:
    """(B, k) item rows, best first, -1 where a list is short -> (B, k) bool, whether each is relevant to its user."""
    if len(ranked) != len(relevant):
        raise ValueError(f"{len(ranked)} ranked lists came with relevant items of {len(relevant)} users; give one set per list.")
    if not relevant.items.size or not ranked.size:
        return np.zeros(ranked.shape, bool)
    span = int(max(relevant.items.max(), ranked.max())) + 2
    users = np.repeat(np.arange(len(relevant), dtype=np.int64), relevant.sizes)
    wanted = np.sort(users * span + relevant.items)
    keys = np.arange(len(ranked), dtype=np.int64)[:, None] * span + ranked  # (B, k)
    at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    found: np.ndarray = (wanted[at] == keys) & (ranked != UNKNOWN)
    return found


def at_k(ranked: np.ndarray, relevant: Relevant, ks: Sequence[int] = (10,)) -> dict[str, np.ndarray]:
    """All list metrics at each cut: {"ndcg@10": (B,) float64, ...} for ndcg, recall, hit, mrr, precision, f1, map.

    Lists shorter than k count as padded with misses. NaN for users without relevant items.
    """
    found = hits(ranked, relevant)
    return {name: values for k in ks for name, values in _at_one_k(found, relevant.sizes, int(k)).items()}


def _at_one_k(found: np.ndarray, n_relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    found = found[:, :k].astype(np.float64)
    width = found.shape[1]
    size = np.where(n_relevant > 0, n_relevant, np.nan).astype(np.float64)
    n_found = found.sum(1)
    discount = 1 / np.log2(np.arange(2, k + 2))  # (k,)
    ideal = np.concatenate([[np.nan], np.cumsum(discount)])[np.minimum(n_relevant, k)]
    first = np.where(n_found > 0, found.argmax(1) + 1, np.inf) if width else np.full(len(found), np.inf)
    precisions = np.cumsum(found, 1) / np.arange(1, width + 1)
    some = np.where(n_relevant > 0, 1.0, np.nan)
    return {
        f"ndcg@{k}": found @ discount[:width] / ideal,
        f"recall@{k}": n_found / size,
        f"hit@{k}": (n_found > 0) * some,
        f"mrr@{k}": some / first,
        f"precision@{k}": n_found / k * some,
        f"f1@{k}": 2 * n_found / (k + size),
        f"map@{k}": (precisions * found).sum(1) / np.minimum(size, k),
    }


def mean_of_users(values: np.ndarray) -> float:
    """The mean over users who count (not NaN); NaN if none does."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def interval(values: np.ndarray, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of the mean over users, by the normal approximation; NaN below two users."""
    values = values[~np.isnan(values)]
    if values.size < 2:
        return float("nan"), float("nan")
    half = z * float(values.std(ddof=1)) / float(np.sqrt(values.size))
    return float(values.mean()) - half, float(values.mean()) + half


# Scores against labels.


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of (n,) 0/1 labels; a tie counts one half. NaN where one class is absent."""
    value, weight = _group_auc(labels, scores, np.zeros(len(labels), np.int64))
    return float(value[0]) if weight.size else float("nan")


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """AUC inside each group (user), weighted by the group's rows, over groups that have both classes. NaN if none has."""
    value, weight = _group_auc(labels, scores, groups)
    return float(np.average(value, weights=weight)) if weight.size else float("nan")


def _group_auc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and number of rows of each group with both classes, in ascending order of group (Mann-Whitney by mid-ranks)."""
    if not len(labels):
        return np.empty(0), np.empty(0)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; AUC needs numbers.")
    order = np.lexsort((scores, groups))
    group, score, positive = groups[order], scores[order], labels[order] > 0.5
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_tie = new_group | np.concatenate([[True], score[1:] != score[:-1]])
    starts, ties = np.flatnonzero(new_group), np.flatnonzero(new_tie)
    sizes = np.diff(np.append(starts, len(group)))
    tie_sizes = np.diff(np.append(ties, len(group)))
    mid = np.repeat(ties + (tie_sizes + 1) / 2, tie_sizes) - np.repeat(starts, sizes)  # mid-ranks inside the group, from 1
    n_positive = np.add.reduceat(positive.astype(np.int64), starts).astype(np.float64)
    n_negative = sizes - n_positive
    rank_sum = np.add.reduceat(np.where(positive, mid, 0.0), starts)
    both = (n_positive > 0) & (n_negative > 0)
    wins = rank_sum[both] - n_positive[both] * (n_positive[both] + 1) / 2
    return wins / (n_positive[both] * n_negative[both]), sizes[both].astype(np.float64)


def logloss(labels: np.ndarray, probabilities: np.ndarray, *, epsilon: float = 1e-7) -> float:
    """Mean negative log-likelihood of (n,) 0/1 labels in nats; probabilities are clipped to [epsilon, 1 - epsilon]."""
    p = np.clip(probabilities.astype(np.float64), epsilon, 1 - epsilon)
    return float(-np.mean(np.where(labels > 0.5, np.log(p), np.log1p(-p))))


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Sum of predicted over sum of observed positives: 1 is calibrated, above 1 is overconfident. NaN without a positive."""
    observed = float(np.sum(labels > 0.5))
    return float(np.sum(probabilities, dtype=np.float64)) / observed if observed else float("nan")


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, *, bins: int = 20) -> float:
    """Expected calibration error: mean |observed - predicted| over equal-width bins, weighted by rows (Naeini et al., 2015)."""
    at = np.clip((probabilities * bins).astype(np.int64), 0, bins - 1)
    predicted = np.bincount(at, probabilities, minlength=bins)
    observed = np.bincount(at, labels > 0.5, minlength=bins)
    return float(np.abs(predicted - observed).sum() / len(labels))


def at_threshold(labels: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Precision, recall and F1 of saying yes from `threshold` on: {"precision", "recall", "f1"}; NaN where one divides by none."""
    yes, true = probabilities >= threshold, labels > 0.5
    both, n_yes, n_true = int((yes & true).sum()), int(yes.sum()), int(true.sum())
    return {
        "precision": both / n_yes if n_yes else float("nan"),
        "recall": both / n_true if n_true else float("nan"),
        "f1": 2 * both / (n_yes + n_true) if n_yes + n_true else float("nan"),
    }


def rmse(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.mean((truth.astype(np.float64) - predicted) ** 2)))


def mae(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(truth.astype(np.float64) - predicted)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,) score lists of the same candidates, ties by mid-rank. NaN if one is constant or n < 2."""
    if len(a) < 2:
        return float("nan")
    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else float("nan")


def spearman_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of two (B, N) score arrays over the slots that both fill (finite), (B,)."""
    both = np.isfinite(a) & np.isfinite(b)
    return np.array([spearman(x[m], y[m]) for x, y, m in zip(a, b, both, strict=True)], np.float64)


# Beyond accuracy.


def coverage(ranked: np.ndarray, n_items: int) -> float:
    """Share of the catalogue that stands in at least one list."""
    return len(np.unique(ranked[ranked != UNKNOWN])) / n_items if n_items else float("nan")


def gini(ranked: np.ndarray, n_items: int) -> float:
    """How unevenly the places of all lists fall on the catalogue: 0, every item equally often; towards 1, few items everywhere."""
    shown = np.sort(np.bincount(ranked[ranked != UNKNOWN], minlength=n_items)).astype(np.float64)
    total = shown.sum()
    return float((2 * np.arange(1, n_items + 1) - n_items - 1) @ shown / (n_items * total)) if total else float("nan")


def long_tail_share(ranked: np.ndarray, counts: np.ndarray, *, head: float = 0.2) -> np.ndarray:
    """Share of each list outside the head, the `head` share of items with most events (ties: smaller row), (B,).

    counts (n_items,) are the events of each item in training. NaN for empty lists.
    """
    n_head = round(head * len(counts))
    tail = np.ones(len(counts) + 1, bool)
    tail[np.argsort(-counts, kind="stable")[:n_head]] = False
    tail[-1] = False  # -1, the empty slot
    return _mean_of_filled(tail[ranked].astype(np.float64), ranked)


def novelty(ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean self-information of each list in bits, -log2(count / all events), (B,); an item without events counts as one event."""
    counts = np.maximum(counts.astype(np.float64), 1.0)
    bits = np.append(-np.log2(counts / counts.sum()), 0.0)
    return _mean_of_filled(bits[ranked], ranked)


def popularity(ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean training events of the items of each list (average recommendation popularity), (B,)."""
    return _mean_of_filled(np.append(counts, 0).astype(np.float64)[ranked], ranked)


def popularity_lift(ranked: np.ndarray, had: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How much more popular the items of a list are than those the user had: mean counts of (B, k) over (B, L), less 1, (B,).

    0 is no popularity bias (Abdollahpouri et al., 2019, of one user). NaN without a list or a history.
    """
    own = popularity(had, counts)
    lift: np.ndarray = popularity(ranked, counts) / np.where(own > 0, own, np.nan) - 1
    return lift


def _mean_of_filled(values: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    filled = ranked != UNKNOWN
    size = filled.sum(1)
    total = np.where(filled, values, 0.0).sum(1)
    mean: np.ndarray = np.divide(total, size, out=np.full(len(ranked), np.nan), where=size > 0)
    return mean


def intra_list_diversity(ranked: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Mean cosine distance of the pairs of each list, (B,); vectors (n_items, d). NaN for lists of fewer than two items."""
    filled = ranked != UNKNOWN
    v = vectors[np.where(filled, ranked, 0)].astype(np.float64)  # (B, k, d)
    norm = np.linalg.norm(v, axis=2, keepdims=True)
    v = np.divide(v, norm, out=np.zeros_like(v), where=norm > 0) * filled[:, :, None]
    # The sum over all ordered pairs is |sum of unit vectors|^2 less the pairs of an item with itself.
    total = (v.sum(1) ** 2).sum(1) - (v**2).sum((1, 2))
    n = filled.sum(1).astype(np.float64)
    pairs = n * (n - 1)
    alike = np.divide(total, pairs, out=np.full(len(n), np.nan), where=pairs > 0)
    distance: np.ndarray = 1 - alike
    return distance


def diversity_by_users(ranked: np.ndarray, item_users: sparse.csr_matrix) -> np.ndarray:
    """`intra_list_diversity` where an item's vector is the users who had it: item_users (n_items, U) csr with rows of unit length.

    It needs no model, so it is the same measure for every row of a report.
    """
    filled = ranked != UNKNOWN
    lists, slots = np.nonzero(filled)
    picks = sparse.csr_matrix((np.ones(len(lists)), (lists, ranked[lists, slots])), shape=(len(ranked), item_users.shape[0]))
    total = picks @ item_users  # (B, U): the sum of a list's unit vectors
    norms = np.asarray(item_users.multiply(item_users).sum(1)).ravel()  # 1, or 0 for an item that nobody had
    n = filled.sum(1).astype(np.float64)
    pairs = n * (n - 1)
    alike = np.asarray(total.multiply(total).sum(1)).ravel() - picks @ norms
    distance: np.ndarray = 1 - np.divide(alike, pairs, out=np.full(len(n), np.nan), where=pairs > 0)
    return distance
