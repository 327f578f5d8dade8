"""How ingestion is: lag by partition, dead letters, Parquet, and what users and items take in memory. Read by anybody, any time."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from cluster.event_log import EventLog
from cluster.partition import PartitionStore
from cluster.redis_cluster import clustered
from recsys.config import Config
from recsys.data import event_files

SAMPLED = 200
"""Keys of each kind that sizes are measured on."""


class PartitionStatus(NamedTuple):
    """One partition. Lags count entries; `lag_s` is the age of the oldest one that users' counters lack."""

    partition: int
    owner: str
    owned: bool
    events: int
    lag: int
    lag_s: float
    items_lag: int
    dead: int
    parquet_lag: int
    parquet_rows: int
    parquet_at: float | None


async def status(config: Config, redis: Redis, log: EventLog) -> list[PartitionStatus]:
    """Every partition. Faults are the client's own."""
    P = config.store.partitions
    store = PartitionStore(redis, config.store.prefix, ttl_s=1, mark_ttl_s=1, dead_letters=1)
    heads, ends = await store.heads(range(P)), await log.ends(P)
    now_ms = await server_ms(redis)
    waiting = {h.partition: h.at for h in heads if ends[h.partition].behind(h.at, h.n)}
    oldest = await log.read(waiting, 1) if waiting else {}
    written = await asyncio.to_thread(event_files.manifests, config.place("events"))
    out = []
    for head in heads:
        p, manifest, end = head.partition, written.get(head.partition), ends[head.partition]
        first = oldest.get(p) or []
        out.append(
            PartitionStatus(
                p,
                head.owner,
                head.until_ms > now_ms,
                end.total,
                end.behind(head.at, head.n),
                max(0.0, (now_ms - first[0].told_ms) / 1000) if first else 0.0,
                max((end.behind(h.reached.get(p, ""), h.counted.get(p, 0)) for h in heads), default=0),
                head.dead,
                end.behind(manifest.at, manifest.n) if manifest else end.behind("", 0),
                sum(f.rows for f in manifest.files) if manifest else 0,
                max((f.written for f in manifest.files), default=None) if manifest else None,
            )
        )
    return out


async def server_ms(redis: Redis) -> int:
    """The server's clock."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def memory(redis: Redis) -> dict[str, Any]:
    """What the server, or all primaries of a cluster, use of the budget, and what it had to forget: only histories and counters can be evicted, never the log."""
    nodes = await infos(redis)
    return {
        "used_mb": round(sum(node["used_memory"] for node in nodes) / 2**20, 1),
        "budget_mb": round(sum(node["maxmemory"] for node in nodes) / 2**20, 1) or None,
        "policy": nodes[0]["maxmemory_policy"],
        "evicted_keys": sum(int(node["evicted_keys"]) for node in nodes),
    }


async def infos(redis: Redis) -> list[dict[str, Any]]:
    """INFO of the server, or of every primary of a cluster."""
    if not clustered(redis):
        return [await redis.info()]
    told: dict[str, Any] = await redis.execute_command("INFO", target_nodes=RedisCluster.PRIMARIES)
    return [told] if "used_memory" in told else list(told.values())


def summary(partitions: list[PartitionStatus]) -> dict[str, Any]:
    """All partitions together, as JSON shows them."""
    written = [p.parquet_at for p in partitions if p.parquet_at is not None]
    return {
        "partitions": len(partitions),
        "without_owner": [p.partition for p in partitions if not p.owned],
        "events": sum(p.events for p in partitions),
        "lag": sum(p.lag for p in partitions),
        "lag_s": round(max((p.lag_s for p in partitions), default=0.0), 3),
        "items_lag": max((p.items_lag for p in partitions), default=0),
        "dead_letters": sum(p.dead for p in partitions),
        "parquet_lag": sum(p.parquet_lag for p in partitions),
        "parquet_rows": sum(p.parquet_rows for p in partitions),
        "parquet_age_s": round(time.time() - max(written), 1) if written else None,
        "lag_by_partition": {p.partition: p.lag for p in partitions},
    }


async def dead_letters(config: Config, redis: Redis, most: int) -> list[dict[str, Any]]:
    """The newest dead letters of every partition: when, where in the log, why, and the record."""
    found = []
    for p in range(config.store.partitions):
        for position, fields in await redis.xrevrange(f"{config.store.prefix}:{{{p}}}:dead", count=most):
            found.append(
                {
                    "partition": p,
                    "buried_ms": int(position.split(b"-")[0]),
                    "position": fields[b"at"].decode(),
                    "why": fields[b"why"].decode(),
                    "record": fields[b"e"].decode("utf-8", "replace"),
                }
            )
    return sorted(found, key=lambda letter: -int(str(letter["buried_ms"])))[:most]


async def sizes(config: Config, redis: Redis) -> dict[str, float]:
    """Mean bytes in the server, keys and their overhead included, of a history, of what fell off one where something did, of a user's
    counters and of an item-side key."""
    found: dict[str, list[int]] = {"history": [], "fallen": [], "user_counters": []}
    prefix = config.store.prefix
    for part, kind in (("h", "history"), ("b", "fallen"), ("s", "user_counters")):
        async for key in redis.scan_iter(match=f"{prefix}:{{*}}:{part}:*", count=1_000):
            found[kind].append(int(await redis.memory_usage(key, samples=0) or 0))
            if len(found[kind]) >= SAMPLED:
                break
    out = {kind: sum(taken) / len(taken) if taken else 0.0 for kind, taken in found.items()}
    keys = bytes_ = 0
    for p in range(config.store.partitions):
        name = f"{prefix}:{{{p}}}:items"
        keys += int(await redis.hlen(name))
        bytes_ += int(await redis.memory_usage(name, samples=0) or 0)
    return out | {"item_key": bytes_ / keys if keys else 0.0}
