"""Splits worked out by hand, and the proof that a split keeps its promise."""

import datetime as dt
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.data.interactions import Interactions
from recsys.data.split import Split, SplitConfig, counts
from recsys.data.synthetic import named, zipf
from recsys.errors import DataError


def made(user, time=None, **more) -> Interactions:
    n = len(user)
    return Interactions.of(user, list(range(n)), time, users=named("u", max(user, default=0) + 1), items=named("i", n), **more)


def cut(config: SplitConfig, log: Interactions, parts=None) -> tuple[list[int], list[int], list[int]]:
    split = config.split(log, parts)
    return tuple(np.flatnonzero(mask).tolist() for mask in (split.train, split.valid, split.test))


def test_by_default_the_first_eight_tenths_of_the_time_are_learnt_from():
    assert cut(SplitConfig(), made([0] * 10, range(10))) == ([0, 1, 2, 3, 4, 5, 6, 7], [8], [9])


def test_rows_that_share_a_time_stay_together_in_the_later_part():
    assert cut(SplitConfig(ratio=(2, 1, 1)), made([0] * 8, [0, 1, 2, 3, 3, 4, 5, 6])) == ([0, 1, 2], [3, 4, 5], [6, 7])


def test_a_log_without_time_is_cut_by_its_order():
    assert cut(SplitConfig(ratio=(2, 1, 1)), made([0, 1, 0, 1])) == ([0, 1], [2], [3])


@pytest.mark.parametrize(
    "cuts",
    [(20, 30), ("1970-01-01T00:00:20Z", "1970-01-01T00:00:30"), (dt.datetime(1970, 1, 1, 0, 0, 20, tzinfo=dt.UTC), "1970-01-01 00:00:30")],
)
def test_cuts_by_time_belong_to_the_later_part(cuts):
    log = made([0] * 5, [10, 19.9, 20, 29, 30])
    assert cut(SplitConfig(valid_from=cuts[0], test_from=cuts[1]), log) == ([0, 1], [2, 3], [4])


@pytest.mark.parametrize(
    ("days", "cuts"),
    [
        ([20220503, 20220504, 20220505], (20220504, 20220505)),
        ([20220503, 20220504, 20220505], ("20220504", "20220505")),
        (["2022-05-03", "2022-05-04", "2022-05-05"], ("2022-05-04", "2022-05-05")),
        (["2022-05-03", "2022-05-04", "2022-05-05"], (dt.date(2022, 5, 4), dt.date(2022, 5, 5))),
        (np.array(["2022-05-03", "2022-05-04", "2022-05-05"], "datetime64[us]"), ("2022-05-04", "2022-05-05")),
    ],
)
def test_cuts_by_a_column_of_numbers_text_or_dates(days, cuts):
    if isinstance(days[0], str):
        days = np.array(days, object)
    log = made([0, 0, 0], [1, 2, 3], context={"date": days})
    config = SplitConfig(column="date", valid_from=cuts[0], test_from=cuts[1])
    assert config.keep == ("date",)
    assert cut(config, log) == ([0], [1], [2])


def test_rows_whose_column_is_early_but_whose_time_is_late_are_left_out(caplog):
    # The day turns over at 23:40: one train row is later than the first validation row, one validation row later than the first test row.
    log = made([0] * 7, [1, 2, 3, 4, 5, 6, 7], context={"date": np.array([1, 1, 2, 1, 3, 2, 3])})
    with caplog.at_level(logging.INFO):
        assert cut(SplitConfig(column="date", valid_from=2, test_from=3), log) == ([0, 1], [2], [4, 6])
    assert "2 rows left out of train and valid: earlier by column 'date', not by time" in caplog.text


def test_rows_without_the_column_are_in_no_part():
    log = made([0] * 4, range(4), context={"date": np.array([1.0, np.nan, 2, 3])})
    assert cut(SplitConfig(column="date", valid_from=2, test_from=3), log) == ([0], [2], [3])
    log = made([0] * 4, range(4), context={"date": np.array(["a", None, "b", "c"], object)})
    assert cut(SplitConfig(column="date", valid_from="b", test_from="c"), log) == ([0], [2], [3])


def test_leave_one_out_takes_each_users_last_two_ties_in_file_order():
    log = made([0, 1, 0, 1, 0, 0, 2], [1, 1, 2, 2, 2, 2, 3])
    assert cut(SplitConfig(by="leave_one_out"), log) == ([0, 1, 2, 3, 6], [4], [5])


def test_leave_one_out_counts_positives_and_leaves_out_what_came_after():
    log = made([0] * 6, range(6), labels={"click": [1, 0, 1, 0, 1, 0]})
    assert cut(SplitConfig(by="leave_one_out"), log) == ([0, 1], [2], [4])


def test_files_in_parts_overrule_the_ratio_but_not_cuts():
    log, parts = made([0, 0, 0, 0], range(4)), np.array([0, 2, 1, 0], np.int8)
    assert cut(SplitConfig(), log, parts) == ([0, 3], [2], [1])
    assert cut(SplitConfig(by="parts"), log, parts) == ([0, 3], [2], [1])
    assert cut(SplitConfig(valid_from=1, test_from=2), log, parts) == ([0], [1], [2, 3])
    with pytest.raises(DataError, match=r"split by parts: the log came in one piece"):
        SplitConfig(by="parts").split(log)


def test_random_parts_have_the_sizes_of_the_ratio_and_hang_on_the_seed():
    log = made([0] * 100, range(100))
    sizes = [len(part) for part in cut(SplitConfig(by="random", seed=1), log)]
    assert sizes == [80, 10, 10]
    assert cut(SplitConfig(by="random", seed=1), log) == cut(SplitConfig(by="random", seed=1), log)
    assert cut(SplitConfig(by="random", seed=1), log) != cut(SplitConfig(by="random", seed=2), log)
    assert cut(SplitConfig(by="random", ratio=(9, 0, 1)), log)[1] == []


def test_per_user_each_user_is_cut_by_the_ratio_with_recboles_rounding():
    log = made([0] * 20 + [1] * 3 + [2] * 2 + [3], range(26))
    split = SplitConfig(by="random", per_user=True).split(log)
    size = {
        name: np.bincount(log.user[mask], minlength=4).tolist()
        for name, mask in (("train", split.train), ("valid", split.valid), ("test", split.test))
    }
    # 20 -> 16, 2, 2. 3 -> a part due 0.3 rows gets one while train keeps one: 1, 1, 1. 2 -> 1, 0, 1. 1 -> all train.
    assert size == {"train": [16, 1, 1, 1], "valid": [2, 1, 0, 0], "test": [2, 1, 1, 0]}


def recbole_counts(n: int, ratios: list[float]) -> list[int]:
    """The rounding rule of RecBole 1.2.1, for one user."""
    cnt = [int(r * n) for r in ratios]
    cnt[0] = n - sum(cnt[1:])
    for i in range(1, len(ratios)):
        if cnt[0] <= 1:
            break
        if 0 < ratios[-i] * n < 1:
            cnt[-i] += 1
            cnt[0] -= 1
    return cnt[1:]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_counts_are_recboles(n):
    valid, test = counts(np.array(n), (8, 1, 1))
    assert np.stack([valid, test], 1).tolist() == [recbole_counts(x, [0.8, 0.1, 0.1]) for x in n]


@pytest.mark.parametrize(
    "config",
    [
        SplitConfig(),
        SplitConfig(by="random"),
        SplitConfig(by="random", per_user=True),
        SplitConfig(by="leave_one_out"),
        SplitConfig(valid_from=1_701_500_000, test_from=1_702_000_000),
    ],
)
def test_a_split_of_a_larger_log_keeps_its_promise(config):
    log = zipf(50, 30, 1000)
    split = config.split(log)  # checks itself
    assert (split.train.astype(int) + split.valid + split.test).max() == 1
    if config.by == "time":
        assert log.time[split.train].max() < log.time[split.valid].min()
        assert log.time[split.valid].max() < log.time[split.test].min()


def mask(E: int, *at: int) -> np.ndarray:
    out = np.zeros(E, bool)
    out[list(at)] = True
    return out


def test_a_train_row_after_the_cut_is_found_and_named():
    log = made([0, 1, 1, 0], [10, 20, 30, 40])
    with pytest.raises(
        DataError, match=r"split by time: 1 rows of train are not before test, such as user 'u0', item 'i3' at 1970-01-01T00:00:40Z"
    ):
        Split(mask(4, 0, 3), mask(4), mask(4, 2), "time").check(log)
    with pytest.raises(DataError, match=r"1 rows of valid are not before test"):
        Split(mask(4, 0), mask(4, 3), mask(4, 2), "time").check(log)
    with pytest.raises(DataError, match=r"1 rows of train are not before valid"):
        Split(mask(4, 0, 3), mask(4, 2), mask(4), "time").check(made([0, 0, 1, 1]))


def test_rows_that_share_the_time_of_the_cut_may_not_be_in_train():
    with pytest.raises(DataError, match=r"1 rows of train are not before test"):
        Split(mask(3, 0, 1), mask(3), mask(3, 2), "time").check(made([0, 0, 0], [1, 2, 2]))


def test_leave_one_out_is_checked_within_each_user():
    log = made([0, 1, 0, 1], [1, 2, 3, 4])
    Split(mask(4, 0, 1), mask(4), mask(4, 2, 3), "leave_one_out").check(log)
    Split(mask(4, 3), mask(4), mask(4, 2), "leave_one_out").check(log)  # another user's later row is no leak here
    with pytest.raises(DataError, match=r"split by leave_one_out: 1 rows of train are not before test, such as user 'u0'"):
        Split(mask(4, 2), mask(4), mask(4, 0), "leave_one_out").check(log)


def test_parts_may_not_overlap_and_must_fit_the_log():
    log = made([0, 0, 0], [1, 2, 3])
    with pytest.raises(DataError, match=r"split: 1 rows are in two parts, the first at position 1"):
        Split(mask(3, 0, 1), mask(3, 1), mask(3, 2), "random").check(log)
    with pytest.raises(DataError, match=r"split: the masks are for 2 rows, the log has 3"):
        Split(mask(2, 0), mask(2), mask(2, 1), "random").check(log)


@pytest.mark.parametrize(
    ("config", "log", "said"),
    [
        (
            SplitConfig(),
            made([0] * 10, [5] * 10),
            "split by time: train is empty (train 0, valid 0, test 10). The log has 10 rows from 1970-01-01T00:00:05Z",
        ),
        (SplitConfig(valid_from=50, test_from=60), made([0, 0], [5, 6]), "test is empty"),
        (SplitConfig(by="leave_one_out"), made([0, 0], [5, 6]), "split by leave_one_out: test is empty"),
        (SplitConfig(valid_from=1, test_from=2), made([0, 0]), "the log has no time to cut at. Declare interactions.time"),
        (SplitConfig(valid_from=2, test_from=1), made([0, 0], [5, 6]), "valid_from 2 is not before test_from 1"),
        (
            SplitConfig(valid_from="soon", test_from="later"),
            made([0, 0], [5, 6]),
            "split.valid_from: 'soon' is no time. Expected ISO text such as",
        ),
        (
            SplitConfig(column="date", valid_from=1, test_from=2),
            made([0, 0], [5, 6]),
            "the log was loaded without column 'date'. It has: none.",
        ),
        (
            SplitConfig(column="d", valid_from="a", test_from="b"),
            made([0, 0], [5, 6], context={"d": np.array([1, 2])}),
            "column 'd' holds int64 such as 1, the cuts are 'a' and 'b'",
        ),
    ],
)
def test_a_split_that_cannot_be_says_why(config, log, said):
    with pytest.raises(DataError) as fault:
        config.split(log)
    assert said in str(fault.value)


@pytest.mark.parametrize(
    ("given_config", "said"),
    [
        ({"valid_from": 1}, "valid_from and test_from go together"),
        ({"by": "random", "valid_from": 1, "test_from": 2}, "belong to by: time, not by: random"),
        ({"column": "date"}, "column 'date' needs valid_from and test_from"),
        ({"ratio": [0, 1, 1]}, "leaves nothing to train on"),
        ({"by": "magic"}, "Input should be 'time'"),
    ],
)
def test_a_contradictory_split_is_refused(given_config, said):
    with pytest.raises(ValidationError) as fault:
        SplitConfig.model_validate(given_config)
    assert said in str(fault.value)
