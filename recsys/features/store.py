"""The feature store: an append-only log of events, each user's recent history, and profiles. The protocol, and one in memory.

A user's history is LastN of `features.generate`: the newest events by (time, log position), late ones in their place. Event
types that the configuration keeps out of histories are in the log all the same. An event id counts once per user. A refusal
(data.refusals) stands beside the history, once per item, so that its length and its age say nothing of it. So do the items that
fell off the history, where what was seen is not shown again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from recsys.core import FrozenConfig, id_hash
from recsys.errors import StoreError
from recsys.features.declaration import HistoryConfig

T = TypeVar("T", int, float)


class StoreConfig(FrozenConfig):
    prefix: str = "rf"
    """Begins every key, so that several recommenders can share one Redis."""
    partitions: PositiveInt = 16
    """Event streams that users are spread over; one consumer owns each. Fixed once a store holds events."""
    user_ttl_h: PositiveFloat = 24.0 * 90
    """Hours after a user's last event when that user's history, what fell off it, and counters are forgotten. The log itself never
    expires, and what a user refused is kept for features.history.refused_days."""
    duplicate_ttl_h: PositiveFloat = 1.0
    """Hours during which a repeated event id is recognised. Costs about 100 bytes per event of that time."""
    append_timeout_ms: PositiveFloat = 5_000.0
    """How long an append may take before the store counts as unavailable."""
    replicas_acked: NonNegativeInt = 0
    """Replicas that must have an event, or a step of the consumers, before it counts; a server answers before any has it, so with 0 a
    failover may cost the last accepted events. With as many as each primary has, none that was answered 202 is lost while one of them
    lives; with fewer, only if one that has it takes over. Each append then takes a round trip to the replicas more, and is answered
    503 while fewer of them follow.
    """
    append_batch: PositiveInt = 2_000
    """Most events of concurrent calls that go to the store in one round. A larger call goes by itself, whole."""
    memory_mb: PositiveInt | None = None
    """Budget of the embedded store. Beyond it, histories and counters of users who were away for longest are evicted, and never
    the log: a log that fills it by itself refuses events with 503. A Redis of your own has `maxmemory` and
    `maxmemory-policy volatile-lru` for that. A user takes about 70 bytes an event of the history, about 20 an item that fell off
    it (features.history.seen), and what the counters take: see `rayfunnel ingest status`. null: what the host has."""


class NewEvent(NamedTuple):
    """An event as it comes in; `time_ms` is milliseconds since 1970, `context` anything that JSON can hold."""

    user_id: str
    item_id: str
    event: str
    time_ms: int
    value: float | None
    event_id: str
    request_id: str | None = None
    context: Mapping[str, Any] | None = None


class StoredEvent(NamedTuple):
    """An event of a user's history."""

    item_id: str
    event: str
    time_ms: int
    value: float | None
    event_id: str


class LoggedEvent(NamedTuple):
    """An event of the log and its position in its partition; positions ascend, and are `read_log`'s `after`."""

    position: str
    event: NewEvent


@dataclass
class UserState:
    """What the store knows of a user: history, oldest first, what was refused and what is seen beyond the history, profile, and
    packed counters (see `stream.Stream.unpack`)."""

    events: list[StoredEvent] = field(default_factory=list)
    """The history; a refusal is no member of it."""
    refused: dict[str, int] = field(default_factory=dict)
    """Refused items, and when (time_ms): the newest `history.refused` of them."""
    seen: set[str] = field(default_factory=set)
    """Items of events that fell off the history, by the newest of them the newest `history.seen`. One may be in the history again."""
    profile: dict[str, Any] = field(default_factory=dict)
    counters: bytes = b""


class AppendResult(NamedTuple):
    """How many events were new, and how many had been told before."""

    accepted: int
    duplicates: int


ProfileChange = Mapping[str, Any] | None
"""Columns of a user to change: what is not named stays, a column of None goes. None for all of it forgets the profile."""


class FeatureStore(Protocol):
    """Every call raises StoreUnavailableError when the store does not answer, StoreError for what it cannot hold."""

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        """Log events and update histories; durable when it returns. Repeating a call is harmless, a failed one included."""
        ...

    async def append_all(self, calls: Sequence[Sequence[NewEvent]]) -> list[AppendResult]:
        """`append` for several callers in one round; fails for all or for none."""
        ...

    async def read(self, user_ids: Sequence[str], *, timeout_s: float) -> list[UserState]:
        """The states of a micro-batch in one read, in its order; an unknown user has an empty one."""
        ...

    async def change_profiles(self, changes: Mapping[str, ProfileChange]) -> None:
        """Merge each user's change into the profile that is held, atomically with any other writer; durable when it returns.
        Repeating a call is harmless, a failed one included."""
        ...

    def read_log(self, partition: int, after: str = "") -> AsyncIterator[LoggedEvent]:
        """The events of a partition in log order, those behind position `after`."""
        ...

    async def ping(self) -> None:
        """Return when the store answers."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


def event_identity(user_id: str, item_id: str, event: str, time_ms: int) -> str:
    """The id of an event that brings none: 128 bits of sha256 over what it says, in hexadecimal."""
    return hashlib.sha256(json.dumps([user_id, item_id, event, time_ms]).encode()).hexdigest()[:32]


def partition_of(user_id: str, partitions: int) -> int:
    """The partition that holds everything of a user."""
    return id_hash(user_id) % partitions


def to_record(event: NewEvent) -> bytes:
    """An event as one record of the log: a JSON list that begins with its version. StoreError where JSON cannot hold it."""
    value = None if event.value is None or not math.isfinite(event.value) else float(event.value)
    try:
        return orjson.dumps([1, *event[:4], value, event.event_id, event.request_id, dict(event.context or {})])
    except (TypeError, ValueError) as fault:
        raise StoreError(
            f"Event '{event.event_id}' cannot be written as JSON ({fault}). Send text, numbers, lists and mappings."
        ) from fault


def from_record(record: bytes) -> NewEvent:
    """What `to_record` wrote."""
    version, *fields = orjson.loads(record)
    if version != 1:
        raise StoreError(f"The event log holds a record of version {version}, this code reads version 1. Run the newer release.")
    return NewEvent(*fields)


def merged_profile(user_id: str, held: bytes, change: ProfileChange) -> bytes:
    """A stored profile, JSON or nothing, with a change; nothing where no column is left. StoreError where JSON cannot hold it."""
    if change is None:
        return b""
    columns = (orjson.loads(held) if held else {}) | dict(change)
    left = {name: value for name, value in columns.items() if value is not None}
    try:
        return orjson.dumps(left) if left else b""
    except (TypeError, ValueError) as fault:
        raise StoreError(f"The profile of user '{user_id}' cannot be written as JSON ({fault}).") from fault


def newest_items(held: dict[str, T], most: int) -> dict[str, T]:
    """Item -> when, of the `most` newest; of equal times the greater ids stay, in any store and in training."""
    if len(held) <= most:
        return held
    return dict(sorted(held.items(), key=lambda e: (e[1], e[0].encode()))[len(held) - most :])


def _note(held: dict[str, dict[str, int]], user_id: str, event: NewEvent | StoredEvent, most: int) -> None:
    """Of a user's items the newest `most`, each with the time of its newest event."""
    items = held.setdefault(user_id, {})
    items[event.item_id] = max(event.time_ms, items.get(event.item_id, event.time_ms))
    held[user_id] = newest_items(items, most)


class MemoryStore:
    """A store in this process, for tests and for trying things out: nothing survives it. Not for several threads."""

    def __init__(
        self, config: StoreConfig | None = None, history: HistoryConfig | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.config, self.history = config or StoreConfig(), history or HistoryConfig()
        self._clock = clock
        self._log: list[list[bytes]] = [[] for _ in range(self.config.partitions)]
        self._histories: dict[str, list[StoredEvent]] = {}
        self._refused: dict[str, dict[str, int]] = {}
        self._seen: dict[str, dict[str, int]] = {}
        self._profiles: dict[str, bytes] = {}
        self._told: dict[tuple[str, str], float] = {}  # (user, event id) -> when it is forgotten

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        records = [to_record(event) for event in events]
        now, accepted = self._clock(), 0
        for event, record in zip(events, records, strict=True):
            if self._told.get((event.user_id, event.event_id), -math.inf) > now:
                continue
            self._told[event.user_id, event.event_id] = now + self.config.duplicate_ttl_h * 3600
            self._log[partition_of(event.user_id, self.config.partitions)].append(record)
            accepted += 1
            if self.history.refuses(event.event):
                _note(self._refused, event.user_id, event, self.history.refused)
            elif self.history.admits(event.event):
                self._enter(from_record(record))
        return AppendResult(accepted, len(events) - accepted)

    async def append_all(self, calls: Sequence[Sequence[NewEvent]]) -> list[AppendResult]:
        for event in (e for events in calls for e in events):
            to_record(event)
        return [await self.append(events) for events in calls]

    def _enter(self, event: NewEvent) -> None:
        line = self._histories.setdefault(event.user_id, [])
        at = bisect.bisect_right(line, event.time_ms, key=lambda e: e.time_ms)  # behind those of its time: they came first
        line.insert(at, StoredEvent(event.item_id, event.event, event.time_ms, event.value, event.event_id))
        for fallen in line[: -self.history.length]:
            _note(self._seen, event.user_id, fallen, self.history.seen)
        del line[: -self.history.length]

    async def read(self, user_ids: Sequence[str], *, timeout_s: float) -> list[UserState]:  # noqa: ARG002 - nothing to wait for
        return [
            UserState(
                list(self._histories.get(u, ())),
                dict(self._refused.get(u, {})),
                set(self._seen.get(u, ())),
                orjson.loads(self._profiles.get(u) or b"{}"),
            )
            for u in user_ids
        ]

    async def change_profiles(self, changes: Mapping[str, ProfileChange]) -> None:
        for user_id, change in changes.items():
            self._profiles[user_id] = merged_profile(user_id, self._profiles.get(user_id, b""), change)

    async def read_log(self, partition: int, after: str = "") -> AsyncIterator[LoggedEvent]:
        records = self._log[partition]
        for at in range(int(after) + 1 if after else 0, len(records)):
            yield LoggedEvent(str(at), from_record(records[at]))

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        return None
