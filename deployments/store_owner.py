"""The deployment that owns the embedded Valkey where the configuration names no Redis: starts it, watches it, starts it again."""

from __future__ import annotations

import time
from pathlib import Path

import ray

from cluster.embedded import EmbeddedValkey, check_single_node
from deployments.replica_log import log_with_serve
from recsys.config import Config
from recsys.errors import StoreError

START_S = 60.0
"""How long a gateway waits for the store at its start; reading a large log back takes its time."""


class StoreOwner:
    """One replica. It takes over a server whose owner was killed, and ends the server when the application is deleted."""

    def __init__(self, folder: str, max_memory_mb: int | None = None) -> None:
        log_with_serve()
        check_single_node(sum(bool(node["Alive"]) for node in ray.nodes()))
        self._server = EmbeddedValkey(folder, max_memory_mb=max_memory_mb, start_timeout_s=START_S)
        self._server.start()
        self._server.supervise()

    def url(self) -> str:
        """Where the server listens."""
        return self._server.url

    def __del__(self) -> None:
        self._server.stop()


def url_of(config: Config) -> str:
    """The store's address: redis_url, else that of the embedded server, once it runs. Raises StoreError where it does not come."""
    if config.redis_url is not None:
        return config.redis_url
    folder = Path(config.place("store"))
    deadline = time.monotonic() + START_S
    server = EmbeddedValkey(folder)
    while not server.check():
        if time.monotonic() > deadline:
            raise StoreError(
                f"The embedded feature store in '{folder}' has not started within {START_S:.0f} s. The log of deployment 'store' says why."
            )
        time.sleep(0.05)
    return server.url
