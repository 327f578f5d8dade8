"""What users refused, for training and for serving: the items of their dislikes, hides and "not interested".

A refusal is no member of a history. It is kept beside it, an item once with the time it was refused last, the newest
`history.refused` of them for `history.refused_days`. A user's history at an instant is the newest n events (LastN), without those
of items that were refused before the instant: so the store need not rewrite a history, and a late event changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from recsys.core import UNKNOWN, Vocabulary
from recsys.data.interactions import Interactions, group
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import cuts


def still_refused(refused: Mapping[int, float], at: float, items: Vocabulary, history: HistoryConfig) -> np.ndarray:
    """(R,) int32 item rows that are refused at an instant, ascending, of item row -> Unix seconds (NaN: nobody knows when, long ago)."""
    kept = {row: time for row, time in refused.items() if not time < at - history.refused_s}
    if len(kept) > history.refused:
        ids = dict(zip(kept, items.outside(list(kept)), strict=True))
        age = {row: -np.inf if np.isnan(time) else time for row, time in kept.items()}
        kept = {row: kept[row] for row in sorted(kept, key=lambda row: (age[row], ids[row].encode()))[-history.refused :]}
    return np.array(sorted(kept), np.int32)


@dataclass(frozen=True)
class Refusals:
    """The refusals of one log, at any instants. `says` (E,) bool: the rows that refuse their item."""

    log: Interactions
    says: np.ndarray
    history: HistoryConfig

    @classmethod
    def of(cls, log: Interactions, history: HistoryConfig) -> Self:
        """By event type, as declared."""
        return cls(log, np.array([history.refuses(name) for name in log.event_names], bool)[log.event], history)

    def where(self, mask: np.ndarray) -> Self:
        """Of the events where the (E,) bool mask holds."""
        return replace(self, log=self.log.where(mask), says=self.says[mask])

    @cached_property
    def _by_user(self) -> tuple[np.ndarray, np.ndarray]:
        """((U + 1,) indptr, log positions of refusals by user, ascending)."""
        positions = np.flatnonzero(self.says)
        indptr, order = group(self.log.user[positions], self.log.n_users)
        return indptr, positions[order]

    def before(self, users: np.ndarray, at: np.ndarray, times: np.ndarray) -> list[np.ndarray]:
        """Of n instants of `users` (n,) rows (-1: unknown), given as to `Histories.before`: the item rows refused by then, ascending."""
        none = np.empty(0, np.int32)
        out = [none] * len(users)
        indptr, positions = self._by_user
        if not len(positions):
            return out
        cut = cuts(self.log, at, times)
        for i in np.flatnonzero((users >= 0) & (np.diff(indptr)[users] > 0)):
            mine = positions[indptr[users[i]] : indptr[users[i] + 1]]
            mine = mine[: int(np.searchsorted(mine, cut[i]))]
            if len(mine):
                out[i] = still_refused(self._times(mine), float(times[i]), self.log.items, self.history)
        return out

    def closing(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every user's refused items when the log ends: ((U + 1,) int64 indptr, item rows, Unix seconds; NaN where the log has no time)."""
        U, (indptr, positions) = self.log.n_users, self._by_user
        out, items, times = np.zeros(U + 1, np.int64), list[int](), list[float]()
        for user in np.flatnonzero(np.diff(indptr)):
            held = self._times(positions[indptr[user] : indptr[user + 1]])
            kept = still_refused(held, -np.inf, self.log.items, self.history).tolist()
            items += kept
            times += [held[row] for row in kept]
            out[user + 1] = len(kept)
        return np.cumsum(out), np.array(items, np.int32), np.array(times, np.float64)

    def _times(self, positions: np.ndarray) -> dict[int, float]:
        """Item row -> when it was refused last, of ascending log positions."""
        times = self.log.time[positions] if self.log.has_time else np.full(len(positions), np.nan)
        return dict(zip(self.log.item[positions].tolist(), times.tolist(), strict=True))


def taken_out(items: np.ndarray, times: np.ndarray, refused: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Histories (n, L) as `Histories.before` gives them without n lists of refused items: -1 and NaN on the left instead."""
    for i, rows in enumerate(refused):
        if len(rows) and (gone := np.isin(items[i], rows)).any():
            kept = items[i][~gone], times[i][~gone]
            items[i, : gone.sum()], times[i, : gone.sum()] = UNKNOWN, np.nan
            items[i, gone.sum() :], times[i, gone.sum() :] = kept
    return items, times
