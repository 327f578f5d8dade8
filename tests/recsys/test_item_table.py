"""Snapshots that go on from the one before say what one made anew says, whatever events, time and eviction did meanwhile."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features import item_table
from recsys.features.counting import by_name
from recsys.features.groups import Row
from recsys.features.item_table import ItemTable
from recsys.features.records import parted
from recsys.features.snapshot import packed_snapshot, unpacked_snapshot
from recsys.features.stream import Stream
from tests.recsys.test_features_roads import COLUMNS, HOUR, ITEMS, PLAN, USERS

ITEM_PLAN = parted(PLAN)[1]
START = 1_700_000_000.0
happenings = st.lists(
    st.tuples(
        st.lists(  # events: item, minutes behind or ahead of now, what, tab, value
            st.tuples(
                st.integers(0, 3),
                st.integers(-600, 5),
                st.sampled_from(["click", "view"]),
                st.sampled_from(["", "0", "1"]),
                st.sampled_from([float("nan"), 1.0, -2.5]),
            ),
            max_size=6,
        ),
        st.sampled_from([0.0, 5.0, 1_800.0, 2 * HOUR, 26 * HOUR, 8 * 24 * HOUR]),  # then so much time goes by
        st.integers(0, 9),  # and a key is evicted
    ),
    min_size=1,
    max_size=8,
)


def same(table: pa.Table, other: pa.Table) -> None:
    assert table.column_names == other.column_names
    for name in table.column_names:
        mine, anew = table[name].to_pylist(), other[name].to_pylist()
        if name == "key" or any(isinstance(x, list) for x in anew):
            assert mine == anew, name
        else:
            np.testing.assert_allclose(np.array(mine, float), np.array(anew, float), rtol=1e-9, err_msg=name)


@settings(deadline=None)
@given(happenings)
def test_a_snapshot_that_goes_on_is_the_one_made_anew(told):
    stream, states, kept, now, position = Stream(ITEM_PLAN, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR), {}, {}, START, 0
    for events, passes, evicted in told:
        for item, minutes, what, tab, value in events:
            position += 1
            row = Row(now + 60 * minutes, position, "u0", f"i{item}", what, value, {}, {"tab": tab})
            states |= stream.taken(states, by_name(stream.touched(row)))
        if evicted < len(states):
            del states[list(states)[evicted]]
        now += passes
        mine = unpacked_snapshot(packed_snapshot(ITEM_PLAN, states, now, [position], kept))
        anew = unpacked_snapshot(packed_snapshot(ITEM_PLAN, states, now, [position]))
        assert (mine.at, mine.counted, mine.tables.keys()) == (anew.at, anew.counted, anew.tables.keys())
        for mark, table in anew.tables.items():
            same(mine.tables[mark], table)


def clicks(stream: Stream, n: int, at: float):
    states: dict = {}
    for k in range(n):
        states |= stream.taken(states, by_name(stream.touched(Row(at + k, k, "u0", f"i{k % 4}", "click", context={"tab": str(k)}))))
    return states


def test_only_what_changed_is_computed_anew(monkeypatch):
    """Four items; then one of them is clicked; then an hour goes by, at whose end the first window of an hour loses its clicks."""
    stream = Stream(ITEM_PLAN, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)
    number = next(n for n, g in enumerate(ITEM_PLAN.groups) if {f.name for f in g.features} >= {"n_1h", "ctr"})
    states, computed = clicks(stream, 4, START), []
    looked = item_table.looked
    monkeypatch.setattr(item_table, "looked", lambda g, held, *rest: computed.append(len(held := list(held))) or looked(g, held, *rest))
    table = ItemTable(ITEM_PLAN.groups[number])

    def shown(at: float) -> list[float]:
        held = [(key, state) for (n, key), state in states.items() if n == number]
        return table.table(held, at)["0.0"].to_pylist()

    assert shown(START + 10) == [1, 1, 1, 1]
    assert shown(START + 15) == [1, 1, 1, 1]
    states |= stream.taken(states, by_name(stream.touched(Row(START + 16, 9, "u0", "i2", "click"))))
    assert shown(START + 20) == [1, 1, 2, 1]
    assert shown(START + 25) == [1, 1, 2, 1]
    assert shown(START + 2 * HOUR) == [0, 0, 0, 0]
    assert shown(START + 4 * HOUR) == [0, 0, 0, 0]
    assert computed == [4, 0, 1, 0, 4, 0]
    assert shown(START - 1) == [0, 0, 0, 0], "time went back: nothing had happened"
    assert computed[-1] == 4


def test_what_is_out_of_use_is_forgotten(monkeypatch):
    monkeypatch.setattr(item_table, "SPARE", 2)
    group = next(g for g in ITEM_PLAN.groups if "tab" in g.key)
    stream = Stream(ITEM_PLAN, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)
    table, number = ItemTable(group), ITEM_PLAN.groups.index(group)
    held = [(key, state) for (n, key), state in clicks(stream, 12, START).items() if n == number]
    for first in range(12):
        shown = table.table(held[first : first + 1], START + 20 + first)
        assert shown["key"].to_pylist() == ["\0".join(held[first][0])]
        assert len(table._rows) <= 2 * 1 + 2 + 1
