"""Users' states at instants of a log: the queries that training and evaluation ask, as service would have asked them.

A moment sees only what came strictly before it in (time, log position); rows of an impression log that share user and time
were one screen and do not see each other. Excluded is what the user already had, as in service.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from recsys.core import UNKNOWN, Queries, Wishes
from recsys.data.interactions import Interactions, group
from recsys.features.generate import Histories
from recsys.features.refusals import Refusals, taken_out


@dataclass(frozen=True)
class Moments:
    """The states of users along one log.

    `told` (E,) bool says which rows of the log enter a history; `length` is how many events a history keeps;
    `exclude_seen` whether what a user had before is excluded from the answer; `refusals` what users refused, which is excluded
    in any case (None: nobody refused anything).
    """

    log: Interactions
    told: np.ndarray
    length: int
    exclude_seen: bool = True
    refusals: Refusals | None = None

    def where(self, mask: np.ndarray, *, length: int | None = None) -> Moments:
        """Along the rows where the (E,) bool mask holds; `length`: of another length."""
        refusals = None if self.refusals is None else self.refusals.where(mask)
        return Moments(self.log.where(mask), self.told[mask], length or self.length, self.exclude_seen, refusals)

    @cached_property
    def histories(self) -> Histories:
        """The one definition of a history, over this log."""
        return Histories(self.log, length=self.length, told=self.told)

    @cached_property
    def _told_by_user(self) -> tuple[np.ndarray, np.ndarray]:
        """((U + 1,) indptr, log positions of told rows by user, ascending): of every user and item the first alone.

        So what a user had is a beginning of the user's list, and one with 100,000 events on 60 items costs 60 an instant.
        """
        positions = np.flatnonzero(self.told)
        pairs = self.log.user[positions].astype(np.int64) * max(self.log.n_items, 1) + self.log.item[positions]
        positions = positions[np.sort(np.unique(pairs, return_index=True)[1])]
        indptr, order = group(self.log.user[positions], self.log.n_users)
        return indptr, positions[order]

    def queries(self, at: np.ndarray) -> Queries:
        """The moments just before the rows at log positions `at` (n,), each with its row's time and context."""
        return self.states(self.log.user[at], at, self.log.time[at], self._contexts(at))

    def bare(self, at: np.ndarray) -> Queries:
        """`queries` without histories and exclusions, which cost the most of them: what aggregates are asked by."""
        users, none = self.log.user[at], np.empty((len(at), 0), np.int32)
        return Queries(
            user_ids=self.log.users.outside(users),
            users=users.astype(np.int32),
            k=np.full(len(users), 10, np.int32),
            at=self.log.time[at].astype(np.float64),
            history=none,
            history_times=none.astype(np.float64),
            exclude=none,
            contexts=list(self._contexts(at)),
            profiles=[{}] * len(users),
            positions=np.asarray(at, np.int64),
        )

    def _contexts(self, at: np.ndarray) -> list[dict[str, Any]]:
        return [{name: column[i] for name, column in self.log.context.items()} for i in at]

    def chunks(self, at: np.ndarray, size: int) -> Iterator[Queries]:
        """`queries` in batches of at most `size`."""
        return (self.queries(at[a : a + size]) for a in range(0, len(at), size))

    def states(self, users: np.ndarray, at: np.ndarray, times: np.ndarray, contexts: list[dict[str, Any]]) -> Queries:
        """The states of `users` (n,) rows just before log positions `at` (n,), asked at `times` (n,) Unix seconds."""
        items, item_times = self.histories.before(users, at, times)
        refused = [] if self.refusals is None else self.refusals.before(users, at, times)
        wishes = None
        if any(len(rows) for rows in refused):
            items, item_times = taken_out(items, item_times, refused)
            wishes = tuple(Wishes(unwanted=tuple(rows.tolist())) if len(rows) else None for rows in refused)
        return Queries(
            user_ids=self.log.users.outside(users),
            users=users.astype(np.int32),
            k=np.full(len(users), 10, np.int32),
            at=times.astype(np.float64),
            history=items,
            history_times=item_times,
            exclude=_padded(self._had(users, at, times, refused) if self.exclude_seen else refused, len(users)),
            contexts=list(contexts),
            profiles=[{}] * len(users),
            positions=np.asarray(at, np.int64),
            wishes=wishes,
        )

    def _had(self, users: np.ndarray, at: np.ndarray, times: np.ndarray, refused: list[np.ndarray]) -> list[np.ndarray]:
        """The item rows that each user had before log position `at` or refused, distinct."""
        indptr, order = self._told_by_user
        past = self.log.past
        if self.log.impressions:  # a screen's rows do not see each other
            at = np.minimum(at, np.searchsorted(self.log.time, times, "left"))
        lists = []
        for n, (user, position) in enumerate(zip(users.tolist(), at.tolist(), strict=True)):
            mine = order[indptr[user] : indptr[user + 1]]
            had = self.log.item[mine[: int(np.searchsorted(mine, position))]]
            if past is not None:
                had = np.concatenate([past.items[past.indptr[user] : past.indptr[user + 1]], had])
            if refused and len(refused[n]):
                had = np.concatenate([had, refused[n]])
            lists.append(np.unique(had))
        return lists


def _padded(lists: list[np.ndarray], n: int) -> np.ndarray:
    """n lists as (n, E) item rows, -1 on the right; no list is n empty ones."""
    out = np.full((n, max(map(len, lists), default=0)), UNKNOWN, np.int32)
    for row, items in zip(out, lists, strict=False):
        row[: len(items)] = items
    return out
