"""The state of a key as bytes: versioned, compact, read back exactly. What a store holds and a bundle carries; no pickle.

A state begins with its version (1 byte) and 4 bytes of the declaration that it counts by: a state of another declaration is
not read. Then the pending events, by column, and each aggregate's settled state. A count takes one to three bytes, any other number nine,
a time eight; a window's part names its bucket instead, a part of the whole past needs no time at all.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import struct
from typing import Any

from recsys.errors import StoreError
from recsys.features.generate import Event
from recsys.features.groups import Counted, Group, GroupState
from recsys.features.tally import Distinct, Ends, Entry, Part, Tally

VERSION = 2
_F64, _U64, _I64 = struct.Struct("<d"), struct.Struct("<Q"), struct.Struct("<q")
_NONE, _TEXT, _NUMBER, _AMOUNTS = range(4)
_INTEGERS = float(1 << 55)
_WIDTHS, _MOST = "BHIQ", (0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
_RAW = len(_WIDTHS)
"""In place of a width: times as they are, eight bytes each."""


def digest(group: Group) -> bytes:
    """4 bytes of what a group counts. A rate's prior and strength are no part of it: they only read the state."""
    declared = [[f.name, f.config.model_dump(mode="json", exclude={"prior", "strength"}), repr(f.monoid)] for f in group.features]
    return hashlib.sha256(json.dumps([group.key, declared, group.signals], sort_keys=True).encode()).digest()[:4]


def pack(group: Group, state: GroupState, *, mark: bytes | None = None) -> bytes:
    """A state as bytes; `mark` is `digest(group)` where it is at hand."""
    out = bytearray([VERSION]) + (mark or digest(group)) + _F64.pack(state.newest)
    _put_pending(out, state)
    for f, held in zip(group.features, state.settled, strict=True):
        _put_int(out, len(held))
        for part in held:
            _put_part(out, f.monoid, f, part)
    return bytes(out)


def _put_pending(out: bytearray, state: GroupState) -> None:
    """Columns: milliseconds before the newest event, positions from the first on, and what is said, each thing once."""
    pending = state.pending
    _put_int(out, len(pending))
    if not pending:
        return
    times, positions, values = zip(*pending, strict=True)
    ms = _whole_ms((*times, state.newest))
    if ms:
        newest = ms.pop()
        _put_column(out, [newest - at for at in ms])
    else:
        out.append(_RAW)
        out += struct.pack(f"<{len(times)}d", *times)
    first = min(positions)
    _put_signed(out, first)
    _put_column(out, [position - first for position in positions])
    table = {said: at for at, said in enumerate(dict.fromkeys(values))}
    _put_int(out, len(table))
    for said in table:
        out += _said(said)
    if len(table) > 1:
        _put_column(out, [table[said] for said in values])


def _whole_ms(times: tuple[float, ...]) -> list[int]:
    """Times in milliseconds, or nothing where that is not all of each, or more apart than a column holds."""
    try:
        ms = [round(time * 1000) for time in times]
    except (OverflowError, ValueError):  # infinite, or none
        return []
    return ms if tuple([at / 1000 for at in ms]) == times and max(ms) - min(ms) <= _MOST[-1] else []


def _put_column(out: bytearray, numbers: list[int]) -> None:
    """Numbers from 0 on, each in as few bytes as the largest takes."""
    width = bisect.bisect_left(_MOST, max(numbers))
    out.append(width)
    out += struct.pack(f"<{len(numbers)}{_WIDTHS[width]}", *numbers)


@functools.lru_cache(maxsize=4_096)
def _said(values: tuple[Any, ...]) -> bytes:
    """What an event says by signal, as bytes. Most events of a group say the same."""
    out = bytearray()
    for value in values:
        _put_value(out, value)
    return bytes(out)


def unpack(group: Group, held: bytes, *, mark: bytes | None = None) -> GroupState:
    """What `pack` wrote; the empty state for bytes of another declaration. StoreError for another version or damage."""
    if not held:
        return group.init()
    if held[0] not in (1, VERSION):
        raise StoreError(f"A feature state has version {held[0]}, this code reads version {VERSION}. Run the newer release.")
    if held[1:5] != (mark or digest(group)):
        return group.init()
    try:
        return _Reader(held).state(group)
    except (struct.error, IndexError, ValueError, OverflowError) as fault:
        raise StoreError(f"A feature state of {len(held)} bytes is damaged ({fault}). Rebuild it from the event log.") from fault


def _put_int(out: bytearray, n: int) -> None:
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)


def _put_signed(out: bytearray, n: int) -> None:
    _put_int(out, n << 1 if n >= 0 else (-n << 1) - 1)


def _put_number(out: bytearray, x: float) -> None:
    """A whole number from 0 on is a varint of twice itself, anything else a 1 and eight bytes."""
    if 0 <= x < _INTEGERS and x == int(x) and math.copysign(1.0, x) > 0:
        _put_int(out, int(x) << 1)
    else:
        out.append(1)
        out += _F64.pack(x)


def _put_value(out: bytearray, value: Any) -> None:
    if value is None:
        out.append(_NONE)
    elif isinstance(value, str):
        text = value.encode()
        out.append(_TEXT)
        _put_int(out, len(text))
        out += text
    elif isinstance(value, tuple):
        out.append(_AMOUNTS)
        _put_int(out, len(value))
        for x in value:
            _put_number(out, x)
    else:
        out.append(_NUMBER)
        _put_number(out, float(value))


def _put_part(out: bytearray, monoid: Any, f: Counted, part: Any) -> None:
    if isinstance(monoid, Ends):
        out += _F64.pack(part.time) + _I64.pack(part.position)
        _put_value(out, part.value)
    elif isinstance(monoid, Distinct):
        out += _F64.pack(part[0]) + _U64.pack(part[1])
    else:
        if not _timed(monoid, f):
            if monoid.buckets:
                _put_signed(out, monoid.bucket(part.last))
        else:
            out += _F64.pack(part.first) + _F64.pack(part.last)
        _put_int(out, len(part.amounts))
        for x in part.amounts:
            _put_number(out, x)


def _timed(monoid: Tally, f: Counted) -> bool:
    """Whether a part's exact times say something: for a decay, a recency, a day or a session."""
    return bool(monoid.half_life_s) or f.config.kind == "recency" or (monoid.until != "now" and not monoid.buckets)


class _Reader:
    def __init__(self, held: bytes) -> None:
        self.held, self.at = held, 5

    def state(self, group: Group) -> GroupState:
        newest, n, signals = self._float(), self._int(), len(group.signals)
        if self.held[0] == 1:  # before pending events were written as columns
            pending = tuple(Event(self._float(), self._unpack(_I64), self._said(signals)) for _ in range(n))
        else:
            pending = self._pending(newest, n, signals) if n else ()
        settled = tuple(tuple(self._part(f.monoid, f) for _ in range(self._int())) for f in group.features)
        return GroupState(newest, pending, settled)

    def _pending(self, newest: float, n: int, signals: int) -> tuple[Event, ...]:
        if self.held[self.at] == _RAW:
            self.at += 1 + 8 * n
            times = struct.unpack_from(f"<{n}d", self.held, self.at - 8 * n)
        else:
            newest_ms = round(newest * 1000)
            times = tuple((newest_ms - before) / 1000 for before in self._column(n))
        first = self._signed()
        positions = self._column(n)
        table = [self._said(signals) for _ in range(self._int())]
        which = self._column(n) if len(table) > 1 else (0,) * n
        return tuple(Event(time, first + after, table[at]) for time, after, at in zip(times, positions, which, strict=True))

    def _column(self, n: int) -> tuple[int, ...]:
        form = f"<{n}{_WIDTHS[self.held[self.at]]}"
        self.at += 1 + struct.calcsize(form)
        return struct.unpack_from(form, self.held, self.at - struct.calcsize(form))

    def _said(self, signals: int) -> tuple[Any, ...]:
        return tuple(self._value() for _ in range(signals))

    def _unpack(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.held, self.at)
        self.at += form.size
        return value

    def _float(self) -> float:
        return float(self._unpack(_F64))

    def _int(self) -> int:
        n, shift = 0, 0
        while True:
            byte = self.held[self.at]
            self.at += 1
            n |= (byte & 127) << shift
            if byte < 128:
                return n
            shift += 7

    def _signed(self) -> int:
        n = self._int()
        return n >> 1 if not n & 1 else -(n + 1 >> 1)

    def _number(self) -> float:
        n = self._int()
        return self._float() if n == 1 else float(n >> 1)

    def _value(self) -> Any:
        tag = self.held[self.at]
        self.at += 1
        if tag == _NONE:
            return None
        if tag == _TEXT:
            n = self._int()
            self.at += n
            return self.held[self.at - n : self.at].decode()
        return tuple(self._number() for _ in range(self._int())) if tag == _AMOUNTS else self._number()

    def _part(self, monoid: Any, f: Counted) -> Any:
        if isinstance(monoid, Ends):
            return Entry(self._float(), self._unpack(_I64), self._value())
        if isinstance(monoid, Distinct):
            return (self._float(), self._unpack(_U64))
        if _timed(monoid, f):
            first, last = self._float(), self._float()
        elif monoid.buckets:
            bucket = self._signed()
            first = last = (bucket + 0.5) * monoid.bucket_s - monoid.offset_s  # the middle: rounding cannot leave the bucket
        else:
            first = last = 0.0
        return Part(first, last, tuple(self._number() for _ in range(self._int())))
