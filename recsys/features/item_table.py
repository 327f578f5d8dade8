"""Item-side values kept as arrays between snapshots: computed anew is what an event changed, or the clock; the rest is looked at.

Which keys an event changed is told by the state itself, which is another object then. When the clock alone will change a value is
known when it is computed (`Group.closed`); what decays is carried on by arithmetic on the whole column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from recsys.features.generate import Instant
from recsys.features.groups import Counted, Group, GroupState
from recsys.features.reading import Key
from recsys.features.states import LATEST, looked
from recsys.features.tally import Ends, Tally

SPARE = 1_024
"""Rows and texts that may be out of use before all is computed anew without them."""


class ItemTable:
    """The keys of one group. Instants must not go back: where one does, all is computed anew."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._forget()

    def _forget(self) -> None:
        self._at = -math.inf
        self._rows: dict[Key, int] = {}
        self._states: list[GroupState] = []
        self._until: np.ndarray = np.empty(0)
        self._amounts: list[np.ndarray] = [np.empty((0, self._width(f))) for f in self.group.features]
        self._last: list[np.ndarray] = [np.empty(0) for _ in self.group.features]
        self._texts: dict[str, int] = {}
        self._shown, self._keys = np.empty(0, np.int64), pa.array([], pa.string())

    def table(self, held: Sequence[tuple[Key, GroupState]], at: float) -> pa.Table:
        """One row a key, in this order: its texts joined by NUL, and per aggregate its amounts and when its newest event was."""
        if at < self._at or len(self._rows) > 2 * len(held) + SPARE or len(self._texts) > 2 * self._values() + SPARE:
            self._forget()
        self._at = at
        rows, stale = np.empty(len(held), np.int64), list[int]()
        for n, (key, state) in enumerate(held):
            row = self._rows.get(key)
            if row is None:
                row = self._rows[key] = len(self._states)
                self._states.append(state)
                stale.append(row)
            elif self._states[row] is not state:
                self._states[row] = state
                stale.append(row)
            rows[n] = row
        known = rows[rows < len(self._until)]
        self._compute(np.union1d(np.array(stale, np.int64), known[self._until[known] <= at]), at)
        if not np.array_equal(rows, self._shown):
            self._shown, self._keys = rows, pa.array(["\0".join(key) for key, _ in held], pa.string())
        return pa.table({"key": self._keys} | self._columns(rows, at))

    def _compute(self, rows: np.ndarray, at: float) -> None:
        """Values of these rows (n,) at an instant, and until when they stand."""
        more = len(self._states) - len(self._until)
        if more:
            self._until = np.concatenate([self._until, np.empty(more)])
            self._amounts = [np.concatenate([x, np.empty((more, x.shape[1]))]) for x in self._amounts]
            self._last = [np.concatenate([x, np.empty(more)]) for x in self._last]
        closed = [self.group.closed(self._states[row], Instant(at, LATEST)) for row in rows.tolist()]
        found = looked(self.group, enumerate(state for state, _ in closed), Instant(at, LATEST), self._code)
        for kept, new in zip(self._amounts, found.amounts, strict=True):
            kept[rows] = new
        for kept, new in zip(self._last, found.last, strict=True):
            if len(new):
                kept[rows] = new
        self._until[rows] = [until for _, until in closed]

    def _code(self, of: str, value: object) -> float:
        return float(value) if of == "value" else float(self._texts.setdefault(str(value), len(self._texts)))  # type: ignore[arg-type]

    def _columns(self, rows: np.ndarray, at: float) -> dict[str, pa.Array]:
        out: dict[str, pa.Array] = {}
        texts = list(self._texts)
        for i, f in enumerate(self.group.features):
            amounts, last = self._amounts[i][rows], self._last[i][rows]
            if isinstance(f.monoid, Ends) and f.config.reads != "value":
                out[f"{i}"] = pa.array([[texts[int(c)] for c in row if not math.isnan(c)] for row in amounts], pa.list_(pa.string()))
                continue
            if isinstance(f.monoid, Tally) and f.monoid.half_life_s:  # amounts hold at `last`
                known = ~np.isnan(last)
                amounts[known] *= 2.0 ** ((last[known, None] - at) / f.monoid.half_life_s)
                last[known] = at
            for c in range(amounts.shape[1]):
                out[f"{i}.{c}"] = pa.array(amounts[:, c], pa.float64())
            if isinstance(f.monoid, Tally):
                out[f"{i}.last"] = pa.array(last, pa.float64())
        return out

    def _values(self) -> int:
        return sum(x.size for f, x in zip(self.group.features, self._amounts, strict=True) if isinstance(f.monoid, Ends))

    @staticmethod
    def _width(f: Counted) -> int:
        if isinstance(f.monoid, Ends):
            return f.monoid.n
        return len(f.nothing) if isinstance(f.monoid, Tally) else 1
