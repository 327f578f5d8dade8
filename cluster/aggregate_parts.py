"""What tasks of the batch road on Ray Data do: rows of a log and instants as blocks, dealt to parts by key, each part answered.

Pure functions of tables; `cluster.aggregate` runs them. A block has the events first; `ask` numbers instants, and is -1 in events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from recsys.data.interactions import SHOWN
from recsys.features.aggregates import CLOCK_KEYS
from recsys.features.asof import Asked, AsOf
from recsys.features.encoders import as_floats
from recsys.features.groups import Counted, Group
from recsys.features.keys import KeyColumns, TextColumn, clock_codes
from recsys.features.tally import Ends

BLOCK = 250_000
"""Rows of a block: 10 to 20 MB."""
PART, ASK = "part", "ask"


@dataclass(frozen=True)
class Pass:
    """Groups that are dealt by one part of their keys. `wide`: its rows have several values each."""

    by: str
    wide: bool
    groups: tuple[Group, ...]

    @property
    def features(self) -> list[Counted]:
        """The aggregates of all groups."""
        return [f for g in self.groups for f in g.features]

    @property
    def widths(self) -> list[int]:
        """How many numbers the answer to each is: amounts and a time, a list's values, or one."""
        return [len(f.nothing) + 1 if self.wide else f.monoid.n if isinstance(f.monoid, Ends) else 1 for f in self.features]


def passes(columns: KeyColumns, groups: Sequence[Group]) -> list[Pass]:
    """The groups by the part that they are dealt by: user, item or a column of one value; else a list; else the clock."""
    by: dict[tuple[str, bool], list[Group]] = {}
    for group in groups:
        wide = {p for p in group.key if _width(columns, p) > 1}
        ranked = sorted(group.key, key=lambda p: (p in CLOCK_KEYS, p in wide, p != "user", p != "item"))
        by.setdefault((ranked[0], ranked[0] in wide), []).append(group)
    return [Pass(name, wide, tuple(mine)) for (name, wide), mine in by.items()]


def _width(columns: KeyColumns, part: str) -> int:
    side = columns.side_of(part)
    return int(columns.texts[side][part].codes.shape[1]) if side and part not in ("user", "item") else 1


# ---- rows -------------------------------------------------------------------------------------------------------------


def blocks_of(asof: AsOf, asked: Asked, groups: Sequence[Group]) -> Iterator[pa.Table]:
    """The log's events, then what is asked, as blocks of one schema. `ask` numbers instants, -1 in events; `seen` is the log
    position of an event, and of an instant the one below which it sees the log; `code:` are codes of the whole log's context."""
    whole, E, n = asof.log, len(asof.log), len(asked)
    coded, numbers, labels = _read(asof, groups)
    for a in range(0, E, BLOCK):
        at = slice(a, min(a + BLOCK, E))
        rows = at.stop - at.start
        yield _table(
            np.full(rows, -1),
            np.arange(at.start, at.stop),
            {name: getattr(whole, name)[at] for name in ("user", "item", "time", "event", "value")}
            | {"clock": whole.time[at], "told": asof.told[at]}
            | {f"label:{name}": whole.labels[name][at] for name in labels}
            | {f"code:{name}": asof.context[name].codes[at, 0] for name in coded}
            | {f"context:{name}": as_floats(whole.context[name][at]) for name in numbers},
        )
    clock = asked.times if asked.clock is None else asked.clock
    for a in range(0, n, BLOCK):
        at = slice(a, min(a + BLOCK, n))
        rows = at.stop - at.start
        yield _table(
            np.arange(at.start, at.stop),
            asked.rows[at],
            {"user": asked.users[at], "item": asked.items[at], "time": asked.times[at], "clock": clock[at]}
            | {"event": np.zeros(rows), "value": np.zeros(rows), "told": np.zeros(rows)}
            | {f"label:{name}": np.zeros(rows) for name in labels}
            | {f"code:{name}": asked.context[name][at] if name in asked.context else np.full(rows, -1) for name in coded}
            | {f"context:{name}": np.zeros(rows) for name in numbers},
        )


def _read(asof: AsOf, groups: Sequence[Group]) -> tuple[list[str], list[str], list[str]]:
    """Context columns whose texts, and those whose numbers the groups read, and labels."""
    signals = [s for g in groups for s in g.signals]
    numbers = {s.of for s in signals if s.kind in ("mean", "number") and s.of in asof.log.context}
    coded = ({p for g in groups for p in g.key} | {s.of for s in signals}) & set(asof.context) - numbers
    return sorted(coded), sorted(numbers), sorted(({s.of for s in signals if s.kind == "rate"} | {SHOWN}) & set(asof.log.labels))


_TYPES = {
    "user": np.int32,
    "item": np.int32,
    "event": np.int16,
    "value": np.float32,
    "told": np.bool_,
    "time": np.float64,
    "clock": np.float64,
}
_KINDS = {"label": np.float32, "code": np.int32, "context": np.float64}


def _table(ask: np.ndarray, seen: np.ndarray, columns: dict[str, np.ndarray]) -> pa.Table:
    typed: dict[str, np.ndarray] = {
        n: np.ascontiguousarray(x, _TYPES.get(n) or _KINDS[n.partition(":")[0]]) for n, x in sorted(columns.items())
    }
    return pa.table({ASK: ask.astype(np.int64), "seen": seen.astype(np.int64)} | typed)


# ---- a task -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What every task needs beside its rows. Part p of pass n has the number n · parts + p."""

    asof: AsOf
    """Over no event."""
    passes: list[Pass]
    parts: int
    texts: dict[str, list[str]]


def shared_by(asof: AsOf, groups: Sequence[Group], parts: int) -> Shared:
    """What the tasks share, none of the log in it."""
    none = replace(asof.log.where(np.empty(0, np.int64)), past=None, context={}, session=None)
    plan = replace(asof.plan, groups=tuple(groups))
    empty = AsOf(plan, none, _needed(asof.columns, groups), np.empty(0, bool), offset_s=asof.offset_s)
    return Shared(empty, passes(asof.columns, groups), parts, {n: c.texts for n, c in asof.context.items()})


def _needed(columns: KeyColumns, groups: Sequence[Group]) -> KeyColumns:
    """The columns that the groups read, as plain arrays: those of a memory-mapped file would be copied into every task."""
    names = {n for g in groups for n in (*g.key, *(s.of for s in g.signals))}
    texts = {
        side: {n: TextColumn(np.asarray(c.codes), c.texts) for n, c in named.items() if n in names} for side, named in columns.texts.items()
    }
    return KeyColumns(texts, {side: {n: np.asarray(x) for n, x in named.items() if n in names} for side, named in columns.numbers.items()})


def deal(rows: pa.Table, shared: Shared) -> pa.Table:
    """The rows with their part, once for each pass; of a list for each part that one of its values is in. What has no key counts nowhere."""
    dealt = []
    for number, one in enumerate(shared.passes):
        codes = _codes(shared, one.by, rows)
        part = np.where(codes >= 0, codes % shared.parts, -1)
        if one.wide:
            part.sort(axis=1)
            part[:, 1:][part[:, 1:] == part[:, :-1]] = -1
        else:  # an instant without a key wants an answer all the same: those are dealt evenly
            ask = rows[ASK].to_numpy()
            part[:, 0] = np.where((part[:, 0] < 0) & (ask >= 0), ask % shared.parts, part[:, 0])
        at, slot = np.nonzero(part >= 0)
        dealt.append(rows.take(at).append_column(PART, pa.array(number * shared.parts + part[at, slot])))
    return pa.concat_tables(dealt)


def _codes(shared: Shared, by: str, rows: pa.Table) -> np.ndarray:
    """(n, W) codes of the part that rows are dealt by."""
    columns = shared.asof.columns
    if by in ("user", "item"):
        return np.asarray(rows[by].to_numpy()[:, None], np.int64)
    if by in CLOCK_KEYS:
        return clock_codes(by, rows["clock"].to_numpy(), shared.asof.offset_s)[:, None]
    side = columns.side_of(by)
    if side is None:
        name = f"code:{by}"
        return np.asarray(rows[name].to_numpy()[:, None] if name in rows.column_names else np.full((len(rows), 1), -1), np.int64)
    at, codes = rows[side].to_numpy(), columns.texts[side][by].codes
    return np.asarray(np.where(at[:, None] >= 0, codes[np.maximum(at, 0)] if len(codes) else -1, -1), np.int64)


def answer(rows: pa.Table, shared: Shared) -> pa.Table:
    """What is asked in one part: `ask`, `part`, and `numbers`: what the pass's aggregates are, side by side."""
    number = int(rows[PART][0].as_py())
    one = shared.passes[number // shared.parts]
    is_asked = rows[ASK].to_numpy() >= 0
    asked, events = rows.filter(is_asked), rows.filter(~is_asked)
    events = events.take(np.argsort(events["seen"].to_numpy(), kind="stable"))
    asof = _of(events, shared, one, number % shared.parts)
    log_rows = np.searchsorted(events["seen"].to_numpy(), asked["seen"].to_numpy(), "left")
    context = {n.removeprefix("code:"): asked[n].to_numpy() for n in asked.column_names if n.startswith("code:")}
    users, items, times, clock = (asked[name].to_numpy() for name in ("user", "item", "time", "clock"))
    instants = Asked(users, items, times, log_rows, context, clock)
    found: list[np.ndarray] = []
    for group in one.groups:
        if one.wide:
            for amounts, newest in asof.tallies(instants, group).values():
                found += [*amounts, newest]
        else:
            found += [x if x.ndim == 2 else x[:, None] for x in asof.values(instants, (group,)).values()]
    width = sum(one.widths)
    flat = np.column_stack(found).astype(np.float64).reshape(-1)
    offsets = pa.array(np.arange(len(asked) + 1, dtype=np.int64) * width)
    return pa.table({ASK: asked[ASK], PART: asked[PART], "numbers": pa.LargeListArray.from_arrays(offsets, pa.array(flat))})


def numbers_in(answers: pa.Table) -> np.ndarray:
    """(n, width) what `answer` gave, of parts of one pass."""
    flat: np.ndarray = answers["numbers"].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(answers), -1)


def _of(events: pa.Table, shared: Shared, one: Pass, part: int) -> AsOf:
    """The batch road over a part's events. A list's other values are not of this part: nobody's events are counted twice."""
    empty, names = shared.asof, events.column_names
    held = {n.removeprefix("context:"): events[n].to_numpy() for n in names if n.startswith("context:")}
    coded = {n.removeprefix("code:"): events[n].to_numpy() for n in names if n.startswith("code:")}
    mine = replace(
        empty.log,
        **{name: events[name].to_numpy() for name in ("user", "item", "time", "event", "value")},
        labels={n.removeprefix("label:"): events[n].to_numpy() for n in names if n.startswith("label:")},
        context=held | coded,
    )
    columns = _own(empty.columns, one.by, shared.parts, part) if one.wide else empty.columns
    out = AsOf(empty.plan, mine, columns, events["told"].to_numpy(), offset_s=empty.offset_s)
    return out.coded({name: TextColumn(codes[:, None], shared.texts[name]) for name, codes in coded.items()})


def _own(columns: KeyColumns, by: str, parts: int, part: int) -> KeyColumns:
    side = columns.side_of(by)
    assert side is not None  # noqa: S101 - only columns of users and items have lists
    whole = columns.texts[side][by]
    own = TextColumn(np.where(whole.codes % parts == part, whole.codes, -1), whole.texts)
    return KeyColumns(columns.texts | {side: columns.texts[side] | {by: own}}, columns.numbers)
