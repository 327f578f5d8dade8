"""Ingestion: `python -m tests.benchmarks.ingest [--json] [--seconds 20] [--rate 2000] [--burst-s 1]`.

Events come by HTTP in calls of 50, by a clock, while the service's own consumers keep counters of users and items, Parquet and
snapshots. Measured: events/s accepted, the lag on the way and after a burst of ten times the rate, reads of user state meanwhile,
and, when Parquet is up to date, which of the accepted events are missing or stand there twice. Then bytes per user and item
against one key per feature, measured in the same server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import numpy as np
from rich.console import Console

from cluster.embedded import EmbeddedValkey
from cluster.ingest_status import sizes
from cluster.redis_store import RedisStore, connected
from recsys.config import Config
from recsys.data import event_files
from recsys.features.counting import Counting
from recsys.features.tally import Tally
from tests.benchmarks.live_service import USERS, Connection, event, service

A_CALL, BURST_CALL = 50, 500


class Teller:
    """Tells events at a rate, and remembers which were accepted."""

    def __init__(self, url: str, connections: int = 8) -> None:
        self._free: asyncio.Queue[Connection] = asyncio.Queue()
        for _ in range(connections):
            self._free.put_nowait(Connection(url))
        self._rng, self.sent, self.accepted, self.refused = random.Random(7), 0, [], 0

    async def tell(self, rate: float, seconds: float, a_call: int) -> float:
        """So many events a second in calls of `a_call`; gives the seconds until the last one was answered."""
        began, tasks = time.perf_counter(), []
        for n in range(int(rate * seconds / a_call)):
            wait = began + n * a_call / rate - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._call(a_call)))
        await asyncio.gather(*tasks)
        return time.perf_counter() - began

    async def _call(self, n: int) -> None:
        events = [event(self._rng, "e", self.sent + i) for i in range(n)]
        self.sent += n
        line = await self._free.get()
        status, said = await line.ask("POST", "/v1/events", json.dumps(events).encode())
        self._free.put_nowait(line)
        if status == 202 and said["accepted"] == n:
            self.accepted += [e["event_id"] for e in events]
        else:
            self.refused += n

    def close(self) -> None:
        while not self._free.empty():
            self._free.get_nowait().close()


async def lagging(line: Connection, what: tuple[str, ...], patience_s: float) -> float:
    """Seconds until all of these lags are 0."""
    began = time.perf_counter()
    while True:
        _, said = await line.ask("GET", "/v1/ingest")
        if not any(said[name] for name in what):
            return time.perf_counter() - began
        if time.perf_counter() - began > patience_s:
            raise SystemExit(f"The consumers did not catch up within {patience_s:.0f} s: {said}")
        await asyncio.sleep(0.05)


async def watched(line: Connection, over: asyncio.Event) -> list[dict[str, Any]]:
    """The status twice a second."""
    seen = []
    while not over.is_set():
        seen.append((await line.ask("GET", "/v1/ingest"))[1])
        await asyncio.sleep(0.5)
    return seen


async def reads(store: RedisStore, over: asyncio.Event) -> list[float]:
    """Milliseconds of reads of 32 users each, ten a second."""
    rng, took = random.Random(3), []
    while not over.is_set():
        users = [f"u{min(int(rng.paretovariate(0.6)), USERS) - 1}" for _ in range(32)]
        began = time.perf_counter()
        await store.read(users, timeout_s=5.0)
        took.append(1000 * (time.perf_counter() - began))
        await asyncio.sleep(0.1)
    return took


async def measured(url: str, config: Config, given: argparse.Namespace) -> dict[str, Any]:
    teller, line, over = Teller(url), Connection(url), asyncio.Event()
    store = RedisStore(EmbeddedValkey(config.place("store")).url, config.store, config.history)
    await teller.tell(given.rate, 2, A_CALL)  # warm
    await lagging(line, ("lag", "items_lag"), 60)
    warm = len(teller.accepted)
    watching, reading = asyncio.create_task(watched(line, over)), asyncio.create_task(reads(store, over))
    took = await teller.tell(given.rate, given.seconds, A_CALL)
    sustained = (len(teller.accepted) - warm) / took
    over.set()
    seen, ms = await watching, await reading
    behind = await lagging(line, ("lag",), 60)
    burst_took = await teller.tell(10 * given.rate, given.burst_s, BURST_CALL)
    after_burst = await lagging(line, ("lag",), 120)
    items_after_burst = after_burst + await lagging(line, ("items_lag",), 120)
    await lagging(line, ("parquet_lag",), 60)
    kept = event_files.read(config.place("events"))["event_id"].to_pylist()
    quiet = asyncio.Event()
    asyncio.get_running_loop().call_later(3, quiet.set)
    idle = await reads(store, quiet)
    found = {
        "events_per_s": round(sustained, 1),
        "lost": len(set(teller.accepted) - set(kept)),
        "duplicated": len(kept) - len(set(kept)),
        "events": teller.sent,
        "refused": teller.refused,
        "lag_s_max": max((s["lag_s"] for s in seen), default=0.0),
        "lag_after_s": round(behind, 2),
        "burst_events_per_s": round(10 * given.rate * given.burst_s / burst_took, 1),
        "lag_after_burst_s": round(after_burst, 2),
        "items_lag_after_burst_s": round(items_after_burst, 2),
        "read32_p50_ms": round(float(np.percentile(ms, 50)), 2),
        "read32_p99_ms": round(float(np.percentile(ms, 99)), 2),
        "read32_idle_p99_ms": round(float(np.percentile(idle, 99)), 2),
    }
    found |= await against_naive(config, store)
    teller.close()
    line.close()
    await store.close()
    return found


async def against_naive(config: Config, store: RedisStore, most: int = 200) -> dict[str, float]:
    """Bytes per user and item-side key as they are, and with a key per feature (per bucket where it has a window)."""
    from cluster.live_plan import loader

    counting = loader(config)("")
    assert counting is not None
    redis = connected(EmbeddedValkey(config.place("store")).url)
    ours = await sizes(config, redis)
    users = [f"u{n}" for n in range(USERS)]
    states = await store.read(users, timeout_s=30.0)
    with_counters = [(u, s) for u, s in zip(users, states, strict=True) if s.counters][:: max(1, len(users) // most)][:most]
    taken = mine = settled = 0
    for user, state in with_counters:
        states = counting.users.unpack(state.counters)
        names = await _naive(redis, f"naive:user:{user}", states, counting.users.plan.groups)
        settled += await _at_rest(redis, f"rest:user:{user}", states, counting)
        taken += sum([int(await redis.memory_usage(n, samples=0) or 0) for n in names])
        (p,) = [p for p in range(config.store.partitions) if await redis.exists(f"{config.store.prefix}:{{{p}}}:s:{user}")]
        mine += int(await redis.memory_usage(f"{config.store.prefix}:{{{p}}}:s:{user}", samples=0) or 0)
    item_keys = item_bytes = 0
    for p in range(config.store.partitions):
        held = counting.item_records.read(await redis.hvals(f"{config.store.prefix}:{{{p}}}:items"))
        names = await _naive(redis, f"naive:item:{p}", held, counting.items.plan.groups)
        item_bytes += sum([int(await redis.memory_usage(n, samples=0) or 0) for n in names])
        item_keys += len(held)
    await redis.aclose()
    n = max(1, len(with_counters))
    return {
        "bytes_per_user_history": round(ours["history"]),
        "bytes_per_user_fallen": round(ours["fallen"]),
        "bytes_per_user_counters": round(mine / n),
        "bytes_per_user_counters_at_rest": round(settled / n),
        "naive_bytes_per_user_counters": round(taken / n),
        "bytes_per_item_key": round(ours["item_key"]),
        "naive_bytes_per_item_key": round(item_bytes / max(1, item_keys)),
    }


async def _at_rest(redis: Any, name: str, states: Any, counting: Counting) -> int:
    """Bytes of a user's counters once no event is young enough for an older one to come before it (`lateness`): the road keeps those apart."""
    records = counting.user_records
    held = {}
    for (number, key), state in states.items():
        group = counting.users.plan.groups[number]
        held[number, key] = group._settled(state.newest + group.lateness_s, state.pending, state.settled)
    fields = {records.field(n, key): records.value(n, key, state) for (n, key), state in held.items()}
    await redis.hset(name, mapping=fields)
    return int(await redis.memory_usage(name, samples=0) or 0)


async def _naive(redis: Any, prefix: str, states: Any, groups: Any) -> list[str]:
    """Write one key per feature and per bucket, as counters are often kept; gives their names."""
    names = []
    async with redis.pipeline(transaction=False) as pipe:
        for (number, key), state in states.items():
            group = groups[number]
            for f, held in zip(group.features, state.settled, strict=True):
                for e in state.pending:
                    if e.value[f.signal] is not None:
                        held = f.monoid.apply(held, e._replace(value=e.value[f.signal]))
                for i, part in enumerate(held):
                    name = f"{prefix}:{f.name}:{':'.join(key)}:{i}"
                    names.append(name)
                    pipe.set(name, ",".join(map(repr, part.amounts)) if isinstance(f.monoid, Tally) else repr(tuple(part)))
        await pipe.execute()
    return names


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=2_000.0)
    parser.add_argument("--burst-s", type=float, default=1.0, help="how long ten times the rate lasts")
    given = parser.parse_args()
    with service() as (url, config):
        found = asyncio.run(measured(url, config, given))
    Console(stderr=True).print(found)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
