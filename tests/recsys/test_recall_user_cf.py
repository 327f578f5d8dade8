"""UserCF and Pearson similarity: the contract of every channel, and answers worked out by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.core import UNKNOWN
from recsys.data.synthetic import zipf
from recsys.errors import NotFittedError
from recsys.recall import user_cf as user_cf_module
from recsys.recall.neighbors import ItemCFConfig, incidence, nearest
from recsys.recall.similarity import weigh
from recsys.recall.user_cf import UserCFConfig
from tests.contracts import RecallerContract, log_of, queries_of, seen_of


class TestUserCF(RecallerContract):
    def make(self, interactions):
        return UserCFConfig(neighbors=6).build().fit(interactions)


class TestUserCFByCountsAndBM25(RecallerContract):
    def make(self, interactions):
        return UserCFConfig(neighbors=6, shrink=2, weighting="bm25", values="count", decay=0.9).build().fit(interactions)


class TestUserCFByPearson(RecallerContract):
    def make(self, interactions):
        return UserCFConfig(neighbors=6, similarity="pearson", weighting="none", reach=9).build().fit(interactions)


class TestUserCFInManyParts(TestUserCF):
    """A batch with more common items than are held at once."""

    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch):
        monkeypatch.setattr(user_cf_module, "BLOCK", 30)


class TestItemCFByPearson(RecallerContract):
    def make(self, interactions):
        return ItemCFConfig(neighbors=6, similarity="pearson", weighting="iuf").build().fit(interactions)


PLAIN = partial(UserCFConfig, weighting="none")
LOG = log_of([0, 1, 2], [0, 1], [3, 4], [0, 3])


def test_neighbours_and_scores_by_hand():
    channel = PLAIN().build().fit(LOG)
    users, similarity = channel.similar_users(queries_of([0, 1]), 4)
    assert users.tolist() == [[1, 0, 3, -1]]
    assert similarity[0][:3] == pytest.approx([1, 2 / np.sqrt(6), 1 / 2])
    assert np.isneginf(similarity[0][3])
    items, scores = channel.recall(queries_of([0, 1], exclude=[[0, 1]]), 5)
    assert items[0].tolist() == [2, 3, -1, -1, -1]
    assert scores[0][:2] == pytest.approx([2 / np.sqrt(6), 1 / 2])


def test_a_known_user_is_no_neighbour_of_himself_and_a_twin_is():
    channel = PLAIN().build().fit(log_of([0, 1], [0, 1], [0, 2]))
    assert channel.similar_users(queries_of([0, 1], users=[0]), 3)[0].tolist() == [[1, 2, -1]]
    assert channel.similar_users(queries_of([0, 1], users=[UNKNOWN]), 3)[0].tolist() == [[0, 1, 2]]


def test_a_history_that_changed_live_changes_the_neighbours_at_once():
    channel = PLAIN(neighbors=1).build().fit(LOG)
    before, _ = channel.recall(queries_of([0, 1], users=[1], exclude=[[0, 1]]), 1)
    after, _ = channel.recall(queries_of([0, 1, 3, 4], users=[1], exclude=[[0, 1, 3]]), 1)
    assert (before.tolist(), after.tolist()) == ([[2]], [[4]])
    assert channel.recall(queries_of([3], exclude=[[3]]), 1)[0].tolist() == [[4]], "a user the log never saw"


@pytest.mark.parametrize(
    "setting",
    [
        {"weighting": "none"},
        {"weighting": "iuf", "shrink": 3},
        {"weighting": "tf_idf", "values": "count"},
        {"weighting": "bm25", "values": "count"},
        {"weighting": "none", "similarity": "pearson"},
        {"weighting": "iuf", "similarity": "pearson", "shrink": 0.5, "values": "count"},
    ],
)
def test_a_history_equal_to_the_row_of_the_log_has_the_neighbours_between_rows(setting, tmp_path):
    log = zipf(60, 40, 900, seed=3)
    config = UserCFConfig(**setting)
    channel = config.build().fit(log)
    rows = weigh(incidence(log, values=config.values).T.tocsr(), config.weighting).T.tocsr()
    kind = "dot" if config.weighting == "bm25" else config.similarity
    want_users, want = nearest(rows, 7, kind, shrink=config.shrink)
    queries = queries_of(*seen_of(log), users=list(range(60)))
    channel.save(tmp_path / "user_cf")
    for one in (channel, config.load(tmp_path / "user_cf")):
        users, similarity = one.similar_users(queries, 7)
        np.testing.assert_allclose(np.where(users >= 0, similarity, 0), want, atol=1e-5)
        assert (users == want_users).mean() > 0.97  # near-ties may stand the other way round


def test_pearson_is_the_correlation_over_all_columns():
    log = zipf(50, 30, 700, seed=5)
    rows = log.matrix().T.tocsr()
    truth = np.corrcoef(rows.toarray())
    np.fill_diagonal(truth, 0)
    neighbors, similarity = nearest(rows, 29, "pearson")
    for i in range(30):
        known = neighbors[i] >= 0
        np.testing.assert_allclose(similarity[i][known], truth[i, neighbors[i][known]], atol=1e-5)
        assert known.sum() == (truth[i] > 1e-6).sum(), "every item with a positive correlation is found, and no other"


def test_pearson_asks_for_more_common_users_than_chance_gives():
    log = log_of([0, 1], [0, 1], [0], [1], [2, 3], [])  # 0 and 1 share two of their three users each, 2 and 3 their only one
    rows = log.matrix().T.tocsr()
    assert nearest(rows, 1)[1][:, 0] == pytest.approx([2 / 3, 2 / 3, 1, 1])
    # Six users: (2 - 6 * 1/2 * 1/2) / (3 - 6 / 4) = 1/3.
    assert nearest(rows, 1, "pearson")[1][:, 0] == pytest.approx([1 / 3, 1 / 3, 1, 1])


def test_what_everybody_has_correlates_with_nothing():
    log = log_of([0, 1], [0, 1], [0])
    neighbors, _ = nearest(log.matrix().T.tocsr(), 1, "pearson")
    assert neighbors.tolist() == [[-1], [-1]]


@pytest.mark.parametrize("config", [UserCFConfig, ItemCFConfig])
def test_pearson_of_bm25_is_refused(config):
    with pytest.raises(ValidationError, match=r"similarity: pearson does not go with weighting: bm25, which takes the dot product"):
        config(similarity="pearson", weighting="bm25")


def test_popular_items_say_less_with_iuf():
    log = log_of([0, 1], [0, 2], [0, 4], [0, 5], [0, 6], [1, 3])
    query = queries_of([0, 1], exclude=[[0, 1]])
    plain, weighed = (UserCFConfig(weighting=w).build().fit(log).recall(query, 2)[1][0] for w in ("none", "iuf"))
    assert plain[0] == pytest.approx(plain[1])  # item 2 by user 1 through item 0, item 3 by user 5 through item 1
    assert weighed[0] > weighed[1]
    assert UserCFConfig().build().fit(log).recall(query, 2)[0].tolist() == [[3, 2]]


def test_reach_keeps_the_users_who_were_active_last():
    log = log_of([0, 1], [0, 2], [0, 3], times=[[0, 50], [0, 90], [0, 10]])
    channel = PLAIN(reach=2).build().fit(log)
    assert sorted(channel.similar_users(queries_of([0]), 3)[0][0].tolist()) == [-1, 0, 1]
    assert PLAIN(reach=None).build().fit(log).similar_users(queries_of([0]), 3)[0].tolist() == [[0, 1, 2]]


def test_older_events_count_less_with_decay():
    log = log_of([0, 2], [1, 3])
    assert PLAIN(decay=0.5).build().fit(log).recall(queries_of([0, 1], exclude=[[0, 1]]), 2)[0].tolist() == [[3, 2]]
    assert PLAIN(newest=1).build().fit(log).recall(queries_of([1, 0], exclude=[[0, 1]]), 2)[0].tolist() == [[2, -1]]


def test_weak_neighbours_are_not_asked():
    assert PLAIN(minimum=0.6).build().fit(LOG).similar_users(queries_of([0, 1]), 3)[0].tolist() == [[1, 0, -1]]


def test_a_user_with_a_hundred_thousand_events_is_bounded():
    robot = np.arange(100_000) % 30_000
    channel = PLAIN(max_events_per_user=500).build().fit(log_of(robot.tolist(), [0, 1], [0, 2]))
    assert channel.taken[0].nnz == 500
    assert channel.recall(queries_of(robot[:1_000].tolist(), exclude=[[0]]), 2)[0].tolist() == [[1, 2]]


def test_no_user_and_no_depth_are_no_error():
    channel = PLAIN().build().fit(log_of([], n_items=3))
    assert channel.recall(queries_of([0]), 2)[0].tolist() == [[-1, -1]]
    assert channel.recall(queries_of([0]), 0)[0].shape == (1, 0)
    assert channel.similar_users(queries_of([0], []), 5)[0].tolist() == [[-1], [-1]]


def test_an_unfitted_channel_says_so():
    with pytest.raises(NotFittedError, match=r"UserCF has no users yet\. Call fit"):
        UserCFConfig().build().recall(queries_of([0]), 1)
