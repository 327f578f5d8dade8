"""Whether a difference between two rows of a report is more than chance: paired tests, Holm's correction, jackknife.

The unit is the user: each has one value per row, and both rows saw the same users, so their differences are tested
(paired t, two-sided). Measures that are no mean over users (AUC, log loss) get pseudo-values of a jackknife that leaves out
a group of users at a time (Efron & Tibshirani, 1993, chapter 11); those are then treated as users are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.05
"""A corrected p below this is called significant."""
GROUPS = 40
"""Groups of users that the jackknife leaves out one at a time."""
TEST = "paired t-test over users, two-sided; p corrected over the rows by Holm (1979), significant below 0.05"


class Comparison(NamedTuple):
    """A row against a reference: mean of (row - reference) over the users of both, its 95 % interval, p and Holm's p."""

    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    users: int

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.p_holm < LEVEL

    def as_json(self) -> dict[str, float | int | bool | list[float]]:
        """Plain values."""
        return {
            "difference": self.difference,
            "interval": [self.low, self.high],
            "p": self.p,
            "p_holm": self.p_holm,
            "users": self.users,
            "significant": self.significant,
        }


def paired_t(row: np.ndarray, reference: np.ndarray) -> Comparison:
    """Two (B,) arrays of the same users; users with NaN in either do not count. `p_holm` is p until `holm` corrects it.

    Equal arrays have p = 1; fewer than two users tell nothing (NaN).
    """
    d = (row - reference)[~(np.isnan(row) | np.isnan(reference))]
    n = len(d)
    if n < 2:
        nan = float("nan")
        return Comparison(float(d.mean()) if n else nan, nan, nan, nan, nan, n)
    mean, error = float(d.mean()), float(d.std(ddof=1) / np.sqrt(n))
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
        return Comparison(mean, mean, mean, p, p, n)
    p = float(2 * student.sf(abs(mean) / error, n - 1))
    half = float(student.ppf(0.975, n - 1)) * error
    return Comparison(mean, mean - half, mean + half, p, p, n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p; NaN stays NaN and is not counted among the tests."""
    values = np.asarray(p, np.float64)
    asked = np.flatnonzero(~np.isnan(values))
    order = asked[np.argsort(values[asked], kind="stable")]
    stepped = np.minimum(1.0, values[order] * np.arange(len(order), 0, -1))
    out = values.copy()
    out[order] = np.maximum.accumulate(stepped)
    return [float(x) for x in out]


def against(values: Mapping[str, np.ndarray], reference: str, *, same: Sequence[str] = ()) -> dict[str, Comparison]:
    """Every row but the reference against it, corrected together. Rows of `same` repeat another and are not tested twice."""
    found = {name: paired_t(v, values[reference]) for name, v in values.items() if name != reference and name not in same}
    corrected = holm([c.p for c in found.values()])
    return {name: c._replace(p_holm=p) for (name, c), p in zip(found.items(), corrected, strict=True)}


def pseudo_values(measure: Callable[[np.ndarray], float], users: np.ndarray, *, groups: int = GROUPS) -> np.ndarray:
    """(G,) pseudo-values G m(all) - (G - 1) m(all but group g) of a measure of (n,) bool row masks; users (n,) go whole.

    Their mean estimates the measure, their spread its standard error; a user's rows are never parted. Users are dealt into
    the groups in order of their first row, so every measure and every row of a report has the same groups.
    """
    _, first, inverse = np.unique(users, return_index=True, return_inverse=True)
    turn = np.empty(len(first), np.int64)
    turn[np.argsort(first, kind="stable")] = np.arange(len(first))
    G = min(groups, len(first))
    group = (turn % max(G, 1))[inverse]
    whole = measure(np.ones(len(users), bool))
    return np.array([G * whole - (G - 1) * measure(group != g) for g in range(G)], np.float64)
