"""Paired tests, Holm's correction and the jackknife: against scipy, against answers by hand, and what they do to noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recsys.metrics import auc, interval
from recsys.significance import against, holm, paired_t, pseudo_values

CASES = settings(max_examples=40, deadline=None, derandomize=True)


@CASES
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=30))
def test_the_paired_test_equals_scipys(rows):
    a, b = (np.array(x, float) / 6 for x in zip(*rows, strict=True))
    got = paired_t(a, b)
    assert got.difference == pytest.approx(float(np.mean(a - b)))
    if np.ptp(a - b) > 1e-12:
        expected = stats.ttest_rel(a, b)
        low, high = expected.confidence_interval(0.95)
        assert (got.p, got.low, got.high) == pytest.approx((expected.pvalue, low, high), abs=1e-9)


def test_equal_rows_have_p_one_and_users_without_a_value_do_not_count():
    a = np.array([0.0, 1.0, np.nan, 0.5])
    same = paired_t(a, a)
    assert (same.p, same.users, same.significant) == (1.0, 3, False)
    assert math.isnan(paired_t(np.array([1.0]), np.array([0.0])).p)


def test_holm_by_hand():
    # Ordered .01 .02 .03 .04: times 4, 3, 2, 1, and never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.01, math.nan, 0.6])[0] == pytest.approx(0.02)
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@CASES
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_definition_rejects(p):
    order = sorted(range(len(p)), key=lambda i: (p[i], i))
    corrected, so_far = {}, 0.0
    for place, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = so_far
    assert holm(p) == pytest.approx([corrected[i] for i in range(len(p))])


def test_a_clear_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(3)
    user = rng.normal(size=400)
    rows = {"best": user + 0.5 + rng.normal(0, 0.1, 400), "worse": user + rng.normal(0, 0.1, 400)}
    rows["twin"] = rows["best"] + rng.normal(0, 0.1, 400)
    found = against(rows, "best")
    assert set(found) == {"worse", "twin"}
    assert found["worse"].significant
    assert found["worse"].difference == pytest.approx(-0.5, abs=0.05)
    assert not found["twin"].significant
    assert set(against(rows, "best", same=["twin"])) == {"worse"}


def test_under_no_difference_one_family_in_twenty_is_wrong():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        rows = {str(i): rng.random(50) for i in range(4)}
        wrong += any(c.significant for c in against(rows, "0").values())
    assert wrong / 300 < 0.09  # 5 % and three standard errors


def test_pseudo_values_of_a_mean_are_the_means_of_the_groups():
    values = np.arange(12.0)
    got = pseudo_values(lambda mask: float(values[mask].mean()), np.arange(12), groups=12)
    np.testing.assert_allclose(got, values)


def test_the_jackknife_interval_of_an_auc_holds_its_spread_over_samples():
    rng = np.random.default_rng(1)

    def sample():
        users = np.repeat(np.arange(120), 6)
        label = (rng.random(720) < 0.4).astype(float)
        return users, label, label + rng.normal(0, 1.2, 720) + rng.normal(0, 0.5, 120)[users]

    spread = np.std([auc(label, score) for _, label, score in (sample() for _ in range(100))])
    users, label, score = sample()
    low, high = interval(pseudo_values(lambda m: auc(label[m], score[m]), users))
    assert (high - low) / 3.92 == pytest.approx(spread, rel=0.4)


def test_a_users_rows_are_left_out_together():
    users = np.array([7, 7, 3, 3, 7])
    seen = []
    pseudo_values(lambda mask: seen.append(mask.copy()) or 0.0, users)
    assert [m.tolist() for m in seen[1:]] == [[False, False, True, True, False], [True, True, False, False, True]]
