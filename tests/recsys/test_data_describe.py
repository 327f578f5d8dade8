"""The numbers of a small log, worked out by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from recsys.data.describe import describe, head_share, histogram, per_day
from recsys.data.events import Account, Dataset
from recsys.data.interactions import Interactions
from recsys.data.split import SplitConfig
from recsys.data.synthetic import named, zipf


def test_a_small_log_is_described():
    log = Interactions.of([0, 0, 0, 1], [0, 0, 1, 0], np.array([0, 1, 2, 3]) * 86_400.0, users=named("u", 3), items=named("i", 5))
    users = pd.DataFrame({"age": [1.0, None, None]})
    account = Account(5, {"duplicate": 1}, ["a note"])
    got = describe(Dataset(log, users, pd.DataFrame(index=range(5)), account), SplitConfig(ratio=(2, 1, 1)).split(log))
    assert {key: got[key] for key in ("events", "users", "items", "cold_users", "cold_items")} == {
        "events": 4, "users": 2, "items": 2, "cold_users": 1, "cold_items": 3,
    }  # fmt: skip
    assert got["sparsity"] == pytest.approx(1 - 3 / 15)
    assert got["repeats"] == pytest.approx(1 / 4)
    assert got["tail_share"] == pytest.approx(1 / 4)  # four of five items have one event of four
    assert got["gini"] == pytest.approx((2 * 1 + 4 * 3) / (5 * 4))  # ranks -4, -2, 0, 2, 4 times 0, 0, 0, 1, 3
    assert got["events_per_user"] | {} == got["events_per_user"]
    assert (got["events_per_user"]["min"], got["events_per_user"]["p50"], got["events_per_user"]["max"]) == (1, 2, 3)
    assert (got["from"], got["to"], got["days"]) == ("1970-01-01T00:00:00Z", "1970-01-04T00:00:00Z", 3.0)
    assert got["missing"] == {"users.age": pytest.approx(2 / 3)}
    assert got["account"] == {"rows read": 5, "dropped: duplicate": 1, "kept": 4}
    assert got["notes"] == ["a note"]
    assert got["head_share"] == {"1%": 3 / 4, "10%": 3 / 4, "20%": 3 / 4}  # one of five items has three of the four events
    assert got["history_lengths"] == {"1": 1, "2-3": 1}  # one user with one event, one with three
    assert (got["events_per_day"]["mean"], got["events_per_day"]["max"]) == (1.0, 1.0)
    assert got["split"] == {
        "train": {"rows": 2, "cold_user_share": 0.0, "cold_item_share": 0.0},
        "valid": {"rows": 1, "cold_user_share": 0.0, "cold_item_share": 1.0},
        "test": {"rows": 1, "cold_user_share": 1.0, "cold_item_share": 0.0},
    }


def test_the_description_is_json():
    log = zipf(20, 30, 200)
    json.dumps(describe(Dataset(log, pd.DataFrame(), pd.DataFrame(), Account(200))))


def test_the_head_the_lengths_and_the_days_by_hand():
    assert head_share(np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 10]), 0.2) == pytest.approx(12 / 20)
    assert histogram(np.array([1, 1, 2, 3, 4, 7, 8])) == {"1": 2, "2-3": 2, "4-7": 2, "8-15": 1}
    days = per_day(np.array([0.0, 10.0, 86_400.0 * 3]))  # two events, none, none, one
    assert (days["mean"], days["min"], days["max"]) == (0.75, 0.0, 2.0)
