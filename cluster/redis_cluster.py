"""A Redis Cluster by URL, behind the calls that the store makes of one server: `redis+cluster://`, or `rediss+cluster://` with TLS.

    redis+cluster://user:password@host1:6379,host2:6379

Any of the named nodes tells of the others. All keys of a user, of a partition and of the item log carry one hash tag, so every
script and every atomic step stays in one slot; reads over many partitions go to all nodes at once. Where a node moves or is
replaced, the client follows. WAITAOF cannot be asked of "the connection that wrote" here, so nodes should have
`appendfsync always`; another setting is warned of.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio.cluster as aio
from redis import exceptions as faults
from redis.asyncio.connection import parse_url
from redis.cluster import ClusterNode, RedisCluster

MARK = "+cluster"
_POLL_S = 0.02


def is_cluster(url: str) -> bool:
    """Whether a URL names a cluster."""
    return urlsplit(url).scheme.endswith(MARK)


@contextmanager
def as_server_faults() -> Iterator[None]:
    """What the client says of a cluster that it cannot reach is no RedisError; callers know those alone."""
    try:
        yield
    except faults.RedisClusterException as fault:
        raise faults.ConnectionError(str(fault)) from (fault.__cause__ or fault.__context__ or fault)


class Pipeline(aio.ClusterPipeline):
    """A pipeline that takes scripts by digest: the keys of each are in one slot."""

    async def initialize(self) -> Pipeline:
        """Learn of the nodes."""
        with as_server_faults():
            await super().initialize()
        return self

    async def execute(self, *given: Any, **named: Any) -> list[Any]:
        """The answers, or the faults among them."""
        with as_server_faults():
            answers: list[Any] = await super().execute(*given, **named)
        return answers

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script that the node was told before."""
        return self.execute_command("EVALSHA", sha, numkeys, *keys_and_args)


class ClusterClient(aio.RedisCluster):
    """The asynchronous client."""

    async def initialize(self, *given: Any, **named: Any) -> ClusterClient:
        """Learn of the nodes; every first command does."""
        with as_server_faults():
            await super().initialize(*given, **named)
        return self

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """One command, at the node that has its key."""
        with as_server_faults():
            return await super().execute_command(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Any:  # noqa: ARG002 - the shape of a server's client
        """Commands for many slots in one round; each node keeps the order."""
        return Pipeline(self)

    async def time(self, *_: Any) -> tuple[int, int]:
        """The clock of one node: all should be kept by NTP."""
        seconds, micros = await self.execute_command("TIME", target_nodes=self.get_default_node())
        return int(seconds), int(micros)

    async def xread(self, streams: Any, count: int | None = None, block: int | None = None, **_: Any) -> list[Any]:
        """As of one server; streams of many slots are asked again and again until one of them has something, or `block` ms are over."""
        until = time.monotonic() + (block or 0) / 1000
        while True:
            async with self.pipeline() as pipe:
                for name, after in streams.items():
                    pipe.xrange(name, min=f"({after}", max="+", count=count)
                pages = await pipe.execute()
            found = [[name.encode() if isinstance(name, str) else name, page] for name, page in zip(streams, pages, strict=True) if page]
            if found or time.monotonic() >= until:
                return found
            await asyncio.sleep(_POLL_S)


class BlockingClient(RedisCluster):
    """The blocking client. It connects when it is made."""

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """One command, at the node that has its key."""
        with as_server_faults():
            return super().execute_command(*args, **kwargs)


def clustered(client: object) -> bool:
    """Whether a client is of a cluster."""
    return isinstance(client, ClusterClient | RedisCluster)


def client_of(url: str, password: str | None, **settings: Any) -> ClusterClient:
    """The client for an event loop. ValueError for what is no address."""
    hosts, options = _parsed(url, password)
    return ClusterClient(startup_nodes=[aio.ClusterNode(*host) for host in hosts], protocol=2, max_connections=64, **options, **settings)


def blocking_client_of(url: str, password: str | None, **settings: Any) -> redis.Redis:
    """The client for a thread of one's own, connected. Faults are the client's own."""
    hosts, options = _parsed(url, password)
    with as_server_faults():
        client: Any = BlockingClient(startup_nodes=[ClusterNode(*host) for host in hosts], protocol=2, **options, **settings)
    return client


def check(url: str) -> None:
    """ValueError for what is no address of a cluster."""
    _parsed(url, None)


def _parsed(url: str, password: str | None) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    scheme = parts.scheme.removesuffix(MARK)
    if parts.path not in ("", "/", "/0"):
        raise ValueError(f"a cluster has database 0 alone, not '{parts.path.strip('/')}'")
    found, options = [], dict[str, Any]()
    for host in hosts.split(","):
        told: Mapping[str, Any] = parse_url(urlunsplit((scheme, f"{login}@{host}" if login else host, "", parts.query, "")))
        if not told.get("host"):
            raise ValueError(f"'{hosts}' names a node without a host")
        options = {name: value for name, value in told.items() if name not in ("host", "port", "db", "connection_class")}
        found.append((str(told["host"]), int(told.get("port", 6379))))
    if scheme == "rediss":
        options["ssl"] = True
    elif scheme != "redis":
        raise ValueError(f"'{parts.scheme}' is none of redis{MARK} and rediss{MARK}")
    return found, options if "password" in options else options | {"password": password}
