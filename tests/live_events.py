"""Live events for tests: rows in the layout of the event log's Parquet, as the consumers write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.archive import Archive, ArchivedRow
from recsys.features.store import NewEvent


class Told(NamedTuple):
    """A live event in short."""

    user: str
    item: str
    time_s: float
    event: str = "click"
    value: float | None = None
    context: dict[str, str] | None = None
    request_id: str | None = None
    event_id: str | None = None


def archive(root: Path, told: Sequence[Told], *, partitions: int = 2) -> None:
    """Append events to the Parquet of an event log, users spread over the partitions; positions go on where they ended."""
    for partition in range(partitions):
        writer = Archive(str(root), partition)
        start = writer.take(1).n
        own = [t for t in told if sum(t.user.encode()) % partitions == partition]
        rows = [
            ArchivedRow(
                NewEvent(
                    t.user,
                    t.item,
                    t.event,
                    round(t.time_s * 1000),
                    t.value,
                    t.event_id or f"{t.user}-{t.item}-{t.time_s}-{t.event}",
                    t.request_id,
                    t.context,
                ),
                start + n,
                round(t.time_s * 1000) + 5,
            )
            for n, t in enumerate(own)
        ]
        writer.append(rows, "", start + len(rows))
