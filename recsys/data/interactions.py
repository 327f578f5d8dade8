"""A log of interactions as arrays of rows: what every model, channel and metric is fitted on.

Sorted by (time, log position). Rows index two vocabularies; ids of users and items that never appear in the log (cold
ones, known from their tables) are in the vocabularies too, after the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from recsys.core import Vocabulary

POSITIVE = "positive"
SHOWN = "shown, not told of"
"""A label that nobody declares: 1 for an exposure, a rate's trial; 0 for the click of one that stands in a row of its own, as live events do
in a log of impressions. Absent where every row is a trial."""
"""The label that every log has: 1 where the row counts as a positive."""


class CSR(NamedTuple):
    """Lists of item rows, one per user row: user u has items[indptr[u]:indptr[u + 1]], oldest first."""

    indptr: np.ndarray
    """(U + 1,) int64."""
    items: np.ndarray
    """(sum of lengths,) int32 item rows."""


@dataclass(frozen=True)
class Interactions:
    """E events, sorted by (time, log position).

    user (E,) and item (E,) int32 rows of `users` and `items`; time (E,) float64 Unix seconds, or 0, 1, 2… in log order where
    the data has no time (`has_time` False); event (E,) int16 codes into `event_names`; value (E,) float32, NaN where absent;
    labels: name -> (E,) float32 of 1 and 0, always with "positive"; context: name -> (E,) raw values; session (E,) int32, one
    number per user and visit, increasing in time, or None; impressions: whether rows without a positive label were shown and
    passed over; past: what each user did before the log, untimed, or None.
    """

    users: Vocabulary
    items: Vocabulary
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    event: np.ndarray
    event_names: tuple[str, ...]
    value: np.ndarray
    labels: dict[str, np.ndarray]
    context: dict[str, np.ndarray] = field(default_factory=dict)
    session: np.ndarray | None = None
    has_time: bool = True
    impressions: bool = False
    past: CSR | None = None

    @classmethod
    def of(
        cls,
        user: ArrayLike,
        item: ArrayLike,
        time: ArrayLike | None = None,
        *,
        users: Vocabulary,
        items: Vocabulary,
        event: ArrayLike | None = None,
        event_names: tuple[str, ...] = ("click",),
        value: ArrayLike | None = None,
        labels: Mapping[str, ArrayLike] | None = None,
        context: Mapping[str, ArrayLike] | None = None,
        impressions: bool = False,
        past: CSR | None = None,
    ) -> Self:
        """From columns in log order: sorts by time (where there is one), fills in what is absent. The first label is the positive."""
        n = len(np.asarray(user))
        seconds = np.arange(n, dtype=np.float64) if time is None else np.asarray(time, np.float64)
        order = np.argsort(seconds, kind="stable")
        named = {name: np.asarray(label, np.float32)[order] for name, label in (labels or {}).items()}
        return cls(
            users=users,
            items=items,
            user=np.asarray(user, np.int32)[order],
            item=np.asarray(item, np.int32)[order],
            time=seconds[order],
            event=(np.zeros(n, np.int16) if event is None else np.asarray(event, np.int16))[order],
            event_names=event_names,
            value=(np.full(n, np.nan, np.float32) if value is None else np.asarray(value, np.float32))[order],
            labels={POSITIVE: next(iter(named.values()), np.ones(n, np.float32)), **named},
            context={name: np.asarray(column)[order] for name, column in (context or {}).items()},
            has_time=time is not None,
            impressions=impressions,
            past=past,
        )

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """U, the rows of the user vocabulary."""
        return len(self.users)

    @property
    def n_items(self) -> int:
        """I, the rows of the item vocabulary."""
        return len(self.items)

    def where(self, mask: np.ndarray) -> Self:
        """The events where the (E,) bool mask holds, or at (n,) ascending positions; vocabularies stay whole."""
        return replace(
            self,
            user=self.user[mask],
            item=self.item[mask],
            time=self.time[mask],
            event=self.event[mask],
            value=self.value[mask],
            labels={name: label[mask] for name, label in self.labels.items()},
            context={name: column[mask] for name, column in self.context.items()},
            session=None if self.session is None else self.session[mask],
        )

    @property
    def positive(self) -> np.ndarray:
        """(E,) bool: rows that count as positives."""
        mask: np.ndarray = self.labels[POSITIVE] > 0
        return mask

    def positives(self) -> Self:
        """Only the rows that count as positives."""
        mask = self.positive
        return self if mask.all() else self.where(mask)

    def by_user(self) -> tuple[np.ndarray, np.ndarray]:
        """((U + 1,) int64 indptr, (E,) int64 order): user u's events, oldest first, are order[indptr[u]:indptr[u + 1]]."""
        return group(self.user, self.n_users)

    def by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """((I + 1,) int64 indptr, (E,) int64 order): the same by item."""
        return group(self.item, self.n_items)

    def matrix(self, *, binary: bool = True) -> sparse.csr_matrix:
        """(U, I) float32 csr with sorted columns: 1 where the user had the item, or how often (binary=False)."""
        ones = np.ones(len(self), np.float32)
        out = sparse.coo_matrix((ones, (self.user, self.item)), shape=(self.n_users, self.n_items)).tocsr()
        out.sum_duplicates()
        if binary:
            out.data[:] = 1.0
        return out


def group(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(E,) row numbers below n -> ((n + 1,) int64 indptr, (E,) int64 positions by row, ascending within each)."""
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n), out=indptr[1:])
    return indptr, np.argsort(rows, kind="stable")
