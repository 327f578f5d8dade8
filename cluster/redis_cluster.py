"""A Redis Cluster by URL, behind the calls that the store makes of one server: `redis+cluster://`, or `rediss+cluster://` with TLS.

    redis+cluster://user:password@host1:6379,host2:6379

Any of the named nodes tells of the others. All keys of a user, of a partition and of the item log carry one hash tag, so every
script and every atomic step stays in one slot; reads over many partitions go to all nodes at once. Where slots move or a replica
takes its primary's place, the client follows. A primary answers before its replicas have what it answers to: see
`store.replicas_acked` for what a failover may cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio.cluster as aio
from redis import exceptions as faults
from redis._parsers.commands import AsyncCommandsParser
from redis.asyncio.connection import parse_url
from redis.cluster import ClusterNode, RedisCluster

from cluster.redis_round import IN_MEMORY, Call, Kept

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


PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.0)
"""After each round in which a node was away, or sent us elsewhere; behind the last the answers stand as they are."""
AT_ONCE = 16
"""Rounds of one client under way, and so its connections to a node; more wait, as they do for the pool of one server."""
_ELSEWHERE = (faults.TryAgainError, faults.ClusterDownError, faults.MasterDownError, faults.ConnectionError, OSError)
"""Nothing was done, or what was done may be repeated: scripts of the store are idempotent or fenced."""


class _Keys(AsyncCommandsParser):
    """All commands of ours name their key first. To ask a node for its table of commands, as the client would at every look round, fails
    where that very node is the one that has gone."""

    async def initialize(self, node: Any = None) -> None:
        self.node = node

    async def get_keys(self, *args: Any) -> tuple[Any, ...]:
        return tuple(args[1:] if args[0] == "MGET" else args[1:2])


class _Sent:
    """A command on its way: to the node of its slot, or where that node sends it for once (ASK)."""

    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.command = aio.PipelineCommand(0, *args, **options)
        self.key = args[3] if args[0] in ("EVAL", "EVALSHA") else args[1]
        self.asked: aio.ClusterNode | None = None

    @property
    def answer(self) -> Any:
        return self.command.result


class Pipeline(aio.ClusterPipeline):
    """Commands for many slots in one round; each node gets its own over one connection, in order.

    The library's own has no way to wait for replicas on the connection that wrote, sends whatever was redirected one by one, closes
    the connections of all when one node is away, and takes no scripts by digest.
    """

    def __init__(self, client: ClusterClient) -> None:
        super().__init__(client)
        self._calls: list[_Sent] = []

    async def initialize(self) -> Pipeline:
        """Nothing: the round itself learns of the nodes."""
        return self

    async def reset(self) -> None:
        """Forget what was not sent."""
        self._calls = []

    def execute_command(self, *args: Any, **options: Any) -> Pipeline:
        """Note a command."""
        self._calls.append(_Sent(args, options))
        return self

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script that the node was told before."""
        return self.execute_command("EVALSHA", sha, numkeys, *keys_and_args)

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:  # noqa: ARG002 - the library's shape
        """The answers; or the faults among them, the first of which is raised."""
        answers = await self.execute_kept(IN_MEMORY)
        if raise_on_error:
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers

    async def execute_kept(self, kept: Kept) -> list[Any]:
        """The answers, or the faults among them, of changes that are `kept`."""
        calls, self._calls = self._calls, []
        client: ClusterClient = self.cluster_client
        async with client.turn:
            left = calls
            for pause_s in PAUSES_S:
                by_node: dict[str, tuple[aio.ClusterNode, list[_Sent]]] = {}
                await client.initialize()
                with as_server_faults():
                    for call in left:
                        node = call.asked or client.nodes_manager.get_node_from_slot(client.keyslot(call.key))
                        by_node.setdefault(node.name, (node, []))[1].append(call)
                await asyncio.gather(*(_told(node, mine, kept) for node, mine in by_node.values()))
                left = [call for node, mine in by_node.values() for call in mine if await client.again(node, call)]
                if not left:
                    break
                await asyncio.sleep(pause_s)
        return [call.answer for call in calls]


async def _told(node: aio.ClusterNode, calls: list[_Sent], kept: Kept) -> None:
    """One round to one node: the answers or faults of all, and of what is not kept a fault."""
    sent = []
    for call in calls:
        sent += [aio.PipelineCommand(0, "ASKING"), call.command] if call.asked else [call.command]
        call.command.result = None
    behind = [aio.PipelineCommand(0, *command) for command in kept.commands]
    try:
        await node.execute_pipeline([*sent, *behind])
    except (faults.RedisError, OSError) as fault:
        for call in calls:
            call.command.result = fault
        return
    for call, answer in zip(calls, kept.confirmed([call.answer for call in calls], [said.result for said in behind]), strict=True):
        call.command.result = answer


class ClusterClient(aio.RedisCluster):
    """The asynchronous client."""

    _initialize: bool

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands_parser = _Keys()
        self.turn = asyncio.Semaphore(AT_ONCE)
        self._named = dict(self.nodes_manager.startup_nodes)

    async def initialize(self, *given: Any, **named: Any) -> ClusterClient:
        """Learn of the nodes, where that is due: from any that is known, or that the URL names."""
        if self._initialize:
            for name, node in self._named.items():  # the library forgets them once others have told it of the cluster
                self.nodes_manager.startup_nodes.setdefault(name, node)
            with as_server_faults():
                await super().initialize(*given, **named)
        return self

    async def again(self, node: aio.ClusterNode, call: _Sent) -> bool:
        """Whether a call has to be sent once more, and all that is to be known for it."""
        fault, call.asked = call.answer, None
        if isinstance(fault, faults.MovedError):
            await self.nodes_manager.move_slot(fault)
        elif isinstance(fault, faults.AskError):
            call.asked = self.get_node(fault.host, fault.port)
            self._initialize = self._initialize or call.asked is None
        elif isinstance(fault, faults.TimeoutError | TimeoutError):
            self._initialize = True
            return False
        elif isinstance(fault, _ELSEWHERE) and not isinstance(fault, faults.AuthenticationError | faults.MaxConnectionsError):
            if isinstance(fault, faults.ConnectionError | OSError):
                node.update_active_connections_for_reconnect()
                await node.disconnect_free_connections()
            self._initialize = True
        else:
            return False
        return True

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """One command, at the node that has its key, or that it names."""
        if "target_nodes" in kwargs or args[0] in self.command_flags:
            with as_server_faults():
                return await super().execute_command(*args, **kwargs)
        (answer,) = await Pipeline(self).execute_command(*args, **kwargs).execute()
        return answer

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Any:  # noqa: ARG002 - the shape of a server's client
        """Commands for many slots in one round; each node keeps the order."""
        return Pipeline(self)

    async def time(self, *_: Any) -> tuple[int, int]:
        """The clock of one node: all should be kept by NTP."""
        seconds, micros = await self.execute_command("TIME")
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


def run_blocking(client: Any, calls: Sequence[Call], key: str, kept: Kept) -> list[Any]:
    """`redis_round.run` for the blocking client of a server or of a cluster: commands of one slot, that of `key`."""
    if not clustered(client):
        return _told_blocking(client, calls, kept)
    answers: list[Any] = []
    asked: ClusterNode | None = None
    for pause_s in PAUSES_S:
        node = asked or client.get_node_from_key(key)
        answers = _told_blocking(client.get_redis_connection(node), calls, kept, asking=asked is not None)
        fault = next((a for a in answers if isinstance(a, faults.AskError | faults.TryAgainError | faults.ClusterDownError)), None)
        if fault is None:
            break
        asked = None
        if isinstance(fault, faults.AskError) and not isinstance(fault, faults.MovedError):
            asked = client.get_node(fault.host, fault.port)
        else:
            client.nodes_manager.initialize()
        time.sleep(pause_s)
    return answers


def _told_blocking(server: redis.Redis, calls: Sequence[Call], kept: Kept, *, asking: bool = False) -> list[Any]:
    with server.pipeline(transaction=False) as pipe:
        for call in calls:
            if asking:
                pipe.execute_command("ASKING")
            pipe.execute_command(*call)
        for command in kept.commands:
            pipe.execute_command(*command)
        said = pipe.execute(raise_on_error=False)
    behind = len(said) - len(kept.commands)
    return kept.confirmed(said[1:behind:2] if asking else said[:behind], said[behind:])


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
