"""Aggregates in service: values from states instead of a log. A bundle's states at training time, then the store's.

Item-side values are an `ItemSnapshot`: the amounts of every key without a user, as sorted arrays, taken at one time which it
names. A ranker holds one and replaces it whole when a newer one is there; a request never reads a counter. A user's values
come from that user's packed states, which ride with the query; without them, from the bundle's.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from recsys.core import UNKNOWN, Queries, Vocabulary
from recsys.data.interactions import SHOWN, Interactions
from recsys.features.aggregates import CLOCK_KEYS
from recsys.features.asof import Raw
from recsys.features.generate import Instant
from recsys.features.groups import Group, GroupState, Row
from recsys.features.inputs import AggregateInputs, Live
from recsys.features.keys import KeyColumns, clock_codes, key_text
from recsys.features.reading import Key
from recsys.features.runs import pooled
from recsys.features.schema import FeatureSpace
from recsys.features.stream import States, Stream
from recsys.features.tally import Ends, Tally

log = logging.getLogger(__name__)
LATEST = 1 << 62
_ODD, _MASK = -0x61C8864680B583EB, (1 << 63) - 1  # 2^64 divided by the golden ratio, as a signed number
MOST_TEXTS = 1 << 20
"""Values of a context column that one bundle tells apart. More would have each other's numbers in keys of several parts, and
whatever clients put there would be held for ever."""
MOST_LATER = 1 << 16
"""Items beyond the bundle's whose counters one bundle tells apart; those that states bring after them count as nothing."""


@dataclass(frozen=True)
class Looked:
    """The states of one group at one instant: codes (K,) ascending, and per aggregate amounts (K, c), last (K,) or values (K, n)."""

    codes: np.ndarray
    amounts: tuple[np.ndarray, ...]
    last: tuple[np.ndarray, ...]

    def only(self, mask: np.ndarray) -> Looked:
        """The keys of a mask (K,)."""
        return Looked(
            self.codes[mask], tuple(x[mask] if len(x) else x for x in self.amounts), tuple(x[mask] if len(x) else x for x in self.last)
        )

    def joined(self, other: Looked) -> Looked:
        """With another's keys, none of which is in this one."""
        order = np.argsort(np.concatenate([self.codes, other.codes]), kind="stable")

        def both(one: tuple[np.ndarray, ...], two: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(np.concatenate([x, y])[order] if len(x) or len(y) else x for x, y in zip(one, two, strict=True))

        return Looked(np.concatenate([self.codes, other.codes])[order], both(self.amounts, other.amounts), both(self.last, other.last))

    def values(self, group: Group, codes: np.ndarray, at: np.ndarray) -> Raw:
        """Aggregate -> (n,) values, or (n, N) lists, of keys (n, W), -1 where there is none, at instants (n,)."""
        n, W = codes.shape
        flat = codes.reshape(-1)
        slot = np.searchsorted(self.codes, flat)
        known = (slot < len(self.codes)) & (flat >= 0)
        known[known] = self.codes[slot[known]] == flat[known]
        slot = np.where(known, slot, 0)
        out: Raw = {}
        for f, amounts, last in zip(group.features, self.amounts, self.last, strict=True):
            if isinstance(f.monoid, Ends):
                out[f.name] = np.where(known[:, None], amounts[slot] if len(amounts) else math.nan, np.full((n, f.monoid.n), math.nan))
                continue
            nothing = f.nothing if isinstance(f.monoid, Tally) else (0.0,)
            held = [np.where(known, amounts[slot, c] if len(amounts) else x, x) for c, x in enumerate(nothing)]
            if not isinstance(f.monoid, Tally):
                out[f.name] = held[0]
                continue
            newest = np.where(known, last[slot] if len(last) else math.nan, math.nan).reshape(n, W)
            when = np.where(np.isnan(newest), -np.inf, newest).max(1)
            merged = [pooled(x.reshape(n, W), f.monoid.op) for x in held]
            with np.errstate(invalid="ignore", divide="ignore"):
                out[f.name] = np.asarray(f.final(merged, np.where(np.isfinite(when), when, np.nan), at), np.float64)
        return out


class Coder:
    """Keys as numbers within one bundle: rows of users and items, codes of texts. A context's texts, and items that the bundle does
    not have, are numbered as states bring them, never as requests do: what a value is hangs on the states alone."""

    def __init__(self, columns: KeyColumns, items: Vocabulary, offset_s: float) -> None:
        self.columns, self.items, self.offset_s = columns, items, offset_s
        self._index = {(side, name): column.index for side, named in columns.texts.items() for name, column in named.items()}
        self._context: dict[str, dict[str, int]] = {}
        self._later: dict[str, int] = {}
        self._later_ids: list[str] = []
        self._hashed: dict[Key, bool] = {}
        self._numbering = threading.Lock()  # a new snapshot is coded beside requests
        self._of_keys: dict[tuple[Key, int], tuple[pa.ChunkedArray, np.ndarray]] = {}

    def of_key(self, group: Group, key: Key, user: int) -> int:
        """The code of a state's key; `user` stands for its user. -1 where an item or text is not of this bundle, or the key has other parts."""
        out = 0
        if len(key) != len(group.key):
            return -1
        for part, text in zip(group.key, key, strict=True):
            code = user if part == "user" else self.item(text, new=True) if part == "item" else self.text(part, text, new=True)
            if code < 0:
                return -1
            out = self._joined(group, part, out, code)
        return out

    def of_keys(self, group: Group, partition: int, keys: pa.ChunkedArray) -> np.ndarray:
        """(K,) codes of a partition's item-side keys, texts joined by NUL. They are kept until the partition has other keys."""
        known = self._of_keys.get((group.key, partition))
        if known is None or not known[0].equals(keys):
            codes = np.array([self.of_key(group, tuple(key.split("\0")), -1) for key in keys.to_pylist()], np.int64)
            known = self._of_keys[group.key, partition] = (keys, codes)
        return known[1]

    def of_pairs(self, group: Group, users: np.ndarray, items: np.ndarray, queries: Queries, at: np.ndarray) -> np.ndarray:
        """(n, W) codes of the pairs' keys: `users` (n,) as in `of_key`, `items` (n,) rows, `at` (n,) rows of `queries`."""
        out = np.zeros((len(items), 1), np.int64)
        for part in group.key:
            codes = self._pairs(part, users, items, queries, at)
            out = np.where((out < 0) | (codes < 0), -1, self._joined(group, part, out, codes))
        return out

    def _pairs(self, part: str, users: np.ndarray, items: np.ndarray, queries: Queries, at: np.ndarray) -> np.ndarray:
        if part in ("user", "item"):
            return (users if part == "user" else items)[:, None].astype(np.int64)
        if part in CLOCK_KEYS:
            return clock_codes(part, queries.at, self.offset_s)[at, None]
        side = self.columns.side_of(part)
        if side is None:
            codes = np.array([self.text(part, key_text(c.get(part))) for c in queries.contexts], np.int64)
            return codes[at, None]
        rows = queries.users[at] if side == "user" else items
        column = self.columns.texts[side][part].codes
        known = (rows >= 0) & (rows < len(column))
        found: np.ndarray = np.where(known[:, None], column[np.where(known, rows, 0)] if len(column) else -1, -1)
        return found.astype(np.int64)

    def item(self, item_id: str, *, new: bool = False) -> int:
        """The row under which states hold an item: the bundle's, or one behind all of them; `new` gives it one. -1 where it has none."""
        row = self.items.row(item_id)
        if row != UNKNOWN or not item_id:
            return row
        if new and item_id not in self._later:
            with self._numbering:
                if len(self._later) < MOST_LATER and item_id not in self._later:
                    self._later_ids.append(item_id)  # before others can meet its number
                    self._later[item_id] = len(self.items) + len(self._later)
                    if len(self._later) == MOST_LATER:
                        log.warning("counters: %d items that the bundle does not have; of more there are none until a retrain", MOST_LATER)
        return self._later.get(item_id, UNKNOWN)

    def item_ids(self, codes: np.ndarray) -> list[str]:
        """(n,) rows that `item` gave -> their n ids."""
        n = len(self.items)
        ours = iter(self.items.outside(codes[codes < n]))
        return [self._later_ids[code - n] if code >= n else next(ours) for code in codes.tolist()]

    def text(self, part: str, text: str, *, new: bool = False) -> int:
        """The code of a text, -1 where it has none; `new` gives a context's text one."""
        if part == "item":
            return self.item(text, new=new)
        if part in CLOCK_KEYS:
            return int(text)
        side = self.columns.side_of(part)
        if side is not None:
            return self._index[side, part].get(text, -1)
        known = self._context.setdefault(part, {})
        if new and text and text not in known:
            with self._numbering:
                if len(known) < MOST_TEXTS and text not in known:
                    known[text] = len(known)
                    if len(known) == MOST_TEXTS:
                        log.warning(
                            "counters: context '%s' has had %d values; of more there are none until the next version", part, MOST_TEXTS
                        )
        return known.get(text, -1)

    def value(self, of: str, value: Any) -> float:
        """A list's value as a number: its own, an item's row or a text's code. NaN, as where there is none, for one that the bundle cannot
        tell, such as the colour that an item had before: -1 would be like the missing colour of a candidate."""
        code = float(value) if of == "value" else float(self.text(of, str(value), new=True))
        return math.nan if of != "value" and code < 0 else code

    def texts(self, part: str) -> list[str]:
        """The texts of a context column, by code."""
        return list(self._context.get(part, {}))

    def _joined(self, group: Group, part: str, out: Any, code: Any) -> Any:
        """The number of a key's parts so far with one more: its place among all combinations; of more than 63 bits of these, a hash."""
        if group.key not in self._hashed:
            self._hashed[group.key] = math.prod(map(self._size, group.key)) >= _MASK
        return (out * _ODD + code + 1) & _MASK if self._hashed[group.key] else out * self._size(part) + code

    def _size(self, part: str) -> int:
        if part in CLOCK_KEYS:
            return 24
        side = self.columns.side_of(part)
        if part == "item":
            return len(self.items) + MOST_LATER
        return max(len(self.columns.texts[side][part].texts), 1) if side and part != "user" else MOST_TEXTS


def looked(group: Group, states: Iterable[tuple[int, GroupState]], at: Instant, value_code: Any) -> Looked:
    """The states of a group, each with its code, as arrays at an instant. `value_code(of, text)` numbers a list's texts."""
    held = sorted(((code, state) for code, state in states if code >= 0), key=lambda e: e[0])
    amounts: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for i, f in enumerate(group.features):
        got = [group.got(i, f, [state], at) for _, state in held]
        if isinstance(f.monoid, Ends):
            rows = np.full((len(got), f.monoid.n), math.nan)
            for row, values in zip(rows, got, strict=True):
                if values:
                    row[-len(values) :] = [value_code(f.config.reads, v) for v in values]
            amounts.append(rows)
            last.append(np.empty(0))
        elif isinstance(f.monoid, Tally):
            amounts.append(np.array([g.amounts if g else f.nothing for g in got], np.float64).reshape(len(got), len(f.nothing)))
            last.append(np.array([g.last if g else math.nan for g in got], np.float64))
        else:
            amounts.append(np.array(got, np.float64)[:, None])
            last.append(np.empty(0))
    return Looked(np.array([code for code, _ in held], np.int64), tuple(amounts), tuple(last))


@dataclass(frozen=True)
class ItemSnapshot:
    """Item-side values at one time: group number -> arrays. `at` is Unix seconds; an impression log names it.

    counted: per partition of the event log, the entries below this number are counted; None: those of the training log alone;
    (): its parts were cut at several places, or at several times.
    """

    at: float
    groups: dict[int, Looked]
    counted: tuple[int, ...] | None = None

    @classmethod
    def of(cls, inputs: AggregateInputs, coder: Coder, states: States, at: float) -> Self:
        """From the catalogue's states: every group whose key has no user."""
        out = {}
        for number, group in enumerate(inputs.plan.groups):
            if "user" not in group.key:
                mine = ((coder.of_key(group, key, -1), s) for (g, key), s in states.items() if g == number)
                out[number] = looked(group, mine, Instant(at, LATEST), coder.value)
        return cls(at, out)


class ReadUser(Protocol):
    """A user's states in a bundle, all or those of some groups; none for somebody it does not know."""

    def __call__(self, user_id: str, only: Collection[int] | None = None) -> States: ...


class StateSource:
    """The Source of a loaded bundle. `snapshot` may be replaced at any time: requests take it once, whole."""

    def __init__(self, inputs: AggregateInputs, stream: Stream, at: float) -> None:
        self.inputs, self.stream = inputs, stream
        self.coder = Coder(inputs.columns, stream.vocabularies["item"], stream.offset_s)
        self.snapshot = ItemSnapshot.of(inputs, self.coder, stream.of_items, at)
        self._of_users = {number for number, group in enumerate(inputs.plan.groups) if "user" in group.key}
        self.read_user: ReadUser = self._told

    def _told(self, user_id: str, only: Collection[int] | None = None) -> States:
        return {name: s for name, s in self.stream.of_user.get(user_id, {}).items() if only is None or name[0] in only}

    def query_values(self, queries: Queries) -> Raw:
        """See inputs.Source."""
        raw = self._values(queries, np.full(len(queries), -1), np.arange(len(queries)), pairs=False)
        return {n: x for n, x in raw.items() if self.inputs.plan.aggregates[n].kind != "match"}

    def pair_values(self, queries: Queries, items: np.ndarray) -> Raw:
        """See inputs.Source."""
        B, N = items.shape
        at, flat = np.repeat(np.arange(B), N), items.reshape(-1)
        raw = self._values(queries, flat, at, pairs=True)
        matches = [n for n, a in self.inputs.plan.aggregates.items() if a.kind == "match"]
        if matches:
            lists = self._values(queries, np.full(B, -1), np.arange(B), pairs=False)
            raw |= {n: np.repeat(lists[n], N, axis=0) for n in matches}
        return self.inputs.matched(raw, lambda of: self._item_codes(of, flat))

    def _values(self, queries: Queries, items: np.ndarray, at: np.ndarray, *, pairs: bool) -> Raw:
        snapshot, out = self.snapshot, Raw()
        users = self._users(queries)
        for group in self.inputs.groups(pairs=pairs):
            number = self.inputs.plan.groups.index(group)
            mine = "user" in group.key
            table = users[number] if mine else snapshot.groups[number]
            codes = self.coder.of_pairs(group, at, items, queries, at)
            out |= table.values(group, codes, queries.at[at] if mine else np.full(len(at), snapshot.at))
        return out

    def _users(self, queries: Queries) -> dict[int, Looked]:
        """The states of all users of the batch, by group; a query's number stands for its user. Made once a batch."""
        if "aggregates" not in queries.memo:
            held: dict[int, list[tuple[int, GroupState, float]]] = {n: [] for n, g in enumerate(self.inputs.plan.groups) if "user" in g.key}
            for b, user_id in enumerate(queries.user_ids):
                state = queries.states[b] if queries.states else b""
                states = self.of_user(user_id, state)
                for (number, key), s in states.items():
                    held[number].append((self.coder.of_key(self.inputs.plan.groups[number], key, b), s, float(queries.at[b])))
            queries.memo["aggregates"] = {n: self._table(self.inputs.plan.groups[n], mine) for n, mine in held.items()}
        tables: dict[int, Looked] = queries.memo["aggregates"]
        return tables

    def of_user(self, user_id: str, state: bytes) -> States:
        """A user's states as the store has them; groups that it does not know, a version's new ones at first, are the bundle's."""
        states = self.stream.unpack(state) if state else {}
        if lacking := self._of_users - {number for number, _ in states}:
            states |= self.read_user(user_id, lacking)
        return states

    def _table(self, group: Group, mine: list[tuple[int, GroupState, float]]) -> Looked:
        """Each state at its own query's time."""
        one = [looked(group, [(c, s)], Instant(at, LATEST), self.coder.value) for c, s, at in sorted(mine, key=lambda e: e[0]) if c >= 0]
        if not one:
            return looked(group, [], Instant(0.0, 0), None)
        columns = range(len(group.features))
        return Looked(
            np.concatenate([x.codes for x in one]),
            tuple(np.concatenate([x.amounts[i] for x in one]) for i in columns),
            tuple(np.concatenate([x.last[i] for x in one]) for i in columns),
        )

    def _item_codes(self, of: str, items: np.ndarray) -> np.ndarray:
        column = self.inputs.columns.texts["item"][of].codes[:, 0]
        known = (items >= 0) & (items < len(column))
        codes: np.ndarray = np.where(known, column[np.where(known, items, 0)] if len(column) else -1, -1)
        return codes.astype(np.float64)

    def item_row(self, item_id: str) -> int:
        """See inputs.Live.item_rows."""
        return self.coder.item(item_id)

    def item_ids(self, codes: np.ndarray) -> list[str]:
        """See inputs.Live: items that came after the bundle have rows here too."""
        return self.coder.item_ids(codes)

    def context_texts(self, of: str) -> Any:
        """The texts of a context column, in the order of their codes."""
        return _Texts(self.coder.texts(of))


@dataclass(frozen=True)
class _Texts:
    texts: list[str]


# ---- a bundle's states ------------------------------------------------------------------------------------------------


def replayed(inputs: AggregateInputs, log: Interactions, told: np.ndarray, users: Vocabulary) -> Stream:
    """The streaming road over a whole log."""
    stream = Stream(inputs.plan, users, log.items, inputs.columns, offset_s=inputs.config.utc_offset_s)
    for row in rows_of(log, told):
        stream.apply(row)
    return stream


def rows_of(log: Interactions, told: np.ndarray, at: np.ndarray | None = None) -> Iterable[Row]:
    """The rows of a log in outside terms, in its order or in the order of positions `at`."""
    users, items = log.users.ids.to_pylist(), log.items.ids.to_pylist()
    for i in range(len(log)) if at is None else at.tolist():
        yield Row(
            time=float(log.time[i]),
            position=i,
            user_id=users[log.user[i]],
            item_id=items[log.item[i]],
            event=log.event_names[log.event[i]],
            value=float(log.value[i]),
            labels={name: float(label[i]) for name, label in log.labels.items()},
            context={name: column[i] for name, column in log.context.items()},
            shown=SHOWN not in log.labels or bool(log.labels[SHOWN][i]),
            told=bool(told[i]),
        )


def newest_of(stream: Stream) -> float:
    """Unix seconds of the newest event that the states count; 0 where there is none."""
    return stream.newest if math.isfinite(stream.newest) else 0.0


def save_states(stream: Stream, folder: Path) -> None:
    """items.bin, and users.bin with users.indptr.npy by row of the vocabulary; states.json names their time."""
    (folder / "items.bin").write_bytes(stream.pack(stream.of_items))
    users = stream.vocabularies["user"]
    packed = [stream.pack(stream.of_user.get(u, {})) for u in users.ids.to_pylist()]
    np.save(folder / "users.indptr.npy", np.concatenate([[0], np.cumsum([len(p) for p in packed], dtype=np.int64)]))
    np.save(folder / "users.bytes.npy", np.frombuffer(b"".join(packed), np.uint8))
    (folder / "states.json").write_text(json.dumps({"at": newest_of(stream)}))


def load_live(folder: Path, space: FeatureSpace, users: Vocabulary, items: Vocabulary) -> Live:
    """The aggregates of a bundle: inputs, the catalogue's snapshot, and users' states read as they are asked for."""
    inputs = AggregateInputs.load(folder, space)
    stream = Stream(inputs.plan, users, items, inputs.columns, offset_s=inputs.config.utc_offset_s)
    stream.of_items = stream.unpack((folder / "items.bin").read_bytes())
    source = StateSource(inputs, stream, float(json.loads((folder / "states.json").read_text())["at"]))
    indptr, held = np.load(folder / "users.indptr.npy", mmap_mode="r"), np.load(folder / "users.bytes.npy", mmap_mode="r")

    def read_user(user_id: str, only: Collection[int] | None = None) -> States:
        row = users.row(user_id)
        return stream.unpack(held[indptr[row] : indptr[row + 1]].tobytes(), only) if row >= 0 else {}

    source.read_user = read_user
    return Live(inputs, source, items)
