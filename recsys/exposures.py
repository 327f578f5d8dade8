"""Pages of the service as lessons for the fine ranker: what was shown and taken is a positive, what was shown and passed over a negative.

Each page is a moment of its user: the state is that just before it was asked for, and the evidence is what the channels say
then. A positive that recall does not find is left out, as everywhere: the fine stage would not meet it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.core import UNKNOWN
from recsys.data.interactions import Interactions
from recsys.evidence import evidence, unvouched
from recsys.examples import CHUNK, Columns, gathered, pair_columns
from recsys.funnel import Funnel
from recsys.moments import Moments

Shown = tuple[str, str, str]
"""Request id, user id and item id."""


@dataclass(frozen=True)
class Pages:
    """P pages of users of a log: users (P,) rows, times (P,) Unix seconds, contexts, items (P, M) rows with -1 behind a short page,
    labels (P, M) 0/1."""

    users: np.ndarray
    times: np.ndarray
    contexts: list[dict[str, Any]]
    items: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def of(cls, labelled: pa.Table, log: Interactions, *, without: Collection[Shown] = ()) -> Pages:
        """From the examples that `impressions.joined` makes. Users and items that the log does not know are left out, and so is what
        stands in `without`: the log has it as a row of its own."""
        pages: dict[tuple[str, int, int], tuple[int, float, dict[str, Any], dict[int, float]]] = {}
        columns = [labelled[name].to_pylist() for name in ("request_id", "user_id", "item_id", "time_ms", "label", "context")]
        users, items = log.users.rows(columns[1]), log.items.rows(columns[2])
        for request, user_id, item_id, time_ms, label, context, user, item in zip(*columns, users.tolist(), items.tolist(), strict=True):
            if UNKNOWN in (user, item) or (request, user_id, item_id) in without:
                continue
            page = pages.setdefault((request, user, time_ms), (user, time_ms / 1000, json.loads(context or "{}"), {}))
            page[3][item] = float(label)
        width = max((len(shown) for *_, shown in pages.values()), default=0)
        rows = np.full((len(pages), width), UNKNOWN, np.int32)
        labels = np.zeros((len(pages), width), np.float32)
        for n, (*_, shown) in enumerate(pages.values()):
            rows[n, : len(shown)], labels[n, : len(shown)] = list(shown), list(shown.values())
        held = list(pages.values())
        return cls(
            np.array([user for user, *_ in held], np.int32),
            np.array([time for _, time, *_ in held], np.float64),
            [p[2] for p in held],
            rows,
            labels,
        )

    def between(self, start: float, end: float, *, most: int, seed: int) -> Pages:
        """Those asked for from `start` until before `end`, at most so many, drawn at random."""
        at = np.flatnonzero((self.times >= start) & (self.times < end))
        if len(at) > most:
            at = np.sort(np.random.default_rng(seed).choice(at, most, replace=False))
        return Pages(self.users[at], self.times[at], [self.contexts[i] for i in at.tolist()], self.items[at], self.labels[at])


def page_examples(funnel: Funnel, moments: Moments, pages: Pages, *, first: int) -> Columns:
    """Pairs (page, shown item) with everything the fine stage sees, and `label`; `moment` numbers pages from `first`."""
    parts: list[Columns] = []
    for start in range(0, len(pages), CHUNK):
        b = slice(start, start + CHUNK)
        times, users, items, labels = pages.times[b], pages.users[b], pages.items[b], pages.labels[b]
        at = np.searchsorted(moments.log.time, times, "left")
        queries = moments.states(users, at, times, pages.contexts[b])
        candidates = funnel.coarse_rank(queries, funnel.recall(queries))
        says = evidence(candidates)
        same = (candidates.items[:, None, :] == items[:, :, None]) & (items != UNKNOWN)[:, :, None]  # (B, M, N)
        found, slot = same.any(2), same.argmax(2) if candidates.width else np.zeros(items.shape, np.int64)
        told = np.broadcast_to(unvouched(says.shape[2]), (*items.shape, says.shape[2])).astype(np.float32)
        rows, places = np.nonzero(found)
        told[rows, places] = says[rows, slot[rows, places]]
        items = np.where(found | (labels == 0), items, UNKNOWN).astype(np.int32)
        parts.append(pair_columns(funnel, queries, (items, told, labels), first + start))
    return gathered(parts)


def beside(columns: Columns, more: Columns) -> Columns:
    """Both as one."""
    return {name: np.concatenate([column, more[name].astype(column.dtype)]) for name, column in columns.items()} if more else columns
