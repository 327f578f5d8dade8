"""Each metric against an answer by hand and against a brute-force version of about ten lines, over generated inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from recsys import metrics
from recsys.metrics import Relevant

CASES = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def lists_and_sets(draw):
    B, n_items, k = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 8))
    ranked = np.full((B, k), -1, np.int32)
    sets = []
    for b in range(B):
        order = draw(st.permutations(range(n_items)))[: draw(st.integers(0, k))]
        ranked[b, : len(order)] = order
        sets.append(draw(st.sets(st.integers(0, n_items + 2), max_size=6)))
    return ranked, sets, draw(st.integers(1, 10))


def brute_list_metrics(ranked, wanted, k):
    if not wanted:
        return dict.fromkeys(("ndcg", "recall", "hit", "mrr", "precision", "f1", "map"), math.nan)
    ranked = [i for i in ranked[:k] if i != -1]
    gain = sum(1 / math.log2(r + 1) for r, i in enumerate(ranked, 1) if i in wanted)
    ideal = sum(1 / math.log2(r + 1) for r in range(1, min(len(wanted), k) + 1))
    found = sum(i in wanted for i in ranked)
    first = next((1 / r for r, i in enumerate(ranked, 1) if i in wanted), 0.0)
    p, r = found / k, found / len(wanted)
    average = sum(sum(j in wanted for j in ranked[:n]) / n for n, i in enumerate(ranked, 1) if i in wanted) / min(len(wanted), k)
    f1 = 2 * p * r / (p + r) if found else 0.0
    return {"ndcg": gain / ideal, "recall": r, "hit": float(found > 0), "mrr": first, "precision": p, "f1": f1, "map": average}


@CASES
@given(lists_and_sets())
def test_list_metrics_equal_brute_force(case):
    ranked, sets, k = case
    got = metrics.at_k(ranked, Relevant.of(sets), [k])
    for b, wanted in enumerate(sets):
        for name, value in brute_list_metrics(ranked[b].tolist(), wanted, k).items():
            np.testing.assert_allclose(got[f"{name}@{k}"][b], value, atol=1e-12, err_msg=name)


def brute_auc(labels, scores):
    pairs = [(p, n) for p, a in zip(scores, labels, strict=True) if a for n, b in zip(scores, labels, strict=True) if not b]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs) if pairs else math.nan


def brute_gauc(labels, scores, groups):
    total = weight = 0.0
    for g in set(groups):
        rows = [i for i, x in enumerate(groups) if x == g]
        value = brute_auc([labels[i] for i in rows], [scores[i] for i in rows])
        if not math.isnan(value):
            total, weight = total + value * len(rows), weight + len(rows)
    return total / weight if weight else math.nan


scored = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=30)


@CASES
@given(scored)
def test_auc_and_gauc_equal_brute_force_with_many_ties(rows):
    labels, scores, groups = (np.array(x) for x in zip(*rows, strict=True))
    np.testing.assert_allclose(metrics.auc(labels.astype(float), scores / 5), brute_auc(labels, scores))
    np.testing.assert_allclose(metrics.gauc(labels.astype(float), scores / 5, groups), brute_gauc(labels, scores, list(groups)))


@CASES
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=20))
def test_logloss_calibration_and_errors_equal_brute_force(rows):
    labels = np.array([float(a) for a, _ in rows])
    p = np.array([b for _, b in rows])
    clipped = [min(max(x, 1e-7), 1 - 1e-7) for x in p]
    expected = -sum(math.log(x) if y else math.log(1 - x) for x, y in zip(clipped, labels, strict=True)) / len(rows)
    np.testing.assert_allclose(metrics.logloss(labels, p), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.calibration(labels, p), sum(p) / sum(labels) if sum(labels) else math.nan)
    np.testing.assert_allclose(metrics.rmse(labels, p), math.sqrt(sum((a - b) ** 2 for a, b in zip(labels, p, strict=True)) / len(rows)))
    np.testing.assert_allclose(metrics.mae(labels, p), sum(abs(a - b) for a, b in zip(labels, p, strict=True)) / len(rows))


@CASES
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=20), st.integers(0, 4))
def test_precision_recall_and_f1_at_a_threshold_equal_brute_force(rows, at):
    labels, p = np.array([float(a) for a, _ in rows]), np.array([b / 4 for _, b in rows])
    got = metrics.at_threshold(labels, p, at / 4)
    hit = sum(a and b >= at for a, b in rows)
    said, true = sum(b >= at for _, b in rows), sum(a for a, _ in rows)
    expected = {"precision": hit / said if said else math.nan, "recall": hit / true if true else math.nan}
    expected["f1"] = 2 * hit / (said + true) if said + true else math.nan
    assert got == pytest.approx(expected, nan_ok=True)


def brute_rank(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


@CASES
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=15))
def test_spearman_equals_the_correlation_of_mid_ranks(rows):
    a, b = (np.array(x, float) for x in zip(*rows, strict=True))
    x, y = brute_rank(list(a)), brute_rank(list(b))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    norm = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    np.testing.assert_allclose(metrics.spearman(a, b), cov / norm if norm else math.nan, atol=1e-12)


@CASES
@given(lists_and_sets(), st.integers(0, 2**32 - 1))
def test_beyond_accuracy_equals_brute_force(case, seed):
    ranked, _, _ = case
    n_items = 15
    rng = np.random.default_rng(seed)
    counts, vectors = rng.integers(0, 5, n_items), rng.normal(size=(n_items, 3))
    head = set(sorted(range(n_items), key=lambda i: (-counts[i], i))[:3])
    total = sum(max(c, 1) for c in counts)
    tail, novel, diverse = (
        metrics.long_tail_share(ranked, counts),
        metrics.novelty(ranked, counts),
        metrics.intra_list_diversity(ranked, vectors),
    )
    for b, row in enumerate(ranked):
        page = [int(i) for i in row if i != -1]
        pairs = [(i, j) for i in page for j in page if i != j]
        cosine = [vectors[i] @ vectors[j] / math.sqrt((vectors[i] @ vectors[i]) * (vectors[j] @ vectors[j])) for i, j in pairs]
        np.testing.assert_allclose(tail[b], sum(i not in head for i in page) / len(page) if page else math.nan)
        np.testing.assert_allclose(novel[b], -sum(math.log2(max(counts[i], 1) / total) for i in page) / len(page) if page else math.nan)
        np.testing.assert_allclose(diverse[b], 1 - sum(cosine) / len(pairs) if pairs else math.nan, atol=1e-9)
    shown = [sum(int(i) == j for i in ranked.ravel()) for j in range(n_items)]
    differences = sum(abs(a - b) for a in shown for b in shown)
    np.testing.assert_allclose(
        metrics.gini(ranked, n_items), differences / (2 * n_items * sum(shown)) if sum(shown) else math.nan, atol=1e-12
    )
    had = rng.integers(-1, n_items, (len(ranked), 3))
    lift = metrics.popularity_lift(ranked, had, counts)
    for b, (row, own) in enumerate(zip(ranked, had, strict=True)):
        mine, theirs = ([counts[i] for i in x if i != -1] for x in (own, row))
        known = mine and theirs and sum(mine)
        np.testing.assert_allclose(lift[b], (sum(theirs) / len(theirs)) / (sum(mine) / len(mine)) - 1 if known else math.nan)
    dense = rng.random((n_items, 6)) * (rng.random((n_items, 6)) < 0.5)
    unit = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(metrics.diversity_by_users(ranked, csr_matrix(unit)), metrics.intra_list_diversity(ranked, dense), atol=1e-9)
    assert metrics.coverage(ranked, n_items) == len({int(i) for i in ranked.ravel()} - {-1}) / n_items


def test_by_hand_two_relevant_items_at_ranks_one_and_three():
    got = metrics.at_k(np.array([[7, 8, 9]]), Relevant.of([{7, 9, 11}]), [3])
    assert got["ndcg@3"][0] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3) + 0.5))
    assert got["recall@3"][0] == pytest.approx(2 / 3)
    assert got["precision@3"][0] == pytest.approx(2 / 3)
    assert got["mrr@3"][0] == 1.0


def test_ideal_dcg_has_min_of_relevant_and_k_items():
    assert metrics.at_k(np.array([[1, 2]]), Relevant.of([{1, 2, 3, 4}]), [2])["ndcg@2"][0] == pytest.approx(1.0)
    assert metrics.at_k(np.array([[1, 2, 3]]), Relevant.of([{1}]), [3])["ndcg@3"][0] == pytest.approx(1.0)


def test_a_user_without_relevant_items_counts_in_no_mean():
    got = metrics.at_k(np.array([[1], [2]]), Relevant.of([{1}, set()]), [1])["recall@1"]
    assert np.isnan(got[1])
    assert metrics.mean_of_users(got) == 1.0


def test_no_lists_and_no_items_are_nan_not_an_error():
    assert math.isnan(metrics.mean_of_users(metrics.at_k(np.empty((0, 5), np.int32), Relevant.of([]), [5])["ndcg@5"]))
    assert metrics.at_k(np.empty((2, 0), np.int32), Relevant.of([{1}, {2}]), [5])["ndcg@5"].tolist() == [0.0, 0.0]
    assert math.isnan(metrics.auc(np.empty(0), np.empty(0)))
    assert math.isnan(metrics.auc(np.ones(3), np.arange(3.0)))


def test_one_relevant_item_each_equals_sets_of_one():
    ranked = np.array([[3, 1], [2, 0], [5, 4]])
    one, sets = Relevant.one(np.array([1, -1, 5])), Relevant.of([{1}, set(), {5}])
    np.testing.assert_array_equal(one.indptr, sets.indptr)
    np.testing.assert_array_equal(metrics.hits(ranked, one), metrics.hits(ranked, sets))


def test_the_interval_of_a_hundred_coin_flips_by_hand():
    values = np.array([0.0, 1.0] * 50)
    low, high = metrics.interval(values)
    half = 1.959964 * math.sqrt(25 / 99) / 10
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert all(math.isnan(x) for x in metrics.interval(np.array([1.0])))


def test_calibration_error_of_a_model_that_says_one_half_to_everything():
    assert metrics.calibration_error(np.array([1.0, 1, 1, 0]), np.full(4, 0.5)) == pytest.approx(0.25)


def test_spearman_of_rows_ignores_empty_slots():
    a = np.array([[3, 2, 1, -np.inf], [1, 2, 3, 4]])
    b = np.array([[9, 5, 1, 7.0], [4, 3, 2, 1]])
    assert metrics.spearman_rows(a, b).tolist() == pytest.approx([1.0, -1.0])


def test_popularity_is_the_mean_count_of_a_list():
    assert metrics.popularity(np.array([[0, 2], [1, -1]]), np.array([10, 4, 2])).tolist() == [6.0, 4.0]


def test_nan_scores_are_refused_with_a_count():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        metrics.auc(np.array([0.0, 1.0]), np.array([np.nan, 0.5]))


def test_lists_and_sets_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 ranked lists came with relevant items of 1 users"):
        metrics.hits(np.zeros((2, 1), np.int32), Relevant.of([{0}]))
