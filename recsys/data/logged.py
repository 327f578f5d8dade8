"""Columns that more than one log of a running service holds, as Parquet types: a name has one type wherever it stands.

Clicks find the page that they answer by these columns, so what is written to one log must equal what is written to the other.
"""

from __future__ import annotations

import pyarrow as pa

USER_ID = pa.field("user_id", pa.string())
ITEM_ID = pa.field("item_id", pa.string())
EVENT = pa.field("event", pa.string())
"""Its type: view, click, impression or a name of one's own."""
TIME_MS = pa.field("time_ms", pa.int64())
"""When it happened, milliseconds since 1970."""
REQUEST_ID = pa.field("request_id", pa.string())
"""The recommendation that a page or an event belongs to; null where an event answers none."""
CONTEXT = pa.field("context", pa.string())
"""A JSON object."""
