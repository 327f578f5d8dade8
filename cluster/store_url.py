"""The feature store of a command that runs beside no service, or beside one: its address, the same way for every command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.embedded import EmbeddedValkey

if TYPE_CHECKING:
    from recsys.config import Config


@contextlib.contextmanager
def store_url(config: Config) -> Iterator[str]:
    """redis_url, else the embedded server: within `store.memory_mb` and watched as the service's is, started where nobody runs it
    and ended with the block. Where a service runs it, this is a guest."""
    if config.redis_url is not None:
        yield config.redis_url
        return
    with EmbeddedValkey(config.place("store"), max_memory_mb=config.store.memory_mb) as server:
        server.supervise()
        yield server.url
