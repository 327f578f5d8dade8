"""Learnt merge weights: a channel that knows ends on top, noise ends low, and nothing clear means nothing changes."""

import json

import numpy as np
import pytest

from recsys.metrics import Relevant, at_k, mean_of_users
from recsys.recall.blend import Blend, LearnConfig, Slate, learn
from recsys.recall.merge import MergeConfig

GIVEN = MergeConfig(limit=60, quota=20)


def lists(rng: np.random.Generator, users: int, items: int, k: int, *, wanted: np.ndarray | None = None, sure: float = 0.0):
    """(items, scores) of a channel: k random items, the wanted one first with chance `sure`."""
    out = np.stack([rng.permutation(items)[:k] for _ in range(users)]).astype(np.int32)
    if wanted is not None:
        for u in np.flatnonzero(rng.random(users) < sure):
            rest = out[u][out[u] != wanted[u]][: k - 1]
            out[u, : len(rest) + 1] = [wanted[u], *rest]
    scores = np.sort(rng.random((users, k)).astype(np.float32))[:, ::-1]
    return out, np.ascontiguousarray(scores)


@pytest.fixture(scope="module")
def told():
    """Three channels of 300 users: one that knows half of what is wanted, and two that guess."""
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 200, 300)
    results = [lists(rng, 300, 200, 20), lists(rng, 300, 200, 20, wanted=wanted, sure=0.5), lists(rng, 300, 200, 20)]
    return ("guess", "knows", "other"), results, Relevant.one(wanted)


def test_the_channel_that_knows_gets_the_weight(told):
    names, results, relevant = told
    got = learn(names, results, relevant, GIVEN, LearnConfig(), seed=3)
    assert got.taken
    assert got.weights["knows"] == 1.0
    assert max(got.weights["guess"], got.weights["other"]) < 0.7
    assert got.after["ndcg@10"] > got.before["ndcg@10"] + 0.05
    assert got.interval[0] > 0
    assert got.alone["knows"] == max(got.alone.values())
    merged = got.config(GIVEN)
    assert (merged.method, merged.weights, merged.limit) == (got.method, got.weights, 60)


def test_equal_seeds_learn_equal_weights_and_survive_json(told):
    names, results, relevant = told
    first, second = (learn(names, results, relevant, GIVEN, LearnConfig(), seed=3) for _ in range(2))
    assert first == second
    assert Blend.from_json(json.loads(json.dumps(first.as_json()))) == first


def test_where_all_channels_guess_what_was_configured_stays():
    taken = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        results = [lists(rng, 200, 100, 20) for _ in range(3)]
        got = learn(("a", "b", "c"), results, Relevant.one(rng.integers(0, 100, 200)), GIVEN, LearnConfig(restarts=0), seed=seed)
        taken.append(got.taken)
        if not got.taken:
            assert got.config(GIVEN) is GIVEN
    assert sum(taken) <= 1, "one standard error lets noise through one time in six"


@pytest.mark.parametrize("method", ["min_max", "rrf", "rank"])
def test_the_search_scores_as_the_merge_ranks(told, method):
    """Two roads to one figure: arrays of gains, and the merge itself."""
    names, results, relevant = told
    slate = Slate(names, results, relevant, GIVEN)
    for weights in (np.array([1.0, 0.5, 0.25]), np.array([0.0, 1.0, 0.0]), np.array([0.3, 0.3, 0.3])):
        items = slate.merged(method, weights)
        np.testing.assert_allclose(slate.ndcg(method, weights), at_k(items, relevant, (10,))["ndcg@10"], atol=1e-9)


def test_users_are_never_on_both_sides_and_half_of_them_see_nothing_of_the_other(told):
    """With two users the one half is one user: what is chosen on one is judged on the other."""
    names, results, relevant = told
    few = Slate(names, results, relevant, GIVEN).take(np.array([0, 1, 2, 3]))
    got = learn(names, few.results, few.relevant, GIVEN, LearnConfig(restarts=0), groups=np.array([7, 7, 9, 9]), seed=1)
    assert got.users == 2
    assert np.isfinite(got.gain)


def test_a_better_head_does_not_cost_the_pool():
    """The channel that ranks best would push out what the other one alone knows: within `limit` it may not."""
    B = 100
    wanted = np.arange(B) % 50
    sharp = np.tile(np.arange(100, 120, dtype=np.int32), (B, 1))
    sharp[: B // 2, 0] = wanted[: B // 2]
    broad = np.tile(np.arange(200, 220, dtype=np.int32), (B, 1))
    broad[B // 2 :, 9] = wanted[B // 2 :]
    scores = np.tile(np.linspace(1, 0.1, 20, dtype=np.float32), (B, 1))
    got = learn(
        ("sharp", "broad"), [(sharp, scores), (broad, scores)], Relevant.one(wanted), MergeConfig(limit=20, quota=20), LearnConfig(loss=0.0)
    )
    assert got.after["recall"] >= got.before["recall"]


def test_one_user_and_empty_lists_learn_nothing_and_fail_not():
    empty = (np.empty((1, 0), np.int32), np.empty((1, 0), np.float32))
    got = learn(("a",), [empty], Relevant.one(np.array([3])), GIVEN, LearnConfig(restarts=0))
    assert not got.taken
    assert mean_of_users(np.array([got.before["ndcg@10"]])) == 0.0
