"""States as bytes: read back exactly, small, and damage is a sentence."""

from __future__ import annotations

import math
import struct

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import Vocabulary
from recsys.errors import StoreError
from recsys.features.aggregates import AggregateConfig
from recsys.features.generate import Event
from recsys.features.groups import GroupState, compiled
from recsys.features.keys import KeyColumns
from recsys.features.packed import digest, pack, unpack
from recsys.features.records import Records
from recsys.features.states import Coder
from recsys.features.stream import Stream

DECLARED = {
    "n": {"kind": "count", "key": "item", "window": "24h"},
    "ctr": {"kind": "rate", "key": "item", "prior": 0.5, "decay": "2h"},
    "spent": {"kind": "sum", "key": "item"},
    "newest": {"kind": "last", "key": "item", "of": "tab", "n": 2},
}
(GROUP,) = compiled(
    {n: AggregateConfig.model_validate(a) for n, a in DECLARED.items()}, priors={}, lateness_s=600.0, offset_s=0.0, gap_s=1_800.0
).groups
NOW = 1_700_000_000.0
SAID = [((1.0,), (1.0, 0.0), None, "home"), ((1.0,), (1.0, 1.0), (2.5,), None)]


def after(*events: Event) -> GroupState:
    return GROUP.take(GROUP.init(), events)


times = st.one_of(
    st.integers(0, 600_000).map(lambda ms: NOW + ms / 1000),
    st.floats(0, 600).map(lambda s: NOW + s),
    st.floats(-1e300, 1e300, allow_nan=False),
    st.sampled_from([-math.inf, math.inf]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(times, st.integers(-(1 << 40), 1 << 60), st.sampled_from(SAID)), max_size=30))
def test_what_is_packed_is_read_back_exactly(told):
    pending = tuple(sorted((Event(*e) for e in told), key=lambda e: e[:2]))
    state = GroupState(max((e.time for e in pending), default=-math.inf), pending, GROUP.init().settled)
    assert unpack(GROUP, pack(GROUP, state)) == state


@pytest.mark.parametrize("time", [NOW + 1e-7, 2.0**54, 2.0**64, -1e300])
def test_times_that_are_no_milliseconds_or_far_apart_are_read_back_too(time):
    state = GroupState(
        max(NOW, time), tuple(sorted((Event(NOW, 0, SAID[0]), Event(time, 1, SAID[1])), key=lambda e: e.time)), GROUP.init().settled
    )
    assert unpack(GROUP, pack(GROUP, state)) == state


def test_a_young_event_takes_a_tenth_of_its_plain_size():
    """100 events of a minute, five things said: 4 or 5 bytes each (time 2 or 4, position 2, what 1) where plain ones take 30."""
    said = [((1.0,), (1.0, 0.0), None, f"tab{n}") for n in range(5)]
    state = after(*(Event(NOW + n * 0.6, 16 * n, said[n % 5]) for n in range(100)))
    assert len(state.pending) == 100
    assert len(pack(GROUP, state)) < 100 * 5 + 150


def test_states_of_the_version_before_are_still_read():
    """Pending events lay there one after another: time, position, and a tag and value by signal."""
    body = b"".join(
        [
            b"\1" + digest(GROUP) + struct.pack("<d", NOW) + b"\2",
            struct.pack("<dq", NOW - 1, 7) + b"\3\1\2" + b"\3\2\2\0" + b"\0" + b"\1\4home",
            struct.pack("<dq", NOW, 9) + b"\3\1\2" + b"\3\2\2\2" + b"\3\1\1" + struct.pack("<d", 2.5) + b"\0",
            b"\0\0\0\0",
        ]
    )
    assert unpack(GROUP, body) == after(Event(NOW - 1, 7, SAID[0]), Event(NOW, 9, SAID[1]))


def test_another_version_and_damage_are_sentences():
    held = pack(GROUP, after(Event(NOW, 0, SAID[0]), Event(NOW + 1, 16, SAID[1])))
    with pytest.raises(StoreError, match=r"has version 9, this code reads version 2\. Run the newer release"):
        unpack(GROUP, b"\t" + held[1:])
    for n in range(5, len(held)):
        with pytest.raises(StoreError, match=r"of \d+ bytes is damaged .* Rebuild it from the event log"):
            unpack(GROUP, held[:n])


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=8).map(lambda b: b + b"\xff" * 200)))
def test_no_bytes_whatever_are_more_than_a_sentence(noise):
    for version in (b"\1", b"\2"):
        try:
            unpack(GROUP, version + digest(GROUP) + noise)
        except StoreError as error:
            assert "is damaged" in str(error)


def test_a_stored_key_of_another_number_of_parts_is_left_out_wherever_it_is_read():
    """As an item id with a NUL left them in a store before such ids were refused."""
    state = GROUP.init()
    plan = compiled({n: AggregateConfig.model_validate(a) for n, a in DECLARED.items()}, priors={}, lateness_s=0.0, offset_s=0.0, gap_s=1.0)
    records, stream = Records(plan), Stream(plan, Vocabulary(["u"]), Vocabulary(["i", "k"]), KeyColumns())
    keys = [("i",), ("i", "k")]
    assert list(records.read([records.value(0, key, state) for key in keys])) == [(0, ("i",))]
    assert list(stream.unpack(stream.pack({(0, key): state for key in keys}))) == [(0, ("i",))]
    coder = Coder(KeyColumns(), Vocabulary(["i", "k"]), 0.0)
    codes = coder.of_keys(plan.groups[0], 0, pa.chunked_array([["i", "i\0k", "k", "later"]]))
    assert codes.tolist() == [0, -1, 1, 2], "an item that came after the bundle has a row behind its own"
