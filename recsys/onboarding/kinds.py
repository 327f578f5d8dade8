"""What each column of an item or user table holds: category, tags, number, text, vector or id; or why it is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.data.columns import Kind
from recsys.onboarding.look import Column, normal, tokens

TITLE = [
    "title",
    "name",
    "movietitle",
    "itemname",
    "productname",
    "producttitle",
    "itemtitle",
    "tracktitle",
    "trackname",
    "songname",
    "booktitle",
    "headline",
    "videotitle",
]
GROWN = {"cnt", "count", "counts", "num", "clicks", "plays", "views", "likes", "sales", "sold", "rank", "popularity", "avg", "average",
         "rating", "ratings", "reviews", "downloads", "ctr", "cvr"}  # fmt: skip
"""Words of figures that grow with the log: counted up to a day nobody knows, they may hold the test."""
CODED = {"onehot", "type", "category", "cat", "class", "segment", "cluster", "group", "level", "genre", "brand", "color", "colour", "size"}
"""Words of numbers that name a thing rather than measure one."""
_UNFIT = re.compile(r"https?://|^[\w./-]+\.(?:jpg|jpeg|png|gif|webp|mp4)$", re.IGNORECASE)
_MARKS = ("|", ";", ",", " ")


@dataclass(frozen=True)
class Held:
    """A column as a feature: its kind, further parameters, and why."""

    kind: Kind
    reason: str
    parameters: dict[str, Any]


@dataclass
class TableRoles:
    """A table's id, the title shown beside an item, its features, and what was left out and why."""

    id: str
    reason: str
    overlap: float
    title: str | None
    features: dict[str, Held]
    rest: dict[str, str]


def kinds(columns: Mapping[str, Column], key: str, overlap: float, role: str) -> TableRoles:
    """What every column of a table holds."""
    share = (
        f"{overlap:.0%} of the log's {role}s are in it" if overlap else f"by name alone: none of the log's {role}s is in it, check the ids"
    )
    titles = [name for word in TITLE for name in columns if normal(name) == word and name != key]
    title = titles[0] if role == "item" and titles else None
    features: dict[str, Held] = {}
    rest: dict[str, str] = {}
    for name, column in columns.items():
        if name == key:
            continue
        if name == title:
            rest[name] = "shown beside the item; as words, add it as {kind: text}"
            continue
        found = kind_of(column)
        if isinstance(found, Held):
            features[name] = found
        else:
            rest[name] = found
    return TableRoles(key, share, overlap, title, features, rest)


def kind_of(column: Column) -> Held | str:
    """A column's kind with its reason, or the reason to leave it out."""
    if not len(column.present):
        return "empty"
    words = set(tokens(column.name))
    if column.is_list:
        return _list(column)
    if column.distinct == 1:
        return f"holds one value ({column.examples(1)})"
    if column.numbers is not None:
        return _number(column, words)
    if column.is_stamp or column.local_date or column.unit == "iso" or "date" in words:
        return "a date; derive a category or an age from it"
    if column.texts.iloc[:50].str.contains(_UNFIT).mean() > 0.5:
        return "an address, not a feature"
    return _vector_text(column) or _text(column)


def _list(column: Column) -> Held | str:
    first = column.present.iloc[:500]
    sizes = {len(value) for value in first}
    if all(isinstance(x, float | np.floating) for value in first for x in value):
        if len(sizes) == 1 and (width := sizes.pop()) > 1:
            return Held("vector", f"{width} floats in every cell", {"dim": width})
        return "lists of floats of different lengths"
    return Held("tags", f"lists such as [{column.examples(1)}]", {})


def _number(column: Column, words: set[str]) -> Held | str:
    numbers = column.numbers
    assert numbers is not None  # noqa: S101 - asked before
    if words & GROWN and column.distinct > 2:
        return "grows with the log, and nobody knows as of when: it may hold the test. A feature only if it is known to be older"
    low, high = float(numbers.min()), float(numbers.max())
    if column.flag or (column.whole and column.distinct <= 20):
        return Held("category", f"{column.distinct} values: {column.examples()}", {})
    if column.whole and words & CODED and column.distinct <= 2_000:
        return Held("category", f"{column.distinct} codes: {column.examples()}", {})
    if column.whole and {"id", "code", "zip", "zipcode", "postcode"} & words:
        return _id(column)
    if column.whole and ("year" in words or (low >= 1800 and high <= 2100)) and column.distinct <= 300:
        return Held("category", f"years {low:g} to {high:g}", {})
    middle = float(np.median(numbers))
    if low >= 0 and high > 20 * max(middle, 1e-9):
        return Held("number", f"{low:g} to {high:g}, middle {middle:g}: skewed, so on a log scale", {"scale": "log"})
    return Held("number", f"{low:g} to {high:g}, middle {middle:g}", {})


def _id(column: Column) -> Held | str:
    shared = float(column.texts.duplicated(keep=False).mean())
    if shared < 0.2:
        return f"nearly every row has a value of its own ({column.distinct:,}); else {{kind: id, min_count: 2}}"
    return Held("id", f"{column.distinct:,} values; {shared:.0%} of the rows share theirs with another", {"min_count": 2})


def _vector_text(column: Column) -> Held | str | None:
    """Floats in one cell of text, or None where it is something else."""
    some = column.texts.iloc[:200]
    bare = some.str.strip("[]() ")
    for mark in (",", " ", ";", "|"):
        cells = [text.split(mark) for text in bare]
        if len({len(cell) for cell in cells}) == 1 and len(cells[0]) >= 4:
            try:
                values = [float(x) for cell in cells for x in cell]
            except ValueError:
                continue
            if any(not x.is_integer() for x in values):
                if not bare.equals(some):
                    return f"{len(cells[0])} floats in brackets: take the brackets out, and it is {{kind: vector, dim: {len(cells[0])}}}"
                return Held("vector", f"{len(cells[0])} floats in every cell", {"dim": len(cells[0]), "separator": mark})
    return None


def _text(column: Column) -> Held | str:
    if (tags := _tags(column)) is not None:
        return tags
    if column.distinct <= 50 or (column.words < 3 and column.repeats >= 5):
        return Held("category", f"{column.distinct:,} values: {column.examples()}", {})
    if column.words >= 2.5:
        return Held("text", f"{column.words:.0f} words a cell", {"min_count": 2})
    return _id(column)


def _tags(column: Column) -> Held | None:
    """Several short values in a cell, which other cells share: few different pieces beside many different cells."""
    texts = column.texts.iloc[:20_000]
    if texts.str.contains(r"[\[(]").mean() > 0.2:  # ranges such as [10,100)
        return None
    for mark in _MARKS:
        cut = texts[texts.str.contains(mark, regex=False)]
        if len(cut) < 0.2 * len(texts):
            continue
        pieces = texts.str.split(mark).explode().str.strip()
        pieces = pieces[pieces != ""]
        per_cell = len(pieces) / len(texts)
        comes_again = len(pieces) / max(1, pieces.nunique())
        short = float(np.mean([len(piece.split()) for piece in pieces])) <= (1 if mark == " " else 3)
        # Words of a sentence come again too: tags are few, and a space needs them to be a small closed set.
        few = pieces.nunique() <= (100 if mark == " " else 5_000) and per_cell <= 15
        if short and few and comes_again >= (5 if mark == " " else 2) and pieces.nunique() <= texts.nunique():
            return Held(
                "tags", f"{pieces.nunique():,} values, {per_cell:.1f} a cell, cut at {mark!r}: {column.examples(2)}", {"separator": mark}
            )
    return None
