"""Users' states at instants of a log: only what came strictly before, a screen does not see itself."""

import numpy as np
import pytest

from recsys.core import UNKNOWN
from recsys.data.interactions import CSR, Interactions
from recsys.data.synthetic import named
from recsys.features.generate import Histories
from recsys.moments import Moments

USERS, ITEMS = named("u", 2), named("i", 6)


def log(user, item, time, **more) -> Interactions:
    return Interactions.of(np.array(user), np.array(item), np.array(time, float), users=USERS, items=ITEMS, **more)


def moments(of: Interactions, told=None, length: int = 3) -> Moments:
    return Moments(of, np.ones(len(of), bool) if told is None else np.array(told), length)


def test_a_moment_sees_only_what_came_before_it():
    m = moments(log([0, 1, 0, 0], [3, 4, 5, 1], [10, 11, 12, 13]))
    queries = m.queries(np.array([0, 2, 3]))
    assert queries.history.tolist() == [[-1, -1, -1], [-1, -1, 3], [-1, 3, 5]]
    assert queries.user_ids == ["u0", "u0", "u0"]
    assert queries.at.tolist() == [10, 12, 13]
    assert sorted(queries.exclude[2].tolist()) == [3, 5]
    assert set(queries.exclude[0].tolist()) == {UNKNOWN}


def test_equal_times_are_told_apart_by_log_position():
    m = moments(log([0, 0], [1, 2], [10, 10]))
    assert m.queries(np.array([1])).history.tolist() == [[-1, -1, 1]]


def test_rows_of_one_screen_do_not_see_each_other():
    of = log([0, 0, 0], [1, 2, 3], [10, 20, 20], labels={"click": np.ones(3, np.float32)}, impressions=True)
    queries = moments(of).queries(np.array([2]))
    assert queries.history.tolist() == [[-1, -1, 1]]
    assert queries.exclude.tolist() == [[1]]


def test_what_is_not_told_enters_no_history_and_is_not_excluded():
    queries = moments(log([0, 0, 0], [1, 2, 3], [1, 2, 3]), told=[True, False, True]).queries(np.array([2]))
    assert queries.history.tolist() == [[-1, -1, 1]]
    assert queries.exclude.tolist() == [[1]]


def test_the_past_before_the_log_comes_first_and_is_excluded():
    of = log([0], [1], [5], past=CSR(np.array([0, 2, 2]), np.array([4, 5], np.int32)))
    queries = moments(of).queries(np.array([0]))
    assert queries.history.tolist() == [[-1, 4, 5]]
    assert sorted(queries.exclude[0].tolist()) == [4, 5]


def test_excluding_can_be_left_out():
    of = log([0, 0], [1, 2], [1, 2])
    assert Moments(of, np.ones(2, bool), 3, exclude_seen=False).queries(np.array([1])).exclude.shape == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_histories_are_the_one_definition(seed):
    rng = np.random.default_rng(seed)
    of = log(rng.integers(0, 2, 50), rng.integers(0, 6, 50), np.sort(rng.integers(0, 30, 50)))
    m = moments(of, length=5)
    at = np.arange(50)
    items, times = Histories(of, length=5, told=m.told).before(of.user[at], at, of.time[at])
    queries = m.queries(at)
    np.testing.assert_array_equal(queries.history, items)
    np.testing.assert_array_equal(queries.history_times, times)
