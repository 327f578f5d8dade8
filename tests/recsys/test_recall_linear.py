"""EASE and Markov: the contract of every channel, and answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.data.interactions import CSR
from recsys.data.synthetic import zipf
from recsys.errors import ConfigError, NotFittedError
from recsys.recall.ease import EASEConfig
from recsys.recall.links import ItemLinks
from recsys.recall.markov import MarkovConfig, sequences
from recsys.recall.realtime import RealtimeConfig
from tests.contracts import RecallerContract, log_of, queries_of, seen_of


class TestEASE(RecallerContract):
    def make(self, interactions):
        return EASEConfig(l2=10).build().fit(interactions)


class TestMarkov(RecallerContract):
    def make(self, interactions):
        return MarkovConfig().build().fit(interactions)


def test_ease_equals_its_closed_form():
    log = zipf(60, 25, 600, seed=4)
    X = log.matrix().toarray().astype(np.float64)
    P = np.linalg.inv(X.T @ X + 20 * np.eye(25))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0)
    channel = EASEConfig(l2=20, links=None, decay=1).build().fit(log)
    np.testing.assert_allclose(channel.links.matrix.toarray(), B, atol=1e-5)
    seen = seen_of(log)
    items, scores = channel.recall(queries_of(*seen), 25)
    counts = np.stack([np.bincount(s, minlength=25) for s in seen])
    for b, want in enumerate(counts @ B):
        known = items[b] >= 0
        np.testing.assert_allclose(scores[b][known], want[items[b][known]], atol=1e-4)
        assert known.sum() == pytest.approx((want > 1e-6).sum(), abs=1), "items that more speaks against than for are not recalled"


def test_ease_keeps_the_weights_furthest_from_zero():
    links = ItemLinks.dense(np.array([[0, 0.5, -0.9], [0.1, 0, 0.2], [0, 0, 0]], np.float32), keep=1)
    np.testing.assert_allclose(links.matrix.toarray(), [[0, 0, -0.9], [0, 0, 0.2], [0, 0, 0]])


def test_ease_refuses_a_catalogue_whose_inverse_does_not_fit():
    with pytest.raises(
        ConfigError, match=r"EASE on 20,000 items needs 8\.9 GiB for its inverse, max_gib allows 4\. Raise it, or use item_cf"
    ):
        EASEConfig().build().fit(log_of([0], n_items=20_000))


def test_transitions_have_a_direction():
    channel = MarkovConfig(window=1).build().fit(log_of([0, 1], [0, 1], [1, 2]))
    assert channel.recall(queries_of([0]), 5)[0].tolist() == [[1]]
    assert channel.recall(queries_of([1]), 5)[0].tolist() == [[2]]
    assert channel.recall(queries_of([2]), 5)[0].tolist() == [[]]


def test_transition_weights_by_hand():
    channel = MarkovConfig(window=2, gap_decay=0.5, popularity=1).build().fit(log_of([0, 1, 2], [0, 2]))
    # 0 -> 1: one step, 1 / (sqrt(2) * 1); 0 -> 2: one step and one over two, 1.5 / (sqrt(2) * 2).
    items, scores = channel.recall(queries_of([0]), 5)
    assert items.tolist() == [[1, 2]]
    assert scores[0] == pytest.approx([1 / np.sqrt(2), 0.75 / np.sqrt(2)])


def test_the_newest_event_leads():
    channel = MarkovConfig(window=1, decay=0.5).build().fit(log_of([0, 1], [2, 3]))
    assert channel.recall(queries_of([0, 2]), 5)[0].tolist() == [[3, 1]]
    assert channel.recall(queries_of([2, 0]), 5)[0].tolist() == [[1, 3]]
    assert MarkovConfig(window=1, newest=1).build().fit(log_of([0, 1], [2, 3])).recall(queries_of([0, 2]), 5)[0].tolist() == [[3]]


def test_transitions_do_not_cross_users_and_only_the_strongest_stay():
    channel = MarkovConfig(window=5, neighbors=1, popularity=0).build().fit(log_of([0, 1, 1, 2], [3, 4]))
    assert channel.links.items.tolist() == [1, 2, 4]
    assert channel.links.indptr.tolist() == [0, 1, 2, 2, 3, 3]


def test_the_past_stands_before_the_log_in_a_sequence():
    log = log_of([2], [], n_items=3)
    seeded = type(log)(**{**log.__dict__, "past": CSR(np.array([0, 2, 3]), np.array([0, 1, 0], np.int32))})
    user, item = sequences(seeded, use_past=True)
    assert list(zip(user.tolist(), item.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert sequences(seeded, use_past=False)[1].tolist() == [2]


def test_realtime_can_trigger_the_links_of_another_channel(tmp_path):
    log = log_of([0, 1], [0, 1])
    markov = MarkovConfig().build().fit(log)
    channel = RealtimeConfig(neighbors="markov").build().fit(log, {"markov": markov})
    assert channel.recall(queries_of([0]), 5)[0].tolist() == [[1]]
    markov.save(tmp_path / "markov")
    channel.save(tmp_path / "realtime")
    assert RealtimeConfig(neighbors="markov").load(tmp_path / "realtime").recall(queries_of([0]), 5)[0].tolist() == [[1]]


def test_unfitted_channels_say_so():
    for config, text in ((EASEConfig(), "EASE has no weights yet"), (MarkovConfig(), "Markov has no transitions yet")):
        with pytest.raises(NotFittedError, match=text):
            config.build().recall(queries_of([0]), 1)
