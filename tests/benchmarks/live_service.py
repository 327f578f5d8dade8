"""A live service over synthetic data for benchmarks of events: trained here in seconds, served as `rayfunnel serve` does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.registry import Registry
from recsys.config import Config
from tests.benchmarks.load import free_port
from tests.small import config_of, publish, write_data

DECLARED = {
    "item_n": {"kind": "count", "key": "item"},
    "item_recent": {"kind": "count", "key": "item", "decay": "24h"},
    "item_24h": {"kind": "count", "key": "item", "window": "24h"},
    "item_device": {"kind": "count", "key": ["item", "device"], "window": "7d"},
    "colour_n": {"kind": "count", "key": "colour", "window": "24h"},
    "user_n": {"kind": "count", "key": "user", "window": "24h"},
    "user_faded": {"kind": "count", "key": "user", "decay": "7d"},
    "user_price": {"kind": "mean", "key": "user", "of": "price"},
    "user_since": {"kind": "recency", "key": "user"},
    "user_colour": {"kind": "rate", "key": ["user", "colour"], "prior": 0.5},
    "same_colour": {"kind": "match", "of": "colour", "n": 5},
}
"""Eleven aggregates over six keys: what a small shop would declare."""
USERS, ITEMS = 10_000, 400


@contextlib.contextmanager
def service(*settings: str, ingest: str = "") -> Iterator[tuple[str, Config]]:
    """A running service with the aggregates above; its URL and configuration."""
    from deployments.serving import running

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_data(home, users=200, items=ITEMS, events=12)
        mine = [f"features.aggregates={json.dumps(DECLARED)}", f"serve.port={free_port()}", "ingest.parquet_every_s=2", *settings]
        config = config_of(home, *mine)
        publish(config, Registry(config.place("registry")))
        with running(config, lambda _: None) as url:
            yield url, config


def event(rng: random.Random, run: str, n: int) -> dict[str, Any]:
    """One event: users and items by Zipf's law, one event id each."""
    user, item = (min(int(rng.paretovariate(0.6)), most) - 1 for most in (USERS, ITEMS))
    return {
        "user_id": f"u{user}",
        "item_id": f"i{item}",
        "event": rng.choice(("click", "view", "like")),
        "event_id": f"{run}-{n}",
        "time": int(1000 * time.time()),
        "context": {"device": rng.choice(("web", "phone"))},
    }


class Connection:
    """One kept-alive HTTP connection that carries one request at a time, and reads answers whole."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer. HAProxy closes idle connections when it takes over a new list of servers: then once more."""
        for _ in range(3):
            try:
                return await self._asked(method, path, body)
            except (asyncio.IncompleteReadError, ConnectionError):
                self.close()
        return await self._asked(method, path, body)

    async def _asked(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host.hostname, self._host.port, limit=1 << 22)
        assert self._reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        told = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        size = next(int(line.split(b":")[1]) for line in told.split(b"\r\n") if line.startswith(b"content-length"))
        return int(told[9:12]), json.loads(await self._reader.readexactly(size))

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
