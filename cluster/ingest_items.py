"""The second hop: item-side counters of our partitions over the logs of all, and their snapshots for rankers.

A key without a user (item, author, item and tab) gets events from every partition of users. Its owner reads all logs, keeps a
position for each beside the counters, and moves both in one step: what an event adds to which key is a pure function of it, so
the log is all that the hops need to hand over.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence

from cluster.catch_up import CatchUp
from cluster.event_log import EventLog
from cluster.owned import Holding, Owned, Taken, uncounted
from cluster.partition import ItemStep
from recsys.features.counting import Counting, Name, home
from recsys.features.covered import Covered, packed_since, unpacked_since
from recsys.features.generate import Event
from recsys.features.reading import Touched
from recsys.features.snapshot import packed_snapshot
from recsys.features.stream import States

log = logging.getLogger(__name__)


class ItemHop:
    """Counts the item-side keys of the partitions that are held."""

    def __init__(self, held: Holding, log: EventLog, past: CatchUp) -> None:
        self._held, self._log, self._past = held, log, past
        self._publishing_s = 0.0
        self._whole = asyncio.Lock()
        """Held while states are ahead of the positions that say how far they count: nothing is published meanwhile."""

    async def step(self) -> dict[int, Exception | int]:
        """One step: per partition that changed how many keys it has, or why nothing was applied."""
        held, mine, counting = self._held, dict(self._held.owned), self._held.counting
        for p, owned in mine.items():
            if owned.items is None:
                await self._read(p, owned)
        states = {p: owned.items for p, owned in mine.items() if owned.items is not None}
        if not states:
            return {}
        mine = {p: owned for p, owned in mine.items() if p in states}
        before = {p: {s: placed(owned.sources.get(s, f" {owned.firsts[s]}")) for s in range(held.partitions)} for p, owned in mine.items()}
        starts = {s: min((before[p][s] for p in mine), key=lambda at: at[1]) for s in range(held.partitions)}
        pages = await self._log.read({s: at for s, (at, _) in starts.items()}, held.config.ingest.batch)
        if pages and (held.repeats or held.store.replicated):
            # Only the first hop tells which of two equal entries counts; and a failover may take back an entry that it has not applied.
            applied = {h.partition: h.n for h in await held.store.heads(list(pages), kept=True)}
            pages = {s: entries[: max(0, applied[s] - starts[s][1])] for s, entries in pages.items()}
        batches = {s: await held.batch(s, starts[s][1], entries) for s, entries in pages.items() if entries}
        if held.counting is not counting:  # another declaration came in force meanwhile: these are states of the old one
            for owned in mine.values():
                owned.items = None
            return {}
        async with self._whole:
            events: dict[int, dict[Name, list[Event]]] = {p: {} for p in mine}
            sources: dict[int, dict[int, tuple[str, str]]] = {p: {} for p in mine}
            for s, batch in batches.items():
                entries = batch.entries
                doubtful = {p: self._doubtful(owned, s, before[p][s][1]) for p, owned in mine.items()}
                for taken in batch.taken:
                    for number, key, event in self._touched(counting, s, taken):
                        p = home(key, held.partitions)
                        if p not in mine or taken.n < before[p][s][1]:
                            continue
                        began = doubtful[p].get(number)
                        if began is None or not began.holds(s, taken.n, taken.entry.told_ms):
                            events[p].setdefault((number, key), []).append(event)
                end = starts[s][1] + len(entries)
                for p, owned in mine.items():
                    if before[p][s][1] < end:
                        sources[p][s] = (owned.sources.get(s, ""), f"{entries[-1].position} {end}")
            steps = []
            for p, owned in mine.items():
                self._count(counting, p, states[p], events[p])
                if sources[p] or owned.rewrite or not owned.since_told:
                    names = list(states[p]) if owned.rewrite else list(events[p])
                    change = counting.item_change(states[p], names, held.config.ingest.item_keys)
                    since = "" if owned.since_told else packed_since(owned.since)
                    steps.append(ItemStep(p, owned.claim.epoch, sources[p], change.fields, [*change.gone, *owned.stale], since))
            out: dict[int, Exception | int] = {}
            for step, answer in zip(steps, await held.store.count(steps) if steps else [], strict=True):
                out[step.partition] = answer
                owned = mine[step.partition]
                if isinstance(answer, Exception):
                    owned.items = None  # what we hold may be ahead of the store
                    continue
                owned.sources |= {s: after for s, (_, after) in step.sources.items()}
                owned.rewrite, owned.since_told = answer < len(states[step.partition]), True
                owned.stale = []
            return out

    def _touched(self, counting: Counting, source: int, taken: Taken) -> Touched:
        try:
            return counting.of_items(taken.row)
        except Exception as fault:  # noqa: BLE001  one event must not stop the item side; the first hop buries what it meets
            log.debug("ingest partition=%d entry=%d at the item side: %s", source, taken.n, uncounted(fault))
            return []

    def _count(self, counting: Counting, partition: int, states: States, events: Mapping[Name, Sequence[Event]]) -> None:
        """Events into states: all at once, or, where one of them cannot be counted, each by itself."""
        try:
            counting.add_items(states, events)
        except Exception as fault:  # noqa: BLE001  as in `_touched`
            each = [(name, event) for name, told in events.items() for event in told]
            if len(each) == 1:
                log.debug("ingest partition=%d position=%d at the item side: %s", partition, each[0][1].position, uncounted(fault))
                return
            for name, event in each:
                self._count(counting, partition, states, {name: [event]})

    def _doubtful(self, owned: Owned, source: int, n: int) -> dict[int, Covered]:
        """The groups whose states may have begun with events of a source from entry `n` on, and what they began with."""
        began = {number: owned.since.get(mark) for number, mark in enumerate(self._held.counting.item_records.marks)}
        return {number: c for number, c in began.items() if c is not None and (c.positions is None or c.first(source) > n)}

    async def _read(self, partition: int, owned: Owned) -> None:
        held, counting = self._held, self._held.counting
        sources, values, told = await held.store.counted(partition)
        firsts = await self._log.firsts(held.partitions)
        # A store that was short of memory may have forgotten the counters and not what they began with.
        since = unpacked_since(told) if values else {}
        marks, last = counting.item_records.marks, len(counting.items.plan.groups) - 1
        lacking = {number for number, mark in enumerate(marks) if mark not in since}
        states = await asyncio.to_thread(self._states, counting, partition, values, lacking)
        read = {s: placed(sources.get(s, f" {firsts[s]}"))[1] for s in range(held.partitions)}
        await self._past.items(counting, partition, states, lacking - {last}, read)
        if held.counting is counting:
            owned.sources, owned.firsts, owned.items, owned.tables = sources, firsts, states, {}
            owned.since = {mark: since.get(mark) or counting.item_covered(number) for number, mark in enumerate(marks)}
            owned.stale = counting.item_records.stale(values)
            owned.rewrite, owned.since_told = bool(lacking), not lacking and len(since) == len(marks)

    def _states(self, counting: Counting, partition: int, values: Sequence[bytes], lacking: set[int]) -> States:
        """What the store holds, and for groups that it does not hold what the version knows."""
        states = {k: s for k, s in counting.item_states(values).items() if k[0] not in lacking}
        return states | counting.item_seeds(partition, self._held.partitions, lacking)

    async def publish(self) -> int:
        """Publish the partitions whose snapshot is due; gives how many.

        Instants are the multiples of `snapshot_every_s` on the store's clock, so that all partitions, whoever owns them, show one
        instant; and what one process publishes is cut at one place of every log.
        """
        held, every = self._held, self._held.config.ingest.snapshot_every_s
        every *= max(1, math.ceil(10 * self._publishing_s / every))
        at = math.floor(await held.store.now() / every) * every
        async with self._whole:
            due = [
                (p, o, dict(o.items), o.tables, self._counted(o)) for p, o in held.owned.items() if o.items is not None and o.published < at
            ]
        plan, began = held.counting.items.plan, time.monotonic()
        for p, owned, states, tables, counted in due:
            value = await asyncio.to_thread(packed_snapshot, plan, states, at, counted, tables)
            await held.store.publish(p, owned.claim.epoch, value)
            owned.published = at
        if due:
            self._publishing_s = time.monotonic() - began
        return len(due)

    def _counted(self, owned: Owned) -> list[int]:
        """Per partition, up to which entry its log is counted in these item-side states."""
        return [placed(owned.sources.get(s, f" {owned.firsts[s]}"))[1] for s in range(self._held.partitions)]


def placed(held: str) -> tuple[str, int]:
    """A source's position and number: `"1700-0 42"` -> ("1700-0", 42)."""
    at, _, n = held.rpartition(" ")
    return at, int(n or 0)
