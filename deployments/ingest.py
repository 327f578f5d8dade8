"""The consumers of the event log as a part of the service: replicas that Serve looks after, partitions that leases hand out.

A Serve deployment and not actors of our own: its controller outlives every replica, sees a dead one within a second, starts
another on any node that is there, and ends all of them with the application. What must survive is not in the replica: the
position, the fence and the counters are in the store, so a new replica goes on when the killed one's lease has run out.
"""

from __future__ import annotations

import asyncio

from cluster.ingest_run import Consumers
from deployments.replica_log import log_with_serve
from deployments.store_owner import url_of
from recsys.config import Config
from recsys.errors import RayfunnelError


class IngestReplica:
    """One replica: one `Ingest`."""

    def __init__(self, config: Config, store: object = None) -> None:  # noqa: ARG002 - bound, so that the store's owner is of the application
        log_with_serve()
        self._config = config
        self._consumers: Consumers | None = None

    async def check_health(self) -> None:
        """Called by Serve, first before the replica counts as there. Raises where the consumers have ended."""
        if self._consumers is None:
            self._consumers = Consumers(self._config, await asyncio.to_thread(url_of, self._config))
        await self._consumers.check()

    async def owns(self) -> list[int]:
        """The partitions of this replica."""
        if self._consumers is None:
            raise RayfunnelError("The consumers are starting.")
        found: list[int] = (await self._consumers.check())["partitions"]
        return found

    async def __del__(self) -> None:
        """Write what is applied, and give the partitions free at once."""
        if self._consumers is not None:
            await self._consumers.stop()
