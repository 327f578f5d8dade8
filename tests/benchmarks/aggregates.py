"""Memory of the batch road: `python -m tests.benchmarks.aggregates [--json] [--quick] [--events 10000000]`.

A made-up log of Zipf's law is prepared as `rayfunnel prepare` does it, into columns that are mapped from their file. Then a process of
its own asks every aggregate at `--asked` instants, first by itself, then on Ray Data by key. Measured are the private memory that
this process comes to hold meanwhile (its peak less what it began with; pages of mapped files, which the kernel may drop, and Ray's
object store, which spills to disk, are not in it), that of the largest task, and the time; and both must say the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cluster.aggregate import Chosen
from cluster.runtime import start_ray
from cluster.steps import prepare
from recsys.config import Config, load
from recsys.data.synthetic import zipf

AGGREGATES = {
    "item_n": {"kind": "count", "key": "item"},
    "item_n_24h": {"kind": "count", "key": "item", "window": "24h"},
    "item_recent": {"kind": "count", "key": "item", "decay": "24h"},
    "item_reach": {"kind": "distinct", "key": "item", "of": "device", "cap": 8},
    "user_n_1h": {"kind": "count", "key": "user", "window": "1h"},
    "user_days": {"kind": "count", "key": "user", "until": "day"},
    "user_faded": {"kind": "count", "key": "user", "decay": "7d"},
    "user_device": {"kind": "count", "key": ["user", "device"]},
    "user_item_n": {"kind": "count", "key": ["user", "item"]},
    "user_since": {"kind": "recency", "key": "user"},
    "user_newest": {"kind": "last", "key": "user", "n": 5},
    "user_hours": {"kind": "count", "key": ["user", "hour"]},
}
MIB = 2**20
EVERY_S = 0.05


def config_in(scratch: Path) -> Config:
    """The recommender over a log that `write` made."""
    described = {
        "name": "aggregates",
        "workdir": str(scratch / "state"),
        "data": {
            "interactions": {
                "path": str(scratch / "log.parquet"),
                "user": "user_id",
                "item": "item_id",
                "time": "time",
                "context": {"device": "category"},
            }
        },
        "split": {"by": "leave_one_out"},
        "features": {"aggregates": AGGREGATES},
    }
    (scratch / "config.json").write_text(json.dumps(described))
    return load([scratch / "config.json"], [])


def write(scratch: Path, events: int) -> None:
    """The log as Parquet."""
    log = zipf(max(events // 50, 10), max(events // 200, 10), events, seed=3)
    device = pa.DictionaryArray.from_arrays(np.random.default_rng(3).integers(0, 4, events), pa.array(["phone", "tablet", "tv", "web"]))
    columns = {"user_id": log.users.ids.take(pa.array(log.user)), "item_id": log.items.ids.take(pa.array(log.item))}
    pq.write_table(pa.table(columns | {"time": log.time, "device": device.cast(pa.string())}), scratch / "log.parquet")


# ---- one road, in a process of its own --------------------------------------------------------------------------------


def private(pid: int | str = "self") -> int:
    """Bytes of anonymous memory that a process has in RAM; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def watched(found: dict[str, int]) -> Iterator[None]:
    """Fills in the peaks while the block runs: `own`, of this process above its beginning; `task`, of the largest worker of Ray's."""
    before, over = private(), threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            found["own"] = max(found.get("own", 0), private() - before)
            for place in Path("/proc").iterdir():
                if place.name.isdigit() and _is_worker(place):
                    found["task"] = max(found.get("task", 0), private(place.name))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_worker(place: Path) -> bool:
    try:
        return (place / "cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def road(scratch: Path, asked: int, *, far: bool) -> dict[str, float]:
    """Ask every aggregate at that many instants; the answers' sum says whether two roads agree."""
    config = config_in(scratch)
    prepared, _ = prepare(config.model_copy(update={"prepare": config.prepare.model_copy(update={"on_ray": far})}), Console(quiet=True))
    if far:
        start_ray()
    live = prepared.live
    assert live is not None
    rows = np.sort(np.random.default_rng(5).choice(len(prepared.log), min(asked, len(prepared.log)), replace=False))
    peaks: dict[str, int] = {}
    with watched(peaks):
        began = time.perf_counter()
        asof = live.source.asof
        values = Chosen(forced=far)(asof) or type(asof).values
        raw = values(asof, asof.at_rows(rows), asof.plan.groups)
        took = time.perf_counter() - began
    checks = {name: float(np.nansum(x * (1 + np.arange(x.size).reshape(x.shape) % 97))) for name, x in raw.items()}
    cells = sum(x.size for x in raw.values())
    return {
        "events": len(prepared.log),
        "asked": len(rows),
        "seconds": round(took, 1),
        "own_mib": round(peaks.get("own", 0) / MIB),
        "answers_mib": round(8 * cells / MIB),
        "largest_task_mib": round(peaks.get("task", 0) / MIB),
        "checks": checks,  # type: ignore[dict-item]
    }


# ---- both -------------------------------------------------------------------------------------------------------------


def measured(events: int, asked: int) -> dict[str, Any]:
    """Both roads over one log."""
    with tempfile.TemporaryDirectory(prefix="rayfunnel-aggregates-") as scratch_:
        scratch = Path(scratch_)
        write(scratch, events)
        here = [sys.executable, "-m", "tests.benchmarks.aggregates", "--within", str(scratch), "--asked", str(asked)]
        subprocess.run([*here, "--road", "prepare"], check=True)
        out: dict[str, Any] = {}
        for name in ("process", "ray"):
            said = subprocess.run([*here, "--road", name], check=True, stdout=subprocess.PIPE, text=True).stdout
            out[name] = json.loads(said.splitlines()[-1])
    near, far = (out[name].pop("checks") for name in ("process", "ray"))
    out["largest_relative_difference"] = max(abs(near[n] - far[n]) / max(abs(near[n]), 1e-9) for n in near)
    return out


def main() -> None:
    """The command."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true", help="200,000 events")
    arguments.add_argument("--events", type=int, default=10_000_000)
    arguments.add_argument("--asked", type=int, default=1_000_000)
    arguments.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--road", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.within:
        if given.road == "prepare":
            prepare(config_in(given.within), Console(quiet=True))
        else:
            print(json.dumps(road(given.within, given.asked, far=given.road == "ray")))
        return
    found = measured(200_000 if given.quick else given.events, given.asked)
    if given.json:
        print(json.dumps(found))
        return
    table = Table("road", "events", "asked", "seconds", "this process, MiB", "of it answers", "largest task, MiB")
    for name in ("process", "ray"):
        table.add_row(name, *(f"{found[name][k]:,}" for k in ("events", "asked", "seconds", "own_mib", "answers_mib", "largest_task_mib")))
    Console().print(table)
    Console().print(f"largest relative difference of a feature's weighted sum: {found['largest_relative_difference']:.1e}")


if __name__ == "__main__":
    main()
