"""Records of the event log as events that may be counted, or the reason why not."""

from __future__ import annotations

import math
from typing import Any

from recsys.core import LONGEST_TEXT, fits_a_key
from recsys.data.event_names import unclean
from recsys.errors import StoreError
from recsys.features.store import NewEvent, from_record


def checked(record: bytes, logged_ms: int, future_s: float) -> NewEvent:
    """The event of a record. ValueError with a sentence where it cannot be counted."""
    try:
        event = from_record(record)
    except StoreError as error:
        raise ValueError(str(error)) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"This is no record of an event ({error}).") from None
    _check(event, logged_ms, future_s)
    return event


def _check(event: NewEvent, logged_ms: int, future_s: float) -> None:
    text: Any
    for name, text in (("user_id", event.user_id), ("item_id", event.item_id), ("event", event.event), ("event_id", event.event_id)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"'{name}' is {text!r:.60}, expected text that is not empty.")
        if not fits_a_key(text):  # the HTTP edge takes shorter ones (serve.limits.id_bytes); other producers may write into the log
            what = "holds a NUL" if "\0" in text else f"has {len(text.encode())} bytes"
            raise ValueError(f"'{name}' {what}; expected at most {LONGEST_TEXT} bytes, none of them NUL.")
    if (why := unclean(event.event)) is not None:
        raise ValueError(f"'event' is {event.event!r:.60}: it {why}.")
    if isinstance(event.time_ms, bool) or not isinstance(event.time_ms, int):
        raise ValueError(f"'time_ms' is {event.time_ms!r:.60}, expected milliseconds since 1970.")
    if not 0 <= event.time_ms <= logged_ms + 1000 * future_s:
        raise ValueError(
            f"'time_ms' {event.time_ms} lies {'before 1970' if event.time_ms < 0 else f'more than {future_s:g} s ahead of the clock that logged it'}."
        )
    if event.value is not None and (
        isinstance(event.value, bool) or not isinstance(event.value, int | float) or not math.isfinite(event.value)
    ):
        raise ValueError(f"'value' is {event.value!r:.60}, expected a finite number or nothing.")
    if not isinstance(event.context or {}, dict):
        raise ValueError(f"'context' is {event.context!r:.60}, expected an object.")
    if event.request_id is not None and not isinstance(event.request_id, str):
        raise ValueError(f"'request_id' is {event.request_id!r:.60}, expected text.")
