"""Skew of a live service: `python -m tests.benchmarks.skew [--json] [--quick] [--seconds 120]`.

The busiest late day of ML-100k against a service trained on what came before it. The day's events are posted in the order of
their times, which are the day's own, pressed into `--seconds` that begin now; one in twenty is told twice and one in twenty comes
some seconds late. A rating has impressions, views and clicks before it, and of the low ones some are dislikes instead. In between
pages are asked for, and every page is logged with the values that it was ranked by. Then `rayfunnel skew`: each value once more from
the log, as of what its page names. It must find nothing. Afterwards the same with bugs put into the offline road (windows a bucket
too long; refusals in histories; types of live events forgotten; impressions counted where the log holds none), and with one in the
online road (the log of a page's counters shifted by an entry): each must be found.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console

from cluster import impressions_report
from cluster.fetch import fetch
from cluster.registry import Registry
from recsys import packing
from recsys.config import Config, load
from recsys.data import live_log
from recsys.data import log as raw_log
from recsys.data.sources import DataConfig
from recsys.features.asof import AsOf
from recsys.features.declaration import HistoryConfig
from recsys.skew import Report
from tests.benchmarks.live_service import Connection
from tests.benchmarks.load import free_port
from tests.small import recipe_of

CONFIG = Path(__file__).parents[2] / "configs" / "movielens.yaml"
DECLARED = {
    "item_n": {"kind": "count", "key": "item"},
    "item_1m": {"kind": "count", "key": "item", "window": "1m"},
    "item_24h": {"kind": "count", "key": "item", "window": "24h"},
    "item_faded": {"kind": "count", "key": "item", "decay": "10m"},
    "item_mean": {"kind": "mean", "key": "item", "of": "value"},
    "genre_1m": {"kind": "count", "key": "genres", "window": "1m"},
    "year_reach": {"kind": "distinct", "key": "year", "of": "occupation", "window": "30d"},
    "user_n": {"kind": "count", "key": "user"},
    "user_1m": {"kind": "count", "key": "user", "window": "1m"},
    "user_faded": {"kind": "mean", "key": "user", "of": "value", "decay": "10m"},
    "user_since": {"kind": "recency", "key": "user"},
    "user_days": {"kind": "count", "key": "user", "until": "day"},
    "user_genre": {"kind": "mean", "key": ["user", "genres"], "of": "value"},
    "user_hours": {"kind": "count", "key": ["user", "hour"]},
    "newest": {"kind": "last", "key": "user", "n": 5},
    "oldest": {"kind": "first", "key": "user", "n": 3},
    "viewed": {"kind": "last", "key": "user", "n": 5, "events": ["view"]},
    "viewed_year": {"kind": "match", "of": "year", "n": 5, "events": ["view"]},
    "item_views": {"kind": "count", "key": "item", "window": "1h", "events": ["view"]},
    "item_refused": {"kind": "count", "key": "item", "decay": "1h", "events": ["dislike"]},
    "item_good": {"kind": "rate", "key": "item", "window": "7d"},
    "user_good": {"kind": "rate", "key": "user", "decay": "24h"},
    "user_years": {"kind": "distinct", "key": "user", "of": "year", "window": "24h"},
    "same_genre": {"kind": "match", "of": "year", "n": 10},
    "item_share": {"kind": "ratio", "parts": ["item_1m", "item_n"]},
}
"""Every kind, window and key that the configuration knows, over the columns of the data set."""
BEFORE = 30_000
"""Events that the service is trained on: the newest before the day."""


ALSO = (("impression", 0.5, 30), ("view", 0.4, 20), ("click", 0.2, 10))
"""What comes before a rating: the type, its chance, and how many ms before."""
DISLIKED, DISLIKES = 2.0, 0.7
"""Highest rating that may be a dislike instead, and the chance of it."""


def told_of(n: int, row: Any, at_ms: int, rng: random.Random) -> list[dict[str, Any]]:
    """The events of one rating of the data set, in order."""
    said = {"user_id": row.user, "item_id": row.item}
    out = [said | {"event": kind, "time": at_ms - ms, "event_id": f"{kind}{n}"} for kind, chance, ms in ALSO if rng.random() < chance]
    last = "dislike" if row.value <= DISLIKED and rng.random() < DISLIKES else "rating"
    return [*out, said | {"event": last, "value": row.value, "time": at_ms, "event_id": f"e{n}"}]


def day_of(log: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(events before, events of the day): the day with most events in the later half of the log."""
    late = log[log.time >= log.time.median()]
    day = (late.time // 86_400).value_counts().idxmax()
    return log[log.time < day * 86_400].tail(BEFORE), log[log.time // 86_400 == day]


def trained(folder: Path, quick: bool) -> tuple[Config, pd.DataFrame]:
    """A published version that knows the log up to the day, in times that end now; and the day."""
    plain = load([CONFIG], [f"workdir={folder / 'state'}"])
    assert plain.fetch is not None and plain.fetched is not None
    fetch(plain.fetch, plain.fetched)
    raw = pd.read_csv(Path(plain.fetched) / "ml-100k.inter", sep="\t", dtype={0: str, 1: str})
    raw.columns = pd.Index(["user", "item", "value", "time"])
    before, day = day_of(raw.sort_values("time", kind="stable"))
    day = day.head(400) if quick else day
    shift = time.time() - float(day.time.iloc[0])
    written = before.assign(time=before.time + shift)
    written.columns = pd.Index(["user_id:token", "item_id:token", "rating:float", "timestamp:float"])
    written.to_csv(folder / "before.inter", sep="\t", index=False)
    small = ["fine_rank.training.epochs=1", "two_tower.training.epochs=1", "examples.window_events=1"]
    settings = [
        f"workdir={folder / 'state'}",
        f"data.interactions.path={folder / 'before.inter'}",
        f"features.aggregates={json.dumps(DECLARED)}",
        f"serve.port={free_port()}",
        "serve.impressions.sample=1.0",
        "serve.impressions.flush_s=1",
        "serve.deadline_ms=5000",
        "ingest.parquet_every_s=2",
        "ingest.snapshot_every_s=2",
        *small,
    ]
    config = load([CONFIG], settings)
    steps = recipe_of(config)
    registry = Registry(config.place("registry"))
    registry.promote_first(registry.publish(lambda f: packing.pack(steps.final(), f, tower=steps.final_tower, ranker=steps.ranker)))
    return config, day


async def lived(url: str, day: pd.DataFrame, known: list[str], seconds: float) -> dict[str, Any]:
    """Post the day and ask for pages; what was answered."""
    rng, statuses, asked = random.Random(7), Counter[str](), 0
    began, first, last = time.time(), float(day.time.iloc[0]), float(day.time.iloc[-1])
    pace = seconds / max(1.0, last - first)
    lines = [Connection(url) for _ in range(8)]
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for line in lines:
        free.put_nowait(line)

    async def ask(path: str, body: Any, at: float) -> None:
        await asyncio.sleep(max(0.0, at - time.time()))
        line = await free.get()
        try:
            status, _ = await line.ask("POST", path, json.dumps(body).encode())
            statuses[f"{path} {status}"] += 1
        finally:
            free.put_nowait(line)

    tasks, kinds = [], Counter[str]()
    for n, row in enumerate(day.itertuples(index=False)):
        at = began + (float(row.time) - first) * pace
        events = told_of(n, row, int(1000 * at), rng)
        kinds.update(e["event"] for e in events)
        late = rng.uniform(1, 8) if rng.random() < 0.05 else 0.0
        tasks.append(ask("/v1/events", events, at + late))
        if rng.random() < 0.05:
            tasks.append(ask("/v1/events", events[-1], at + late + rng.uniform(0, 3)))
        if rng.random() < 0.3:
            user = row.user if rng.random() < 0.8 else rng.choice(known)
            asked += 1
            tasks.append(ask("/v1/recommend", {"user_id": user, "k": 10}, at + rng.uniform(0, 3)))
    await asyncio.gather(*tasks)
    line, until = lines[0], time.monotonic() + 120
    while True:  # every event is in Parquet
        _, told = await line.ask("GET", "/v1/ingest")
        if told["events"] >= kinds.total() and not (told["lag"] or told["items_lag"] or told["parquet_lag"]):
            break
        if time.monotonic() > until:
            raise SystemExit(f"Consumers did not catch up: {told}")
        await asyncio.sleep(0.5)
    await asyncio.sleep(2.5)  # impressions are written
    for line in lines:
        line.close()
    return {"events": dict(kinds), "pages_asked": asked, "answers": dict(statuses), "seconds": round(time.time() - began, 1)}


def checked(config: Config, console: Console) -> dict[str, Any]:
    """The report of `rayfunnel skew`, as figures."""
    report: Report = impressions_report.recomputed(config, console, folder=None, events=None)
    wrong = {name: s.mismatches for name, s in sorted(report.features.items()) if s.mismatches}
    for name in wrong:
        console.print(f"{name}: {report.features[name].example}")
    return {
        "pages": report.pages,
        "without": report.without,
        "mixed": report.mixed,
        "values": sum(s.compared for s in report.features.values()),
        "mismatches": report.mismatches,
        "features": wrong,
    }


@contextmanager
def long_windows() -> Any:
    """The batch road with every window one bucket longer than declared."""
    honest = AsOf._run

    def run(self: AsOf, m: Any, *rest: Any) -> Any:
        return honest(self, dataclasses.replace(m, buckets=m.buckets + 1) if getattr(m, "buckets", 0) else m, *rest)

    with mock.patch.object(AsOf, "_run", run):
        yield


@contextmanager
def refusals_in_histories() -> Any:
    """The batch road with what was refused among the members of histories."""
    with mock.patch.object(HistoryConfig, "admits", lambda _, event: event not in ("impression", "view")):
        yield


@contextmanager
def types_forgotten() -> Any:
    """The batch road that takes every live event for one of the log's default type."""
    honest = raw_log.as_rows

    def as_rows(*given: Any) -> Any:
        return honest(*given).drop_columns([live_log.TYPE])

    with mock.patch.object(raw_log, "as_rows", as_rows):
        yield


@contextmanager
def impressions_counted() -> Any:
    """The batch road that counts impressions in a log that holds none."""
    with mock.patch.object(DataConfig, "leaves_out_impressions", property(lambda _: False)):
        yield


@contextmanager
def shifted_pages(config: Config) -> Any:
    """The pages as a service would have logged them whose counters are one event ahead of what it says."""
    honest = impressions_report.impressions.read

    def read(root: str) -> Any:
        table = honest(root)
        counted = [None if n is None else max(0, n - 1) for n in table["user_counted"].to_pylist()]
        place = table.schema.get_field_index("user_counted")
        return table.set_column(place, table.schema.field(place), [counted])

    with mock.patch.object(impressions_report.impressions, "read", read):
        yield


def main() -> None:
    """Run and print."""
    from deployments.serving import running

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true", help="the day's first 400 events")
    arguments.add_argument("--seconds", type=float, default=120.0)
    arguments.add_argument("--keep", type=Path, help="a folder to leave everything in")
    given = arguments.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config, day = trained(folder, given.quick)
        known = pd.read_csv(folder / "before.inter", sep="\t", dtype=str).iloc[:, 0].unique().tolist()
        with running(config, lambda _: None) as url:
            told = asyncio.run(lived(url, day, known, given.seconds / (4 if given.quick else 1)))
        new = len(set(day.user) - set(known))
        found = {**told, "users": int(day.user.nunique()), "new_users": new, "honest": checked(config, console)}
        shown = [pq.read_table(f) for f in sorted((Path(config.root) / "impressions").glob("*.parquet"))]
        found["snapshots"] = len({at for t in shown for at in t["snapshot_s"].to_pylist()})
        found["degraded_pages"] = int(np.sum([bool(d) for t in shown for d in t["degraded"].to_pylist()]))
        for bug in (long_windows, refusals_in_histories, types_forgotten, impressions_counted):
            with bug():
                found[bug.__name__] = checked(config, Console(quiet=True))
        with shifted_pages(config):
            found["one_event_ahead"] = checked(config, Console(quiet=True))
    bugs = ("long_windows", "refusals_in_histories", "types_forgotten", "impressions_counted", "one_event_ahead")
    found["caught"] = f"{sum(found[bug]['mismatches'] > 0 for bug in bugs)} of {len(bugs)}"
    console.print(found)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
