"""What an evaluation asks: users' states, and what they did next, by protocol.

next_item, time   the state just before a user's first test event; sought are the test items not had before
top_n             all of the user's training events, whenever they were; validation items are masked as well
ncf               next_item's state; the positive stands against given or drawn negatives
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from recsys.core import UNKNOWN, Queries
from recsys.data.interactions import CSR, Interactions, group
from recsys.errors import DataError
from recsys.metrics import Relevant
from recsys.moments import Moments
from recsys.prepared import Prepared

CHUNK = 1_024
WHOLE = 10_000
"""Newest events that "the whole history" means."""
States = Callable[[np.ndarray], Queries]


@dataclass(frozen=True)
class HeldOut:
    """B users' states and what they did next. queries(rows) gives the state of n of the users as the service would see it,
    with the newest `history.length` events; `whole` with the whole history, for models that are defined on all of it.
    """

    queries: States
    relevant: Relevant
    warm: np.ndarray
    """(B,) bool: the user had a history at that instant."""
    users: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """(B,) user rows."""
    had: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """(B,) events of each user's whole history at that instant."""
    whole: States | None = None
    """None: `queries` has the whole history."""
    given: np.ndarray | None = None
    """(B, N) the items to be ranked, -1 in empty slots; None: the whole catalogue."""

    def __len__(self) -> int:
        return len(self.relevant)


@dataclass(frozen=True)
class Known:
    """The states of users along one log, once as long as the service's and once whole."""

    moments: Moments
    whole: Moments

    @classmethod
    def of(cls, moments: Moments) -> Known:
        """From the service's moments."""
        log, told = moments.log, moments.told
        longest = int(np.bincount(log.user[told], minlength=1).max(initial=0))
        longest += 0 if log.past is None else int(np.diff(log.past.indptr).max(initial=0))
        whole = moments if longest <= moments.length else replace(moments, length=min(longest, WHOLE))
        return cls(moments, whole)


def before_first(prepared: Prepared, moments: Moments, *, most: int | None, seed: int) -> HeldOut:
    """Protocols next_item and time: users with test positives, each in the state just before the first of them."""
    users, first, wanted = _tests(prepared, most, seed)
    known = Known.of(moments)
    return _held_out((lambda rows: known.moments.queries(first[rows]), lambda rows: known.whole.queries(first[rows])), users, wanted, known)


def after_training(prepared: Prepared, moments: Moments, *, most: int | None, seed: int) -> HeldOut:
    """Protocol top_n: the state holds all training events of a user; what is in validation is masked, not told."""
    log, split = prepared.log, prepared.split
    users, first, wanted = _tests(prepared, most, seed)
    train = split.train
    known = Known.of(moments.where(train))
    mask = train | split.valid
    masked = moments.where(mask, length=1)
    end = float(np.nextafter(log.time[mask].max(initial=0.0), np.inf))

    def state(of: Moments) -> States:
        def ask(rows: np.ndarray) -> Queries:
            contexts: list[dict[str, Any]] = [{name: column[i] for name, column in log.context.items()} for i in first[rows]]
            at, times = np.full(len(rows), len(log)), np.full(len(rows), end)
            seen = masked.states(users[rows], at, times, contexts).exclude
            return replace(of.states(users[rows], at, times, contexts), exclude=seen)

        return ask

    return _held_out((state(known.moments), state(known.whole)), users, wanted, known)


def against_given(held_out: HeldOut, log: Interactions, *, negatives: int, given: CSR | None, seed: int) -> HeldOut:
    """Protocol ncf from next_item's states: each user's first sought item against given negatives, or so many drawn ones.

    Drawn uniformly, without repeats, among the items that the user has nowhere in the log. Raises DataError where a user
    with a positive has no given negatives at all.
    """
    B = len(held_out)
    relevant = held_out.relevant
    positive = np.array([relevant.items[a] if b > a else UNKNOWN for a, b in zip(relevant.indptr[:-1], relevant.indptr[1:], strict=True)])
    indptr, order = group(log.user, log.n_users)
    lists = []
    for b, user in enumerate(held_out.users.tolist()):
        if given is not None:
            against = given.items[given.indptr[user] : given.indptr[user + 1]]
            if positive[b] != UNKNOWN and not len(against):
                raise DataError(
                    f"evaluate.given has no negatives for user '{log.users.outside([user])[0]}', who has a test positive. "
                    "Give every test user some, or leave evaluate.given out: negatives are drawn then."
                )
        else:
            had = log.item[order[indptr[user] : indptr[user + 1]]]
            if log.past is not None:
                had = np.concatenate([had, log.past.items[log.past.indptr[user] : log.past.indptr[user + 1]]])
            against = _drawn(had, log.n_items, negatives, np.random.default_rng([seed, user]))
        lists.append(np.unique(np.append(against, positive[b])))
    out = np.full((B, max(map(len, lists), default=0)), UNKNOWN, np.int32)
    for row, items in zip(out, lists, strict=True):
        row[: len(items)] = items
    return replace(held_out, relevant=Relevant.one(positive), given=out)


def _drawn(had: np.ndarray, n_items: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """n distinct items outside `had`, or all there are."""
    barred = np.unique(had)
    left = n_items - len(barred)
    picks = np.sort(rng.choice(left, min(n, left), replace=False))
    # The p-th item that is not barred: every barred item up to it shifts it by one.
    shift = barred - np.arange(len(barred))
    free: np.ndarray = picks + np.searchsorted(shift, picks, side="right")
    return free


def _tests(prepared: Prepared, most: int | None, seed: int) -> tuple[np.ndarray, np.ndarray, CSR]:
    """(B,) users with test positives, (B,) log positions of the first of each, and the test items of each in log order."""
    log = prepared.log
    rows = np.flatnonzero(prepared.split.test & log.positive)
    if not len(rows):
        raise DataError(
            "The test part holds no positive, so there is nothing to judge by. Check split and data.labels, or take protocol ctr."
        )
    users, first, inverse = np.unique(log.user[rows], return_index=True, return_inverse=True)
    indptr, order = group(inverse, len(users))
    chosen = np.arange(len(users))
    if most is not None and most < len(users):
        chosen = np.sort(np.random.default_rng(seed).choice(len(users), most, replace=False))
    lengths = np.diff(indptr)[chosen]
    at = np.concatenate([order[indptr[u] : indptr[u + 1]] for u in chosen])
    return users[chosen], rows[first[chosen]], CSR(np.concatenate([[0], np.cumsum(lengths)]), log.item[rows[at]])


def _held_out(ask: tuple[States, States], users: np.ndarray, tests: CSR, known: Known) -> HeldOut:
    """Take from each user's test items those had before, and note who had a history."""
    queries, whole = ask
    B = len(users)
    had, wanted = np.zeros(B, np.int64), []
    for start in range(0, B, CHUNK):
        rows = np.arange(start, min(start + CHUNK, B))
        asked = whole(rows)
        had[rows] = (asked.history != UNKNOWN).sum(1)
        for b, seen in zip(rows, asked.exclude, strict=True):
            wanted.append(np.setdiff1d(tests.items[tests.indptr[b] : tests.indptr[b + 1]], seen))
    same = known.whole is known.moments
    return HeldOut(queries, Relevant.of(wanted), had > 0, users, had, None if same else whole)
