"""What consumers do with events, without any store: users' counters and the item side, with what changed to be written.

Both are `Stream`s over parts of one plan, and nothing else computes a value: the store's states are those of the streaming road.
"""

from __future__ import annotations

import functools
import heapq
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from recsys.core import Vocabulary
from recsys.data.sources import DataConfig
from recsys.features.aggregates import AggregateConfig
from recsys.features.covered import Covered
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import Event
from recsys.features.groups import GroupState, Plan, Row, compiled
from recsys.features.keys import KeyColumns
from recsys.features.live_rows import row_reader
from recsys.features.reading import Key, Touched
from recsys.features.records import Records, joined, parted
from recsys.features.store import NewEvent, partition_of
from recsys.features.stream import MOST_KEYS, States, Stream

log = logging.getLogger(__name__)

TRENDING = "trending now"
"""The one aggregate that nobody declares: history events of an item, decayed. No column can have this name."""
Name = tuple[int, Key]


class Changed(NamedTuple):
    """Fields to set and fields that are gone."""

    fields: dict[bytes, bytes]
    gone: list[bytes]


@dataclass
class Counting:
    """One version's declaration at work. `seed_user` and `seed_items` are the states of its training log's end, which hold the events
    of `covered`."""

    version: str
    users: Stream
    items: Stream
    read: Callable[[NewEvent, int], Row]
    seed_user: Callable[[str], States] = field(default=lambda _: {})
    seed_items: States = field(default_factory=dict)
    covered: Covered = field(default_factory=Covered)
    user_records: Records = field(init=False)
    item_records: Records = field(init=False)

    def __post_init__(self) -> None:
        self.user_records, self.item_records = Records(self.users.plan), Records(self.items.plan)

    @classmethod
    def of(
        cls,
        version: str,
        plan: Plan | None,
        stream: Stream | None,
        data: DataConfig,
        history: HistoryConfig,
        *,
        trending_half_life_h: float,
        seed_user: Callable[[str], States] = lambda _: {},
        covered: Covered | None = None,
    ) -> Counting:
        """From a bundle's plan and stream; None where it declares no aggregate: then only trending is counted."""
        trending = trending_plan(trending_half_life_h)
        of_users, of_items = parted(plan) if plan is not None else (compiled({}, priors={}, lateness_s=0.0, offset_s=0.0, gap_s=1.0), None)
        of_items = joined([of_items, *parted(trending)[1:]]) if of_items is not None else parted(trending)[1]
        none: Vocabulary = Vocabulary([])
        given = (
            (stream.vocabularies["user"], stream.vocabularies["item"], stream.columns) if stream is not None else (none, none, KeyColumns())
        )
        offset_s = stream.offset_s if stream is not None else 0.0
        users, items = (Stream(part, *given, offset_s=offset_s) for part in (of_users, of_items))
        out = cls(version, users, items, row_reader(data, history), covered=covered or Covered())
        if plan is not None and stream is not None:
            places = {n: i for i, n in enumerate(n for n, g in enumerate(plan.groups) if "user" not in g.key)}
            out.seed_items = {(places[n], key): state for (n, key), state in stream.of_items.items()}
            of_user = {n: i for i, n in enumerate(n for n, g in enumerate(plan.groups) if "user" in g.key)}
            out.seed_user = lambda user_id: {(of_user[n], key): state for (n, key), state in seed_user(user_id).items()}
        return out

    # ---- users ----------------------------------------------------------------------------------------------------------

    def of_user(self, row: Row) -> Touched:
        """What a row adds to its user's keys."""
        return self.users.touched(row)

    def user_states(self, values: Sequence[bytes]) -> States:
        """A user's states from the store's values."""
        return self.user_records.read(values)

    def lacking(self, states: States) -> set[int]:
        """The groups of users of which nothing is known."""
        return set(range(len(self.users.plan.groups))) - {number for number, _ in states}

    def seeds(self, user_id: str, lacking: set[int]) -> States:
        """Where counting begins in groups that the store knows nothing of: where the training log ended."""
        return {k: s for k, s in self.seed_user(user_id).items() if k[0] in lacking} if lacking else {}

    def add_user(self, states: States, touched: Touched) -> tuple[set[Name], set[Name]]:
        """Apply what one or several events say, wholly or not at all: the keys it changed, and those that had to go."""
        events = by_name(touched)
        if len(states) + len(events) <= MOST_KEYS:  # nothing has to go
            states.update(self.users.taken(states, events))
            return set(events), set()
        after = dict(states)
        for number, key, event in touched:
            self.users.add(after, number, key, event)
        gone = states.keys() - after.keys()
        states.update(after)
        for name in gone:
            del states[name]
        return events.keys() & states.keys(), gone

    def user_change(self, states: States, changed: Iterable[Name], gone: Iterable[Name]) -> Changed:
        """What is written for changed keys."""
        r = self.user_records
        fields = {r.field(n, k): r.value(n, k, states[n, k]) for n, k in changed if (n, k) in states}
        return Changed(fields, [r.field(n, k) for n, k in gone])

    # ---- items ----------------------------------------------------------------------------------------------------------

    def of_items(self, row: Row) -> Touched:
        """What a row adds to keys without a user; what is trending counts history events alone."""
        touched = self.items.touched(row)
        last = len(self.items.plan.groups) - 1
        return touched if row.told else [t for t in touched if t[0] != last]

    def item_states(self, values: Sequence[bytes]) -> States:
        """A partition's item-side states from the store's values."""
        return self.item_records.read(values)

    def item_seeds(self, partition: int, partitions: int, lacking: set[int]) -> States:
        """Likewise for the item-side keys of a partition."""
        return {k: s for k, s in self.seed_items.items() if k[0] in lacking and home(k[1], partitions) == partition} if lacking else {}

    def item_covered(self, number: int) -> Covered:
        """What the seeds of a group of items hold: nothing of what is trending, which no bundle knows."""
        return Covered() if number == len(self.items.plan.groups) - 1 else self.covered

    def add_items(self, states: States, events: Mapping[Name, Sequence[Event]]) -> None:
        """Apply the events of some keys, wholly or not at all."""
        states.update(self.items.taken(states, events))

    def item_change(self, states: States, changed: Iterable[Name], most: int) -> Changed:
        """What is written for changed keys; beyond `most` keys those without an event for longest leave."""
        gone: list[Name] = []
        if len(states) > most:
            excess = len(states) - most + most // 50
            gone = heapq.nsmallest(excess, states, key=lambda k: _newest(states[k]))
            for k in gone:
                del states[k]
        r = self.item_records
        fields = {r.field(n, k): r.value(n, k, states[n, k]) for n, k in changed if (n, k) in states}
        return Changed(fields, [r.field(n, k) for n, k in gone])


def trending_plan(half_life_h: float) -> Plan:
    """What is counted of trending: one group, by item."""
    now = AggregateConfig(kind="count", key=("item",), decay=f"{half_life_h:g}h")
    return compiled({TRENDING: now}, priors={}, lateness_s=0.0, offset_s=0.0, gap_s=1_800.0)


def by_name(touched: Touched) -> dict[Name, list[Event]]:
    """The events of each key, in their order."""
    out: dict[Name, list[Event]] = {}
    for number, key, event in touched:
        out.setdefault((number, key), []).append(event)
    return out


@functools.lru_cache(maxsize=65_536)
def home(key: Key, partitions: int) -> int:
    """The partition that keeps an item-side key."""
    return partition_of("\0".join(key), partitions)


def _newest(state: GroupState) -> float:
    return state.newest
