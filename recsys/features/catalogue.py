"""What the tables say of items, or of users, as the values themselves: what filters ask and what content is compared by.

Models see a value only as a row that training gave it, and share one row among all it has not seen. Here every value is
kept, so that a new item with a new tag can be filtered and compared from its first minute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from recsys.core import Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.errors import BundleError
from recsys.features.encoders import Vector, as_floats, distinct, spelled, splitter
from recsys.features.fitting import Frame, column_of

LISTED = frozenset({"id", "category", "tags", "sequence", "text"})
"""Kinds whose values are texts."""
NUMERIC = frozenset({"number", "bins"})


@dataclass(frozen=True)
class Values:
    """Entity r has the values known[codes[indptr[r]:indptr[r + 1]]], each once."""

    known: Vocabulary
    indptr: np.ndarray
    codes: np.ndarray

    def holders(self, wanted: np.ndarray) -> np.ndarray:
        """(n,) bool: the entities with at least one of these (m,) codes."""
        hit = np.zeros(len(self.known) + 1, bool)  # one more, for the code -1 of a value that nobody has
        hit[wanted] = True
        hit[-1] = False
        out = np.zeros(len(self.indptr) - 1, bool)
        out[np.searchsorted(self.indptr, np.flatnonzero(hit[self.codes]), side="right") - 1] = True
        return out


@dataclass(frozen=True)
class Catalogue:
    """The declared columns of n entities, by kind: values (texts), numbers (n,) float64 with NaN, vectors (n, dim) with rows of NaN.

    columns: every declared column but those read from the clock.
    """

    n: int
    columns: Mapping[str, ColumnConfig] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: Mapping[str, ColumnConfig], frame: Frame, n: int) -> Self:
        """From raw values by name, n rows each. DataError for an absent column."""
        self = cls(n, dict(columns))
        for name, column in columns.items():
            raw = column_of(frame, name, "declared")
            if column.kind in LISTED:
                self.values[name] = _listed(column, raw)
            elif column.kind in NUMERIC:
                self.numbers[name] = numbers_of(column, raw)
            elif column.kind == "vector":
                self.vectors[name] = vectors_of(column, raw)
        return self

    def save(self, folder: Path) -> None:
        """Write catalogue.json, and per column Arrow and .npy files that can be memory-mapped."""
        folder.mkdir(parents=True, exist_ok=True)
        stems = {name: f"column{i}" for i, name in enumerate(self.columns)}
        for name, values in self.values.items():
            values.known.save(folder, stems[name])
            np.save(folder / f"{stems[name]}.indptr.npy", values.indptr)
            np.save(folder / f"{stems[name]}.codes.npy", values.codes)
        for name, array in (self.numbers | self.vectors).items():
            np.save(folder / f"{stems[name]}.npy", array)
        declared = {name: column.model_dump(mode="json", exclude_unset=True) for name, column in self.columns.items()}
        (folder / "catalogue.json").write_text(json.dumps({"n": self.n, "columns": declared}, ensure_ascii=False, indent=1), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. BundleError where the folder is damaged."""
        try:
            written = json.loads((folder / "catalogue.json").read_text("utf-8"))
            self = cls(int(written["n"]), {name: ColumnConfig.model_validate(c) for name, c in written["columns"].items()})
            for i, (name, column) in enumerate(self.columns.items()):
                stem = folder / f"column{i}"
                if column.kind in LISTED:
                    indptr, codes = (np.load(f"{stem}.{part}.npy", mmap_mode="r") for part in ("indptr", "codes"))
                    self.values[name] = Values(Vocabulary.load(folder, stem.name), np.asarray(indptr), np.asarray(codes))
                elif column.kind in NUMERIC:
                    self.numbers[name] = np.load(f"{stem}.npy", mmap_mode="r")
                elif column.kind == "vector":
                    self.vectors[name] = np.load(f"{stem}.npy", mmap_mode="r")
        except (OSError, KeyError, ValueError, TypeError) as fault:
            raise BundleError(f"The catalogue in '{folder}' cannot be read ({fault}). Restore the bundle or publish it again.") from fault
        return self


def texts_of(column: ColumnConfig, cell: Any) -> list[str]:
    """The values of one cell of a listed kind, each once; [] where it is missing."""
    if column.kind in ("id", "category"):
        return [text] if (text := spelled(cell)) else []
    return list(dict.fromkeys(splitter(column.kind, column.splits_on)(cell)))


def numbers_of(column: ColumnConfig, raw: Any) -> np.ndarray:
    """(n,) raw values -> (n,) float64, NaN where a value is missing or outside of its declared range."""
    x = as_floats(raw)
    low = -np.inf if column.min_value is None else column.min_value
    high = np.inf if column.max_value is None else column.max_value
    with np.errstate(invalid="ignore"):
        out: np.ndarray = np.where((x >= low) & (x <= high), x, np.nan)
    return out


def vectors_of(column: ColumnConfig, raw: Any) -> np.ndarray:
    """(n,) cells -> (n, dim) float32, a row of NaN where a vector is missing, of another length, or all zeros."""
    out: np.ndarray = Vector(column.dim or 1, column.splits_on).encode(raw if isinstance(raw, list) else list(raw))
    out[~out.any(1)] = np.nan
    return out


def _listed(column: ColumnConfig, raw: Any) -> Values:
    cells, uniques = distinct(raw)
    numbered: dict[str, int] = {}
    lists = [np.array([numbered.setdefault(t, len(numbered)) for t in texts_of(column, cell)], np.int32) for cell in uniques]
    lists.append(np.empty(0, np.int32))  # a missing cell has code -1
    sizes = np.fromiter((len(x) for x in lists), np.int64, len(lists))[cells]
    indptr = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(sizes, out=indptr[1:])
    codes = np.concatenate([lists[c] for c in cells.tolist()]) if len(cells) else np.empty(0, np.int32)
    return Values(Vocabulary(list(numbered)), indptr, codes.astype(np.int32))
