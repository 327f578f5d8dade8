"""A stream's states as fields of hashes in a store: one field a key, so that an event rewrites only what it touched.

A field is named by 4 bytes of the declaration and the texts of its key; its value is what `Stream.unpack` reads, so the values
of a hash one after another are the packed states of their owner. One field more says how far they count (`counted_to`): whoever
reads them passes over it, as over a declaration that is no longer in force.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace

from recsys.features.groups import GroupState, Plan
from recsys.features.packed import digest, pack, unpack
from recsys.features.reading import Key
from recsys.features.stream import States

_HEAD, _SIZE = struct.Struct("<BH"), struct.Struct("<I")
_COUNTED = struct.Struct("<Q")
COUNTED = b"\0\0\0\0"
"""The field that says how far a user is counted; no declaration's mark."""
MOST_PENDING_OF_ITEMS = 64
"""Item-side values are asked for at the time of a snapshot, behind every event: few need to be kept apart."""


class Records:
    """Fields and values of the states of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.marks = [digest(group) for group in plan.groups]
        self._numbers = {mark: number for number, mark in enumerate(self.marks)}

    def field(self, number: int, key: Key) -> bytes:
        """The field of a key."""
        return self.marks[number] + "\0".join(key).encode()

    def value(self, number: int, key: Key, state: GroupState) -> bytes:
        """The state of a key as bytes, with its name."""
        texts = "\0".join(key).encode()
        body = pack(self.plan.groups[number], state, mark=self.marks[number])
        return _HEAD.pack(number, len(texts)) + texts + _SIZE.pack(len(body)) + body

    def stale(self, values: Iterable[bytes]) -> list[bytes]:
        """The fields of values that `read` leaves out."""
        found = []
        for held in values:
            _, n = _HEAD.unpack_from(held)
            mark = held[_HEAD.size + n + _SIZE.size :][1:5]
            if mark not in self._numbers and mark != COUNTED:
                found.append(mark + held[_HEAD.size : _HEAD.size + n])
        return found

    def read(self, values: Iterable[bytes]) -> States:
        """The states of some values; those of declarations no longer in force are left out, and so are keys of another number of parts."""
        found: States = {}
        for held in values:
            _, n = _HEAD.unpack_from(held)
            body = held[_HEAD.size + n + _SIZE.size :]
            number = self._numbers.get(body[1:5])
            if number is not None:
                key = tuple(held[_HEAD.size : _HEAD.size + n].decode().split("\0"))
                if len(key) == len(self.plan.groups[number].key):
                    found[number, key] = unpack(self.plan.groups[number], body, mark=body[1:5])
        return found


def counted_field(n: int) -> dict[bytes, bytes]:
    """The field and value of a user of whom every entry of the partition's log below number `n` is counted, and none from it on."""
    body = b"\1" + COUNTED + _COUNTED.pack(n)
    return {COUNTED: _HEAD.pack(0, 0) + _SIZE.pack(len(body)) + body}


def counted_to(counters: bytes) -> int | None:
    """What `counted_field` said, of a user's values one after another; None where they do not say."""
    at = 0
    while at < len(counters):
        _, n = _HEAD.unpack_from(counters, at)
        (size,) = _SIZE.unpack_from(counters, at + _HEAD.size + n)
        body = at + _HEAD.size + n + _SIZE.size
        if counters[body + 1 : body + 5] == COUNTED:
            return int(_COUNTED.unpack_from(counters, body + 5)[0])
        at = body + size
    return None


def parted(plan: Plan) -> tuple[Plan, Plan]:
    """(the groups of users, the groups of items), each a plan of its own."""
    users = tuple(g for g in plan.groups if "user" in g.key)
    items = tuple(replace(g, most_pending=MOST_PENDING_OF_ITEMS) for g in plan.groups if "user" not in g.key)
    return replace(plan, groups=users), replace(plan, groups=items)


def joined(plans: Sequence[Plan]) -> Plan:
    """Several plans as one, with the groups of all."""
    return replace(plans[0], groups=tuple(g for plan in plans for g in plan.groups))
