"""iALS and BPR: the contract of every channel, solutions against the textbook's formulas, and users folded in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from recsys.core import UNKNOWN
from recsys.data.synthetic import checkerboard, zipf
from recsys.errors import NotFittedError
from recsys.recall import ials as ials_module
from recsys.recall.bpr import BPRConfig
from recsys.recall.factors import ItemFactors, newest_of_each
from recsys.recall.ials import IALSConfig, Side, factorize, solve
from recsys.recall.neighbors import incidence
from tests.contracts import RecallerContract, log_of, queries_of, seen_of

NONE = np.empty((1, 0), np.int32)


class TestIALS(RecallerContract):
    def make(self, interactions):
        return IALSConfig(dim=4, l2=0.1, threads=2).build().fit(interactions)


class TestIALSByCountsOverAGraph(RecallerContract):
    """Repeated events, recency, and an approximate index."""

    def make(self, interactions):
        return IALSConfig(dim=6, nu=0, l2=0.5, values="count", decay=0.9, index="hnsw", recall_goal=1).build().fit(interactions)


class TestBPR(RecallerContract):
    def make(self, interactions):
        return BPRConfig(dim=8, batch_size=8, decay=0.9).build().fit(interactions)


# iALS.


def textbook(events, others, alpha0, l2):
    """(n, d) solutions, row by row as in Hu et al.: (alpha0 H'H + H_u' C H_u + l2 I) w = H_u' C 1."""
    others = others.astype(np.float64)
    out = np.zeros((events.shape[0], others.shape[1]))
    for row in range(len(out)):
        here = slice(events.indptr[row], events.indptr[row + 1])
        mine, weight = others[events.indices[here]], events.data[here].astype(np.float64)
        left = alpha0 * others.T @ others + (mine.T * weight) @ mine + l2[row] * np.eye(others.shape[1])
        out[row] = np.linalg.solve(left, mine.T @ weight)
    return out


@pytest.mark.parametrize("values", ["binary", "count"])
@pytest.mark.parametrize("dim", [3, 8, 40])
def test_a_half_sweep_is_the_exact_solution_of_every_row(monkeypatch, values, dim):
    log = zipf(80, 50, 900, seed=2)  # rows of 1 to 40 events: shorter and longer than the dimensions
    config = IALSConfig(dim=dim, alpha0=0.2, l2=0.05, values=values)
    events = incidence(log, values=values)
    others = np.random.default_rng(0).normal(size=(50, dim)).astype(np.float32)
    side = Side.of(events, config)
    np.testing.assert_allclose(side.l2, 0.05 * (np.diff(events.indptr) + 0.2 * 50), rtol=1e-6)
    want = textbook(events, others, 0.2, side.l2)
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_allclose(solve(side, others, 0.2, pool), want, atol=2e-4)
        monkeypatch.setattr(ials_module, "LONGEST", 7)
        monkeypatch.setattr(ials_module, "CHUNK", 7 * dim * 3)
        np.testing.assert_allclose(solve(side, others, 0.2, pool), want, atol=2e-4)


def test_every_sweep_lowers_the_loss():
    log = zipf(60, 40, 700, seed=1, clusters=4)
    events = incidence(log, values="binary")
    X = events.toarray()

    def loss(sweeps):
        config = IALSConfig(dim=8, alpha0=0.2, l2=0.02, sweeps=sweeps)
        users, items = Side.of(events, config), Side.of(events.T.tocsr(), config)
        W, H = factorize(users, items, config)
        fit = (X * (1 - W @ H.T) ** 2).sum() + 0.2 * ((W @ H.T) ** 2).sum()
        return fit + (users.l2[:, None] * W**2).sum() + (items.l2[:, None] * H**2).sum()

    losses = [loss(n) for n in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_a_row_of_the_log_and_the_same_history_folded_in_are_one_solution():
    log = zipf(50, 40, 800, seed=3)
    config = IALSConfig(dim=8)
    events = incidence(log, values="binary")
    W, H = factorize(Side.of(events, config), Side.of(events.T.tocsr(), config), config)
    with ThreadPoolExecutor(1) as pool:
        W = solve(Side.of(events, config), H, config.alpha0, pool)
    channel = config.build().fit(log)
    active = np.diff(events.indptr) > 0
    np.testing.assert_allclose(channel.user_vectors(queries_of(*seen_of(log)))[active], W[active], atol=1e-4)


def test_a_click_changes_the_answer_at_once_and_a_stranger_is_answered_like_a_user_with_his_history():
    log = checkerboard(16, 12, 4)
    channel = IALSConfig(dim=4).build().fit(log)
    even, odd = channel.recall(queries_of([0, 2], [0, 1, 3, 5], users=[0, 0]), 3)[0].tolist()
    assert [i % 2 for i in even] == [0, 0, 0]
    assert sum(i % 2 for i in odd) == 3
    np.testing.assert_array_equal(*channel.recall(queries_of([0, 2], [0, 2], users=[0, UNKNOWN]), 5)[0])


def test_recency_weighs_the_events_of_a_history():
    channel = IALSConfig(dim=4, decay=0.3).build().fit(checkerboard(16, 12, 4))
    assert channel.recall(queries_of([0, 1], exclude=[[0, 1]]), 1)[0][0, 0] % 2 == 1
    assert channel.recall(queries_of([1, 0], exclude=[[0, 1]]), 1)[0][0, 0] % 2 == 0


def test_any_number_of_threads_gives_the_same_factors_and_torch_keeps_its_own():
    log = zipf(200, 60, 3_000, seed=4)
    torch_threads = torch.get_num_threads()
    one, two = (IALSConfig(dim=8, threads=n, sweeps=2).build().fit(log).items.rows(np.arange(60)) for n in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert torch.get_num_threads() == torch_threads
    other = IALSConfig(dim=8, sweeps=2, seed=2).build().fit(log).items.rows(np.arange(60))
    assert np.abs(one - other).max() > 1e-3


# BPR.


def test_equal_seeds_give_equal_models_and_training_ranks_what_was_taken_first():
    log = zipf(60, 40, 700, seed=1, clusters=4)
    a, b = (BPRConfig(dim=8, batch_size=64).build().fit(log) for _ in range(2))
    every = np.arange(40)
    np.testing.assert_array_equal(a.items.rows(every), b.items.rows(every))
    X = log.matrix().toarray() > 0

    def auc(channel):
        factors = channel.items.rows(every)
        scores = channel.user_vectors(queries_of(*[[]] * 60, users=list(range(60)))) @ factors[:, :-1].T + factors[:, -1]
        return np.mean([(s[x][:, None] > s[~x]).mean() for s, x in zip(scores, X, strict=True) if x.any()])

    assert auc(a) > 0.9
    assert auc(BPRConfig(dim=8, epochs=1, batch_size=64).build().fit(log)) < auc(a)


def test_a_known_user_keeps_his_factors_until_something_new_happens():
    log = checkerboard(16, 12, 4)
    channel = BPRConfig(dim=8, batch_size=8).build().fit(log)
    seen = seen_of(log)[0]
    new = next(i for i in range(12) if i not in seen)
    learnt, same, moved, folded = channel.user_vectors(queries_of([], seen, [*seen, new], [new], users=[0, 0, 0, UNKNOWN]))
    np.testing.assert_array_equal(learnt, same)
    np.testing.assert_allclose(moved, (4 * learnt + folded) / 5, rtol=1e-5)


def test_a_stranger_is_answered_by_the_map_from_histories_to_factors():
    log = checkerboard(40, 20, 6)
    channel = BPRConfig(dim=8, batch_size=16).build().fit(log)
    items, _ = channel.recall(queries_of([0, 2], [1, 3], exclude=[[0, 2], [1, 3]]), 4)
    assert (items % 2 == [[0], [1]]).all()


def test_a_user_without_a_positive_and_without_a_history_gets_nothing():
    channel = BPRConfig(dim=4).build().fit(log_of([0, 1], [0, 1], []))
    assert channel.recall(queries_of([], [], users=[2, 0]), 2)[0].tolist()[0] == [-1, -1]
    assert (channel.recall(queries_of([], users=[0]), 2)[0] >= 0).all(), "a user of the log needs no history"


# Both.


@pytest.mark.parametrize("config", [IALSConfig(dim=4, max_events_per_user=500), BPRConfig(dim=4, epochs=1, max_events_per_user=500)])
def test_a_user_with_a_hundred_thousand_events_is_bounded(config):
    robot = np.arange(100_000) % 3_000
    channel = config.build().fit(log_of(robot.tolist(), [0, 1], [0, 1]))
    items, _ = channel.recall(queries_of(robot.tolist(), users=[0]), 5)
    assert (items >= 0).all()


@pytest.mark.parametrize("config", [IALSConfig(dim=4), BPRConfig(dim=4)])
def test_a_log_without_a_positive_and_a_catalogue_without_an_item_are_no_error(config):
    items, _ = config.build().fit(log_of([], n_items=3)).recall(queries_of([0], [], users=[0, UNKNOWN]), 2)
    assert (items[1] == UNKNOWN).all()
    assert config.build().fit(log_of([])).recall(queries_of([]), 2)[0].shape == (1, 0)


@pytest.mark.parametrize("config", [IALSConfig(), BPRConfig()])
def test_an_unfitted_channel_says_so(config):
    with pytest.raises(NotFittedError, match=r"(IALS|BPR) has no factors yet\. Call fit"):
        config.build().recall(queries_of([0]), 1)


def test_one_more_coordinate_makes_one_length_and_changes_no_product():
    rng = np.random.default_rng(0)
    factors, users = rng.normal(size=(300, 5)).astype(np.float32) * rng.random((300, 1), np.float32), rng.normal(size=(4, 5))
    for kind in ("flat", "hnsw"):
        made = ItemFactors.of(factors, kind, 1.0)
        np.testing.assert_allclose(np.linalg.norm(made.index.vectors(), axis=1), np.linalg.norm(factors, axis=1).max(), rtol=1e-5)
        items, scores = made.recall(users.astype(np.float32), queries_of([], [], [], []), 7)
        want = users @ factors.T
        np.testing.assert_array_equal(items, np.argsort(-want, axis=1)[:, :7])
        np.testing.assert_allclose(scores, -np.sort(-want, axis=1)[:, :7], rtol=1e-4)


def test_of_an_item_that_was_had_twice_the_newer_event_counts():
    items, weights = newest_of_each(np.array([-1, 3, 1, 3, 9]), np.array([0.1, 0.2, 0.3, 0.4, 0.5]), 9)
    assert (items.tolist(), weights.tolist()) == ([1, 3], [0.3, 0.4])
