"""Impressions: what was shown, to whom, where, by which version, and the feature values that it was ranked by. As Parquet.

    <workdir>/impressions/1700000000123-1a2b3c4d-000001.parquet     rows of one gateway replica, whole or not there

One row a page. `joined` makes labelled examples of them: an item of a page is a positive where a later event of that user names
the page's request and the item. A page (request, user, instant) and a click count once, however often they were written; a request
that was answered twice is two pages, and its clicks are the later one's.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from recsys.core import Used
from recsys.data.event_files import opened
from recsys.data.logged import CONTEXT, EVENT, ITEM_ID, REQUEST_ID, TIME_MS, USER_ID
from recsys.data.sources import AGAINST, IMPRESSION, is_positive
from recsys.errors import DataError
from recsys.features.records import counted_to
from recsys.funnel import FunnelRequest, PageItem

FORMAT = "3"
READABLE = ("2", FORMAT)
"""Format 2 has no `cold_start`; it reads as null."""
DEFAULT_VARIANT = "default"
"""Of a page whose request and configuration name none."""
SERVED_BY = (pa.field("model_version", pa.string()), pa.field("variant", pa.string()), pa.field("cold_start", pa.string()))
SCHEMA = pa.schema(
    [
        *(REQUEST_ID, USER_ID, TIME_MS),
        ("at_s", pa.float64()),
        *SERVED_BY,
        CONTEXT,
        ("degraded", pa.list_(pa.string())),
        ("items", pa.list_(pa.string())),
        ("positions", pa.list_(pa.int16())),
        ("propensities", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("snapshot_s", pa.float64()),
        ("snapshot_counted", pa.list_(pa.int64())),
        ("user_counted", pa.int64()),
        ("query_features", pa.map_(pa.string(), pa.list_(pa.float32()))),
        ("item_features", pa.map_(pa.string(), pa.list_(pa.float32()))),
    ],
    metadata={"rayfunnel.impressions": FORMAT},
)
"""at_s: the request's own instant, which values are of; cold_start: the rung of a new user's page (null: he is not new); positions from 1; propensities: the probability that the item stood there,
1 where nothing was drawn; snapshot_s: the item snapshot's instant, snapshot_counted: per partition of the event log, the entries below
this number were counted in it (null: those of the training log alone, []: it was cut at several places); user_counted: the same of
the user's own counters (null: training log, -1: nobody knows). query_features: W values of a feature, item_features: W values an
item, one item after the other. Values are the ranker's inputs, after scaling."""


class Impression(NamedTuple):
    """One page as it is logged; the columns of SCHEMA."""

    request_id: str
    user_id: str
    time_ms: int
    at_s: float
    model_version: str
    variant: str
    cold_start: str | None
    context: str
    degraded: list[str]
    items: list[str]
    positions: list[int]
    propensities: list[float]
    scores: list[float]
    snapshot_s: float | None
    snapshot_counted: Sequence[int] | None
    user_counted: int | None
    query_features: list[tuple[str, list[float]]]
    item_features: list[tuple[str, list[float]]]


def picked(used: Used | None, row: int, items: np.ndarray) -> Used | None:
    """What the ranker saw of the page `items` (k,) of one query of a batch, by itself: the batch need not be kept. None: it saw nothing.

    Its fields are of that query alone: of the query (...), of the pairs (k, W).
    """
    if used is None or not (at := np.flatnonzero(used.rows == row)).size:
        return None
    r = int(at[0])
    slot = {int(item): n for n, item in enumerate(used.items[r]) if item >= 0}
    slots = [slot.get(int(item), -1) for item in items]
    # An item that the ranker did not score, such as a pin, has no values: nor has its page then.
    pairs = {n: np.array(x[r, slots], np.float32) for n, x in used.pair_fields.items()} if slots and min(slots) >= 0 else {}
    asked = {n: np.array(x[r], np.float32) for n, x in used.query_fields.items()}
    return used._replace(rows=np.zeros(1, np.int64), items=items, query_fields=asked, pair_fields=pairs)


def impression(
    request: FunnelRequest,
    request_id: str,
    page: Sequence[PageItem],
    seen: Used | None,
    *,
    version: str,
    variant: str = DEFAULT_VARIANT,
    cold_start: str | None = None,
    degraded: Sequence[str] = (),
) -> Impression:
    """The record of one answered page; `seen` is of `picked`."""
    queried = [(n, x.reshape(-1).tolist()) for n, x in seen.query_fields.items()] if seen is not None else []
    paired = [(n, x.reshape(-1).tolist()) for n, x in seen.pair_fields.items()] if seen is not None else []
    n = len(page)
    return Impression(
        request_id,
        request.user_id,
        round(request.at * 1000),
        request.at,
        version,
        variant,
        cold_start,
        json.dumps(dict(request.context), default=str),
        list(degraded),
        [item.item_id for item in page],
        list(range(1, n + 1)),
        [item.propensity for item in page],
        [item.score for item in page],
        None if seen is None else seen.snapshot_s,
        None if seen is None else seen.snapshot_counted,
        None if not request.counters else -1 if (counted := counted_to(request.counters)) is None else counted,
        queried,
        paired,
    )


def table_of(impressions: Sequence[Impression]) -> pa.Table:
    """Records in the columns of the layout."""
    columns = zip(*impressions, strict=True) if impressions else [[] for _ in SCHEMA]
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def files(root: str) -> tuple[pafs.FileSystem, list[str]]:
    """The files of impressions under a folder or URI, in their order, and the filesystem that has them."""
    fs, folder = opened(root)
    held = fs.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    return fs, sorted(f.path for f in held if f.is_file and f.extension == "parquet" and not f.base_name.startswith("."))


def read(root: str) -> pa.Table:
    """Every impression under a folder or URI, each page once, by time. DataError for none, or another format.

    A page is a request id, a user and an instant: clients choose request ids, so two users or two pages may share one.
    """
    fs, found = files(root)
    if not found:
        raise DataError(f"'{root}' holds no impressions. Set serve.impressions.sample above 0 and let the service answer.")
    parts = []
    for file in found:
        schema = pq.read_schema(file, filesystem=fs)
        if (found := (schema.metadata or {}).get(b"rayfunnel.impressions", b"none").decode()) not in READABLE:
            raise DataError(
                f"'{file}' has format {found} of impressions, this code reads {' and '.join(READABLE)}. Move it away, or run its release."
            )
        parts.append(pq.read_table(file, filesystem=fs, schema=SCHEMA, partitioning=None))
    table = pa.concat_tables(parts)
    pages = zip(*(table[name].to_pylist() for name in ("request_id", "user_id", "time_ms")), strict=True)
    first = {page: at for at, page in reversed(list(enumerate(pages)))}
    table = table.take(pa.array(sorted(first.values()), pa.int64()))
    by = [("time_ms", "ascending"), ("request_id", "ascending"), ("user_id", "ascending")]
    return table.take(pc.sort_indices(table, sort_keys=by))


EARLY_S = 300.0
"""Clocks of clients differ from ours by so much, as `serve.limits.future_s` takes it on the other side."""
EXAMPLES = pa.schema(
    [
        *(REQUEST_ID, USER_ID, ITEM_ID, EVENT, TIME_MS),
        ("label", pa.int8()),
        ("position", pa.int16()),
        ("propensity", pa.float32()),
        *SERVED_BY,
        CONTEXT,
    ]
)


def joined(
    impressions: pa.Table, events: pa.Table, *, window_s: float, positives: Sequence[str] | None = None, refusals: Sequence[str] = AGAINST
) -> tuple[pa.Table, dict[str, int]]:
    """One labelled example a shown item, and an account.

    Label 1 where an event of `positives` (default: all but impression, view and `refusals`) names the request, the item and the same user,
    from the page's time to `window_s` later; `event` is then the first such event's type, else impression. Of several pages that share a
    request id and a user, an event answers the newest before it. Equal event ids of a user count once.

    An event that names a page came after it, whatever its own clock says: one that is up to `EARLY_S` ahead of the page is taken.
    """
    shown: dict[tuple[str, str, str], list[int]] = {}
    pages = zip(*(impressions[c].to_pylist() for c in ("request_id", "user_id", "time_ms", "items")), strict=True)
    for request, user, time, items in sorted(pages, key=lambda page: page[2]):
        for item in items:
            shown.setdefault((request, user, item), []).append(time)
    account = {"clicks": 0, "of no logged page": 0, "outside the window": 0, "repeated": 0}
    first: dict[tuple[str, str, str, int], tuple[int, str]] = {}
    told: set[tuple[str, str]] = set()
    columns = ("user_id", "item_id", "event", "time_ms", "request_id", "event_id")
    for user, item, event, time, request, event_id in zip(*(events[c].to_pylist() for c in columns), strict=True):
        if request is None or (event == "view" or not is_positive(event, refusals) if positives is None else event not in positives):
            continue
        if (user, event_id) in told:
            account["repeated"] += 1
            continue
        told.add((user, event_id))
        times = shown.get((request, user, item))
        if times is None:
            account["of no logged page"] += 1
            continue
        at = times[max(bisect_right(times, time) - 1, 0)]
        if not at - 1000 * EARLY_S <= time <= at + 1000 * window_s:
            account["outside the window"] += 1
        else:
            account["clicks"] += 1
            first[request, user, item, at] = min(first.get((request, user, item, at), (time, event)), (time, event))
    out: dict[str, list[Any]] = {name: [] for name in EXAMPLES.names}
    for row in impressions.select(
        ["request_id", "user_id", "time_ms", *(f.name for f in SERVED_BY), "context", "items", "positions", "propensities"]
    ).to_pylist():
        for item, position, propensity in zip(row["items"], row["positions"], row["propensities"], strict=True):
            hit = first.get((row["request_id"], row["user_id"], item, row["time_ms"]))
            values = (row["request_id"], row["user_id"], item, hit[1] if hit else IMPRESSION, row["time_ms"], int(hit is not None))
            for name, value in zip(out, (*values, position, propensity, *(row[f.name] for f in SERVED_BY), row["context"]), strict=True):
                out[name].append(value)
    account |= {"pages": len(impressions), "examples": len(out["label"]), "positives": sum(out["label"])}
    return pa.table(out, schema=EXAMPLES), account
