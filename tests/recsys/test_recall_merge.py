"""The merge of channels, by hand and against a version with loops and dicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.core import UNKNOWN
from recsys.recall.merge import MergeConfig, merge

CASES = settings(max_examples=120, deadline=None, derandomize=True)


def answer(*rows):
    """((B, k) items, (B, k) scores) from [(item, score), …] per query."""
    width = max(map(len, rows))
    items, scores = np.full((len(rows), width), UNKNOWN, np.int32), np.full((len(rows), width), -np.inf, np.float32)
    for b, row in enumerate(rows):
        for n, (item, score) in enumerate(row):
            items[b, n], scores[b, n] = item, score
    return items, scores


A = answer([(5, 9.0), (3, 8.0), (7, 1.0)], [])
B = answer([(3, 0.5), (9, 0.4)], [(1, 0.1)])


def test_reciprocal_ranks_add_up_over_channels():
    c = merge(("a", "b"), [A, B], MergeConfig(method="rrf", rrf_k=60), n_queries=2)
    assert c.items.tolist() == [[3, 5, 9, 7], [1, -1, -1, -1]]
    assert c.scores[0] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])
    assert c.sources(0, 0) == ["a", "b"]
    assert c.sources(0, 1) == ["a"]
    assert c.channel_ranks[0].tolist() == [[2, 1], [1, 0], [0, 2], [3, 0]]
    np.testing.assert_allclose(c.channel_scores[0], [[8, 0.5], [9, np.nan], [np.nan, 0.4], [1, np.nan]], rtol=1e-6)


def test_ranks_fall_from_one_at_the_top_to_zero_below_the_quota():
    c = merge(("a",), [A], MergeConfig(method="rank", quota=4), n_queries=2)
    assert c.scores[0].tolist() == [1.0, 0.75, 0.5]


def test_min_max_scales_each_channel_within_the_query():
    c = merge(("a", "b"), [A, B], MergeConfig(method="min_max"), n_queries=2)
    assert dict(zip(c.items[0].tolist(), c.scores[0].tolist(), strict=True)) == pytest.approx({5: 1.0, 3: 7 / 8 + 1.0, 9: 0.0, 7: 0.0})
    assert c.items[0].tolist() == [3, 5, 7, 9], "ties go to the smaller row"
    assert c.scores[1, 0] == 1.0, "a channel of one item gives it all"


def test_weights_decide_between_channels():
    c = merge(("a", "b"), [A, B], MergeConfig(method="rank", quota=3, weights={"b": 10.0}), n_queries=2)
    assert c.items[0, :2].tolist() == [3, 9]


def test_a_quota_bounds_what_a_channel_brings():
    c = merge(("a", "b"), [A, B], MergeConfig(quotas={"a": 1}), n_queries=2)
    assert sorted(c.items[0].tolist()) == [3, 5, 9]
    assert c.sources(0, 0) == ["b"]


def test_a_minimum_share_saves_a_channels_first_items():
    strong = answer([(i, 100.0 - i) for i in range(10)])
    weak = answer([(50, 1.0), (51, 0.5), (52, 0.2)])
    free = MergeConfig(method="min_max", weights={"weak": 0.01}, limit=4)
    assert merge(("strong", "weak"), [strong, weak], free, n_queries=1).items.tolist() == [[0, 1, 2, 3]]
    sure = free.model_copy(update={"minimum_share": {"weak": 0.5}})
    assert merge(("strong", "weak"), [strong, weak], sure, n_queries=1).items.tolist() == [[0, 1, 50, 51]]


def test_a_score_that_is_no_number_makes_an_empty_slot():
    c = merge(("a",), [answer([(1, np.nan), (2, 0.5), (3, np.inf)])], MergeConfig(method="min_max"), n_queries=1)
    assert c.items.tolist() == [[2]]


def test_no_channel_and_no_answer_give_no_candidates():
    empty = np.empty((2, 0), np.int32), np.empty((2, 0), np.float32)
    for names, results in (((), []), (("a",), [empty]), (("a",), [answer([], [])]), (("a",), [answer([(-1, -np.inf)], [(-1, -np.inf)])])):
        c = merge(names, results, MergeConfig(), n_queries=2)
        assert c.items.shape == (2, 0)
        assert c.channel_scores.shape == (2, 0, len(names))


def test_at_depth_lets_deep_pages_through():
    config = MergeConfig(limit=10, quota=5, quotas={"a": 2, "b": 100})
    assert config.at_depth(0) is config
    deep = config.at_depth(50)
    assert (deep.limit, deep.quota, deep.quotas) == (50, 50, {"a": 50, "b": 100})


def test_shares_above_the_whole_and_ranks_beyond_16_bits_are_refused():
    with pytest.raises(ValidationError, match=r"minimum_share of all channels is 1\.2 together"):
        MergeConfig(minimum_share={"a": 0.6, "b": 0.6})
    with pytest.raises(ValidationError, match="a quota is 40000; 32767 is the most"):
        MergeConfig(quotas={"a": 40_000})


def brute(names, rows, config):
    """One query: ({item: {channel: (rank, score)}} in order, merged scores)."""
    facts, merged, sure = {}, {}, set()
    for name, row in zip(names, rows, strict=True):
        row = row[: config.quota_of(name)]
        values = [s for _, s in row]
        for rank, (item, score) in enumerate(row, 1):
            gain = {
                "rrf": 1 / (config.rrf_k + rank),
                "rank": 1 - (rank - 1) / config.quota_of(name),
                "min_max": (score - min(values)) / (max(values) - min(values)) if max(values) > min(values) else 1.0,
            }[config.method]
            merged[item] = merged.get(item, 0.0) + gain * config.weights.get(name, 1.0)
            facts.setdefault(item, {})[name] = (rank, score)
            if rank <= math.floor(config.minimum_share.get(name, 0) * config.limit + 1e-9):
                sure.add(item)
    by_score = sorted(merged, key=lambda i: (-np.float32(merged[i]), i))
    free = config.limit - len(sure)
    kept = sure | set([i for i in by_score if i not in sure][: max(free, 0)])
    return [i for i in by_score if i in kept][: config.limit], facts, merged


@st.composite
def cases(draw):
    names = ("a", "b", "c")[: draw(st.integers(1, 3))]
    # Powers of two below one: sums are exact, so order is certain in either arithmetic.
    score = st.sampled_from([0.5, 0.25, 0.125, 1.0, 0.75])
    n_queries = draw(st.integers(1, 3))
    rows = [
        [
            [
                (i, s)
                for i, s in zip(
                    draw(st.permutations(range(9)))[: draw(st.integers(0, 6))],
                    sorted(draw(st.lists(score, min_size=6, max_size=6)))[::-1],
                    strict=False,
                )
            ]
            for _ in range(n_queries)
        ]
        for _ in names
    ]
    config = MergeConfig(
        method=draw(st.sampled_from(["rrf", "rank", "min_max"])),
        rrf_k=60,
        limit=draw(st.integers(1, 8)),
        quota=draw(st.sampled_from([2, 4, 8])),
        weights={n: draw(st.sampled_from([0.5, 1.0, 2.0])) for n in names},
        minimum_share={n: draw(st.sampled_from([0.0, 0.25, 0.3])) for n in names},
    )
    return names, rows, config


@CASES
@given(cases())
def test_merge_equals_brute_force(case):
    names, rows, config = case
    n_queries = len(rows[0])
    c = merge(names, [answer(*channel) for channel in rows], config, n_queries=n_queries)
    assert c.width <= config.limit
    for b in range(n_queries):
        order, facts, merged = brute(names, [channel[b] for channel in rows], config)
        got = [i for i in c.items[b].tolist() if i != UNKNOWN]
        assert c.items[b, : len(got)].tolist() == got
        assert (np.diff(c.scores[b, : len(got)]) <= 0).all()
        np.testing.assert_allclose(sorted(c.scores[b, : len(got)]), sorted(merged[i] for i in order), rtol=1e-5)
        for n, item in enumerate(got):
            assert c.scores[b, n] == pytest.approx(merged[item], rel=1e-5)
            for channel, name in enumerate(names):
                rank, score = facts[item].get(name, (0, np.nan))
                assert c.channel_ranks[b, n, channel] == rank
                np.testing.assert_equal(c.channel_scores[b, n, channel], np.float32(score))


@CASES
@given(cases())
def test_a_batch_equals_batches_of_one(case):
    names, rows, config = case
    results = [answer(*channel) for channel in rows]
    c = merge(names, results, config, n_queries=len(rows[0]))
    for b in range(len(rows[0])):
        one = merge(names, [(i[b : b + 1], s[b : b + 1]) for i, s in results], config, n_queries=1)
        np.testing.assert_array_equal(c.items[b, : one.width], one.items[0])
        np.testing.assert_array_equal(c.scores[b, : one.width], one.scores[0])
        assert (c.items[b, one.width :] == UNKNOWN).all()
