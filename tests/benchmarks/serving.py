"""What serving costs over the funnel itself: CPU and latency of the pure funnel, the fused and the split service, and plain peers.

    python -m tests.benchmarks.serving [--json] [--quick] [--config FILE]... [--set PATH=VALUE]...

CPU is that of the whole process tree (raylet, GCS, HAProxy, Valkey, replicas), without the load generator, whose own is shown.
The promoted version of the configuration is served; where there is none, it is trained first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.embedded import EmbeddedValkey
from cluster.redis_store import RedisStore
from cluster.registry_url import open_registry
from deployments.serving import wait_until_ready
from recsys.config import Config, load
from recsys.features.store import NewEvent
from recsys.funnel import STAGES, Funnel, FunnelRequest
from tests.benchmarks.load import Load, free_port, open_loop, recommend_bodies, wrk
from tests.processes import below

BATCH = 32
KEYS = (
    "cpu_ms_inprocess",
    "cpu_ms_fused",
    "cpu_ms_split",
    "fused_rps",
    "split_rps",
    "split_over_fused",
    "fused_over_plain_app",
    "fast_over_default",
    "p50_idle_ms",
    "p99_half_load_ms",
    "errors",
)


class Line(NamedTuple):
    """One row of the table."""

    what: str
    connections: int | str
    load: Load
    cpu_ms: float


class Bench:
    """The settings of a run, and its rows."""

    def __init__(self, config: Config, files: list[str], settings: list[str], *, quick: bool) -> None:
        self.config, self.files, self.settings = config, files, settings
        self.seconds, self.warm_s = (3.0, 1.0) if quick else (8.0, 3.0)
        registry = open_registry(config.place("registry"))
        self.bundle = registry.local_copy("production")
        self.users = Funnel.load(self.bundle, stages=()).users.ids.to_pylist()
        self.bodies = recommend_bodies(self.users)
        self.lines: list[Line] = []
        self.say = Console(stderr=True).print

    # ---- the funnel itself ----------------------------------------------------------------------------------------

    def in_process(self) -> Line:
        """The funnel in micro-batches of 32, user state read from Valkey: what no service can be cheaper than."""
        told = subprocess.run([*self._me("--in-process"), str(self.seconds)], stdout=subprocess.PIPE, text=True, check=True, env=_home())
        found = json.loads(told.stdout.strip().splitlines()[-1])
        return self._note("in process, batches of 32", "", Load(**found["load"]), found["cpu_ms"])

    # ---- services -------------------------------------------------------------------------------------------------

    def service(self, topology: str, plane: str, connections: tuple[int, ...], *, half: bool = False) -> dict[int | str, Line]:
        """Load on the service in this topology; `half`: also open-loop at half of the peak."""
        name = topology if plane == "haproxy" else f"{topology}, {plane} data plane"
        port = free_port()
        with self._running([*self._me("--serve"), topology, plane, str(port)], port) as pid:
            return self._loads(name, port, pid, connections, half=half)

    def plain(self, connections: tuple[int, ...]) -> dict[int | str, Line]:
        """Load on FastAPI and uvicorn round the same funnel, with as many workers as there are gateways."""
        port, workers = free_port(), self.config.serve.stages.gateway.min_replicas
        with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder) / "store") as store:
            fill(store.url, self.users)
            command = [sys.executable, "-m", "uvicorn", "--factory", "tests.benchmarks.plain_app:create", "--workers", str(workers)]
            command += ["--port", str(port), "--log-level", "warning", "--no-access-log"]
            # Faiss asks OpenMP's own number in every thread of the pool: unset, they fight for the cores (measured: a fourth of the answers).
            env = {"PLAIN_APP_BUNDLE": str(self.bundle), "PLAIN_APP_STORE": store.url, "OMP_NUM_THREADS": "1"}
            with self._running(command, port, env) as pid:
                return self._loads(
                    f"plain FastAPI + uvicorn, {workers} workers", port, pid, connections, also=store._process.pid if store._process else 0
                )

    def _loads(
        self, name: str, port: int, pid: int, connections: tuple[int, ...], *, half: bool = False, also: int = 0
    ) -> dict[int | str, Line]:
        url, found = f"http://127.0.0.1:{port}", {}
        for n in connections:
            wrk(url, "/v1/recommend", self.bodies, connections=n, seconds=self.warm_s)
            before = cpu_s(pid, also)
            load = wrk(url, "/v1/recommend", self.bodies, connections=n, seconds=self.seconds)
            found[n] = self._note(name, n, load, 1000 * (cpu_s(pid, also) - before) / max(load.requests, 1))
        if half:
            rate = found[connections[-1]].load.per_s / 2
            before = cpu_s(pid, also)
            load = open_loop(url, "/v1/recommend", self.bodies, per_s=rate, seconds=self.seconds)
            found["half"] = self._note(name, f"open loop, {rate:.0f}/s", load, 1000 * (cpu_s(pid, also) - before) / load.requests)
        return found

    @contextlib.contextmanager
    def _running(self, command: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[int]:
        process = subprocess.Popen(command, env=_home() | (env or {}), stdout=sys.stderr, start_new_session=True)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}")
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)

    def _me(self, mode: str) -> list[str]:
        own = [f"--config={f}" for f in self.files] + [f"--set={s}" for s in self.settings]
        return [sys.executable, "-m", "tests.benchmarks.serving", *own, mode]

    def _note(self, what: str, connections: int | str, load: Load, cpu_ms: float) -> Line:
        line = Line(what, connections, load, cpu_ms)
        self.lines.append(line)
        self.say(f"  {what} {connections}: {load.per_s:.0f}/s, {cpu_ms:.2f} CPU-ms, p50 {load.p50_ms:.1f} ms, {load.errors} errors")
        return line


def cpu_s(pid: int, also: int = 0) -> float:
    """CPU seconds of the process tree below `pid`, and of `also`."""
    return sum(seen.cpu_s for seen in below(pid, *([also] if also else [])).values())


def fill(url: str, users: list[str]) -> None:
    """Give every user a few live events, so that reading user state is not reading nothing."""

    async def write() -> None:
        store = RedisStore(url)
        now = int(time.time() * 1000)
        events = [NewEvent(u, f"live-{n}", "click", now - n, None, f"{u}-{n}") for u in users for n in range(5)]
        await store.append(events)
        await store.close()

    asyncio.run(write())


# ---- what runs in processes of its own ----------------------------------------------------------------------------


def run_in_process(config: Config, seconds: float) -> None:
    """Time the funnel here; the last line of output is JSON."""
    from deployments.stage import pin_threads

    pin_threads(1)
    funnel = Funnel.load(open_registry(config.place("registry")).local_copy("production"))
    users = funnel.users.ids.to_pylist()
    rng = np.random.default_rng(0)

    async def measure(store: RedisStore, for_s: float) -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + for_s
        while time.perf_counter() < until:
            began = time.perf_counter()
            ids = [users[i] for i in rng.integers(0, len(users), BATCH)]
            states = await store.read(ids, timeout_s=5.0)
            queries = funnel.queries([FunnelRequest(u, 10, time.time(), events=s.events) for u, s in zip(ids, states, strict=True)])
            funnel.page(queries, funnel.recommend(queries))
            times.append(time.perf_counter() - began)
        return times

    async def run(url: str) -> dict[str, Any]:
        store = RedisStore(url)
        await measure(store, 2.0)
        before = cpu_s(os.getpid())
        began = time.perf_counter()
        times = await measure(store, seconds)
        took, used = time.perf_counter() - began, cpu_s(os.getpid()) - before
        await store.close()
        n = len(times) * BATCH
        p50, p99 = np.percentile(times, [50, 99]) * 1000
        return {"load": Load(n, took, 0, float(p50), float(p99), 0.0)._asdict(), "cpu_ms": 1000 * used / n}

    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder) / "store") as valkey:
        fill(valkey.url, users)
        print(json.dumps(asyncio.run(run(valkey.url))))


def run_service(config: Config, topology: str, plane: str, port: int) -> None:
    """Serve until SIGTERM, over a store of its own."""
    from deployments.serving import running, until_interrupted

    place = {"fused": "gateway", "split": "own"}[topology]
    serving = config.serve.model_validate(
        config.serve.model_dump() | {"port": port, "data_plane": plane, "topology": dict.fromkeys(STAGES, place), "host": "127.0.0.1"}
    )
    with tempfile.TemporaryDirectory() as folder:
        with EmbeddedValkey(Path(folder) / "store") as valkey:
            fill(valkey.url, Funnel.load(open_registry(config.place("registry")).local_copy("production"), stages=()).users.ids.to_pylist())
        settled = config.model_copy(update={"serve": serving, "registry": config.place("registry"), "workdir": folder})
        with running(settled, lambda _: None):
            until_interrupted()


def _home() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def report(bench: Bench, *, quick: bool) -> dict[str, float | int | None]:
    """Run everything; the keys of the last line."""
    found: dict[str, float | int | None] = dict.fromkeys(KEYS)
    found["cpu_ms_inprocess"] = bench.in_process().cpu_ms
    fused = bench.service("fused", "haproxy", (1, 16, 64), half=True)
    split = bench.service("split", "haproxy", (1, 16, 64))
    found |= {"cpu_ms_fused": fused[64].cpu_ms, "cpu_ms_split": split[64].cpu_ms}
    found |= {"fused_rps": fused[64].load.per_s, "split_rps": split[64].load.per_s}
    found["split_over_fused"] = split[64].load.per_s / fused[64].load.per_s
    found |= {"p50_idle_ms": fused[1].load.p50_ms, "p99_half_load_ms": fused["half"].load.p99_ms}
    if not quick:
        found["fast_over_default"] = fused[64].load.per_s / bench.service("fused", "python", (64,))[64].load.per_s
        found["fused_over_plain_app"] = fused[64].load.per_s / bench.plain((64,))[64].load.per_s
    found["errors"] = sum(line.load.errors for line in bench.lines)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


def table(lines: list[Line]) -> Table:
    """The rows for people."""
    shown = Table("", "connections", "answers/s", "CPU-ms an answer", "p50 ms", "p99 ms", "errors", "generator CPU-s", header_style="bold")
    for what, connections, seen, cpu_ms in lines:
        row = (f"{seen.per_s:,.0f}", f"{cpu_ms:.2f}", f"{seen.p50_ms:.1f}", f"{seen.p99_ms:.1f}", str(seen.errors), f"{seen.own_cpu_s:.1f}")
        shown.add_row(what, str(connections), *row)
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="short runs, no peers")
    parser.add_argument("--config", action="append", default=[], help="configuration (default: configs/quickstart.yaml)")
    parser.add_argument("--set", action="append", default=[], help="dotted.path=value over it")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = given.config or [str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")]
    config = load([Path(f) for f in files], given.set)
    if given.in_process:
        return run_in_process(config, float(given.in_process))
    if given.serve:
        return run_service(config, given.serve[0], given.serve[1], int(given.serve[2]))
    if open_registry(config.place("registry")).aliases().get("production") is None:
        train = [sys.executable, "-m", "cluster", "train", *(f"--config={f}" for f in files), *(f"--set={s}" for s in given.set)]
        subprocess.run(train, check=True, stdout=sys.stderr)
    bench = Bench(config, files, given.set, quick=given.quick)
    found = report(bench, quick=given.quick)
    Console(width=140).print(table(bench.lines))
    if given.json:
        print(json.dumps(found))
    return None


if __name__ == "__main__":
    main()
