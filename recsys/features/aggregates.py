"""What is counted of events, declared once: kind, key, window. Training and serving both compile this declaration.

    item_ctr:     {kind: rate, key: item, window: 7d}                # smoothed clicks per impression
    user_ctr:     {kind: rate, key: user, until: day}                # of earlier days only
    user_tag_ctr: {kind: rate, key: [user, tag], until: day}         # candidate's tag, this user
    item_now:     {kind: count, key: item, decay: 6h}
    same_tag:     {kind: match, of: tag, n: 10}                      # share of the last 10 that have the candidate's tag

The trap: a user's own rate with the same day counted in orders that user's rows backwards (who clicked early has no clicks
left), so rates by user want `until: day` or `until: session`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, field_validator, model_validator

from recsys.core import FrozenConfig

AggregateKind = Literal[
    "count", "sum", "mean", "rate", "min", "max", "recency", "last", "first", "distinct", "match", "ratio", "product", "concat"
]
DAY_S = 86_400.0
CLOCK_KEYS = ("hour", "weekday")
"""Key parts that are read from the time of an event, and of the request."""
TALLIED = frozenset({"count", "sum", "mean", "rate", "min", "max", "recency"})
"""Kinds whose state is a few numbers."""
LISTED = frozenset({"last", "first", "distinct", "match"})
"""Kinds whose state is a bounded list."""
CROSSED = frozenset({"ratio", "product", "concat"})
"""Kinds that are made of other features."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": DAY_S}
_BUCKETS_S = (60.0, 300.0, 900.0, 3_600.0, 21_600.0, DAY_S, 7 * DAY_S, 28 * DAY_S, 364 * DAY_S)
_MOST_BUCKETS = 32
_TAKEN_BY: dict[str, frozenset[str]] = {
    "key": TALLIED | {"last", "first", "distinct"},
    "window": TALLIED | {"distinct"},
    "decay": frozenset({"count", "sum", "mean", "rate"}),
    "until": TALLIED,
    "events": TALLIED | LISTED,
    "of": frozenset({"sum", "mean", "rate", "min", "max"}) | LISTED,
    "prior": frozenset({"rate"}),
    "strength": frozenset({"rate"}),
    "n": frozenset({"last", "first", "match"}),
    "cap": frozenset({"distinct"}),
    "parts": CROSSED,
    "buckets": frozenset({"concat"}),
}


def duration_s(text: str) -> float:
    """`90s`, `15m`, `24h` or `7d` in seconds; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"'{text}' is no duration; write a number and s, m, h or d, such as 1h, 24h, 7d, 30d")
    return float(found[1]) * _UNITS[found[2]]


class AggregateConfig(FrozenConfig):
    kind: AggregateKind
    """count, sum, mean, min, max of past events; rate: smoothed hits per trial; recency: seconds since the last one; last,
    first: the newest or oldest n values; distinct: how many different values; match: the share of the user's last n events
    that have the candidate's value of a column; ratio, product: of two others; concat: columns joined to one hashed category."""
    key: tuple[str, ...] = ()
    """Whose events: user, item, hour, weekday (of the event and of the request), or columns of users, items and context. With
    several, their combination. One may be left unbracketed."""
    of: str | None = None
    """rate: the label or event that is a hit (default: positive). sum, mean, min, max: `value` or a number column (default:
    value). last, first, distinct: `item`, `value` or a column (default: item); by a key of items,
    last and first list values alone. match: an item column."""
    events: tuple[str, ...] | None = None
    """Event types that are counted. Default: all; last, first and match: those that enter a history."""
    window: str = "all"
    """How far back: 1h, 24h, 7d, 30d, or all. In buckets, so the running one is counted whole."""
    decay: str | None = None
    """Instead of a window, the time in which an event loses half of its weight, such as 7d."""
    until: Literal["now", "day", "session"] = "now"
    """Up to when: now, the end of the last day, or of the key's last session (`interactions.session_gap_min` of silence end one)."""
    prior: float | None = None
    """rate: the rate of a key with no events (default: the mean of the training log)."""
    strength: NonNegativeFloat = 20.0
    """rate: how many events the prior is worth."""
    n: PositiveInt = 5
    """last, first, match: how many events."""
    cap: PositiveInt = 256
    """distinct: exact up to so many values, then it stays there. Costs 12 bytes a value."""
    parts: tuple[str, ...] = ()
    """ratio, product: two aggregates or number columns of users and items. concat: two or more columns of one side."""
    buckets: PositiveInt = 1_000
    """concat: rows of its embedding table."""

    @field_validator("key", "events", "parts", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("window", "decay")
    @classmethod
    def _duration(cls, text: str | None) -> str | None:
        if text not in (None, "all"):
            duration_s(text)
        return text

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for name, kinds in _TAKEN_BY.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is not a parameter of kind '{self.kind}'; it belongs to {', '.join(sorted(kinds))}")
        if self.kind in _TAKEN_BY["key"] and not self.key:
            raise ValueError(f"kind '{self.kind}' needs 'key': user, item, a column, or several of them such as [user, tag]")
        if len(set(self.key)) < len(self.key):
            raise ValueError(f"key {list(self.key)} names a part twice")
        if self.kind == "match" and self.of is None:
            raise ValueError("kind 'match' needs 'of', the item column to compare, such as of: category")
        if self.kind in ("ratio", "product") and len(self.parts) != 2:
            raise ValueError(f"kind '{self.kind}' needs two parts, got {len(self.parts)}")
        if self.kind == "concat" and len(self.parts) < 2:
            raise ValueError("kind 'concat' needs two parts or more")
        if self.decay is not None and self.window != "all":
            raise ValueError("give 'window' or 'decay', not both: a decay forgets by itself")
        if self.until == "session" and self.window != "all":
            raise ValueError("until: session takes window: all or a decay, as sessions do not end where buckets do")
        if self.until == "session" and "user" not in self.key:
            raise ValueError("until: session needs user in the key: sessions are a user's")
        if self.until == "day" and self.window != "all" and duration_s(self.window) < DAY_S:
            raise ValueError(f"until: day with window: {self.window} is always empty; take a window of days")
        return self

    @property
    def half_life_s(self) -> float | None:
        """The half-life in force."""
        return None if self.decay is None else duration_s(self.decay)

    @property
    def bucketing(self) -> tuple[float, int] | None:
        """(seconds of a bucket, buckets that count, the running one included); None for all."""
        if self.window == "all":
            return None
        span = duration_s(self.window)
        if self.until == "day":
            return DAY_S, math.ceil(span / DAY_S) + 1
        bucket_s = next((b for b in _BUCKETS_S if span / b <= _MOST_BUCKETS), _BUCKETS_S[-1])
        return bucket_s, math.ceil(span / bucket_s)

    @property
    def reads(self) -> str:
        """What `of` is where it is left out."""
        return self.of or ("positive" if self.kind == "rate" else "item" if self.kind in LISTED else "value")


Aggregates = Mapping[str, AggregateConfig]
"""Name of the feature -> what it counts."""


def faults(aggregates: Aggregates, columns: Mapping[str, Mapping[str, str]], refused: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, sentence) of every aggregate that does not fit the declared data.

    columns: side (user, item, context) -> column -> kind; refused: column -> why it cannot be an input.
    """
    found: list[tuple[str, str]] = []
    sides = {name: side for side, named in columns.items() for name in named}
    numbers = {name for named in columns.values() for name, kind in named.items() if kind == "number"}
    many = {name for named in columns.values() for name, kind in named.items() if kind in ("tags", "sequence", "text")}
    wide = {name for named in columns.values() for name, kind in named.items() if kind == "vector"}
    parts = {"user", "item", *CLOCK_KEYS, *sides}
    for name, a in aggregates.items():
        if name in sides or name in ("user_id", "item_id", "history", "recent", "evidence", "user", "item", *CLOCK_KEYS):
            found.append((name, "has the name of a column or of a feature that the system makes; give it another"))
        for part in a.key:
            if part in refused:
                found.append((name, f"has '{part}' in its key, {refused[part]}; the key must be known before the item is shown"))
            elif part not in parts or part in numbers | wide:
                found.append(
                    (name, f"has '{part}' in its key, which is no id or category; known: {', '.join(sorted(parts - numbers - wide))}")
                )
        if len(many & set(a.key)) > 1:
            found.append((name, f"has several lists in its key ({', '.join(p for p in a.key if p in many)}); take one"))
        if many & set(a.key) and a.kind in LISTED:
            found.append((name, f"is of kind {a.kind}, which takes no list such as '{next(iter(many & set(a.key)))}' in its key"))
        found += [(name, sentence) for sentence in _of_faults(a, aggregates, sides, (numbers, many | wide), refused)]
    return found


def _of_faults(
    a: AggregateConfig, aggregates: Aggregates, sides: Mapping[str, str], shapes: tuple[set[str], set[str]], refused: Mapping[str, str]
) -> list[str]:
    found, (numbers, many) = [], shapes
    if a.kind == "match" and (sides.get(a.reads) != "item" or a.reads in numbers | many):
        found.append(f"compares '{a.reads}', which is no item column of one id or category")
    if a.kind in ("sum", "mean", "min", "max") and a.reads != "value" and a.reads not in numbers:
        found.append(f"adds up '{a.reads}', which is neither 'value' nor a number column")
    if a.kind in ("last", "first", "distinct") and a.reads not in ("item", "value") and (a.reads not in sides or a.reads in many):
        found.append(f"lists '{a.reads}', which is neither 'item', 'value' nor a column of one value")
    if a.kind in ("last", "first") and a.reads != "value" and (of := [p for p in a.key if "item" in (p, sides.get(p))]):
        found.append(f"lists '{a.reads}' by '{of[0]}': a ranker takes lists of a user, not of each candidate; declare a rate, or of: value")
    for part in a.parts:
        if part in refused:
            found.append(f"is made of '{part}', {refused[part]}")
        elif a.kind == "concat":
            if part not in sides or part in many | numbers:
                found.append(f"joins '{part}', which is no id or category column")
        elif part in numbers and sides[part] == "context":
            found.append(f"is made of '{part}', a column of the context; take columns of users and items, or aggregates")
        elif part not in numbers and (part not in aggregates or aggregates[part].kind in CROSSED | {"last", "first"}):
            found.append(f"is made of '{part}', which is neither a number column nor an aggregate of one number")
    if a.kind == "concat" and len({sides[p] == "item" for p in a.parts if p in sides}) > 1:
        found.append("joins columns of users and items: that would be an embedding a pair; declare a rate by that key instead")
    return found
