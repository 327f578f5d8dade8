"""Aggregates that a version declares anew: they begin with the version's states, and what came since is counted from Parquet.

A version knows the events up to where it was made (`recsys.features.covered`). By the time it is promoted consumers are further;
for the groups that they counted all along nothing is to be done, but a new group's states would lack what lies between. It is
read once more, from Parquet and behind that from the log, and counted for the new groups alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import orjson
import pyarrow as pa

from cluster.event_log import Entry, EventLog
from cluster.owned import Holding, Owned, Taken, uncounted
from cluster.partition import Step, UserChange
from recsys.data.event_files import Written, opened, pages, partition_manifest
from recsys.features.counting import Counting, by_name, home
from recsys.features.covered import Covered
from recsys.features.records import counted_field
from recsys.features.store import NewEvent
from recsys.features.stream import States

log = logging.getLogger(__name__)
PAGE = 10_000
"""Entries read from the log at once."""
USERS_A_STEP = 500


class Behind(NamedTuple):
    """A user who did something meanwhile: the new groups that the store does not have, and their states."""

    lacking: set[int]
    states: States


class CatchUp:
    """Reads of the past, for partitions that are held."""

    def __init__(self, held: Holding, log: EventLog) -> None:
        self._held, self._log = held, log

    async def rows(self, counting: Counting, source: int, covered: Covered, upto: int) -> AsyncIterator[list[Taken]]:
        """The events of a partition below position `upto` that `covered` does not hold, in log order, a file at a time; of a
        long past the newest `catch_up_events`."""
        first = max(covered.first(source), upto - self._held.config.ingest.catch_up_events)
        if first >= upto:
            return
        manifest, remainder = await self._remainder(source, upto)
        root, since_ms = self._held.config.place("events"), covered.until_ms if covered.positions is None else -math.inf
        files = await asyncio.to_thread(lambda: iter(pages(*opened(root), manifest, first, since_ms=since_ms)))
        while (table := await asyncio.to_thread(next, files, None)) is not None:
            yield _wanted(await asyncio.to_thread(self._taken, counting, source, table), source, covered, first, upto)
        yield _wanted(remainder, source, covered, first, upto)

    async def _remainder(self, source: int, upto: int) -> tuple[Written, list[Taken]]:
        """The manifest, and the events behind it. What is trimmed meanwhile is in the next manifest."""
        held = self._held
        while True:
            manifest = await asyncio.to_thread(partition_manifest, held.config.place("events"), source)
            at, n, out = manifest.at, manifest.n, list[Taken]()
            while n < upto:
                entries = (await self._log.read({source: at}, PAGE)).get(source)
                if not entries:
                    break
                out += (await held.batch(source, n, entries)).taken
                at, n = entries[-1].position, n + len(entries)
            if manifest.n >= upto or (await self._log.firsts(held.partitions))[source] <= manifest.n:
                return manifest, out

    def _taken(self, counting: Counting, source: int, table: pa.Table) -> list[Taken]:
        out = []
        for r in table.to_pylist():
            event = NewEvent(
                r["user_id"],
                r["item_id"],
                r["event"],
                r["time_ms"],
                value=r["value"],
                event_id=r["event_id"],
                request_id=r["request_id"],
                context=orjson.loads(r["context"] or b"{}"),
            )
            try:
                row = counting.read(event, r["position"] * self._held.partitions + source)
            except Exception as fault:  # noqa: BLE001  one event must not stop its partition
                self._pass_over(source, r["position"], fault)
            else:
                out.append(Taken(Entry("", b"", r["logged_ms"]), event, r["position"], row))
        return out

    # ---- users ----------------------------------------------------------------------------------------------------------

    async def users(self, partition: int, owned: Owned) -> int:
        """Bring the partition's users up to the declaration in force; gives how many users had something to catch up with."""
        held, counting = self._held, self._held.counting
        marks = counting.user_records.marks
        told = await held.store.counts(partition)
        new = {number for number, mark in enumerate(marks) if mark not in told}
        if not new and len(told) == len(marks):
            return 0
        behind: dict[str, Behind] = {}
        if new:
            async for taken in self.rows(counting, partition, counting.covered, owned.claim.n):
                met = sorted({t.event.user_id for t in taken} - behind.keys())
                found = await held.store.counters([(partition, u) for u in met]) if met else []
                for user_id, values in zip(met, found, strict=True):
                    lacking = counting.lacking(counting.user_states(values)) & new
                    behind[user_id] = Behind(lacking, counting.seeds(user_id, lacking))
                for t in taken:
                    one = behind[t.event.user_id]
                    try:
                        if touched := [x for x in counting.of_user(t.row) if x[0] in one.lacking]:
                            counting.add_user(one.states, touched)
                    except Exception as fault:  # noqa: BLE001  likewise
                        self._pass_over(partition, t.n, fault)
        to = counted_field(owned.claim.n)
        changes = [
            UserChange(u, False, counting.user_change(b.states, list(b.states), ()).fields | to) for u, b in behind.items() if b.states
        ]
        for start in range(0, len(changes), USERS_A_STEP):
            claim = owned.claim
            (answer,) = await held.store.apply([Step(partition, claim, claim.at, claim.n, 0, changes[start : start + USERS_A_STEP])])
            if isinstance(answer, Exception):
                raise answer
        await held.store.declare(partition, owned.claim.epoch, marks)
        if changes:
            log.info("ingest partition=%d: counters of %d users caught up with %s", partition, len(changes), counting.version)
        return len(changes)

    # ---- items ----------------------------------------------------------------------------------------------------------

    async def items(self, counting: Counting, partition: int, states: States, lacking: set[int], read: Mapping[int, int]) -> None:
        """Count into `states`, for the groups `lacking`, what the partition has read of each source without counting it for them."""
        if not lacking:
            return
        for source, upto in read.items():
            async for taken in self.rows(counting, source, counting.covered, upto):
                for t in taken:
                    try:
                        mine = [x for x in counting.of_items(t.row) if x[0] in lacking and home(x[1], self._held.partitions) == partition]
                        counting.add_items(states, by_name(mine))
                    except Exception as fault:  # noqa: BLE001  likewise
                        self._pass_over(source, t.n, fault)

    def _pass_over(self, source: int, n: int, fault: Exception) -> None:
        """Say which event is not counted: it is long past the hop that would put it among the dead letters."""
        log.warning("ingest partition=%d entry=%d is passed over in catching up: %s", source, n, uncounted(fault))


def _wanted(taken: list[Taken], source: int, covered: Covered, first: int, upto: int) -> list[Taken]:
    return [t for t in taken if first <= t.n < upto and not covered.holds(source, t.n, t.entry.told_ms)]
