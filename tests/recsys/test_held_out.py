"""What each protocol asks: states, sought items and given lists, against definitions written out in loops."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import UNKNOWN, Vocabulary
from recsys.data.interactions import CSR, Interactions
from recsys.data.negatives import NegativesConfig, read_negatives
from recsys.data.split import SplitConfig
from recsys.errors import DataError
from recsys.held_out import _drawn, after_training, against_given, before_first
from recsys.moments import Moments
from tests.small import config_of, write_data

CASES = settings(max_examples=40, deadline=None, derandomize=True)


class Log:
    """What held_out needs of a Prepared: a log and its split."""

    def __init__(self, user, item, split, positive=None):
        self.log = Interactions.of(
            user, item, np.arange(len(user)) // 2, users=Vocabulary([f"u{u}" for u in range(6)]), items=Vocabulary([f"i{i}" for i in range(9)]),
            labels=None if positive is None else {"like": positive},
        )  # fmt: skip
        self.split = split.split(self.log)
        self.moments = Moments(self.log, np.ones(len(self.log), bool), 3)


events = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=24, max_size=60, unique=True)


def filled(row):
    return [int(i) for i in row if i != UNKNOWN]


@CASES
@given(events)
def test_next_item_asks_for_the_last_with_all_before_it(rows):
    user, item = (np.array(x) for x in zip(*rows, strict=True))
    prepared = Log(user, item, SplitConfig(by="leave_one_out"))
    held_out = before_first(prepared, prepared.moments, most=None, seed=1)
    by_user = {u: [int(i) for i in item[user == u]] for u in range(6)}
    judged = [u for u in range(6) if len(by_user[u]) >= 3]
    assert held_out.users.tolist() == judged
    states = held_out.queries(np.arange(len(judged)))
    whole = (held_out.whole or held_out.queries)(np.arange(len(judged)))
    for b, u in enumerate(judged):
        *before, last = by_user[u]
        assert held_out.relevant.items[held_out.relevant.indptr[b] : held_out.relevant.indptr[b + 1]].tolist() == [last]
        assert filled(states.history[b]) == before[-3:]
        assert filled(whole.history[b]) == before
        assert set(filled(states.exclude[b])) == set(before)
        assert held_out.had[b] == len(before)


@CASES
@given(events, st.integers(0, 50))
def test_top_n_tells_all_of_train_and_masks_valid(rows, seed):
    user, item = (np.array(x) for x in zip(*rows, strict=True))
    prepared = Log(user, item, SplitConfig(by="random", ratio=(2, 1, 1), per_user=True, seed=seed))
    held_out = after_training(prepared, prepared.moments, most=None, seed=1)
    log, split = prepared.log, prepared.split
    states, whole = (ask(np.arange(len(held_out))) for ask in (held_out.queries, held_out.whole or held_out.queries))
    for b, u in enumerate(held_out.users.tolist()):
        train, valid, test = ([int(i) for i in log.item[mask & (log.user == u)]] for mask in (split.train, split.valid, split.test))
        assert filled(whole.history[b]) == train  # also those after the test events
        assert filled(states.history[b]) == train[-3:]
        assert set(filled(states.exclude[b])) == {*train, *valid}
        assert set(held_out.relevant.items[held_out.relevant.indptr[b] : held_out.relevant.indptr[b + 1]].tolist()) == set(test)


def test_rows_that_are_no_positives_are_not_sought():
    user, item = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    prepared = Log(user, item, SplitConfig(by="time", ratio=(1, 0, 1)), positive=np.tile([1.0, 1, 1, 0], 3))
    held_out = before_first(prepared, prepared.moments, most=None, seed=1)
    assert 3 not in held_out.relevant.items


@CASES
@given(st.sets(st.integers(0, 19), max_size=18), st.integers(1, 25), st.integers(0, 99))
def test_negatives_are_distinct_and_never_what_the_user_has(had, n, seed):
    got = _drawn(np.array(sorted(had), np.int64), 20, n, np.random.default_rng(seed)).tolist()
    assert len(got) == len(set(got)) == min(n, 20 - len(had))
    assert not set(got) & had
    assert all(0 <= i < 20 for i in got)


def test_every_free_item_is_drawn_equally_often():
    rng = np.random.default_rng(0)
    times = np.bincount(np.concatenate([_drawn(np.array([0, 3, 4]), 8, 2, rng) for _ in range(3_000)]), minlength=8)
    assert times[[0, 3, 4]].tolist() == [0, 0, 0]
    assert times[[1, 2, 5, 6, 7]] == pytest.approx(1_200, abs=120)


def test_ncf_ranks_the_positive_among_its_negatives_and_the_same_ones_again():
    user, item = np.repeat(np.arange(6), 4), np.concatenate([np.random.default_rng(u).permutation(9)[:4] for u in range(6)])
    prepared = Log(user, item, SplitConfig(by="leave_one_out"))
    base = before_first(prepared, prepared.moments, most=None, seed=1)
    one, two = (against_given(base, prepared.log, negatives=3, given=None, seed=7) for _ in range(2))
    np.testing.assert_array_equal(one.given, two.given)
    for b, u in enumerate(one.users.tolist()):
        had, positive = set(item[user == u].tolist()), one.relevant.items[b]
        assert set(filled(one.given[b])) - {positive} <= set(range(9)) - had
        assert positive in one.given[b]
        assert len(filled(one.given[b])) == 4


def test_given_negatives_are_taken_and_a_user_without_any_is_named():
    user, item = np.repeat(np.arange(2), 3), np.array([0, 1, 2, 3, 4, 5])
    prepared = Log(user, item, SplitConfig(by="leave_one_out"))
    base = before_first(prepared, prepared.moments, most=None, seed=1)
    lists = CSR(np.array([0, 2, 3, 3, 3, 3, 3]), np.array([7, 8, 6], np.int32))
    assert [filled(row) for row in against_given(base, prepared.log, negatives=99, given=lists, seed=1).given] == [[2, 7, 8], [5, 6]]
    nobody = CSR(np.array([0, 2, 2, 2, 2, 2, 2]), np.array([7, 8], np.int32))
    with pytest.raises(DataError, match=r"no negatives for user 'u1'.*leave evaluate.given out"):
        against_given(base, prepared.log, negatives=99, given=nobody, seed=1)


def read_here(path, **more):
    users, items = Vocabulary(["0", "1", "2"]), Vocabulary(["10", "11", "12", "13"])
    return read_negatives(NegativesConfig(path=str(path), **more), Path, users, items)


def test_negatives_in_the_layout_of_the_ncf_paper(tmp_path):
    path = tmp_path / "ml.test.negative"
    path.write_text("(0,10)\t11\t12\t999\n\n(2, 13)\t10\n")
    got = read_here(path)
    assert got.indptr.tolist() == [0, 2, 2, 3]
    assert got.items.tolist() == [1, 2, 0]
    path.write_text("(0,10)\t11\n0,11\t12\n")
    with pytest.raises(DataError, match=r"line 2 of .* is '0,11.*Expected \(user,positive\)"):
        read_here(path)
    path.write_text("(77,10)\t11\n")
    with pytest.raises(DataError, match=r"no user of .* is in the log"):
        read_here(path)


def test_negatives_as_a_table(tmp_path):
    path = tmp_path / "negatives.csv"
    path.write_text("user_id,negatives\n1,11 12\n9,10\n0,13 77 10\n")
    got = read_here(path, format="csv")
    assert got.indptr.tolist() == [0, 2, 4, 4]
    assert got.items.tolist() == [3, 0, 1, 2]
    with pytest.raises(DataError, match=r"evaluate.given, read as data.history is: .*absent.csv"):
        read_here(tmp_path / "absent.csv")
    path.write_text("user_id,negatives\n9,10\n")
    with pytest.raises(DataError, match="Check its columns 'user_id' and 'negatives'"):
        read_here(path, format="csv")


def test_a_test_part_without_a_positive_is_refused(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path, "split.by=time")
    from recsys.prepared import prepare

    prepared = prepare(config)
    prepared.log.labels["positive"][prepared.split.test] = 0
    with pytest.raises(DataError, match="holds no positive"):
        before_first(prepared, prepared.moments(config), most=None, seed=1)
