"""What a batch may be shown: by the filters of its queries, and by the catalogue as its process knew it when it first saw the batch.

The catalogue may change while a batch is on its way; the batch goes on with what it began with, so its stages agree. A stage in
another process may have heard of a change that the first had not, or not yet: `shown` takes out what this process must not show.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recsys.allowed import Allowed, Condition
from recsys.core import UNKNOWN, Candidates, Queries, Recaller
from recsys.delta import Delta, Parts


@dataclass(slots=True, eq=False)
class Eligibility:
    """Of one batch in one process. delta: what changed since the bundle was made, None where nothing did."""

    parts: Parts
    delta: Delta | None
    beside: Allowed | None = field(default=None, init=False)
    """What of the delta's slots may be shown, once `admit` has made it."""

    @property
    def n(self) -> int:
        """Items of the bundle; what came later has rows from here on."""
        return len(self.parts.items)

    def admit(self, queries: Queries) -> None:
        """Make the bitmaps of the queries' filters and of what was deleted, once a batch."""
        if self.delta is not None:
            if self.beside is None:
                queries.allowed, self.beside = self.delta.allowed(queries, self.parts)
        elif queries.filters is not None and queries.allowed is None:
            queries.allowed = self.parts.filters.allowed(queries.filters)

    def recall(self, name: str, channel: Recaller, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A channel's ((B, k') items, (B, k') scores) among what the admitted queries may be shown."""
        found = self.delta.recall(name, channel, queries, self._beside, k) if self.delta is not None else channel.recall(queries, k)
        # A channel that knows nothing of filters loses places, never the promise.
        return found if queries.allowed is None else queries.allowed.kept(*found, self.n)

    def shown(self, candidates: Candidates) -> Candidates:
        """The candidates without items that were deleted since they were recalled, or that another process heard of first."""
        if self.delta is None and candidates.items.max(initial=UNKNOWN) < self.n:
            return candidates
        hidden = self._now.absent(candidates.items)
        if not hidden.any():
            return candidates
        order = np.argsort(hidden, axis=1, kind="stable")
        out = candidates.reordered(order, np.take_along_axis(np.where(hidden, -np.inf, candidates.scores), order, 1))
        out.items = np.where(np.take_along_axis(hidden, order, 1), UNKNOWN, out.items).astype(np.int32)
        return out

    def passes(self, condition: Condition, items: np.ndarray) -> np.ndarray:
        """(B, N) bool: the items that a condition means."""
        if self.delta is None:
            lies, mask, slots = items, self.parts.filters.mask((condition,)), np.zeros(1, bool)
        else:
            lies, (mask, slots) = np.where(items < 0, UNKNOWN, self.delta.storage(items)), self.delta.mask((condition,), self.parts)
        inside = np.append(mask.items, False)[np.where((lies >= 0) & (lies < self.n), lies, -1)]
        found: np.ndarray = inside | np.append(slots, False)[np.where(lies >= self.n, lies - self.n, -1)]
        return found

    def may(self, queries: Queries, items: np.ndarray) -> np.ndarray:
        """(B, N) bool: the items that a query's filter and the catalogue let be shown."""
        self.admit(queries)
        now = self._now
        may: np.ndarray = (items != UNKNOWN) & ~now.absent(items)
        b, slot = np.nonzero(may)
        lies = now.storage(items[b, slot])
        ok = np.ones(len(b), bool)
        inside = lies < self.n
        if queries.allowed is not None:
            ok[inside] = queries.allowed.admits(b[inside], lies[inside])
        if (~inside).any():
            ok[~inside] = self._beside.admits(b[~inside], lies[~inside] - self.n)
        may[b, slot] = ok
        return may

    def vectors(self, base: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(…, d) two-tower vectors of item rows, with `base` (I, d) those of the bundle; what stands for -1 means nothing."""
        if self.delta is None or self.delta.vectors is None:
            found: np.ndarray = base[np.where(items < self.n, items, UNKNOWN)]
            return found
        return self.delta.grown(base, self.delta.vectors)[items]

    @property
    def _now(self) -> Delta:
        return self.delta if self.delta is not None else Delta.nothing(self.n)

    @property
    def _beside(self) -> Allowed:
        assert self.beside is not None  # noqa: S101 - asked of admitted queries only
        return self.beside
