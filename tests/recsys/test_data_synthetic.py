"""Made-up logs have the properties they are made for."""

import numpy as np
import pytest

from recsys.data.synthetic import checkerboard, planted, zipf


def test_checkerboard_users_take_distinct_items_of_their_parity():
    log = checkerboard(n_users=10, n_items=12, events_per_user=4)
    assert len(log) == 40
    assert (log.user % 2 == log.item % 2).all()
    assert log.matrix().nnz == 40
    assert np.diff(log.time).tolist() == [60.0] * 39
    with pytest.raises(ValueError, match=r"events_per_user 7 exceeds the 6 items of a parity"):
        checkerboard(n_items=12, events_per_user=7)


def test_zipf_logs_have_exact_size_a_long_tail_and_a_cap_per_user():
    log = zipf(200, 500, 20_000, max_per_user=150, seed=3)
    assert len(log) == 20_000
    assert np.bincount(log.user, minlength=200).max() == 150
    popularity = np.sort(np.bincount(log.item, minlength=500))[::-1]
    assert popularity[:100].sum() > 0.7 * len(log)  # the hundred first of 500 have ln(100)/ln(500), about three quarters
    assert (np.diff(log.time) >= 0).all()
    with pytest.raises(ValueError, match=r"201 events do not fit 2 users"):
        zipf(2, 5, 201, max_per_user=100)


def test_clustered_users_stay_at_home_four_times_in_five():
    log = zipf(100, 400, 20_000, clusters=4, max_per_user=1000)
    home = [np.bincount(log.item[log.user == u] % 4, minlength=4).argmax() for u in range(100)]
    assert (log.item % 4 == np.array(home)[log.user]).mean() == pytest.approx(0.8 + 0.2 / 4, abs=0.04)


def test_a_planted_click_hangs_on_the_pair_alone():
    log = planted(noise=0.0, n_events=40_000)
    click = log.labels["click"]
    for one in ("kind_user", "kind_item"):
        for kind in range(4):
            assert click[log.context[one] == kind].mean() == pytest.approx(0.5, abs=0.05)
    pair = log.context["kind_user"] * 4 + log.context["kind_item"]
    assert all(click[pair == p].std() == 0 for p in range(16))
    assert log.impressions
    with pytest.raises(ValueError, match=r"kinds must be even, got 3"):
        planted(kinds=3)


def test_noise_flips_its_share_of_the_clicks():
    log = planted(noise=0.1, n_events=40_000)
    assert (log.labels["click"] != log.context["clicks_given_pair"]).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    "make", [lambda seed: checkerboard(seed=seed), lambda seed: zipf(20, 30, 300, seed=seed), lambda seed: planted(seed=seed)]
)
def test_a_seed_fixes_everything(make):
    assert (make(1).item == make(1).item).all()
    assert (make(1).item != make(2).item).any()
