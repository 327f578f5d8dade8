"""The feature monoids: hand-worked values, the laws of a monoid, streaming against batch, the fast histories against the scan."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import Vocabulary
from recsys.data.interactions import CSR, Interactions
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import DecayedCount, Event, Histories, Instant, LastN, Rate, WindowCount, histories, scan, screen, told

HOUR = 3600.0
MONOIDS = [
    LastN(3),
    WindowCount(bucket_s=10.0, buckets=3),
    DecayedCount(half_life_s=20.0),
    Rate(WindowCount(bucket_s=10.0, buckets=3), prior=0.1, strength=5.0),
    Rate(DecayedCount(half_life_s=20.0), prior=0.5, strength=1.0),
]
LATER = Instant(1e6, 10**9)


def log(user, item, time, *, n_users=3, n_items=5, events=None, positive=None, impressions=False, past=None) -> Interactions:
    n, names = len(user), sorted(set(events or ["click"]))
    return Interactions(
        Vocabulary([f"u{i}" for i in range(n_users)]),
        Vocabulary([f"i{i}" for i in range(n_items)]),
        np.array(user, np.int32),
        np.array(item, np.int32),
        np.array(time, np.float64),
        np.array([names.index(e) for e in (events or ["click"] * n)], np.int8),
        tuple(names),
        np.full(n, np.nan, np.float32),
        {"positive": np.ones(n, np.float32) if positive is None else np.array(positive, np.float32)},
        impressions=impressions,
        past=past,
    )


def test_last_n_keeps_the_newest_and_a_late_event_finds_its_place():
    feature, state = LastN(3), LastN(3).init()
    for event in [Event(10, 0, "a"), Event(30, 1, "c"), Event(20, 2, "late"), Event(30, 3, "d")]:
        state = feature.apply(state, event)
    assert feature.value(state, LATER) == ("late", "c", "d")
    assert feature.value(state, Instant(30, 3)) == ("late", "c"), "an instant does not see itself"
    assert feature.value(state, screen(30)) == ("late",), "a screen does not see events of its own time"


def test_an_event_older_than_a_full_history_does_not_enter_it():
    feature = LastN(2)
    state = feature.apply(feature.apply((), Event(10, 0, "a")), Event(20, 1, "b"))
    assert feature.value(feature.apply(state, Event(5, 2, "old")), LATER) == ("a", "b")


def test_a_window_counts_the_running_bucket_and_the_full_ones_before_it():
    feature = WindowCount(bucket_s=HOUR, buckets=24)
    state = feature.init()
    for hours in (0.5, 1.0, 1.9, 23.99):  # buckets 0, 1, 1, 23
        state = feature.apply(state, Event(hours * HOUR, 0))
    assert feature.value(state, screen(23.999 * HOUR)) == 4, "buckets 0 to 23"
    assert feature.value(state, screen(24.0 * HOUR)) == 3, "buckets 1 to 24: the event of bucket 0 is out"
    assert feature.value(state, screen(25.0 * HOUR)) == 1
    assert feature.value(state, screen(47.0 * HOUR)) == 0


def test_a_window_keeps_no_more_buckets_than_it_has():
    feature = WindowCount(bucket_s=1.0, buckets=5)
    state = feature.init()
    for second in range(100):
        state = feature.apply(state, Event(float(second), second))
    assert state == ((95, 1.0), (96, 1.0), (97, 1.0), (98, 1.0), (99, 1.0))


def test_a_decayed_count_halves_every_half_life():
    feature = DecayedCount(half_life_s=60.0)
    state = feature.apply(feature.apply(feature.init(), Event(0.0, 0)), Event(60.0, 1))
    assert feature.value(state, screen(60.0)) == 1.5
    assert feature.value(state, screen(120.0)) == 0.75
    assert feature.value(feature.init(), screen(60.0)) == 0.0


def test_a_rate_starts_at_its_prior_and_moves_with_evidence():
    feature = Rate(WindowCount(bucket_s=100.0, buckets=10), prior=0.1, strength=10.0)
    state = feature.init()
    assert feature.value(state, LATER) == pytest.approx(0.1)
    for position, hit in enumerate([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]):
        state = feature.apply(state, Event(50.0, position, hit))
    assert feature.value(state, screen(60.0)) == pytest.approx((5 + 1) / (10 + 10))


def test_the_scan_sees_strictly_before_by_time_then_position():
    events = [("u", Event(1.0, 0, "a")), ("u", Event(1.0, 1, "b")), ("v", Event(1.0, 2, "x")), ("u", Event(2.0, 3, "c"))]
    asked = [("u", Instant(1.0, 1)), ("u", Instant(2.0, 3)), ("u", screen(1.0)), ("v", Instant(9.0, 9)), ("nobody", Instant(9.0, 9))]
    assert scan(LastN(9), events, asked) == [("a",), ("a", "b"), (), ("x",), ()]


events_of_a_key = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0.0, 1.0])).map(lambda p: (float(p[0]), p[1])), max_size=12).map(
    lambda rows: [Event(time, position, value) for position, (time, value) in enumerate(rows)]
)


def same(a, b) -> bool:
    if isinstance(a, tuple):
        return a == b
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("feature", MONOIDS, ids=str)
@settings(max_examples=60, deadline=None)
@given(events=events_of_a_key, cuts=st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_merge_is_associative_and_splits_a_log_anywhere(feature, events, cuts):
    first, second = sorted(cuts)
    a, b, c = (run(feature, part) for part in (events[:first], events[first:second], events[second:]))
    at = Instant(max((e.time for e in events), default=0.0), 99)
    left, right = feature.merge(feature.merge(a, b), c), feature.merge(a, feature.merge(b, c))
    assert same(feature.value(left, at), feature.value(right, at))
    assert same(feature.value(left, at), feature.value(run(feature, events), at)), "merged parts are the whole"
    assert same(feature.value(feature.merge(feature.init(), a), at), feature.value(a, at)), "init is the unit"


@pytest.mark.parametrize("feature", MONOIDS, ids=str)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("uv"), st.integers(0, 60), st.sampled_from([0.0, 1.0])), max_size=30))
def test_streaming_in_log_order_gives_the_batch_value_at_every_event(feature, rows):
    rows = sorted(rows, key=lambda r: r[1])
    events = [(key, Event(float(time), position, value)) for position, (key, time, value) in enumerate(rows)]
    batch = scan(feature, events, [(key, Instant(e.time, e.position)) for key, e in events])
    states, live = defaultdict(feature.init), []
    for key, event in events:
        live.append(feature.value(states[key], Instant(event.time, event.position)))
        states[key] = feature.apply(states[key], event)
    assert all(same(a, b) for a, b in zip(batch, live, strict=True))


def run(feature, events):
    state = feature.init()
    for event in events:
        state = feature.apply(state, event)
    return state


def test_histories_stand_newest_last_with_minus_one_and_nan_on_the_left():
    data = log(user=[0, 1, 0, 0], item=[4, 3, 2, 1], time=[10, 11, 12, 12])
    items, times = histories(data, data.user, np.arange(4), data.time, length=2, told=np.ones(4, bool))
    assert items.tolist() == [[-1, -1], [-1, -1], [-1, 4], [4, 2]]
    assert np.isnan(times[0]).all()
    assert times[3].tolist() == [10, 12]


def test_rows_of_one_screen_do_not_see_each_other():
    data = log(user=[0, 0, 0], item=[1, 2, 3], time=[5, 5, 6], impressions=True)
    items, _ = histories(data, data.user, np.arange(3), data.time, length=3, told=np.ones(3, bool))
    assert items.tolist() == [[-1, -1, -1], [-1, -1, -1], [-1, 1, 2]]


def test_the_past_comes_before_the_log_and_has_no_times():
    past = CSR(np.array([0, 2, 2, 3]), np.array([4, 3, 0], np.int32))
    data = log(user=[0, 0], item=[1, 2], time=[5, 6], past=past)
    items, times = histories(data, np.array([0, 1, 2]), np.array([2, 2, 2]), np.full(3, 9.0), length=3, told=np.ones(2, bool))
    assert items.tolist() == [[3, 1, 2], [-1, -1, -1], [-1, -1, 0]]
    assert np.isnan(times[0, 0])
    assert times[0, 1:].tolist() == [5, 6]


def test_an_unknown_user_and_an_empty_log_have_no_history():
    empty = log(user=[], item=[], time=[])
    items, times = histories(empty, np.array([-1, 2]), np.array([0, 0]), np.array([1.0, 1.0]), length=2, told=np.ones(0, bool))
    assert (items == -1).all()
    assert np.isnan(times).all()
    data = log(user=[2, 2], item=[1, 1], time=[1, 2])
    items, _ = histories(data, np.array([-1]), np.array([2]), np.array([9.0]), length=2, told=np.ones(2, bool))
    assert (items == -1).all()


def test_the_closing_histories_hold_each_users_newest_events():
    data = log(user=[0, 2, 0, 0], item=[1, 2, 3, 4], time=[1, 2, 3, 4])
    indptr, items, times = Histories(data, length=2, told=np.ones(4, bool)).closing()
    assert indptr.tolist() == [0, 2, 2, 3]
    assert items.tolist() == [3, 4, 2]
    assert times.tolist() == [3, 4, 2]


def test_impressions_and_views_stay_out_of_the_history_unless_asked_for():
    data = log([0] * 4, [0, 1, 2, 3], [1, 2, 3, 4], events=["view", "click", "impression", "like"])
    assert told(data, HistoryConfig()).tolist() == [False, True, False, True]
    assert told(data, HistoryConfig(events=("view",))).tolist() == [True, False, False, False]


def test_in_an_impression_log_only_positive_rows_enter_the_history():
    data = log([0] * 3, [0, 1, 2], [1, 2, 3], events=["impression"] * 3, positive=[1, 0, 1], impressions=True)
    assert told(data, HistoryConfig()).tolist() == [True, False, True]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=25),
    length=st.integers(1, 5),
    impressions=st.booleans(),
)
def test_the_fast_histories_are_the_scan_of_last_n(rows, length, impressions):
    rows = sorted(rows, key=lambda r: r[2])
    data = log([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], impressions=impressions)
    enters = np.array([r[3] for r in rows], bool)
    events = [(r[0], Event(float(r[2]), p, (r[1], float(r[2])))) for p, r in enumerate(rows) if r[3]]
    asked = [(r[0], screen(float(r[2])) if impressions else Instant(float(r[2]), p)) for p, r in enumerate(rows)]
    items, times = histories(data, data.user, np.arange(len(rows)), data.time, length=length, told=enters)
    for i, expected in enumerate(scan(LastN(length), events, asked)):
        held = items[i] >= 0
        assert list(zip(items[i][held].tolist(), times[i][held].tolist(), strict=True)) == list(expected)
        assert not held[: length - len(expected)].any()
