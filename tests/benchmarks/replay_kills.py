"""Replay through the real consumers while they are killed: `python -m tests.benchmarks.replay_kills [--json] [--quick] [--sets a,b]`.

The whole of ML-100k and of the KuaiRand slice is told in its own order to an embedded Valkey, every hundredth event twice, while two
processes of consumers count it. Every few seconds, at random, one of them is killed (SIGKILL) and started again, or the store is. When
all is counted and in Parquet, every value of every row's user, item and context in the store is held to the batch road over the log,
exactly for counts and to 1e-6 for what decays; and every event must lie in Parquet once.

A row of KuaiRand is an exposure with its labels, for which a client would tell two events: here it is one, which brings its labels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from cluster.embedded import EmbeddedValkey
from cluster.ingest import Ingest
from cluster.ingest_run import IngestStatus
from cluster.partition import PartitionStore
from cluster.redis_store import RedisStore, connected
from recsys.config import Config
from recsys.data import event_files
from recsys.errors import StoreUnavailableError
from recsys.features.asof import Asked, AsOf
from recsys.features.counting import Counting
from recsys.features.generate import Instant
from recsys.features.groups import Row
from recsys.features.states import rows_of
from recsys.features.store import NewEvent
from recsys.features.stream import Stream
from recsys.ingest_config import IngestConfig
from recsys.prepared import Prepared
from tests.benchmarks.replay import compared, data_set, new_stream, present, stacked
from tests.cluster.valkey_process import kill

CONSUMERS = 2
ROUND = 250
"""Events told in one call."""
ROUND_S = 0.5
"""Between two calls: consumers could take ten times as many, and would meet fewer kills."""
PAUSE_S = (6.0, 12.0)
"""Between two kills: a process of consumers takes 3 s to begin."""
REPEATED = 100
"""Every so many events, one is told a second time."""
LABELS, TOLD = "replay.labels", "replay.told"
"""Of an exposure: its labels, and whether it enters its user's history."""
DECAY = 1e-6
"""Relative difference that decayed counters may show."""


def opened(name: str, scratch: Path) -> tuple[Config, Prepared]:
    """The recommender over its own workdir, with leases that are given up soon: what is killed must be taken over."""
    config, prepared = data_set(name, scratch)
    ingest = IngestConfig(lease_s=1.0, items_every_s=0.1, snapshot_every_s=1.0, parquet_every_s=1.0, keep_h=1.0)
    return config.model_copy(update={"ingest": ingest, "workdir": str(scratch)}), prepared


def consume(name: str, scratch: Path, url: str) -> None:
    """A process of consumers, until it is killed."""
    config, prepared = opened(name, scratch)
    inputs = prepared.aggregates
    assert inputs is not None
    plan = inputs.plan

    def load(version: str) -> Counting | None:
        if version:
            return None
        counting = Counting.of("replay", plan, new_stream(prepared, inputs), config.data, config.history, trending_half_life_h=6.0)
        if config.data.impressions:
            counting.read = labelled
        return counting

    asyncio.run(Ingest(config, url, load).run())


def told_of(prepared: Prepared, most: int) -> list[NewEvent]:
    """The log's first rows as a client would post them."""
    log = prepared.log.where(np.arange(min(most, len(prepared.log))))
    return [
        NewEvent(row.user_id, row.item_id, row.event, round(row.time * 1000), row.value, f"row-{n}", None, _context(row, log.impressions))
        for n, row in enumerate(rows_of(log, prepared.told[: len(log)]))
    ]


def _context(row: Row, impressions: bool) -> dict[str, Any]:
    context = {name: getattr(value, "item", lambda value=value: value)() for name, value in row.context.items()}
    return context | {LABELS: dict(row.labels), TOLD: row.told} if impressions else context


def labelled(event: NewEvent, position: int) -> Row:
    """The row of the log that `told_of` made an event of."""
    context = event.context or {}
    return Row(
        time=event.time_ms / 1000,
        position=position,
        user_id=event.user_id,
        item_id=event.item_id,
        event=event.event,
        labels=context[LABELS],
        context=context,
        told=context[TOLD],
    )


class Killed:
    """Processes of consumers, and their store, which die at random and come back."""

    def __init__(self, name: str, scratch: Path, server: EmbeddedValkey) -> None:
        self._server, here = server, [sys.executable, "-m", "tests.benchmarks.replay_kills", "--sets", name, "--workdir", str(scratch)]
        self._command = [*here, "--consume", server.url]
        self._rng, self.consumers, self.store = random.Random(7), 0, 0
        self._next = time.monotonic() + 3 * PAUSE_S[0]  # all have to begin
        self._running = [self._start() for _ in range(CONSUMERS)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    async def now_and_then(self) -> None:
        """Where it is time: SIGKILL to one of them, and another begins."""
        if time.monotonic() < self._next:
            return
        at = self._rng.randrange(CONSUMERS + 1)
        if at == CONSUMERS:
            await asyncio.to_thread(kill, self._server)
            await asyncio.to_thread(self._server.check)
            self.store += 1
        else:
            self._running[at].kill()
            self._running[at].wait()
            self._running[at], self.consumers = self._start(), self.consumers + 1
        self._next = time.monotonic() + self._rng.uniform(*PAUSE_S)

    def stop(self) -> None:
        """End all, as a kill."""
        for process in self._running:
            process.kill()
            process.wait()


async def accepted(store: RedisStore, events: list[NewEvent]) -> int:
    """Tell these until the store takes them, as a client does that is answered 503; gives how many it knew already."""
    while True:
        try:
            return (await store.append(events)).duplicates
        except StoreUnavailableError:
            await asyncio.sleep(0.1)


async def replayed(config: Config, url: str, events: list[NewEvent], killed: Killed, console: Console) -> dict[str, Any]:
    """Tell everything while consumers and the store die; then wait until all of it is counted and in Parquet."""
    store, status = RedisStore(url, config.store, config.history), IngestStatus(config, url)
    known, began = 0, time.monotonic()
    for start in track(range(0, len(events), ROUND), "telling", console=console):
        some = events[start : start + ROUND]
        known += await accepted(store, some + [e for n, e in enumerate(some, start) if n % REPEATED == 0])
        await killed.now_and_then()
        await asyncio.sleep(ROUND_S)
    while True:
        try:
            said = await status.read()
        except StoreUnavailableError:
            said = {"events": 0}
        if said["events"] >= len(events) and not (said["lag"] or said["items_lag"] or said["parquet_lag"]):
            break
        await asyncio.sleep(0.2)
    await store.close()
    await status.close()
    return {
        "events": len(events),
        "repeats_known": known,
        "kills_of_consumers": killed.consumers,
        "kills_of_the_store": killed.store,
        "seconds": round(time.monotonic() - began, 1),
    }


async def counted(config: Config, url: str, prepared: Prepared) -> Stream:
    """Every counter in the store, in a stream."""
    inputs = prepared.aggregates
    assert inputs is not None
    stream, users = new_stream(prepared, inputs), prepared.log.users.ids.to_pylist()
    store, redis = RedisStore(url, config.store, config.history), connected(url)
    for start in range(0, len(users), 200):
        some = users[start : start + 200]
        for user, state in zip(some, await store.read(some, timeout_s=30.0), strict=True):
            stream.of_user[user] = stream.unpack(state.counters)
    partitions = PartitionStore(redis, config.store.prefix, ttl_s=10, mark_ttl_s=10, dead_letters=10)
    for p in range(config.store.partitions):
        stream.of_items |= stream.unpack(b"".join((await partitions.counted(p))[1]))
    await store.close()
    await redis.aclose()
    return stream


def held_to_the_batch_road(prepared: Prepared, stream: Stream, most: int) -> dict[str, Any]:
    """The values of every rating's user, item and context after the last event: store against log."""
    inputs = prepared.aggregates
    assert inputs is not None
    log = prepared.log.where(np.arange(min(most, len(prepared.log))))
    told = prepared.told[: len(log)]
    asof = AsOf(inputs.plan, log, inputs.columns, told, offset_s=inputs.config.utc_offset_s)
    end = float(log.time.max()) + 1.0
    one = asof.at_rows(np.arange(len(log)))
    batch = asof.values(Asked(one.users, one.items, np.full(len(log), end), np.full(len(log), len(log)), one.context))
    at = Instant(end, -1)
    live = [stream.values(row.user_id, row.item_id, row.context, at) for row in rows_of(log, told)]
    wrong, worst = compared(stacked(live, log.items), batch, inputs)
    return {"values": len(log) * len(batch), "mismatches": wrong, "max_rel_diff_decay": worst}


def measured(name: str, most: int, console: Console) -> dict[str, Any]:
    """One data set."""
    with tempfile.TemporaryDirectory() as scratch_, EmbeddedValkey(Path(scratch_) / "store") as server:
        scratch = Path(scratch_)
        config, prepared = opened(name, scratch)
        events = told_of(prepared, most)
        killed = Killed(name, scratch, server)
        try:
            found = asyncio.run(replayed(config, server.url, events, killed, console))
        finally:
            killed.stop()
        held = Counter(event_files.read(str(config.place("events")))["event_id"].to_pylist())
        stream = asyncio.run(counted(config, server.url, prepared))
        found |= held_to_the_batch_road(prepared, stream, most)
        found["lost"] = sum(held[e.event_id] == 0 for e in events)
        found["twice"] = sum(n > 1 for n in held.values())
    found["ok"] = found["mismatches"] == 0 and found["max_rel_diff_decay"] <= DECAY and not found["lost"] and not found["twice"]
    return found


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true", help="the first 10,000 events")
    arguments.add_argument("--sets", default="movielens,kuairand")
    arguments.add_argument("--consume", metavar="URL", help=argparse.SUPPRESS)
    arguments.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.consume:
        consume(given.sets, given.workdir, given.consume)
        return
    console, found = Console(stderr=given.json), {}
    for name in given.sets.split(","):
        if name == "kuairand" and not present():
            console.print("kuairand: left out, its folder is absent (KUAIRAND_DIR)")
            continue
        found[name] = measured(name, 10_000 if given.quick else 1 << 40, console)
        console.print(name, found[name])
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
