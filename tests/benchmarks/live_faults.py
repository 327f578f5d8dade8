"""Faults on the live side of a service: `python -m tests.benchmarks.live_faults [--json] [--seconds 20]`.

A service with consumers over its embedded store, under 8 connections that ask for pages and one that posts events one by one,
a client that tries again whatever is not answered 202. Meanwhile, one after another: the store's server is killed (SIGKILL), the
replica of consumers is killed, a record that nobody can read is put into the log, and a machine whose clock is an hour behind
and one whose clock is two minutes ahead tell events. Counted: pages that were not 200, events by status, and at the end how many
events that were answered 202 are not in Parquet, or are there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from typing import Any

import redis
from rich.console import Console

from deployments.serving import APPLICATION
from recsys.config import Config
from recsys.data import event_files
from tests.benchmarks.live_service import event, service
from tests.deployments.client import Client, crowd, eventually
from tests.processes import below, replicas

CONNECTIONS = 8
BEHIND_MS, AHEAD_MS = 3_600_000, 120_000


class Teller(threading.Thread):
    """Posts events one by one until `done`, each until it is answered 202; what was answered, and which were accepted."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.done = url, threading.Event()
        self.statuses: Counter[str] = Counter()
        self.accepted: list[str] = []

    def run(self) -> None:
        rng, client, n = random.Random(3), Client(self.url), 0
        while not self.done.is_set():
            told = event(rng, "faults", n)
            told["time"] -= {0: BEHIND_MS, 1: -AHEAD_MS}.get(n % 20, 0)  # clocks of other machines
            while not self.done.is_set():
                try:
                    answer = client.ask("POST", "/v1/events", told)
                except OSError:
                    self.statuses["connection"] += 1
                    client.close()
                    continue
                self.statuses[str(answer.status)] += 1
                if answer.status == 202:
                    self.accepted.append(told["event_id"])
                    break
                time.sleep(0.05)
            n += 1
        client.close()


def server() -> int:
    """The pid of the store's server, wherever it hangs in the tree of processes."""
    mine = below(os.getpid())
    found = [pid for pid, seen in mine.items() if "valkey-server" in seen.name.split(" ")[0]]
    return found[0] if found else 0


def hurt(config: Config, store: str, name: str) -> float:
    """Do one harm; gives the seconds until what was killed stood again."""
    if name == "poison":
        client = redis.Redis.from_url(store)
        client.xadd(f"{config.store.prefix}:{{0}}:log", {"e": b"\xff no record"})
        client.close()
        return 0.0
    before = server() if name == "store" else replicas(APPLICATION, "ingest")[0]
    os.kill(before, signal.SIGKILL)
    if name == "store":
        return eventually(lambda: _answers(store), 90, "the store is back")
    return eventually(lambda: bool(set(replicas(APPLICATION, "ingest")) - {before}), 90, "consumers are back")


def _answers(store: str) -> bool:
    try:
        client = redis.Redis.from_url(store, socket_timeout=1)
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def lived(url: str, config: Config, seconds: float, say: Any) -> dict[str, Any]:
    """Load, with a harm every `seconds`; what was seen."""
    from deployments.store_owner import url_of  # Ray reads its environment when it is first imported, and that is made by now

    teller, rounds, store = Teller(url), {}, url_of(config)
    teller.start()
    with crowd(url, CONNECTIONS, lambda n: f"u{n % 200}") as tally:
        for name in ("store", "consumers", "poison"):
            time.sleep(seconds / 2)
            rounds[name] = round(hurt(config, store, name), 2)
            say(f"{name}: back after {rounds[name]} s; pages {dict(tally.statuses)}, events {dict(teller.statuses)}")
            time.sleep(seconds / 2)
    teller.done.set()
    teller.join(30)
    client = Client(url)

    def caught_up() -> bool:
        told = client.ask("GET", "/v1/ingest").json
        return not (told["lag"] or told["items_lag"] or told["parquet_lag"]) and told["events"] >= len(teller.accepted)

    drained = eventually(caught_up, 120, "consumers have caught up")
    told = client.ask("GET", "/v1/ingest").json
    held = Counter(event_files.read(str(config.place("events")))["event_id"].to_pylist())
    return {
        "pages": sum(tally.statuses.values()),
        "pages_not_200": sum(n for status, n in tally.statuses.items() if status != 200),
        "broken_connections": len(tally.broken),
        "slowest_page_s": round(tally.slowest_s, 2),
        "events": dict(teller.statuses),
        "accepted": len(teller.accepted),
        "lost": sum(held[e] == 0 for e in teller.accepted),
        "twice": sum(n > 1 for n in held.values()),
        "dead_letters": told["dead_letters"],
        "back_s": rounds,
        "drained_s": round(drained, 1),
        "memory": told.get("memory"),
    }


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--seconds", type=float, default=20.0, help="between two harms")
    given = arguments.parse_args()
    console = Console(stderr=True)
    with service() as (url, config):
        found = lived(url, config, given.seconds, console.print)
    console.print(found)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
