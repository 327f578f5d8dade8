"""Live catalogue: `python -m tests.benchmarks.catalogue [--json] [--quick] [--bundle FOLDER]`.

One gateway in this process over an embedded Valkey, its follower looking every serve.items_poll_s as in a service, without HTTP:

    put_to_recall_ms    from PUT of a new item to the first page (asked for every 10 ms) that has it
    recall_cpu_ms       recall of a micro-batch of 32, by how many items lie beside the bundle: 0, 10,000
    follow_10k_cpu_s    taking 10,000 new items over: encoding, vectors, ranker rows, values for filters

Without --bundle a small one is trained first (41 items); what lies beside it costs the same beside a large one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cluster.embedded import EmbeddedValkey
from cluster.redis_items import RedisItemLog
from cluster.registry import Registry
from deployments.live_items import ItemsFollower
from deployments.service import Service
from recsys.features.live_items import ItemChange, MemoryItemLog
from recsys.features.store import MemoryStore
from recsys.funnel import Funnel, FunnelRequest
from recsys.serve_config import ServeConfig
from tests.small import config_of, publish, write_data

BESIDE = 10_000
LOOK_S = 0.01


class One:
    """A rollout of one version."""

    def __init__(self, funnel: Funnel) -> None:
        self._funnel, self.current, self.aliases, self.refused = funnel, funnel.version, {}, {}
        self.held = self.promoted = [funnel.version]

    def funnel(self, version: str | None = None) -> Funnel:
        return self._funnel

    def stop(self) -> None:
        return None


def columns(funnel: Funnel, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Values of item n: those of some item of the bundle, and numbers of its own."""
    held, row = funnel.catalogue, int(rng.integers(len(funnel.items)))
    out: dict[str, Any] = {}
    for name, values in held.values.items():
        texts = values.known.outside(values.codes[values.indptr[row] : values.indptr[row + 1]])
        out[name] = texts[0] if held.columns[name].kind in ("id", "category") and texts else " ".join(texts) or None
    return out | {name: float(n % 97) for name in held.numbers}


async def fresh(funnel: Funnel, puts: int) -> list[float]:
    """Milliseconds from PUT to the first page that has the item, of each put."""
    rng, took = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
        log = RedisItemLog(server.url)
        config = ServeConfig(deadline_ms=20_000)
        follower = ItemsFollower(log, poll_s=config.items_poll_s)
        follower.loading(lambda _: funnel)(Path())
        follower.start()
        service = Service(config, One(funnel), MemoryStore(), items=log, follower=follower)  # type: ignore[arg-type]
        for n in range(puts):
            body = json.dumps({"item_id": f"new{n}", "columns": columns(funnel, n, rng), "title": f"New {n}"}).encode()
            asked = json.dumps({"user_id": "somebody", "k": 5, "filter": {"item_id": [f"new{n}"]}}).encode()
            began = time.perf_counter()
            await service.catalogue.put_items(body)
            while not json.loads(await service.recommend(asked, "r"))["items"]:
                await asyncio.sleep(LOOK_S)
            took.append(1000 * (time.perf_counter() - began))
        await service.close()
    return took


def cost(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU time of recall by what lies beside, and of taking it over."""
    funnel = Funnel.load(folder)
    users = funnel.users.outside(range(min(32, len(funnel.users))))
    found: dict[str, Any] = {"recall_cpu_ms": {}}

    def measured() -> float:
        times = []
        for _ in range(rounds):
            queries = funnel.queries([FunnelRequest(u, 10, time.time()) for u in users])
            began = time.process_time()
            funnel.recall(queries)
            times.append(1000 * (time.process_time() - began))
        return round(float(np.median(times)), 3)

    found["recall_cpu_ms"]["0"] = measured()
    log, rng = MemoryItemLog(), np.random.default_rng(0)
    log.change([ItemChange(f"new{n}", columns(funnel, n, rng)) for n in range(BESIDE)])
    records = log.since(0).records
    began = time.process_time()
    funnel.follow(records)
    found["follow_10k_cpu_s"] = round(time.process_time() - began, 3)
    found["recall_cpu_ms"][str(BESIDE)] = measured()
    log.change([ItemChange("one more", {})])
    began = time.process_time()
    funnel.follow(log.since(BESIDE).records)
    found["follow_one_beside_10k_cpu_ms"] = round(1000 * (time.process_time() - began), 3)
    return found


def main() -> None:
    """Run, print, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few puts and rounds")
    parser.add_argument("--bundle", type=Path, help="a published bundle")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.bundle or _trained(Path(scratch))
        took = asyncio.run(fresh(Funnel.load(folder), 20 if args.quick else 200))
        p50, p99 = (round(float(np.percentile(took, q)), 1) for q in (50, 99))
        found = {"put_to_recall_ms": {"p50": p50, "p99": p99, "puts": len(took)}} | cost(folder, 10 if args.quick else 100)
    Console().print(found)
    if args.json:
        print(json.dumps(found))


def _trained(folder: Path) -> Path:
    write_data(folder)
    config = config_of(folder, "recall.channels.content.type=content")
    registry = Registry(config.place("registry"))
    bundle: Path = registry.bundles / publish(config, registry)
    return bundle


if __name__ == "__main__":
    main()
