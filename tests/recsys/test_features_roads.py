"""Two roads, one answer: the streaming states against the batch road at every event of random logs, in order and shuffled."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.data.interactions import SHOWN, Interactions
from recsys.features import runs
from recsys.features.aggregates import AggregateConfig
from recsys.features.asof import AsOf
from recsys.features.counting import by_name
from recsys.features.generate import Instant, screen
from recsys.features.groups import Row, compiled
from recsys.features.keys import KeyColumns, TextColumn, clock_codes
from recsys.features.reading import clock_text
from recsys.features.states import rows_of
from recsys.features.stream import Stream
from recsys.features.tally import Part

HOUR, DAY = 3_600.0, 86_400.0
GAP_S, LATE_S = 1_800.0, 300.0
USERS, ITEMS = Vocabulary(["u0", "u1"]), Vocabulary(["i0", "i1", "i2", "i3"])
COLUMNS = KeyColumns(
    {"user": {}, "item": {"shop": TextColumn.of([["x"], ["y"], ["x"], []]), "tags": TextColumn.of([["a", "b"], ["b"], [], ["a", "c"]])}},
    {"user": {}, "item": {"price": np.array([1.0, 2.5, math.nan, 8.0])}},
)
DECLARED = {
    "n": {"kind": "count", "key": "user"},
    "n_1h": {"kind": "count", "key": "item", "window": "1h"},
    "n_24h": {"kind": "count", "key": "user", "window": "24h", "events": "click"},
    "n_days": {"kind": "count", "key": "user", "window": "7d", "until": "day"},
    "ctr": {"kind": "rate", "key": "item", "of": "click", "prior": 0.3},
    "ctr_day": {"kind": "rate", "key": "user", "of": "click", "until": "day", "prior": 0.3},
    "ctr_visit": {"kind": "rate", "key": "user", "of": "click", "until": "session", "prior": 0.3},
    "ctr_tag": {"kind": "rate", "key": ["user", "tags"], "of": "click", "prior": 0.3, "strength": 2},
    "ctr_tag_visit": {"kind": "rate", "key": ["user", "tags"], "of": "click", "until": "session", "prior": 0.3},
    "faded": {"kind": "rate", "key": ["item", "tab"], "of": "click", "decay": "2h", "prior": 0.1},
    "faded_day": {"kind": "count", "key": "user", "decay": "12h", "until": "day"},
    "faded_visit": {"kind": "count", "key": "user", "decay": "12h", "until": "session"},
    "total": {"kind": "sum", "key": "tags"},
    "spent": {"kind": "mean", "key": "user", "of": "price", "events": "click"},
    "low": {"kind": "min", "key": "user", "window": "24h"},
    "high": {"kind": "max", "key": "tags", "of": "price"},
    "since": {"kind": "recency", "key": "user"},
    "since_tag": {"kind": "recency", "key": ["user", "tags"], "until": "day"},
    "hourly": {"kind": "count", "key": ["user", "hour"]},
    "weekly": {"kind": "count", "key": ["item", "weekday"], "window": "30d"},
    "newest": {"kind": "last", "key": "user", "n": 3, "events": ["click", "view"]},
    "newest_value": {"kind": "last", "key": "item", "of": "value", "n": 2, "events": "click"},
    "oldest": {"kind": "first", "key": "user", "of": "shop", "n": 2, "events": ["click", "view"]},
    "variety": {"kind": "distinct", "key": "user", "window": "24h", "cap": 3},
    "reach": {"kind": "distinct", "key": "item", "of": "tab"},
    "same": {"kind": "match", "of": "shop", "n": 3},
}
PLAN = compiled(
    {name: AggregateConfig.model_validate(a) for name, a in DECLARED.items()}, priors={}, lateness_s=LATE_S, offset_s=8 * HOUR, gap_s=GAP_S
)
events = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 3),
        st.one_of(
            st.integers(0, 400), st.integers(0, 12), st.integers(0, 200).map(lambda m: m * 60), st.integers(0, 60).map(lambda h: h * 7_201)
        ),
        st.booleans(),
        st.sampled_from(["", "0", "1"]),
        st.one_of(st.none(), st.integers(-3, 9)),
        st.integers(0, 299),
    ),
    max_size=40,
)


def log_of(rows, *, impressions: bool) -> Interactions:
    return Interactions.of(
        [r[0] for r in rows],
        [r[1] for r in rows],
        [1.7e9 + r[2] for r in rows],
        users=USERS,
        items=ITEMS,
        event=[int(not r[3]) for r in rows],
        event_names=("click", "view"),
        value=[math.nan if r[5] is None else r[5] for r in rows],
        labels={"click": [float(r[3]) for r in rows]},
        context={"tab": np.array([r[4] for r in rows], object)},
        impressions=impressions,
    )


def row_of(log: Interactions, i: int) -> Row:
    return Row(
        time=float(log.time[i]),
        position=i,
        user_id=f"u{log.user[i]}",
        item_id=f"i{log.item[i]}",
        event=log.event_names[log.event[i]],
        value=float(log.value[i]),
        labels={"click": float(log.labels["click"][i])},
        context={"tab": log.context["tab"][i]},
    )


def stream() -> Stream:
    return Stream(PLAN, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)


def decoded(name: str, values: np.ndarray, asof: AsOf) -> list:
    """A batch list as the streaming road says it."""
    kept = [v for v in values.tolist() if not math.isnan(v)]
    of = DECLARED[name].get("of", "item")
    return kept if of == "value" else [f"i{int(v)}" if of == "item" else COLUMNS.texts["item"][of].texts[int(v)] for v in kept]


def assert_same(batch: dict, at: int, live: dict, asof: AsOf) -> None:
    for name, value in live.items():
        if isinstance(value, tuple):
            assert decoded(name, batch[name][at], asof) == list(value), name
        else:
            exact = DECLARED[name]["kind"] in ("count", "distinct", "min", "max", "recency") and "decay" not in DECLARED[name]
            assert np.isclose(batch[name][at], value, rtol=0 if exact else 1e-9, atol=0, equal_nan=True), (name, batch[name][at], value)


@settings(max_examples=150, deadline=None)
@given(rows=events, impressions=st.booleans())
def test_streaming_in_order_gives_the_batch_values_at_every_event(rows, impressions):
    log = log_of(rows, impressions=impressions)
    asof = AsOf(PLAN, log, COLUMNS, np.ones(len(log), bool), offset_s=8 * HOUR)
    batch, live = asof.values(asof.at_rows(np.arange(len(log)))), stream()
    for i in range(len(log)):
        row = row_of(log, i)
        at = screen(row.time) if impressions else Instant(row.time, i)
        assert_same(batch, i, live.values(row.user_id, row.item_id, row.context, at), asof)
        live.apply(row)
        for states in (*live.of_user.values(), live.of_items):  # what is stored is what goes on
            again = live.unpack(live.pack(states))
            states.clear()
            states.update(again)


@settings(max_examples=50, deadline=None)
@given(rows=events)
def test_clicks_told_of_by_themselves_are_no_trials_in_either_road(rows):
    """In a log of impressions a live click is a row of its own: the hit of an exposure that stands in another row."""
    plain = log_of(rows, impressions=True)
    shown = np.array([r[6] % 2 for r in sorted(rows, key=lambda r: r[2])], np.float32)
    log = replace(plain, labels={**plain.labels, SHOWN: shown})
    asof = AsOf(PLAN, log, COLUMNS, np.ones(len(log), bool), offset_s=8 * HOUR)
    batch, live = asof.values(asof.at_rows(np.arange(len(log)))), stream()
    for i, row in enumerate(rows_of(log, asof.told)):
        assert row.shown == bool(shown[i])
        assert_same(batch, i, live.values(row.user_id, row.item_id, row.context, screen(row.time)), asof)
        live.apply(row)


@settings(max_examples=100, deadline=None)
@given(rows=events)
def test_events_that_arrive_late_count_at_their_own_time(rows):
    log = log_of(rows, impressions=True)
    late = np.array([r[6] for r in sorted(rows, key=lambda r: r[2])], np.float64)
    arrival = np.argsort(log.time + late, kind="stable")
    live = stream()
    for n, i in enumerate(arrival):
        came = np.sort(arrival[:n])  # the batch road over what has arrived, and whose time lies before the instant
        row = row_of(log, int(i))
        if n:
            arrived = log.where(came)
            asof = AsOf(PLAN, arrived, COLUMNS, np.ones(n, bool), offset_s=8 * HOUR)
            asked = AsOf(PLAN, log, COLUMNS, np.ones(len(log), bool), offset_s=8 * HOUR).at_rows(np.array([i]))
            seen = np.searchsorted(arrived.time, asked.times, "left")
            context = {"tab": np.array([asof.context["tab"].index.get(str(row.context["tab"]), -1)])}
            batch = asof.values(asked.__class__(asked.users, asked.items, asked.times, seen, context))
            assert_same(batch, 0, live.values(row.user_id, row.item_id, row.context, screen(row.time)), asof)
        live.apply(row)


@settings(max_examples=100, deadline=None)
@given(rows=events, cuts=st.lists(st.integers(0, 40), max_size=6), most_pending=st.sampled_from([0, 3, 1_024]))
def test_events_in_parcels_leave_the_states_that_they_leave_one_by_one(rows, cuts, most_pending):
    log = log_of(rows, impressions=True)
    late = np.array([r[6] for r in sorted(rows, key=lambda r: r[2])], np.float64)
    arrival = [row_of(log, int(i)) for i in np.argsort(log.time + late, kind="stable")]
    plan = replace(PLAN, groups=tuple(replace(g, most_pending=most_pending) for g in PLAN.groups))
    road = Stream(plan, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)
    one_by_one, parcels = {}, {}
    for row in arrival:
        for number, key, event in road.touched(row):
            state = one_by_one.get((number, key), plan.groups[number].init())
            one_by_one[number, key] = plan.groups[number].apply(state, event)
    bounds = [0, *sorted(c for c in cuts if c < len(arrival)), len(arrival)]
    for a, b in itertools.pairwise(bounds):
        parcels |= road.taken(parcels, by_name([t for row in arrival[a:b] for t in road.touched(row)]))
    assert parcels.keys() == one_by_one.keys()
    for name, state in one_by_one.items():
        same_state(plan.groups[name[0]], parcels[name], state)


def same_state(group, a, b):
    assert (a.newest, a.pending) == (b.newest, b.pending)
    for f, x, y in zip(group.features, a.settled, b.settled, strict=True):
        assert len(x) == len(y), f.name
        for p, q in zip(x, y, strict=True):
            if isinstance(p, Part):
                assert p[:2] == q[:2], f.name
                assert p.amounts == pytest.approx(q.amounts, rel=1e-12), f.name
            else:
                assert p == q, f.name


@pytest.mark.parametrize("n", [0, -1.7e9, 1_700_003_599.99, 1_700_524_800.0])
def test_hours_and_weekdays_of_one_time_are_those_of_many(n):
    for part in ("hour", "weekday"):
        assert clock_text(part, n, 8 * HOUR) == str(clock_codes(part, np.array([n]), 8 * HOUR)[0])


# ---- numbers that are not small ---------------------------------------------------------------------------------------


def of_two_users(values: dict[str, list[float]]) -> tuple[AsOf, int]:
    """A log in which u0 does something first, then u1: each event has a value and is of i0; and its number of events."""
    rows = [(u, 0, 600 * n, True, "", value, 0) for u, said in enumerate(values.values()) for n, value in enumerate(said)]
    log = log_of([(u, i, t + 10_000 * u, *rest) for u, i, t, *rest in rows], impressions=False)
    total = {"total": AggregateConfig.model_validate({"kind": "sum", "key": "user"}), "mean": AggregateConfig(kind="mean", key=("user",))}
    plan = compiled(total, priors={}, lateness_s=LATE_S, offset_s=0, gap_s=GAP_S)
    return AsOf(plan, log, COLUMNS, np.ones(len(log), bool)), len(log)


def test_a_sum_loses_nothing_to_larger_ones_of_other_keys():
    """u1's 2.5 and 4 come after u0's 1e20: as a difference of sums over both users they would be 0."""
    asof, n = of_two_users({"u0": [1e20, 1.0], "u1": [2.5, 4.0, 8.0]})
    raw = asof.values(asof.at_rows(np.arange(n)))
    np.testing.assert_allclose(raw["total"], [0, 1e20, 0, 2.5, 6.5])
    np.testing.assert_allclose(raw["mean"], [math.nan, 1e20, math.nan, 2.5, 3.25])


@settings(max_examples=100, deadline=None)
@given(
    amounts=st.lists(st.one_of(st.integers(-5, 5), st.floats(-1e30, 1e30)), max_size=33),
    cuts=st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33)), min_size=1, max_size=8),
)
def test_the_sum_of_a_run_is_that_of_its_own_amounts(amounts, cuts):
    lo, hi = (np.array([min(end, len(amounts)) for end in ends]) for ends in zip(*map(sorted, cuts), strict=True))
    tree: list[np.ndarray] = []
    for _ in range(2):  # what is kept between calls
        got = runs.summed(np.array(amounts, np.float64), tree, lo, hi)
        for a, b, total in zip(lo.tolist(), hi.tolist(), got.tolist(), strict=True):
            run = amounts[a:b]
            assert total == pytest.approx(math.fsum(run), rel=1e-12, abs=1e-14 * sum(map(abs, run)))


@pytest.mark.parametrize("told", ["inf", "-inf", 1e39, "1e400", "nan", 10**400])
def test_a_number_that_float32_cannot_hold_is_missing_in_both_roads(told):
    """The last event's number is what is asked about: 5 of the event before it is all that counts."""
    sums = {"hot": AggregateConfig.model_validate({"kind": "sum", "key": "item", "of": "heat"})}
    plan = compiled(sums, priors={}, lateness_s=LATE_S, offset_s=0, gap_s=GAP_S)
    heat = [5.0, told, 0.0]
    log = replace(log_of([(0, 0, n, True, "", None, 0) for n in range(3)], impressions=False), context={"heat": np.array(heat, object)})
    asof, live = AsOf(plan, log, COLUMNS, np.ones(3, bool)), Stream(plan, USERS, ITEMS, COLUMNS)
    for row in itertools.islice(rows_of(log, asof.told), 2):
        live.apply(row)
    assert asof.values(asof.at_rows(np.array([2])))["hot"].tolist() == [5.0]
    assert live.values("u0", "i0", {}, Instant(log.time[2], 2)) == {"hot": 5.0}


def test_numbers_out_of_their_columns_range_are_missing_to_aggregates():
    """-1 stands for no price in this table, and the column says so."""
    columns = {"item": {"price": ColumnConfig(kind="number", min_value=0, max_value=100)}}
    spent = {"spent": AggregateConfig.model_validate({"kind": "mean", "key": "user", "of": "price"})}
    keys = KeyColumns.of(spent, columns, {}, {"price": [3.0, -1.0, 101.0, 100.0]})
    np.testing.assert_array_equal(keys.numbers["item"]["price"], [3.0, math.nan, math.nan, 100.0])
