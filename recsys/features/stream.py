"""The streaming road: states by key, events applied as they come, values at an instant. The same monoids as the batch road.

Who owns what: a user's states (every key with `user` in it) lie together and are read with the user's history; the others
(item, author, item and tab, ...) are the catalogue's, kept by their consumers and copied into rankers as a snapshot.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from recsys.core import Vocabulary
from recsys.features.generate import Event, Instant
from recsys.features.groups import GroupState, Plan, Row
from recsys.features.keys import KeyColumns
from recsys.features.packed import digest, pack, unpack
from recsys.features.reading import Key, Reader, Touched

States = dict[tuple[int, Key], GroupState]
"""(number of the group, texts of its key) -> state."""
MOST_KEYS = 1_024
"""Keys of one group that a user may have (tags, items, ...): the one without an event for longest goes first."""
_LENGTH = struct.Struct("<H")


class Stream:
    """States of every key, in this process. `users` and `items` give the rows of `columns`; ids they do not know have none."""

    def __init__(
        self, plan: Plan, users: Vocabulary, items: Vocabulary, columns: KeyColumns, *, offset_s: float = 0.0, duplicate_s: float = 3_600.0
    ) -> None:
        self.plan, self.vocabularies, self.columns = plan, {"user": users, "item": items}, columns
        self.offset_s, self.duplicate_s = offset_s, duplicate_s
        self.reader = Reader(plan, self.vocabularies, columns, offset_s)
        self.of_user: dict[str, States] = {}
        self.of_items: States = {}
        self.newest = -math.inf
        self._told: dict[str, float] = {}
        self._ages: deque[tuple[float, str]] = deque()

    # ---- events -----------------------------------------------------------------------------------------------------

    def apply(self, row: Row) -> bool:
        """Count an event; False where its id was told before (within `duplicate_s` of event time), and nothing happens."""
        if row.event_id and self._again(row):
            return False
        self.newest = max(self.newest, row.time)
        for number, key, event in self.touched(row):
            states = self.of_user.setdefault(row.user_id, {}) if "user" in self.plan.groups[number].key else self.of_items
            self.add(states, number, key, event)
        return True

    def touched(self, row: Row) -> Touched:
        """What an event adds to which keys. A pure function of the event."""
        return self.reader.touched(row) if row.counted else []

    def add(self, states: States, number: int, key: Key, event: Event) -> None:
        """Apply one event to one key's state; a user's keys are bounded."""
        group = self.plan.groups[number]
        held = states.get((number, key))
        states[number, key] = group.apply(held or group.init(), event)
        if held is None and "user" in group.key and len(group.key) > 1:
            mine = [k for k in states if k[0] == number]
            if len(mine) > MOST_KEYS:
                del states[min(mine, key=lambda k: states[k].newest)]

    def taken(self, states: Mapping[tuple[int, Key], GroupState], events: Mapping[tuple[int, Key], Sequence[Event]]) -> States:
        """The states of some keys after several events of each; `states` stay as they are."""
        out: States = {}
        for name, told in events.items():
            group = self.plan.groups[name[0]]
            out[name] = group.take(states.get(name) or group.init(), told)
        return out

    def _again(self, row: Row) -> bool:
        while self._ages and self._ages[0][0] < self.newest - self.duplicate_s:
            self._told.pop(self._ages.popleft()[1], None)
        told = f"{row.user_id}\0{row.event_id}"
        if told in self._told:
            return True
        self._told[told] = row.time
        self._ages.append((row.time, told))
        return False

    # ---- values -----------------------------------------------------------------------------------------------------

    def values(self, user_id: str, item_id: str, context: Mapping[str, Any], at: Instant) -> dict[str, Any]:
        """The raw value of every aggregate for one user, item and context at an instant, crosses left out."""
        out: dict[str, Any] = {}
        mine = self.of_user.get(user_id, {})
        for number, group in enumerate(self.plan.groups):
            states = mine if "user" in group.key else self.of_items
            keys = self.reader.keys[number](user_id, item_id, context, at.time)
            held = [s for key in keys if (s := states.get((number, key)))]
            out |= dict(zip((f.name for f in group.features), group.pooled(held, at), strict=True))
        return out

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def pack(self, states: States) -> bytes:
        """The states of one owner as one value of a store: per state its group, its key and `packed.pack`, with lengths."""
        out = bytearray()
        marks = [digest(g) for g in self.plan.groups]
        for (number, key), state in states.items():
            texts = b"\0".join(text.encode() for text in key if text) if len(key) else b""
            body = pack(self.plan.groups[number], state, mark=marks[number])
            out += bytes([number]) + _LENGTH.pack(len(texts)) + texts + struct.pack("<I", len(body)) + body
        return bytes(out)

    def unpack(self, held: bytes, only: Collection[int] | None = None) -> States:
        """What `pack` wrote; states of declarations that are no longer in force are left out. `only`: of these groups."""
        marks = {digest(g): number for number, g in enumerate(self.plan.groups)}
        out: States = {}
        at = 0
        while at < len(held):
            (n,) = _LENGTH.unpack_from(held, at + 1)
            texts = held[at + 3 : at + 3 + n]
            (size,) = struct.unpack_from("<I", held, at + 3 + n)
            body = held[at + 7 + n : at + 7 + n + size]
            at += 7 + n + size
            number = marks.get(body[1:5])
            if number is not None and (only is None or number in only):
                group, key = self.plan.groups[number], tuple(texts.decode().split("\0"))
                if len(key) == len(group.key):
                    out[number, key] = unpack(group, body, mark=body[1:5])
        return out
