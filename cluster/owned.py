"""What a process of consumers holds: its partitions, what it knows of each, and the road from log entries to rows."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.archive import Archive
from cluster.event_log import Entry
from cluster.live_records import checked
from cluster.partition import Claim, DeadLetter, PartitionStore
from recsys.config import Config
from recsys.features.counting import Counting
from recsys.features.covered import Since
from recsys.features.groups import Row
from recsys.features.item_table import ItemTable
from recsys.features.store import NewEvent
from recsys.features.stream import States

SKEW_S = 3_600.0
"""Clocks of gateways and of the log may differ by this much more than serve.limits.future_s before a record is a dead letter."""


@dataclass(slots=True)
class Known:
    """A user's states. seeded: what the version's states know of the user is among them; until then an event that they hold is not counted."""

    states: States
    seeded: bool = False
    stale: list[bytes] = field(default_factory=list)
    """Fields in the store of declarations that are no longer in force: they go with the next change, or they would be behind one day."""


@dataclass
class Owned:
    """A partition that is ours, and what we know of it without asking."""

    claim: Claim
    archive: Archive
    lost: tuple[str, int] | None = None
    """Where Parquet ends, of a log that lost entries before that: behind what is left of them the partition goes on from there."""
    users: OrderedDict[str, Known] = field(default_factory=OrderedDict)
    caught_up: bool = False
    """Whether users' counters are up to date in every declaration in force."""
    items: States | None = None
    """Item-side states; None until they are read from the store."""
    tables: dict[int, ItemTable] = field(default_factory=dict)
    """What the snapshots before computed, by number of the group."""
    since: Since = field(default_factory=dict)
    """What the item-side states of each group began with."""
    since_told: bool = True
    """Whether the store has it."""
    stale: list[bytes] = field(default_factory=list)
    """Item-side fields in the store of declarations that are no longer in force."""
    sources: dict[int, str] = field(default_factory=dict)
    firsts: list[int] = field(default_factory=list)
    """Per source the number of its oldest entry, for sources of which nothing is counted."""
    rewrite: bool = False
    """The store lacks item-side keys that we know: write them all."""
    published: float = 0.0


class Taken(NamedTuple):
    """An entry that is an event: itself, the event, its log position, and as a row."""

    entry: Entry
    event: NewEvent
    n: int
    row: Row


@dataclass
class Batch:
    """Entries of one partition: what they say, and what could not be read. marks: to leave where the log may repeat itself."""

    entries: Sequence[Entry]
    taken: list[Taken] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    marks: dict[bytes, int] = field(default_factory=dict)

    def bury(self, entry: Entry, why: str) -> None:
        """Note a record that cannot be counted."""
        self.dead.append(DeadLetter(entry.position, entry.record, why))


@dataclass
class Holding:
    """Shared by the parts of one process. `counting` is replaced when another version is promoted."""

    config: Config
    store: PartitionStore
    counting: Counting
    repeats: bool = False
    owned: dict[int, Owned] = field(default_factory=dict)

    @property
    def partitions(self) -> int:
        """How many there are in all."""
        return self.config.store.partitions

    async def batch(self, partition: int, n: int, entries: Sequence[Entry]) -> Batch:
        """Entries from log position `n` on, as rows; a record that one line of ours cannot take must not stop its partition."""
        out = Batch(entries)
        future_s = self.config.serve.limits.future_s + SKEW_S
        events: list[tuple[Entry, NewEvent, int]] = []
        for i, entry in enumerate(entries):
            try:
                event = checked(entry.record, entry.told_ms, future_s)
                if event.value is not None and (why := self.config.data.interactions.out_of_range(event.value)) is not None:
                    raise ValueError(f"'value' is {event.value:g}, which {why}.")
                events.append((entry, event, n + i))
            except ValueError as fault:
                out.bury(entry, str(fault))
        if self.repeats:
            events, out.marks = await self._told_once(partition, events)
        for entry, event, number in events:
            try:
                row = self.counting.read(event, number * self.partitions + partition)
            except Exception as fault:  # noqa: BLE001  see above
                out.bury(entry, uncounted(fault))
            else:
                out.taken.append(Taken(entry, event, number, row))
        return out

    async def _told_once(
        self, partition: int, events: Sequence[tuple[Entry, NewEvent, int]]
    ) -> tuple[list[tuple[Entry, NewEvent, int]], dict[bytes, int]]:
        """Events without those that another entry told, and the marks of entries that were never seen."""
        keys = [self._mark(partition, event) for _, event, _ in events]
        fresh, marks = [], dict[bytes, int]()
        for told, key, mark in zip(events, keys, await self.store.marks(keys), strict=True):
            if marks.get(key, told[2] if mark is None else mark) == told[2]:
                fresh.append(told)
                if mark is None:
                    marks[key] = told[2]
        return fresh, marks

    def _mark(self, partition: int, event: NewEvent) -> bytes:
        user = event.user_id.encode()
        told = len(user).to_bytes(4, "little") + user + event.event_id.encode()
        return self.store.key(partition, "k:") + hashlib.blake2b(told, digest_size=12).digest()


def uncounted(fault: Exception) -> str:
    """Why an event that could be read was not counted."""
    return f"It could not be counted ({type(fault).__name__}: {fault})."
