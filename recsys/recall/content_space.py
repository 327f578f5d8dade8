"""What items are made of, as vectors of one length: TF-IDF of values and words, numbers by rank, given vectors as they are.

Each column is a block of unit length times its weight, so that ten tags weigh no more than one category. Values beyond `dim`
are folded by a truncated SVD (latent semantic analysis; Deerwester et al., 1990), which leaves inner products nearly as they
are and lets related tags answer for each other. The cosine of two items is the inner product of their vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from recsys.core import UNKNOWN, Vocabulary
from recsys.features.catalogue import Catalogue, Values
from recsys.recall.taste import unit

KNOTS = 129
"""Quantiles of a number that are kept, to tell its rank among all items by."""


@dataclass(frozen=True)
class Block:
    """One column. Listed: its values and their IDF, 0 for those of one item alone, which can match nothing; number: its quantiles."""

    kind: str
    weight: float
    start: int
    """Where its features begin: among the sparse ones, or for a vector among the dense ones."""
    width: int
    known: Vocabulary | None = None
    idf: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    knots: np.ndarray = field(default_factory=lambda: np.empty(0))


class ContentSpace:
    """Columns -> vectors. fold (F, f) maps the F sparse features, turn (D, g) the D floats of vectors; a vector has f + g floats."""

    def __init__(self, blocks: dict[str, Block], fold: np.ndarray, turn: np.ndarray) -> None:
        self.blocks, self.fold, self.turn = blocks, fold, turn

    @classmethod
    def fit(cls, items: Catalogue, weights: Mapping[str, float], dim: int, seed: int = 0) -> Self:
        """Learn IDF, quantiles and the fold from all items, with and without events."""
        blocks: dict[str, Block] = {}
        at = deep = 0
        for name in items.columns:
            weight = weights.get(name, 0.0)
            if weight <= 0:
                continue
            if name in items.values:
                values = items.values[name]
                held = np.bincount(values.codes, minlength=len(values.known))
                idf = np.where(held > 1, np.log((1 + items.n) / (1 + held)) + 1, 0).astype(np.float32)
                blocks[name] = Block("listed", weight, at, len(idf), values.known, idf)
                at += len(idf)
            elif name in items.numbers:
                x = np.asarray(items.numbers[name])
                known = x[~np.isnan(x)]
                knots = np.quantile(known, np.linspace(0, 1, KNOTS)) if len(known) else np.zeros(KNOTS)
                blocks[name] = Block("number", weight, at, 2, knots=knots)
                at += 2
            elif name in items.vectors:
                width = items.vectors[name].shape[1]
                blocks[name] = Block("vector", weight, deep, width)
                deep += width
        self = cls(blocks, np.eye(at, dtype=np.float32), np.eye(deep, dtype=np.float32))
        rows, floats = self._features(items)
        if at > dim:
            k = min(dim, items.n, at)
            self.fold = randomized_svd(rows, k, random_state=seed)[2].T.astype(np.float32)  # (F, f)
        if deep > dim:
            self.turn = np.linalg.eigh(floats.T @ floats)[1][:, ::-1][:, :dim].astype(np.float32)
        return self

    @property
    def width(self) -> int:
        """Floats of a vector."""
        return int(self.fold.shape[1] + self.turn.shape[1])

    def items(self, items: Catalogue) -> np.ndarray:
        """(I, width) float32 unit vectors; zeros where nothing is known of an item."""
        rows, floats = self._features(items)
        return unit(np.column_stack([rows @ self.fold, floats @ self.turn]).astype(np.float32))

    def _features(self, items: Catalogue) -> tuple[sparse.csr_matrix, np.ndarray]:
        """((I, F) csr, (I, D) float32) of weighted unit blocks."""
        parts: list[sparse.csr_matrix] = [sparse.csr_matrix((items.n, 0), dtype=np.float32)]
        floats: list[np.ndarray] = [np.empty((items.n, 0), np.float32)]
        for name, block in self.blocks.items():
            if block.kind == "vector":
                floats.append(block.weight * unit(np.nan_to_num(np.asarray(items.vectors[name]))))
                continue
            if block.kind == "listed":
                values = items.values[name]
                part = sparse.csr_matrix((block.idf[values.codes], values.codes, values.indptr), shape=(items.n, block.width))
            else:
                part = _turned(np.asarray(items.numbers[name]), block.knots)
            length = np.sqrt(np.asarray(part.multiply(part).sum(1))).ravel()
            scale = np.divide(block.weight, length, out=np.zeros_like(length), where=length > 0)
            parts.append(sparse.diags_array(scale.astype(np.float32)).dot(part).tocsr())
        return sparse.hstack(parts, format="csr", dtype=np.float32), np.concatenate(floats, axis=1)

    def later(self, items: Catalogue) -> np.ndarray:
        """(n, width) vectors of items that came after the fit: as those of `items`, values that the fit did not know left out."""
        values = dict(items.values)
        for name, block in self.blocks.items():
            if block.known is not None:
                told = items.values[name]
                codes = block.known.rows(told.known.ids)[told.codes] if len(told.codes) else told.codes
                kept = np.concatenate([[0], np.cumsum(codes != UNKNOWN)])
                values[name] = Values(block.known, kept[told.indptr].astype(np.int64), codes[codes != UNKNOWN])
        return self.items(replace(items, values=values))

    def of_values(self, name: str, values: list[str]) -> np.ndarray:
        """(width,) float32: one column's part of an item that has these values; zeros where none is known."""
        block, out = self.blocks[name], np.zeros(self.width, np.float32)
        assert block.known is not None  # noqa: S101 - only listed columns are asked
        codes = block.known.rows(values)
        codes = codes[codes != UNKNOWN]
        idf = block.idf[codes]
        length = float(np.sqrt((idf * idf).sum()))
        if length:
            out[: self.fold.shape[1]] = block.weight / length * (idf @ self.fold[block.start + codes])
        return out

    def save(self, folder: Path) -> None:
        """Write space.json, fold.npy, turn.npy, and the values of each listed column."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "fold.npy", self.fold)
        np.save(folder / "turn.npy", self.turn)
        told = {}
        for i, (name, block) in enumerate(self.blocks.items()):
            told[name] = {"kind": block.kind, "weight": block.weight, "start": block.start, "width": block.width, "file": f"block{i}"}
            np.save(folder / f"block{i}.npy", block.idf if block.kind == "listed" else block.knots)
            if block.known is not None:
                block.known.save(folder, f"block{i}")
        (folder / "space.json").write_text(json.dumps(told, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        blocks = {}
        for name, told in json.loads((folder / "space.json").read_text("utf-8")).items():
            file = told.pop("file")
            array = np.load(folder / f"{file}.npy", mmap_mode="r")
            listed = told["kind"] == "listed"
            blocks[name] = Block(
                **told, **({"known": Vocabulary.load(folder, file), "idf": np.asarray(array)} if listed else {"knots": np.asarray(array)})
            )
        return cls(blocks, np.asarray(np.load(folder / "fold.npy", mmap_mode="r")), np.asarray(np.load(folder / "turn.npy")))


def _turned(x: np.ndarray, knots: np.ndarray) -> sparse.csr_matrix:
    """(n,) numbers -> (n, 2) csr: the rank r of each among all, from 0 to 1, as the point at r of half a circle; NaN has none.

    The inner product of two is cos(pi (r - r')): 1 for equal ranks, 0 half the catalogue apart, -1 from end to end.
    """
    known = np.flatnonzero(~np.isnan(x))
    ranks = np.linspace(0, 1, len(knots))
    values, place = np.unique(knots, return_inverse=True)
    angle = np.pi * np.interp(x[known], values, np.bincount(place, ranks) / np.bincount(place))
    data = np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32)
    return sparse.csr_matrix((data, (np.tile(known, 2), np.repeat([0, 1], len(known)))), shape=(len(x), 2))
