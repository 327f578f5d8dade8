"""What users and items are keyed by in aggregates: the texts and numbers of their declared columns, by row.

Texts, not rows of an embedding table: counters outlive a training, and its tables are numbered anew each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from recsys.core import fits_a_key, load_arrow, save_arrow
from recsys.data.columns import ColumnConfig
from recsys.features import fitting
from recsys.features.aggregates import DAY_S, Aggregates
from recsys.features.catalogue import numbers_of
from recsys.features.encoders import spelled, splitter
from recsys.features.fitting import Frame

Side = Literal["user", "item"]


@dataclass(frozen=True)
class TextColumn:
    """A column of N rows as codes of texts. codes (N, W) int32, -1 where a row has fewer values; texts: code -> text."""

    codes: np.ndarray
    texts: list[str]

    @classmethod
    def of(cls, cells: Iterable[list[str]]) -> Self:
        """From each row's distinct texts."""
        listed = list(cells)
        known: dict[str, int] = {}
        codes = np.full((len(listed), max((len(c) for c in listed), default=1) or 1), -1, np.int32)
        for row, cell in zip(codes, listed, strict=True):
            for slot, text in enumerate(cell):
                row[slot] = known.setdefault(text, len(known))
        return cls(codes, list(known))

    @classmethod
    def of_one(cls, cells: Iterable[str]) -> Self:
        """From each row's one text, "" where it has none; holds no list of N texts."""
        known: dict[str, int] = {}
        codes = np.fromiter((known.setdefault(text, len(known)) if text else -1 for text in cells), np.int32)
        return cls(codes[:, None], list(known))

    def at(self, row: int) -> list[str]:
        """The texts of a row; none for -1."""
        return [self.texts[c] for c in self.codes[row] if c >= 0] if row >= 0 else []

    @cached_property
    def index(self) -> dict[str, int]:
        """Text -> code."""
        return {text: code for code, text in enumerate(self.texts)}


@dataclass(frozen=True)
class KeyColumns:
    """The columns of users and items that aggregates read: side -> name -> column; numbers (N,) float64, NaN where missing or out of range."""

    texts: dict[str, dict[str, TextColumn]] = field(default_factory=lambda: {"user": {}, "item": {}})
    numbers: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: {"user": {}, "item": {}})

    @classmethod
    def of(cls, aggregates: Aggregates, columns: Mapping[str, Mapping[str, ColumnConfig]], users: Frame, items: Frame) -> Self:
        """From the raw tables, one row per row of the vocabularies; only what the aggregates name."""
        wanted = named(aggregates)
        texts: dict[str, dict[str, TextColumn]] = {"user": {}, "item": {}}
        numbers: dict[str, dict[str, np.ndarray]] = {"user": {}, "item": {}}
        for side, frame in (("user", users), ("item", items)):
            for name, column in columns.get(side, {}).items():
                if name not in wanted:
                    continue
                values = fitting.column_of(frame, name, side)
                if column.kind == "number":
                    numbers[side][name] = numbers_of(column, values)
                else:
                    texts[side][name] = TextColumn.of(text_of(column, values))
        return cls(texts, numbers)

    def side_of(self, name: str) -> Side | None:
        """Whose column this is; None for a column of the context."""
        for side in ("user", "item"):
            if name in self.texts[side] or name in self.numbers[side]:
                return side
        return None

    def padded(self, n_users: int, n_items: int) -> KeyColumns:
        """The same with rows behind the others, of which nothing is known."""
        more, out = {"user": n_users, "item": n_items}, KeyColumns()
        for side in ("user", "item"):
            for name, c in self.texts[side].items():
                out.texts[side][name] = TextColumn(
                    np.concatenate([c.codes, np.full((more[side], c.codes.shape[1]), -1, c.codes.dtype)]), c.texts
                )
            for name, numbers in self.numbers[side].items():
                out.numbers[side][name] = np.concatenate([numbers, np.full(more[side], np.nan)])
        return out

    def save(self, folder: Path) -> None:
        """Write what `load` reads into an existing folder."""
        for side in ("user", "item"):
            for name, column in self.texts[side].items():
                np.save(folder / f"{side}.{name}.codes.npy", column.codes)
                save_arrow(folder / f"{side}.{name}.texts.arrow", pa.table({"text": pa.array(column.texts, pa.string())}))
            for name, numbers in self.numbers[side].items():
                np.save(folder / f"{side}.{name}.number.npy", numbers)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        out = cls()
        for path in sorted(folder.glob("*.codes.npy")):
            side, name = path.name.removesuffix(".codes.npy").split(".", 1)
            texts = load_arrow(folder / f"{side}.{name}.texts.arrow").column("text").to_pylist()
            out.texts[side][name] = TextColumn(np.load(path, mmap_mode="r"), texts)
        for path in sorted(folder.glob("*.number.npy")):
            side, name = path.name.removesuffix(".number.npy").split(".", 1)
            out.numbers[side][name] = np.load(path, mmap_mode="r")
        return out


def named(aggregates: Aggregates) -> set[str]:
    """Every column that aggregates read."""
    return {n for a in aggregates.values() for n in (*a.key, *a.parts, *([a.of] if a.of else []))}


def key_text(value: Any) -> str:
    """The text of one raw value as a part of a key: `spelled`, and "" (missing) where it cannot be one: a NUL is what parts the texts
    of a stored key, and no key has room for a page of prose."""
    text = spelled(value)
    return text if fits_a_key(text) else ""


def text_of(column: ColumnConfig, values: Any) -> list[list[str]]:
    """The distinct texts of each raw value; a bin's is its number."""
    if column.kind == "bins":
        return [[str(b)] if b else [] for b in fitting.build(column, None).encode(values).tolist()]
    if column.kind in ("tags", "sequence", "text"):
        split = splitter(column.kind, column.splits_on)
        return [list(dict.fromkeys(t for t in split(cell) if t and fits_a_key(t))) for cell in values]
    return [[t] if (t := key_text(v)) else [] for v in values]


def clock_codes(part: str, times: np.ndarray, offset_s: float) -> np.ndarray:
    """(n,) Unix seconds -> (n,) the hour (0-23) or weekday (0 is Monday) that far ahead of UTC."""
    local = np.asarray(times, np.float64) + offset_s
    if part == "hour":
        return (np.floor(local / 3_600) % 24).astype(np.int64)
    return ((np.floor(local / DAY_S) + 3) % 7).astype(np.int64)
