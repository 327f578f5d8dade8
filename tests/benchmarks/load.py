"""Load on an HTTP service, and what it costs to make it: wrk for closed-loop peaks, an open-loop generator for latency at a rate.

Open loop: requests start by a clock, whether earlier ones were answered or not, and latency counts from the planned start.
A closed loop would wait with the server and never see its queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

LUA = """
local bodies = {}
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
local n = 0
request = function()
  n = n %% #bodies + 1
  return wrk.format("POST", "%(path)s", {["Content-Type"] = "application/json"}, bodies[n])
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("ERRORS connect=%%d read=%%d write=%%d status=%%d timeout=%%d\\n", e.connect, e.read, e.write, e.status, e.timeout))
  io.write(string.format("RESULT %%d %%d %%d %%f %%f\\n", summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


class Load(NamedTuple):
    """What a run of load saw: requests, seconds, errors (anything but 2xx), latency in ms, and the generator's own CPU seconds."""

    requests: int
    seconds: float
    errors: int
    p50_ms: float
    p99_ms: float
    own_cpu_s: float

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


def wrk(url: str, path: str, bodies: Sequence[bytes], *, connections: int, seconds: float) -> Load:
    """Closed loop over so many connections. Exits with a sentence where wrk is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; it makes the load at a fraction of what Python would take. apt install wrk")
    with tempfile.TemporaryDirectory() as folder:
        lines, script = Path(folder) / "bodies.jsonl", Path(folder) / "post.lua"
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        script.write_text(LUA % {"bodies": lines, "path": path})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "10s", "-s", str(script), url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        text = process.stdout.read()
        process.stdout.close()
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = code
    told = next((line.split()[1:] for line in text.splitlines() if line.startswith("RESULT")), None)
    if told is None:
        raise SystemExit(f"wrk said nothing of a result:\n{text}")
    if int(told[2]):
        sys.stderr.write(next(line for line in text.splitlines() if line.startswith("ERRORS")) + "\n")
    return Load(int(told[0]), int(told[1]) / 1e6, int(told[2]), float(told[3]), float(told[4]), used.ru_utime + used.ru_stime)


class Line(asyncio.Protocol):
    """One kept-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._held = b""
        self._waiting: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, gap, body = self._held.partition(b"\r\n\r\n")
        if not gap:
            return
        length = next(int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length"))
        if len(body) >= length and self._waiting is not None:
            self._held = body[length:]
            self._waiting.set_result(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(0)

    async def ask(self, raw: bytes) -> int:
        """The status of the answer; 0 where the connection broke."""
        if self.transport is None:
            return 0
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(raw)
        return await self._waiting


def open_loop(url: str, path: str, bodies: Sequence[bytes], *, per_s: float, seconds: float, connections: int = 64) -> Load:
    """Poisson arrivals at a mean rate; a request that finds no free connection waits, and its wait counts."""
    host = urlsplit(url)
    heads = [
        f"POST {path} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(b)}\r\n\r\n".encode() + b
        for b in bodies
    ]
    plan = np.cumsum(np.random.default_rng(0).exponential(1 / per_s, int(per_s * seconds)))

    async def run() -> tuple[list[float], int]:
        loop, free = asyncio.get_running_loop(), asyncio.Queue[Line]()
        for _ in range(connections):
            free.put_nowait((await loop.create_connection(Line, host.hostname, host.port))[1])
        latencies: list[float] = []
        errors = 0

        async def one(n: int, due: float) -> None:
            nonlocal errors
            line = await free.get()
            status = await line.ask(heads[n % len(heads)])
            latencies.append(1000 * (time.perf_counter() - due))
            errors += not 200 <= status < 300
            if line.transport is None:
                line = (await loop.create_connection(Line, host.hostname, host.port))[1]
            free.put_nowait(line)

        began = time.perf_counter()
        tasks = []
        for n, offset in enumerate(plan.tolist()):
            wait = began + offset - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(n, began + offset)))
        await asyncio.gather(*tasks)
        while not free.empty():
            line = free.get_nowait()
            if line.transport is not None:
                line.transport.close()
        return latencies, errors

    used = time.process_time()
    latencies, errors = asyncio.run(run())
    p50, p99 = np.percentile(latencies, [50, 99])
    return Load(len(latencies), float(plan[-1]), errors, float(p50), float(p99), time.process_time() - used)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def recommend_bodies(users: Sequence[str], k: int = 10) -> list[bytes]:
    """One request body per user."""
    return [json.dumps({"user_id": user, "k": k}).encode() for user in users]
