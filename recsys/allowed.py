"""What a request may be answered with: filters as they were asked, and the items that pass them as one bitmap per filter.

A batch mixes filters. Its queries point at bitmaps that they share, and every channel searches among the items of the
bitmap only: filtering an answer afterwards would leave places empty that another item could have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np


class Condition(NamedTuple):
    """What one item column must hold. Empty: not asked. A filter is several of them, and all must hold."""

    column: str
    any: tuple[str, ...] | None = None
    """At least one of these values; an empty tuple lets nothing pass."""
    all: tuple[str, ...] = ()
    """Every one of these values."""
    none: tuple[str, ...] = ()
    """None of these values; an item without a value passes."""
    low: float = -np.inf
    """Numbers: at least this."""
    high: float = np.inf
    """Numbers: at most this."""


Filter = tuple[Condition, ...]
"""Conditions in the order of their columns, so that equal filters are equal and share a bitmap."""


@dataclass(frozen=True, eq=False)
class Mask:
    """The items that pass a filter: (I,) bool."""

    items: np.ndarray

    @cached_property
    def rows(self) -> np.ndarray:
        """(n,) int32 rows of the items that pass, ascending."""
        return np.flatnonzero(self.items).astype(np.int32)

    @cached_property
    def bits(self) -> np.ndarray:
        """(I / 8,) uint8, item r in bit r % 8 of byte r / 8: as Faiss's IDSelectorBitmap reads it."""
        return np.packbits(self.items, bitorder="little")


@dataclass(frozen=True, eq=False)
class Allowed:
    """The bitmaps of a batch of B queries: query b may be answered with the items of masks[of[b]], with any where of[b] is -1."""

    masks: tuple[Mask, ...]
    of: np.ndarray

    def __getitem__(self, rows: Any) -> Allowed:
        """The bitmaps of these queries."""
        return Allowed(self.masks, self.of[rows])

    def groups(self) -> Iterator[tuple[Mask | None, np.ndarray]]:
        """Each bitmap that a query points at, None for no filter, with the positions of its queries."""
        for f in np.unique(self.of).tolist():
            yield (None if f < 0 else self.masks[f]), np.flatnonzero(self.of == f)

    def of_rows(self, rows: np.ndarray) -> Allowed:
        """The same for a channel that numbers items anew: its row r is item rows[r]."""
        return Allowed(tuple(Mask(mask.items[rows]) for mask in self.masks), self.of)

    def bar(self, scores: np.ndarray, value: float = -np.inf) -> None:
        """Write `value` into (B, I) scores wherever an item is not allowed."""
        for mask, rows in self.groups():
            if mask is not None:
                scores[np.ix_(rows, np.flatnonzero(~mask.items))] = value

    def admits(self, query: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n,) positions of queries and (n,) item rows -> (n,) bool. A row that the bitmap does not reach is not admitted."""
        out = np.ones(len(items), bool)
        which = self.of[query]
        for f in np.unique(which).tolist():
            if f >= 0:
                allowed, here = self.masks[f].items, which == f
                at = items[here]
                known = (at >= 0) & (at < len(allowed))
                out[here] = known & allowed[np.where(known, at, 0)] if len(allowed) else False
        return out

    def kept(self, items: np.ndarray, scores: np.ndarray, below: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, N) items and scores without what is not allowed: its slots are emptied where they stand (-1, -inf).

        Rows from `below` on are not of these bitmaps and stay.
        """
        here = np.ones(items.shape, bool)
        asked = (items >= 0) & (self.of >= 0)[:, None]
        query, slot = np.nonzero(asked if below is None else asked & (items < below))
        here[query, slot] = self.admits(query, items[query, slot])
        if here.all():
            return items, scores
        return np.where(here, items, -1).astype(items.dtype), np.where(here, scores, -np.inf).astype(scores.dtype)
