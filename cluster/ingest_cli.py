"""`rayfunnel ingest`: run the consumers alone, see how far they are, read the dead letters."""

from __future__ import annotations

import asyncio
import json as json_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cluster.store_url import store_url

if TYPE_CHECKING:
    from cluster.ingest_status import PartitionStatus
    from recsys.config import Config


def run(config: Config, actors: int, out: Console) -> None:
    """Consume until Ctrl-C."""
    from cluster import ingest_run

    with store_url(config) as url:
        out.print("Consuming events. Ctrl-C stops it; what is counted is in Parquet then.")
        if not actors:
            ingest_run.run_here(config, url)
            return
        from cluster.runtime import start_ray

        start_ray(num_cpus=max(2, actors))
        ingest_run.run_actors(config, url, actors)


def show_status(config: Config, out: Console, *, as_json: bool) -> None:
    """A table of the partitions, or JSON."""
    from cluster.ingest_run import IngestStatus
    from cluster.ingest_status import memory, sizes, summary
    from cluster.redis_store import connected

    async def read(url: str) -> tuple[list[PartitionStatus], dict[str, float], dict[str, Any]]:
        told, redis = IngestStatus(config, url), connected(url, timeout_s=5.0)
        try:
            return await told.partitions(), await sizes(config, redis), await memory(redis)
        finally:
            await told.close()
            await redis.aclose()

    with store_url(config) as url:
        partitions, bytes_, used = asyncio.run(read(url))
    if as_json:
        print(json_module.dumps(summary(partitions) | {"bytes": bytes_, "memory": used}))  # noqa: T201 - the command's answer
        return
    table = Table("partition", "owner", "events", "lag", "lag s", "items lag", "dead letters", "in Parquet", header_style="bold")
    for p in partitions:
        owner = p.owner[:8] if p.owned else "nobody"
        table.add_row(str(p.partition), owner, *map(str, (p.events, p.lag, round(p.lag_s, 2), p.items_lag, p.dead, p.parquet_rows)))
    out.print(table)
    whole = summary(partitions)
    age = "never" if whole["parquet_age_s"] is None else f"{whole['parquet_age_s']:.0f} s ago"
    out.print(f"lag {whole['lag']:,} events, {whole['lag_s']:.2f} s; {whole['dead_letters']:,} dead letters; last Parquet {age}")
    out.print(
        f"memory {used['used_mb']:,} MB of {used['budget_mb'] or 'no budget'}, {used['evicted_keys']:,} keys evicted ({used['policy']}; never the log)"
    )
    out.print(
        f"bytes: history {bytes_['history']:.0f} and counters {bytes_['user_counters']:.0f} a user, {bytes_['item_key']:.0f} an item-side key"
    )


def show_dead_letters(config: Config, most: int, out: Console, *, as_json: bool) -> None:
    """The newest first: where, why, the record."""
    from cluster.ingest_status import dead_letters
    from cluster.redis_store import connected

    async def read(url: str) -> list[dict[str, object]]:
        redis = connected(url, timeout_s=5.0)
        try:
            return await dead_letters(config, redis, most)
        finally:
            await redis.aclose()

    with store_url(config) as url:
        found = asyncio.run(read(url))
    if as_json:
        print(json_module.dumps(found, ensure_ascii=False))  # noqa: T201 - the command's answer
        return
    if not found:
        out.print("No dead letters.")
        return
    table = Table("partition", "position", "why", "record", header_style="bold")
    for letter in found:
        table.add_row(str(letter["partition"]), str(letter["position"]), str(letter["why"]), str(letter["record"])[:200])
    out.print(table)
