"""`rayfunnel` is the offline commands and those that serve; a port in use is told in a sentence; Ctrl-C leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recsys.errors import RayfunnelError
from recsys.serve_config import ServeConfig
from tests.conftest import free_port
from tests.deployments.client import Client, eventually
from tests.processes import all_processes
from tests.small import Small

RAYFUNNEL = [sys.executable, "-c", "from deployments.cli import main; main()"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RAYFUNNEL, *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_it_has_the_offline_commands_and_those_that_serve() -> None:
    told = run("--help").stdout
    for command in ("prepare", "train", "evaluate", "promote", "serve", "quickstart"):
        assert command in told
    assert "--once" in run("quickstart", "--help").stdout


def test_a_port_in_use_is_told_in_a_sentence(small: Small) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--config", str(small.config.base / "small.yaml"), "--port", str(port))
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 cannot be used: Address already in use." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_needs_root_and_a_foreign_address_are_told_too() -> None:
    from deployments.serving import check_port

    with pytest.raises(RayfunnelError, match=r"Port 8123 on 203\.0\.113\.7 cannot be used"):
        check_port(ServeConfig(host="203.0.113.7", port=8123))


def test_a_proxy_of_serve_that_does_not_come_up_in_time_is_a_sentence(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import serve

    from deployments import serving

    def late(**_: object) -> None:
        raise ray.exceptions.ActorDiedError

    for owner, name, does in ((serving, "start_ray", None), (serve, "start", late), (serve, "shutdown", None), (ray, "shutdown", None)):
        monkeypatch.setattr(owner, name, does or (lambda *_, **__: None))
    config = small.config.model_copy(update={"serve": ServeConfig(port=free_port(), data_plane="python")})
    with (
        pytest.raises(RayfunnelError, match=r"^Ray Serve did not start: The actor died .* give the command again"),
        serving.running(config, lambda _: None),
    ):
        pass


@pytest.mark.ray
def test_serve_answers_until_ctrl_c_and_leaves_nothing_behind(small: Small) -> None:
    port = free_port()
    command = [*RAYFUNNEL, "serve", "-c", str(small.config.base / "small.yaml"), "--port", str(port), "--set", "serve.data_plane=python"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_SERVE_")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        eventually(lambda: any("Serving at" in line for line in lines) or process.poll() is not None, 240, "it serves")
        assert process.poll() is None, "".join(lines)
        page = Client(f"http://127.0.0.1:{port}").recommend("u1", 3)
        assert (page.status, len(page.json["items"])) == (200, 3)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        reader.join(10)
        process.stdout.close()
    assert process.returncode == 0, "".join(lines)
    store = str(Path(small.config.place("store")))
    eventually(lambda: not any(store in seen.name for seen in all_processes().values()), 20, "the store's server has ended")
