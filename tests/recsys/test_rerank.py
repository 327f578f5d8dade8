"""MMR and caps: the contract of every re-ranker, pages worked out by hand, and a version with loops to agree with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import UNKNOWN
from recsys.errors import ConfigError
from recsys.rerank import diversity as diversity_module
from recsys.rerank.diversity import REASONS, RELAXED, CapConfig, MMRConfig
from tests.contracts import RerankerContract, candidates_of, queries_of

VECTORS = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
COLUMNS = {
    "category": (np.arange(10) % 3 + 1).astype(np.int32),
    "genres": np.stack([np.arange(10) % 3, np.arange(10) % 4], axis=1).astype(np.int32),
}


class TestMMR(RerankerContract):
    def make(self):
        return MMRConfig(lambda_=0.5).build(VECTORS, {})


class TestMMRWithCaps(RerankerContract):
    def make(self):
        caps = (CapConfig(column="category", at_most=1, window=2), CapConfig(column="genres", at_most=2))
        return MMRConfig(lambda_=0.7, pool=6, caps=caps).build(VECTORS.astype(np.float16), COLUMNS)


class TestCapsWithoutVectors(RerankerContract):
    def make(self):
        return MMRConfig(caps=(CapConfig(column="category", at_most=1, window=3),)).build(None, COLUMNS)


class TestNoRerank(RerankerContract):
    def make(self):
        return MMRConfig(type="none").build(VECTORS, COLUMNS)


def page(config, items, scores=None, *, k=10, vectors=None, columns=None):
    reranker = config.build(vectors, columns or {})
    out, reasons = reranker.rerank_with_reasons(candidates_of([items], [scores] if scores else None), k)
    return out.items[0].tolist(), [REASONS[r] for r in reasons[0]]


TWINS = np.array([[1, 0], [1, 0], [0, 1]], np.float32)


def test_a_twin_of_the_first_item_gives_way_to_something_else():
    # lambda .5: the twin is worth .45 - .5 * 1, the other one 0 - .5 * .5.
    items, _ = page(MMRConfig(lambda_=0.5), [0, 1, 2], [1.0, 0.9, 0.0], vectors=TWINS)
    assert items == [0, 1, 2], ".45 - .5 = -.05 is above 0 - .25"
    items, reasons = page(MMRConfig(lambda_=0.3), [0, 1, 2], [1.0, 0.9, 0.0], vectors=TWINS)
    assert items == [0, 2, 1], ".27 - .7 = -.43 is below 0 - .35"
    assert reasons == ["", "moved up for diversity", "moved down for diversity"]


def test_lambda_of_one_keeps_the_order():
    assert page(MMRConfig(lambda_=1), [0, 1, 2], vectors=TWINS)[0] == [0, 1, 2]


def test_the_first_place_goes_to_the_best_item_whatever_lambda_is():
    assert page(MMRConfig(lambda_=0), [2, 1, 0], vectors=TWINS)[0] == [2, 1, 0]


def test_relevance_is_scaled_so_that_the_unit_of_scores_does_not_matter():
    for unit in (1e-6, 1.0, 1e6):
        assert page(MMRConfig(lambda_=0.3), [0, 1, 2], [unit, 0.9 * unit, 0.0], vectors=TWINS)[0] == [0, 2, 1]


def test_an_item_without_a_vector_is_like_nothing():
    vectors = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    assert page(MMRConfig(lambda_=0.1), [0, 1, 2], [1.0, 0.9, 0.8], vectors=vectors)[0] == [0, 2, 1]


def test_without_vectors_and_caps_the_order_stays():
    assert page(MMRConfig(lambda_=0.1), [4, 2, 9])[0] == [4, 2, 9]


CATEGORY = {"category": np.array([1, 1, 1, 2, 2, 0, 0], np.int32)}


def cap(at_most, window):
    return MMRConfig(caps=(CapConfig(column="category", at_most=at_most, window=window),))


def test_a_cap_holds_in_every_window():
    assert page(cap(1, 2), [0, 1, 2, 3, 4], columns=CATEGORY)[0] == [0, 3, 1, 4, 2]
    assert page(cap(2, 3), [0, 1, 2, 3, 4], columns=CATEGORY)[0] == [0, 1, 3, 2, 4]


def test_a_cap_that_would_leave_places_empty_gives_way_and_says_so():
    items, reasons = page(cap(1, 10), [0, 1, 2, 3], columns=CATEGORY)
    assert items == [0, 3, 1, 2]
    assert reasons == ["", "moved up for diversity", REASONS[RELAXED], REASONS[RELAXED]]


def test_items_without_a_value_are_free_of_the_cap():
    assert page(cap(1, 10), [5, 6, 0, 3], columns=CATEGORY)[0] == [5, 6, 0, 3]


def test_of_a_bag_every_value_counts():
    bag = {"category": np.array([[1, 2], [2, 0], [3, 0], [1, 3]], np.int32)}
    assert page(cap(1, 10), [0, 1, 2, 3], columns=bag)[0] == [0, 2, 1, 3]


def test_only_the_pool_is_considered_unless_the_page_is_longer():
    assert page(MMRConfig(lambda_=0.0, pool=2), [0, 1, 2], k=2, vectors=TWINS)[0] == [0, 1]
    assert page(MMRConfig(lambda_=0.0, pool=2), [0, 1, 2], k=3, vectors=TWINS)[0] == [0, 2, 1]


def test_columns_of_a_million_values_are_counted_alike():
    wide = {"category": CATEGORY["category"] * 3_000_000}
    assert page(cap(1, 2), [0, 1, 2, 3, 4], columns=wide)[0] == [0, 3, 1, 4, 2]


def test_large_batches_in_parts_equal_one_part(monkeypatch):
    c = candidates_of([np.random.default_rng(b).permutation(10).tolist() for b in range(7)])
    reranker = MMRConfig(lambda_=0.5).build(VECTORS, {})
    whole = reranker.rerank(queries_of(*[[]] * 7), c, 6).items
    monkeypatch.setattr(diversity_module, "BLOCK", 200)
    np.testing.assert_array_equal(reranker.rerank(queries_of(*[[]] * 7), c, 6).items, whole)


def test_unknown_columns_are_named_together():
    caps = (CapConfig(column="colour"), CapConfig(column="size"))
    with pytest.raises(ConfigError, match=r"'colour', which items do not have\. Known: category\.\n.*'size'"):
        MMRConfig(caps=caps).build(None, CATEGORY)


def test_in_files_lambda_is_written_lambda():
    assert MMRConfig.model_validate({"lambda": 0.25}).lambda_ == 0.25


def brute_page(items, scores, *, lam, at_most, window, category, vectors, k):
    """MMR with one cap, by loops."""
    low, high = min(scores), max(scores)
    left, out = list(range(len(items))), []
    cosine = lambda a, b: vectors[a] @ vectors[b] / np.sqrt((vectors[a] @ vectors[a]) * (vectors[b] @ vectors[b]))  # noqa: E731
    while left and len(out) < k:
        recent = out[max(0, len(out) - window + 1) :]
        allowed = [n for n in left if sum(category[items[m]] == category[items[n]] for m in recent) < at_most] or left

        def value(n):
            relevance = (scores[n] - low) / (high - low) if high > low else 0.0
            return lam * relevance - (1 - lam) * max(((1 + cosine(items[m], items[n])) / 2 for m in out), default=0.0)

        best = max(allowed, key=lambda n: (value(n), -n))
        out.append(best)
        left.remove(best)
    return [items[n] for n in out]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10), st.floats(0, 1), st.integers(1, 3), st.integers(1, 6))
def test_pages_equal_brute_force(seed, n, lam, at_most, window):
    rng = np.random.default_rng(seed)
    items = rng.permutation(10)[:n].tolist()
    scores = sorted(rng.random(n).tolist())[::-1]
    vectors, category = rng.normal(size=(10, 4)), rng.integers(1, 4, 10).astype(np.int32)
    config = MMRConfig(lambda_=lam, caps=(CapConfig(column="category", at_most=at_most, window=window),))
    got = config.build(vectors, {"category": category}).rerank(queries_of([]), candidates_of([items], [scores]), 8).items[0]
    want = brute_page(items, scores, lam=lam, at_most=at_most, window=window, category=category, vectors=vectors, k=8)
    assert [i for i in got.tolist() if i != UNKNOWN] == want


# ---- who may stand instead of another ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_who_fits_raises_no_count_above_a_cap_in_any_window(data):
    k, at_most, window = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 10))
    genres = np.array(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=12, max_size=12)), np.int32)
    made = MMRConfig(caps=(CapConfig(column="genres", at_most=at_most, window=window),)).build(None, {"genres": genres})
    filled = data.draw(st.integers(1, k))
    page = np.array([*data.draw(st.permutations(range(8)))[:filled], *[UNKNOWN] * (k - filled)], np.int32)[:k]
    place, instead = data.draw(st.integers(0, filled - 1)), np.arange(8, 12, dtype=np.int32)

    def counts(items: list[int], value: int) -> list[int]:
        holds = [item != UNKNOWN and value in genres[item] for item in items]
        return [sum(holds[a : a + window]) for a in range(max(1, k - window + 1))]

    for item, fits in zip(instead.tolist(), made.fit(page, place, instead).tolist(), strict=True):
        after = [*page[:place].tolist(), item, *page[place + 1 :].tolist()]
        breaks = any(
            now > max(before, at_most)
            for value in (1, 2, 3)
            for before, now in zip(counts(page.tolist(), value), counts(after, value), strict=True)
        )
        assert fits == (not breaks)
