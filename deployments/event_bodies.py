"""Events as clients send them: one at a time accepted or refused with a reason, whatever stands beside it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from deployments.checks import check_id, check_size, check_text, fault
from deployments.schemas import EventBody
from recsys.data.event_names import unknown
from recsys.errors import RequestError
from recsys.features.store import NewEvent, event_identity
from recsys.serve_config import LimitsConfig

EVENT = TypeAdapter(EventBody)
SECONDS = (1e8, 1e11)
"""Numbers that are Unix seconds of 1973 and later, and milliseconds of before: who sends one means seconds."""


def events_in(raw: bytes) -> Any:
    """The JSON of POST /v1/events. Text that is no UTF-8 is let through here, so that its event alone is rejected."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(raw.decode("utf-8", "surrogateescape"))  # keeps what is no UTF-8 as lone surrogates
        except (ValueError, RecursionError):
            raise RequestError("malformed_json", f"The body is not valid JSON: {error}.", status=400) from None


def event_of(
    raw: Any,
    limits: LimitsConfig,
    now_s: float,
    *,
    sent: int = 0,
    known: Sequence[str] | None = None,
    out_of_range: Callable[[float], str | None] | None = None,
) -> NewEvent:
    """One event of a parsed body of `sent` bytes, of a type that is `known` (None: any), whose value is not `out_of_range` (which says
    why, as the end of a sentence). Raises RequestError with the reason for its rejection."""
    check_text(raw)
    check_size(raw, sent, limits)
    try:
        body = EVENT.validate_python(raw)
    except ValidationError as error:
        raise fault(error) from None
    for name, value in (("user_id", body.user_id), ("item_id", body.item_id), ("event_id", body.event_id), ("request_id", body.request_id)):
        if value is not None:
            check_id(name, value, limits)
    if known is not None and body.event not in known:
        text = f"'event' is '{body.event}', which {unknown(body.event, known)}"
        raise RequestError("unknown_event", text if text.endswith("?") else f"{text}.", field="event")
    if body.value is not None and not math.isfinite(body.value):
        raise RequestError("invalid_value", f"'value' must be a finite number, got {body.value}.", field="value")
    if body.value is not None and out_of_range is not None and (why := out_of_range(body.value)) is not None:
        raise RequestError("value_out_of_range", f"'value' is {body.value:g}, which {why}.", field="value")
    time_ms = _time_ms(body.time, now_s, limits.future_s)
    identity = body.event_id or event_identity(body.user_id, body.item_id, body.event, time_ms)
    return NewEvent(body.user_id, body.item_id, body.event, time_ms, body.value, identity, body.request_id, body.context)


def _time_ms(given: str | float | None, now_s: float, future_s: float) -> int:
    if given is None:
        return int(now_s * 1000)
    shown = repr(given)[:40]
    if isinstance(given, str):
        try:
            at = datetime.fromisoformat(given)
        except ValueError:
            raise RequestError(
                "bad_time", f"'time' must be ISO 8601, or Unix milliseconds as a number, got {shown}.", field="time"
            ) from None
        seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    else:
        try:
            seconds = given / 1000
        except OverflowError:  # an integer of hundreds of digits
            seconds = math.inf if given > 0 else -math.inf
        if math.isnan(seconds):
            raise RequestError("bad_time", "'time' must be ISO 8601 or Unix milliseconds, got nan.", field="time")
        if SECONDS[0] <= given < SECONDS[1]:
            text = f"'time' is {shown}, which looks like Unix seconds: as milliseconds it lies before 1974. Send milliseconds, or ISO 8601."
            raise RequestError("bad_time", text, field="time")
    if seconds > now_s + future_s:
        text = (
            f"'time' lies in the future: {shown}. At most {future_s:g} s ahead of our clock are taken; send ISO 8601 or Unix milliseconds."
        )
        raise RequestError("future_time", text, field="time")
    if seconds < 0:
        raise RequestError("bad_time", f"'time' lies before 1970: {shown}. Send ISO 8601 or Unix milliseconds.", field="time")
    return int(seconds * 1000)


def unix_now() -> float:
    """Unix seconds; one place, so that a test can stop the clock."""
    return time.time()
