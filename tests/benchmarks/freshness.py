"""Freshness: `python -m tests.benchmarks.freshness [--json] [--clicks 100] [--background 0,500]`.

From the POST of a click until the first answer, asked for every 10 ms, whose user history contains the item: seen items are never
recommended again, so that is the first page without it; the user asks for so deep a page that every other item is on it.
At no other traffic, and with 500 events a second of other users.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from typing import Any

import numpy as np
from rich.console import Console

from tests.benchmarks.ingest import A_CALL, Teller
from tests.benchmarks.live_service import Connection, service

POLL_S = 0.01
PATIENCE_S = 10.0


async def one(line: Connection, poster: Connection) -> float:
    """Milliseconds from a click until the page of its user shows that it is known."""
    user = f"fresh-{uuid.uuid4().hex[:12]}"
    ask = json.dumps({"user_id": user, "k": 10}).encode()
    _, page = await line.ask("POST", "/v1/recommend", ask)
    item = page["items"][0]["item_id"]
    began = time.perf_counter()
    told = asyncio.create_task(poster.ask("POST", "/v1/events", json.dumps({"user_id": user, "item_id": item, "event": "click"}).encode()))
    n = 0
    while True:
        status, page = await line.ask("POST", "/v1/recommend", ask)
        now = time.perf_counter()
        if status == 200 and all(i["item_id"] != item for i in page["items"]) and page["items"]:
            break
        if now - began > PATIENCE_S:
            raise SystemExit(f"The click was not seen within {PATIENCE_S:.0f} s.")
        n += 1
        await asyncio.sleep(max(0.0, began + n * POLL_S - time.perf_counter()))
    status, _ = await told
    if status != 202:
        raise SystemExit(f"The click was answered {status}.")
    return 1000 * (now - began)


async def measured(url: str, clicks: int, background: float) -> dict[str, Any]:
    line, poster, teller = Connection(url), Connection(url), Teller(url, 4)
    others = asyncio.create_task(teller.tell(background, 3_600, A_CALL)) if background else None
    await asyncio.sleep(2.0 if background else 0.0)
    began, before = time.perf_counter(), len(teller.accepted)
    took = [await one(line, poster) for _ in range(clicks)]
    rate = (len(teller.accepted) - before) / (time.perf_counter() - began)
    if others is not None:
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)
    for connection in (line, poster):
        connection.close()
    return {
        "background_events_per_s": round(rate, 1),
        "p50_ms": round(float(np.percentile(took, 50)), 1),
        "p99_ms": round(float(np.percentile(took, 99)), 1),
        "clicks": clicks,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON a background")
    parser.add_argument("--clicks", type=int, default=100)
    parser.add_argument("--background", default="0,500", help="events a second of other users, by comma")
    given = parser.parse_args()
    with service() as (url, _):
        found = [asyncio.run(measured(url, given.clicks, float(b))) for b in given.background.split(",")]
    for row in found:
        Console(stderr=True).print(row)
        if given.json:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
