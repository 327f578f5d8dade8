"""An HTTP client for tests, and a crowd of them that counts what it is answered."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

PATIENCE_S = 30.0


class Told(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    json: Any


class Client:
    """One connection, kept alive."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._line = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)

    def ask(self, method: str, path: str, body: Any = None) -> Told:
        """Send bytes as they are, anything else as JSON."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self._line.request(method, path, raw, {"content-type": "application/json"})
        answer = self._line.getresponse()
        text = answer.read()
        return Told(answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(text) if text else None)

    def recommend(self, user: str, k: int = 10, **more: Any) -> Told:
        return self.ask("POST", "/v1/recommend", {"user_id": user, "k": k, **more})

    def close(self) -> None:
        self._line.close()

    def __del__(self) -> None:
        self._line.close()


@dataclass
class Tally:
    """What a crowd was answered: statuses, broken connections, versions, and what stood in."""

    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    degraded: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def failed(self) -> dict[str, int]:
        """Everything but 200s."""
        return {str(s): n for s, n in self.statuses.items() if s != 200} | ({"broken": len(self.broken)} if self.broken else {})


@contextmanager
def crowd(url: str, connections: int, users: Callable[[int], str] = lambda n: f"u{n % 60}") -> Iterator[Tally]:
    """Ask for pages over so many connections, as fast as they are answered, as long as the block runs."""
    tally, stop, lock = Tally(), threading.Event(), threading.Lock()

    def one(number: int) -> None:
        client, n = Client(url), number
        while not stop.is_set():
            began = time.monotonic()
            try:
                told = client.recommend(users(n))
            except (OSError, http.client.HTTPException) as error:
                with lock:
                    tally.broken.append(repr(error))
                client.close()
                continue
            with lock:
                tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
                tally.statuses[told.status] += 1
                if told.status == 200:
                    tally.versions[told.json["model_version"]] += 1
                    for note in told.json["degraded"]:
                        tally.degraded[note["stage"], note["rung"], note["reason"]] += 1
            n += connections
        client.close()

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)


def eventually(claim: Callable[[], bool], within_s: float, what: str) -> float:
    """Wait until the claim holds; how long it took. Fails with `what` where it does not."""
    began = time.monotonic()
    while not claim():
        assert time.monotonic() - began < within_s, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began
