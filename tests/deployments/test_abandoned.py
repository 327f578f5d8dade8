"""HAProxy of a service that was killed is ended before the next one starts on its port; nobody else's process is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime import haproxy_folder
from deployments.serving import check_port
from recsys.errors import RayfunnelError
from recsys.serve_config import ServeConfig
from tests.benchmarks.load import free_port

LISTENS = """
import os, socket, time
held = socket.socket()
held.bind(("127.0.0.1", {port}))
held.listen()
print(os.getpid(), flush=True)
time.sleep(60)
"""
STARTS = "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); {then}"


class Killed:
    """A service whose processes are stand-ins of the right names: HAProxy, which listens, and what had started it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.started = folder, port, list[subprocess.Popen[str]]()
        for name in ("haproxy", "raylet"):
            (folder / name).symlink_to(os.path.realpath(sys.executable))

    def proxy(self, configuration: Path, *, under: str = sys.executable, then: str = "") -> int:
        """The pid of an HAProxy that listens; whoever started it has ended, unless `then` says otherwise."""
        child = [str(self.folder / "haproxy"), "-c", LISTENS.format(port=self.port), "-f", str(configuration)]
        parent = subprocess.Popen([under, "-c", STARTS.format(then=then), *child], stdout=subprocess.PIPE, text=True)
        self.started.append(parent)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if not then:
            parent.wait()
        return pid


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    made = Killed(tmp_path, free_port())
    yield made
    for parent in made.started:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
    shutil.rmtree(haproxy_folder(made.port), ignore_errors=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def test_the_proxy_of_a_killed_service_gives_the_port_back(killed: Killed, caplog: pytest.LogCaptureFixture) -> None:
    pid = killed.proxy(haproxy_folder(killed.port) / "node" / "haproxy.cfg")
    check_port(ServeConfig(port=killed.port))
    assert not alive(pid)
    assert f"HAProxy (pid {pid}) of a service that was killed still held port {killed.port}; it is ended" in caplog.text


def test_the_proxy_of_a_living_service_and_of_anybody_else_stays(killed: Killed) -> None:
    living = killed.proxy(haproxy_folder(killed.port) / "haproxy.cfg", under=str(killed.folder / "raylet"), then="child.wait()")
    with pytest.raises(RayfunnelError, match="cannot be used: Address already in use"):
        check_port(ServeConfig(port=killed.port))
    assert alive(living)
    os.kill(living, signal.SIGKILL)
    foreign = killed.proxy(Path("/etc/haproxy/haproxy.cfg"))
    with pytest.raises(RayfunnelError, match="cannot be used: Address already in use"):
        check_port(ServeConfig(port=killed.port))
    assert alive(foreign)
    os.kill(foreign, signal.SIGKILL)
