"""What users of the service notice while parts of it die: kills and hangs under 16 connections, and the answers counted.

    python -m tests.benchmarks.faults [--json] [--quick] [--rounds N] [--only NAME]... [--config FILE]... [--set PATH=VALUE]...

Every stage is its own deployment. Before anything is hurt, the pages of 200 users are compared with the pure funnel's. Then, one
round each: a replica of every deployment and the store's server are killed with SIGKILL, and the store hangs for ten seconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.registry_url import open_registry
from deployments.serving import APPLICATION, wait_until_ready
from recsys.config import load
from recsys.funnel import STAGES, Funnel, FunnelRequest
from tests.benchmarks.load import free_port
from tests.deployments.client import Client, Tally, crowd, eventually
from tests.processes import all_processes, below

CONNECTIONS = 16
DEPLOYMENTS = ("gateway", *STAGES, "store")
STORE_SERVER, STORE_HANGS = "store's server", "store hangs"


class Round(NamedTuple):
    """One thing that was hurt and what 16 connections saw: `back_s` until it stood again, events by status."""

    hurt: str
    tally: Tally
    back_s: float
    events: Counter[int | str]


class Service:
    """A split service in a process of its own."""

    def __init__(self, given: argparse.Namespace, files: list[str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = [*(f"--config={f}" for f in files), *(f"--set={s}" for s in given.set)]
        command = [sys.executable, "-m", "tests.benchmarks.serving", *own, "--serve", "split", "haproxy", str(self.port)]
        self.process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
        self._servers: set[int] = set()
        try:
            wait_until_ready(self.url)
            self.pids(STORE_SERVER)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def pids(self, name: str) -> list[int]:
        """Replicas of a deployment, or the store's server."""
        title = f"ray::ServeReplica:{APPLICATION}:{name}"
        found = below(self.process.pid).items()
        if name in (STORE_SERVER, STORE_HANGS):  # it outlives its owner, and is then nobody's child until the next one adopts it
            self._servers |= {pid for pid, seen in found if "valkey-server" in seen.name.split(" ")[0]}
            return sorted(self._servers & all_processes().keys())
        return sorted(pid for pid, seen in found if seen.name.split(" ")[0] == title)

    def same_pages(self, funnel: Funnel, n: int = 200) -> float:
        """The largest difference of a score over the pages of n users; fails where an item differs."""
        users = funnel.users.ids.to_pylist()[:n]
        queries = funnel.queries([FunnelRequest(u, 10, time.time()) for u in users])
        pages = funnel.page(queries, funnel.recommend(queries))

        def ask(user: str) -> Any:
            client = Client(self.url)
            try:
                return client.recommend(user, 10)
            finally:
                client.close()

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = list(pool.map(ask, users))
        worst = 0.0
        for user, told, page in zip(users, answers, pages, strict=True):
            assert told.status == 200 and not told.json["degraded"], (user, told)
            assert [i["item_id"] for i in told.json["items"]] == [i.item_id for i in page], user
            worst = max(worst, float(np.abs([i["score"] for i in told.json["items"]] - np.array([i.score for i in page])).max()))
        return worst

    def hurt(self, name: str, seconds: float) -> Round:
        """Load for `seconds`, in whose first part the thing is hurt."""
        events: Counter[int | str] = Counter()
        done = threading.Event()

        def click() -> None:
            client = Client(self.url)
            while not done.wait(0.2):
                try:
                    told = client.ask("POST", "/v1/events", {"user_id": "u-faults", "item_id": "1", "event": "click"})
                except (OSError, http.client.HTTPException):  # HAProxy closes idle connections when it takes over a new list of servers
                    events["idle connection closed"] += 1
                    client.close()
                    continue
                events[told.status if told.status != 503 or "retry-after" in told.headers else "503 without Retry-After"] += 1
            client.close()

        clicks = threading.Thread(target=click, daemon=True)
        with crowd(self.url, CONNECTIONS, lambda n: str(n % 900 + 1)) as tally:
            clicks.start()
            began = time.monotonic()
            time.sleep(3)
            before = self.pids(name)
            if name == STORE_HANGS:
                os.kill(before[0], signal.SIGSTOP)
                time.sleep(10)
                os.kill(before[0], signal.SIGCONT)
                took = 0.0
            else:
                os.kill(before[0], signal.SIGKILL)
                took = eventually(lambda: len(set(self.pids(name)) - {before[0]}) >= len(before), 90, f"{name} is back")
            time.sleep(max(3.0, seconds - (time.monotonic() - began)))
            done.set()
        clicks.join()
        calm = Client(self.url).recommend("1", 10)
        assert (calm.status, calm.json["degraded"]) == (200, []), f"after {name}: {calm}"
        return Round(name, tally, took, events)


def table(rounds: list[Round]) -> Table:
    """The rounds for people."""
    shown = Table(
        "hurt", "answers", "not 200", "broken connections", "slowest s", "back after s", "degraded", "events", header_style="bold"
    )
    for r in rounds:
        bad = {s: n for s, n in r.tally.statuses.items() if s != 200}
        stood_in = Counter[str]()
        for (stage, rung, _), n in r.tally.degraded.items():
            stood_in[f"{stage}: {rung}"] += n
        degraded = ", ".join(f"{what} {n}" for what, n in stood_in.most_common(3)) or "-"
        told = ", ".join(f"{status}: {n}" for status, n in sorted(r.events.items(), key=str))
        row = (str(sum(r.tally.statuses.values())), str(bad or 0), str(len(r.tally.broken)), f"{r.tally.slowest_s:.2f}", f"{r.back_s:.1f}")
        shown.add_row(r.hurt, *row, degraded, told)
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="10 s a round instead of 30")
    parser.add_argument("--rounds", type=int, default=1, help="how often each thing is hurt")
    parser.add_argument("--only", action="append", help="hurt only this: a deployment, \"store's server\" or 'store hangs'")
    parser.add_argument(
        "--config", action="append", default=[], help="configuration with a promoted version (default: configs/quickstart.yaml)"
    )
    parser.add_argument("--set", action="append", default=[], help="dotted.path=value over it")
    given = parser.parse_args()
    files = given.config or [str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")]
    config = load([Path(f) for f in files], given.set)
    funnel = Funnel.load(open_registry(config.place("registry")).local_copy("production"))
    say = Console(stderr=True).print
    service, rounds = Service(given, files), []
    try:
        worst = service.same_pages(funnel)
        say(f"  the pages of 200 users are the pure funnel's; scores differ by {worst:.1e} at most")
        for _ in range(given.rounds):
            for name in given.only or (*DEPLOYMENTS, STORE_SERVER, STORE_HANGS):
                rounds.append(service.hurt(name, 10 if given.quick else 30))
                r = rounds[-1].tally
                say(
                    f"  {name}: {dict(r.statuses)}, {len(r.broken)} broken {r.broken[:2]}, degraded {dict(r.degraded)}, events {dict(rounds[-1].events)}"
                )
    finally:
        service.stop()
    Console(width=160).print(table(rounds))
    if given.json:
        statuses: Counter[int] = sum((r.tally.statuses for r in rounds), Counter())
        found = {
            "score_difference": worst,
            "rounds": len(rounds),
            "answers": statuses.total(),
            "not_200": statuses.total() - statuses[200],
            "broken_connections": sum(len(r.tally.broken) for r in rounds),
            "slowest_s": round(max(r.tally.slowest_s for r in rounds), 3),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
