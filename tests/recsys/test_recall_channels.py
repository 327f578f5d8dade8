"""ItemCF, popular and realtime: the contract of every channel, and answers worked out by hand."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest

from recsys.data.interactions import CSR
from recsys.data.synthetic import named, zipf
from recsys.errors import ConfigError, NotFittedError
from recsys.recall import links as links_module
from recsys.recall import neighbors as neighbors_module
from recsys.recall.links import ItemLinks, recency
from recsys.recall.neighbors import ItemCF, ItemCFConfig, incidence, nearest
from recsys.recall.popular import PopularConfig
from recsys.recall.realtime import Realtime, RealtimeConfig
from recsys.recall.similarity import weigh
from tests.contracts import RecallerContract, log_of, queries_of, seen_of


class TestItemCF(RecallerContract):
    def make(self, interactions):
        return ItemCFConfig(neighbors=6).build().fit(interactions)


class TestItemCFByHistory(RecallerContract):
    def make(self, interactions):
        return ItemCFConfig(neighbors=6, keep="history", shrink=2, weighting="bm25").build().fit(interactions)


class TestItemCFOnALargeCatalogue(TestItemCF):
    """The road of large catalogues, which sorts links."""

    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch):
        monkeypatch.setattr(links_module, "PRODUCT_BELOW", 0)


class TestItemCFInManyParts(TestItemCF):
    """A batch with more links than are summed at once."""

    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch):
        monkeypatch.setattr(links_module, "MAX_LINKS", 20)
        monkeypatch.setattr(neighbors_module, "BLOCK", 7)


class TestPopular(RecallerContract):
    answers_without_history = True

    def make(self, interactions):
        return PopularConfig().build().fit(interactions)

    def test_a_checkerboard_user_gets_the_withheld_items_first(self):
        """Popular knows no parity: everybody gets one list."""
        items, _ = PopularConfig(half_life_h=None).build().fit(log_of([0, 1, 2], [2, 1], [2])).recall(queries_of([0], [2]), 3)
        assert items.tolist() == [[2, 1, 0], [2, 1, 0]]


class TestRealtime(RecallerContract):
    def make(self, interactions):
        return RealtimeConfig().build().fit(interactions)


class TestRealtimeSharingTheLinksOfItemCF(RecallerContract):
    def make(self, interactions):
        self.item_cf = ItemCFConfig(neighbors=6).build().fit(interactions)
        return RealtimeConfig().build().fit(interactions, {"item_cf": self.item_cf})

    def reload(self, folder, channel):
        assert list(folder.iterdir()) == [], "what is shared is not saved twice"
        self.item_cf.save(folder.parent / "item_cf")
        return RealtimeConfig().load(folder)


# ItemCF.

PLAIN = partial(ItemCFConfig, weighting="none", decay=1.0)
LOG = log_of([0, 1], [0, 1], [0, 2], [1, 2, 3], [3])  # item 0: users 0 1 2; 1: 0 1 3; 2: 2 3; 3: 3 4


def similarity_of(found, a, b):
    neighbors, similarity = found
    return dict(zip(neighbors[a].tolist(), similarity[a].tolist(), strict=True)).get(b)


def test_cosine_by_hand():
    found = nearest(LOG.matrix().T.tocsr(), 3)
    assert similarity_of(found, 0, 1) == pytest.approx(2 / 3)  # two common users of three each
    assert similarity_of(found, 0, 2) == pytest.approx(1 / np.sqrt(6))
    assert similarity_of(found, 0, 3) is None  # no common user
    assert found[0][0].tolist() == [1, 2, -1]


def test_shrinkage_ranks_the_well_supported_pair_first():
    log = log_of(*[[0, 1]] * 8, *[[0]] * 2, [2, 3], [2, 3], n_items=4)
    rows = log.matrix().T.tocsr()
    assert similarity_of(nearest(rows, 3), 2, 3) == pytest.approx(1.0)
    shrunk = nearest(rows, 3, shrink=10)
    assert similarity_of(shrunk, 2, 3) == pytest.approx(2 / (2 + 10))
    assert similarity_of(shrunk, 0, 1) == pytest.approx(8 / (np.sqrt(80) + 10))


def test_the_minimum_drops_weak_neighbours():
    neighbors, _ = nearest(LOG.matrix().T.tocsr(), 3, minimum=0.5)
    assert neighbors[0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_do_not_change_the_neighbours_of_a_brute_force(monkeypatch, threads):
    log = zipf(60, 40, 900, seed=3)
    X = log.matrix().toarray().astype(np.float64)
    norm = np.sqrt((X**2).sum(0))
    cosine = (X.T @ X) / np.maximum(np.outer(norm, norm), 1e-12)
    np.fill_diagonal(cosine, 0)
    monkeypatch.setattr(neighbors_module, "BLOCK", 100)
    neighbors, similarity = nearest(log.matrix().T.tocsr(), 7, threads=threads)
    order = np.argsort(-np.round(cosine, 5), axis=1, kind="stable")[:, :7]
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, 1), atol=1e-5)
    for i in range(40):
        known = neighbors[i] >= 0
        np.testing.assert_allclose(similarity[i][known], cosine[i, neighbors[i][known]], atol=1e-5)


def test_a_score_sums_over_the_history():
    channel = PLAIN(neighbors=3).build().fit(LOG)
    items, scores = channel.recall(queries_of([0, 3], exclude=[[0, 3]]), 5)
    one, two = 2 / 3 + 1 / np.sqrt(6), 1 / np.sqrt(6) + 1 / 2
    assert items.tolist() == [[1, 2]]
    assert scores[0] == pytest.approx([one, two])


def test_keeping_neighbours_of_the_candidate_or_of_the_history_differ_as_defined():
    log = log_of([0, 1], [0, 1], [0, 2])  # item 2's nearest is 0; but 0's nearest is 1
    query = queries_of([0], exclude=[[0]])
    by_history, _ = PLAIN(neighbors=1, keep="history").build().fit(log).recall(query, 5)
    by_candidate, _ = PLAIN(neighbors=1, keep="candidate").build().fit(log).recall(query, 5)
    assert by_history.tolist() == [[1]]
    assert by_candidate.tolist() == [[1, 2]]


def test_similar_items_are_the_nearest_in_either_mode():
    for keep in ("history", "candidate"):
        items, scores = PLAIN(neighbors=3, keep=keep).build().fit(LOG).similar(np.array([0, -1, 3]), 2)
        assert items.tolist() == [[1, 2], [-1, -1], [2, 1]]
        assert scores[0] == pytest.approx([2 / 3, 1 / np.sqrt(6)])


def test_a_repeated_event_counts_once_or_as_often_as_it_happened():
    log = log_of([0, 0, 0, 1])
    assert incidence(log, values="binary").toarray().tolist() == [[1, 1]]
    assert incidence(log, values="count").toarray().tolist() == [[3, 1]]


def test_only_the_newest_events_of_a_user_count_beyond_the_cap():
    assert incidence(log_of([0, 1, 2, 3], [0]), values="binary", most_per_user=2).toarray().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]


def test_what_happened_before_the_log_counts_first_and_as_the_oldest():
    log = log_of([2], [], n_items=3)
    seeded = type(log)(**{**log.__dict__, "past": CSR(np.array([0, 2, 3]), np.array([0, 1, 0], np.int32))})
    assert incidence(seeded, values="binary").toarray().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert incidence(seeded, values="binary", most_per_user=2).toarray().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert incidence(seeded, values="binary", use_past=False).toarray().tolist() == [[0, 0, 1], [0, 0, 0]]


def test_a_user_with_a_hundred_thousand_events_is_bounded():
    robot = np.arange(100_000) % 30_000
    log = log_of(robot.tolist(), [0, 1], [0, 1])
    channel = ItemCFConfig(neighbors=2, max_events_per_user=500).build().fit(log)
    assert channel.similar(np.array([0]), 1)[0].tolist() == [[1]]


def test_reach_bounds_how_many_items_one_item_speaks_for():
    log = log_of(*[[0, i] for i in range(1, 9)])  # item 0 is the nearest of all others
    assert len(PLAIN(neighbors=1).build().fit(log).links.items) == 9
    bounded = PLAIN(neighbors=1, reach=3).build().fit(log)
    assert bounded.recall(queries_of([0]), 10)[0].tolist() == [[1, 2, 3]]


def test_active_users_count_less_with_iuf():
    log = log_of([0, 1, 2, 3, 4, 5, 6, 7], [0, 8])
    plain = nearest(log.matrix().T.tocsr(), 8)
    weighed = nearest(weigh(log.matrix(), "iuf").T.tocsr(), 8)
    assert similarity_of(plain, 0, 1) == pytest.approx(similarity_of(plain, 0, 8))
    assert similarity_of(weighed, 0, 1) < similarity_of(weighed, 0, 8)


def test_bm25_takes_the_dot_product():
    rows = weigh(LOG.matrix(), "bm25").T.tocsr()
    dots = (rows @ rows.T).toarray()
    found = nearest(rows, 3, "dot")
    assert similarity_of(found, 0, 1) == pytest.approx(dots[0, 1], rel=1e-5)
    assert similarity_of(found, 2, 3) == pytest.approx(dots[2, 3], rel=1e-5)


@pytest.mark.parametrize("weighting", ["iuf", "tf_idf", "bm25"])
def test_weighings_keep_the_pattern_and_stay_finite(weighting):
    weighed = weigh(LOG.matrix(), weighting)
    np.testing.assert_array_equal(weighed.indices, LOG.matrix().indices)
    assert np.isfinite(weighed.data).all()
    assert (weighed.data > 0).all()


def test_an_unfitted_channel_says_so():
    query = queries_of([0])
    for config, name in ((ItemCFConfig(), "ItemCF"), (PopularConfig(), "Popular"), (RealtimeConfig(), "Realtime")):
        with pytest.raises(NotFittedError, match=rf"{name} has no .* yet\. Call fit"):
            config.build().recall(query, 1)
    with pytest.raises(NotFittedError, match="ItemCF has no neighbours yet"):
        ItemCF(ItemCFConfig()).similar(np.array([0]), 1)


# Links.


def test_sums_by_product_and_by_sort_agree(monkeypatch):
    log = zipf(80, 60, 1_500, seed=1)
    links = ItemCFConfig(neighbors=20).build().fit(log).links
    queries = queries_of(*seen_of(log), exclude=[s[:5] for s in seen_of(log)])
    weights = recency(queries, decay=0.9)
    by_product = links.recall(queries.history, weights, queries.exclude, 15)
    monkeypatch.setattr(links_module, "PRODUCT_BELOW", 0)
    by_sort = links.recall(queries.history, weights, queries.exclude, 15)
    np.testing.assert_allclose(by_sort[1], by_product[1], atol=1e-5)
    assert (by_sort[0] == by_product[0]).mean() > 0.99  # near-ties may stand the other way round


def test_links_equal_a_sparse_product():
    log = zipf(50, 30, 600, seed=2)
    links = ItemCFConfig(neighbors=10).build().fit(log).links
    seen = seen_of(log)
    items, scores = links.recall(queries_of(*seen).history, recency(queries_of(*seen)), np.empty((50, 0), np.int32), 30)
    counts = np.stack([np.bincount(s, minlength=30) for s in seen])
    expected = counts @ links.matrix
    for b in range(50):
        known = items[b] >= 0
        np.testing.assert_allclose(scores[b][known], expected[b][items[b][known]], rtol=1e-5)
        assert known.sum() == (expected[b] > 0).sum()


def test_reversed_links_are_the_same_pairs_from_the_other_end():
    links = ItemLinks.of(np.array([[1, 2], [2, -1], [-1, -1]], np.int32), np.array([[0.5, 0.2], [0.9, 0], [0, 0]], np.float32))
    back = links.reversed()
    assert back.indptr.tolist() == [0, 0, 1, 3]
    assert back.items.tolist() == [0, 1, 0]  # of item 2: 1 (0.9) before 0 (0.2)
    np.testing.assert_allclose(back.matrix.toarray(), links.matrix.T.toarray())


def test_recency_by_hand():
    queries = queries_of([0, 1, 2], [3], at=7200.0)
    queries.history_times[0] = [0.0, 3600.0, 7200.0]
    queries.history_times[1, -1] = np.nan
    np.testing.assert_allclose(recency(queries, decay=0.5)[0], [0.25, 0.5, 1])
    np.testing.assert_allclose(recency(queries, newest=2)[0], [0, 1, 1])
    np.testing.assert_allclose(recency(queries, half_life_h=1)[0], [0.25, 0.5, 1])
    np.testing.assert_allclose(recency(queries, window_h=1)[0], [0, 1, 1])
    assert recency(queries, half_life_h=1, window_h=1)[1, -1] == 1, "an event without a time neither fades nor leaves the window"


# Popular.


def test_an_event_loses_half_its_weight_in_a_half_life():
    log = log_of([0, 0], [1], times=[[0.0, 0.0], [48 * 3600.0]])
    assert PopularConfig(half_life_h=24).build().fit(log).counts.tolist() == [0.5, 1.0]
    assert PopularConfig(half_life_h=None).build().fit(log).counts.tolist() == [2.0, 1.0]


def test_popular_returns_k_items_if_the_catalogue_has_them():
    channel = PopularConfig().build().fit(log_of([3], n_items=5))
    items, _ = channel.recall(queries_of([], [], exclude=[[3], [0, 1, 2, 3]]), 4)
    assert items.tolist() == [[0, 1, 2, 4], [4, -1, -1, -1]]


def test_a_log_without_times_is_counted_plainly_and_says_so(caplog):
    log = log_of([0, 0, 1])
    untimed = type(log).of(log.user, log.item, users=named("u", 1), items=named("i", 2))
    with caplog.at_level(logging.INFO):
        assert PopularConfig(half_life_h=1).build().fit(untimed).counts.tolist() == [2.0, 1.0]
    assert "the log has no times" in caplog.text


# Realtime.


def test_only_the_newest_events_within_the_window_trigger():
    log = log_of([0, 1], [0, 1], [2, 3], [2, 3])
    channel = RealtimeConfig(newest=1, window_h=1, half_life_h=None).build().fit(log)
    query = queries_of([0, 2], exclude=[[0, 2]])
    assert channel.recall(query, 5)[0].tolist() == [[3]]
    query.history_times[:] = query.at[:, None] - 7200
    assert channel.recall(query, 5)[0].tolist() == [[]]
    assert RealtimeConfig(newest=2, window_h=3).build().fit(log).recall(query, 5)[0].tolist() == [[3, 1]]


def test_a_trigger_fades_with_its_age():
    log = log_of([0, 1], [2, 3])
    channel = RealtimeConfig(decay=1, half_life_h=1).build().fit(log)
    query = queries_of([2, 0], exclude=[[0, 2]])
    query.history_times[:] = query.at[:, None] - np.array([[3600.0, 0.0]])
    items, scores = channel.recall(query, 5)
    assert items.tolist() == [[1, 3]]
    assert scores[0] == pytest.approx([1.0, 0.5])


def test_realtime_refuses_a_channel_without_links():
    popular = PopularConfig().build()
    with pytest.raises(ConfigError, match=r"realtime\.neighbors names 'item_cf', which is no channel with item links\. Known: none\."):
        Realtime(RealtimeConfig()).share({"popular": popular})
