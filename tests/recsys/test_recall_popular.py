"""Popular by segment and trending: the contract of every channel, and answers worked out by hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from recsys.data.columns import ColumnConfig
from recsys.data.interactions import Interactions
from recsys.data.synthetic import named
from recsys.errors import ConfigError, NotFittedError
from recsys.features.catalogue import Catalogue
from recsys.recall.popular_segment import SegmentPopularConfig
from recsys.recall.trending import TrendingConfig
from tests.contracts import RecallerContract, log_of, queries_of

NOTHING = Catalogue(0)


def table(**columns) -> Catalogue:
    n = len(next(iter(columns.values())))
    return Catalogue.of(dict.fromkeys(columns, ColumnConfig(kind="category")), {k: pd.Series(v) for k, v in columns.items()}, n)


class TestSegmentPopular(RecallerContract):
    answers_without_history = True

    def make(self, interactions):
        users = table(side=[("even", "odd")[u % 2] for u in range(interactions.n_users)])
        return SegmentPopularConfig(by="side", minimum_events=1, smoothing=0.01).build().fit(interactions, NOTHING, users)


class TestSegmentPopularByTheLastItem(RecallerContract):
    answers_without_history = True

    def make(self, interactions):
        items = table(parity=[("even", "odd")[i % 2] for i in range(interactions.n_items)])
        return SegmentPopularConfig(by="parity", minimum_events=1, smoothing=0.01).build().fit(interactions, items, NOTHING)


class TestTrending(RecallerContract):
    answers_without_history = True

    def make(self, interactions):
        return TrendingConfig().build().fit(interactions)

    def test_a_checkerboard_user_gets_the_withheld_items_first(self):
        """Trending knows no parity: everybody gets one list."""
        items, _ = TrendingConfig().build().fit(log_of([0, 1, 2], [2, 1], [2])).recall(queries_of([0], [2]), 3)
        assert items.tolist() == [[2, 1, 0], [2, 1, 0]]


class TestTrendingWithABaseline(TestTrending):
    def make(self, interactions):
        return TrendingConfig(window_h=0.3, smoothing=0.5).build().fit(interactions)

    def test_an_unknown_user_without_events_gets_nothing_unless_the_channel_needs_none(self, channel):
        items, scores = channel.recall(queries_of([]), 12)
        rising = int((items >= 0).sum())
        assert 0 < rising < 12
        assert (scores[items >= 0] > 1).all()


# By segment.

COUNTRIES = table(country=["nl", "nl", "fr", None])
LOG = log_of([0, 1], [0], [2, 1], [2], n_items=3)


def segmented(**more):
    config = {"by": "country", "half_life_h": None, "smoothing": 2.0, "minimum_events": 0.0} | more
    return SegmentPopularConfig(**config).build()


def test_a_segment_borrows_from_everybody_by_the_formula():
    channel = segmented().fit(LOG, NOTHING, COUNTRIES)
    items, scores = channel.recall(queries_of([], [], [], users=[0, 2, 3]), 3)
    share = np.array([2, 2, 2]) / 6  # everybody's counts
    nl, fr = (np.array([2, 1, 0]) + 2 * share) / (3 + 2), (np.array([0, 1, 1]) + 2 * share) / (2 + 2)
    assert items.tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 2]]
    np.testing.assert_allclose(scores, [nl, fr[[1, 2, 0]], share], atol=1e-6)


def test_a_segment_with_few_events_an_unknown_one_and_no_segment_get_what_is_popular_with_all(caplog):
    with caplog.at_level(logging.INFO):
        channel = segmented(minimum_events=3).fit(LOG, NOTHING, COUNTRIES)
    assert "popular_segment by user column 'country': 1 of 2 segments have enough events" in caplog.text
    queries = replace(queries_of([], [], [], [], users=[2, 3, -1, -1]), profiles=[{}, {}, {"country": "xx"}, {"country": "nl"}])
    assert channel.segments(queries).tolist() == [-1, -1, -1, 0]
    items, _ = channel.recall(queries, 1)
    assert items.ravel().tolist() == [0, 0, 0, 0]


def test_a_profile_overrides_the_user_table():
    channel = segmented().fit(LOG, NOTHING, COUNTRIES)
    queries = replace(queries_of([], [], users=[0, 0]), profiles=[{"country": "fr"}, {"country": ["nl", "fr"]}])
    assert channel.recall(queries, 1)[0].tolist() == [[1], [0]]


def test_a_context_column_is_read_from_the_request(tmp_path):
    log = Interactions.of(
        [0, 1, 2, 3],
        [0, 0, 1, 1],
        None,
        users=named("u", 4),
        items=named("i", 2),
        context={"device": np.array(["tv", "tv", "web", None], object)},
    )
    channel = segmented(by="device").fit(log, NOTHING, NOTHING)
    queries = replace(queries_of([], [], []), contexts=[{"device": "web"}, {"device": "tv"}, {}])
    assert channel.recall(queries, 1)[0].tolist() == [[1], [0], [0]]
    channel.save(tmp_path)
    assert channel.config.load(tmp_path).recall(queries, 1)[0].tolist() == [[1], [0], [0]]


def test_an_item_column_tells_what_follows_its_category():
    items = table(kind=["a", "b", "a", "c"])
    channel = segmented(by="kind", smoothing=0.1).fit(log_of([0, 1], [2, 1], [1, 3], [1, 3], n_items=4), items, NOTHING)
    found, _ = channel.recall(queries_of([3, 0], [0, 1], [3]), 1)
    assert found.tolist() == [[1], [3], [1]]  # after a: b, twice; after b: item 3, twice; after c nothing: everybody's


def test_a_column_that_nobody_has_is_refused():
    with pytest.raises(ConfigError, match=r"by names 'county', no column of users, context or items. Known: country"):
        segmented(by="county").fit(LOG, NOTHING, COUNTRIES)
    with pytest.raises(NotFittedError, match="Call fit"):
        segmented().recall(queries_of([]), 1)


# Trending.

HOUR = 3600.0


def risen(recent: list[int], before: list[int], **more) -> tuple[list[int], list[float]]:
    """What trends where item i had recent[i] events in the last hour and before[i] in the day before it."""
    items = [i for i, n in enumerate(before) for _ in range(n)] + [i for i, n in enumerate(recent) for _ in range(n)]
    times = [0.0] * sum(before) + [10 * HOUR] * sum(recent)
    log = Interactions.of([0] * len(items), items, times, users=named("u", 1), items=named("i", len(recent)))
    found, scores = TrendingConfig(window_h=1, smoothing=2, **more).build().fit(log).recall(queries_of([]), 10)
    return found[0].tolist(), scores[0].tolist()


def test_what_rises_comes_by_the_formula_and_what_does_not_stays_out():
    items, scores = risen([6, 4, 0], [10, 80, 10])
    expected = [10 * (n + 2) / (100 + 2 * 3) for n in (10, 80, 10)]
    assert items == [0]  # item 1 was taken often, but 8 were to be expected
    assert scores == pytest.approx([(6 + 2) / (expected[0] + 2)])


def test_smoothing_puts_many_against_some_before_few_against_one():
    assert risen([3, 30], [1, 12])[0][0] == 1


def test_a_baseline_forgets_what_was_long_ago():
    assert risen([4, 5], [40, 10])[0] == [1]
    assert set(risen([4, 5], [40, 10], baseline_h=2)[0]) == {0, 1}  # nothing left to compare with: what is recent


def test_a_log_without_times_is_told_and_works(caplog):
    items = [0] * 9 + [1] * 9 + [2, 2]
    log = Interactions.of([0] * 20, items, None, users=named("u", 1), items=named("i", 3))
    with caplog.at_level(logging.INFO):
        channel = TrendingConfig(smoothing=1).build().fit(log)
    assert "trending: the log has no times, so its newest 0.1 counts as now" in caplog.text
    assert channel.recall(queries_of([]), 3)[0].tolist() == [[2]]


def test_an_empty_log_trends_nothing():
    assert TrendingConfig().build().fit(log_of([], n_items=3)).recall(queries_of([]), 3)[0].shape == (1, 0)
