"""Events that cannot be taken as they are, in POST /v1/events: bytes that are no UTF-8, clocks that are wrong; no other event suffers."""

from __future__ import annotations

import time

import pytest

from deployments.event_bodies import event_of, events_in
from recsys.data.sources import InteractionsConfig
from recsys.errors import RequestError
from recsys.serve_config import LimitsConfig

GOOD = b'{"user_id": "\xe7\x94\xa8", "item_id": "i", "event": "click", "context": {"a": ["\xc3\xa9"]}}'
LIMITS = LimitsConfig()
NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (b'{"user_id": "a\xff", "item_id": "i", "event": "click"}', "user_id"),
        (b'{"user_id": "a", "item_id": "\\ud800", "event": "click"}', "item_id"),
        (b'{"user_id": "a", "item_id": "i", "event": "\xc3("}', "event"),
        (b'{"user_id": "a", "item_id": "i", "event": "click", "context": {"where": ["x", "\xfe"]}}', "context"),
    ],
)
def test_an_event_with_bytes_that_are_no_text_is_rejected_singly(bad, field):
    first, second = events_in(b"[" + bad + b"," + GOOD + b"]")
    with pytest.raises(RequestError) as raised:
        event_of(first, LIMITS, time.time())
    assert (raised.value.code, raised.value.field) == ("bad_utf8", field)
    assert "holds bytes that are no UTF-8. Send text as UTF-8." in str(raised.value)
    assert event_of(second, LIMITS, time.time()).user_id == "用"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.5, "which lies below 1 (data.interactions.min_value)."),
        (5.5, "which lies above 5 (data.interactions.max_value)."),
        (5, None),
        (1, None),
    ],
)
def test_a_value_that_files_of_the_log_may_not_hold_is_refused_by_the_same_rule(value, why):
    log = InteractionsConfig(path="log.csv", min_value=1, max_value=5)
    raw = {"user_id": "u", "item_id": "i", "event": "rating", "value": value}
    if why is None:
        assert event_of(raw, LIMITS, time.time(), out_of_range=log.out_of_range).value == value
        return
    with pytest.raises(RequestError) as raised:
        event_of(raw, LIMITS, time.time(), out_of_range=log.out_of_range)
    assert (raised.value.code, str(raised.value)) == ("value_out_of_range", f"'value' is {value:g}, {why}")


def test_a_value_that_no_float32_holds_is_refused():
    with pytest.raises(RequestError, match=r"'value' is 1e\+39, which is beyond what a value may be, 3\.4e38\."):
        event_of(
            {"user_id": "u", "item_id": "i", "event": "rating", "value": 1e39},
            LIMITS,
            time.time(),
            out_of_range=InteractionsConfig(path="log.csv").out_of_range,
        )


@pytest.mark.parametrize("body", [b"", b"[", b'{"a": \xff}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_at_all_is_refused_whole(body):
    with pytest.raises(RequestError, match="The body is not valid JSON") as raised:
        events_in(body)
    assert raised.value.status == 400


def test_clocks_that_disagree_a_little_are_taken_as_they_are_and_far_ones_are_refused_singly():
    limits, now = LimitsConfig(future_s=60), NOW_MS / 1000
    raw = {"user_id": "u", "item_id": "i", "event": "click"}
    assert event_of(raw | {"time": NOW_MS + 59_000}, limits, now).time_ms == NOW_MS + 59_000
    assert event_of(raw | {"time": NOW_MS - 10**10}, limits, now).time_ms == NOW_MS - 10**10, "late is late, not wrong"
    with pytest.raises(RequestError, match="lies in the future"):
        event_of(raw | {"time": NOW_MS + 61_000}, limits, now)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            1_700_000_000,
            "'time' is 1700000000, which looks like Unix seconds: as milliseconds it lies before 1974. Send milliseconds, or ISO 8601.",
        ),
        (1_700_000_000.5, "'time' is 1700000000.5, which looks like Unix seconds"),
        ("1700000000000", "'time' must be ISO 8601, or Unix milliseconds as a number, got '1700000000000'."),
        (1_700_000_000_000_000, "'time' lies in the future: 1700000000000000. At most 60 s ahead of our clock are taken"),
        (True, "'time': expected a number, got True."),
    ],
)
def test_times_in_another_unit_are_refused_with_the_one_that_is_meant(given, text):
    with pytest.raises(RequestError) as raised:
        event_of({"user_id": "u", "item_id": "i", "event": "click", "time": given}, LimitsConfig(future_s=60), NOW_MS / 1000)
    assert str(raised.value).startswith(text)


def test_true_is_no_value_and_a_row_that_is_no_object_is_told_so():
    with pytest.raises(RequestError, match=r"^'value': expected a number, got True\.$"):
        event_of({"user_id": "u", "item_id": "i", "event": "click", "value": True}, LIMITS, time.time())
    with pytest.raises(RequestError, match=r"^The body: expected an object, got 5\.$"):
        event_of(5, LIMITS, time.time())


@pytest.mark.parametrize(
    ("part", "code", "field", "text"),
    [
        (b'"time": ' + b"9" * 400, "future_time", "time", "'time' lies in the future: 9999"),
        (b'"time": -' + b"9" * 400, "bad_time", "time", "'time' lies before 1970: -999"),
        (b'"time": NaN', "bad_time", "time", "'time' must be ISO 8601 or Unix milliseconds, got nan"),
        (b'"value": ' + b"9" * 400, "wrong_type", "value", "'value': input should be a valid number"),
        (b'"context": {"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", "wrong_type", "context", "'context' is nested more than 32 deep"),
        (b'"request_id": ' + b'{"a": ' * 1000 + b"1" + b"}" * 1000, "wrong_type", "request_id", "'request_id' is nested more than 32 deep"),
    ],
)
def test_numbers_and_nesting_beyond_all_measure_are_rejected_singly(part, code, field, text):
    bad = b'{"user_id": "u", "item_id": "i", "event": "click", ' + part + b"}"
    first, second = events_in(b"[" + bad + b"," + GOOD + b"]")
    with pytest.raises(RequestError) as raised:
        event_of(first, LIMITS, time.time())
    assert (raised.value.code, raised.value.field) == (code, field)
    assert str(raised.value).startswith(text)
    assert len(str(raised.value)) < 200
    assert event_of(second, LIMITS, time.time()).user_id == "用"


def test_a_row_that_is_nothing_but_nesting_is_rejected_too():
    deep, good = events_in(b"[" + b"[" * 1000 + b"]" * 1000 + b"," + GOOD + b"]")
    with pytest.raises(RequestError, match="A list is nested more than 32 deep"):
        event_of(deep, LIMITS, time.time())
    assert event_of(good, LIMITS, time.time()).user_id == "用"


def test_who_wraps_a_list_is_told_that_it_goes_plain():
    with pytest.raises(RequestError, match=r"^'user_id' is required\. Several go as a plain list: \[\{\.\.\.\}, \{\.\.\.\}\]\.$"):
        event_of({"events": [events_in(GOOD)]}, LIMITS, 1_700_000_000.0)
    with pytest.raises(RequestError, match=r"^'user_id' is required\.$"):
        event_of({"item_id": "a", "event": "click"}, LIMITS, 1_700_000_000.0)
