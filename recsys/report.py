"""An evaluation's figures: rows with one value per user, their means, intervals and tests, and where they hold.

Everything that a table, the JSON and the page show is computed here, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recsys.errors import RayfunnelError
from recsys.metrics import interval, mean_of_users
from recsys.significance import TEST, Comparison, against

KINDS = ("channel", "stage", "baseline", "ranker")
LEAD = ("ndcg@10", "auc")


@dataclass
class Row:
    """One line: `values` name -> (B,) per user (or per group of users, see significance.pseudo_values), NaN where a user does
    not count; `whole` measures of all lists together; seconds {"fit", "predict"} and mib likewise; `breakdown` as Report's."""

    model: str
    values: dict[str, np.ndarray]
    whole: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    kind: str = "channel"
    same_as: str | None = None
    """The row whose configuration and history are the same: this one repeats its figures."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    by_history: list[float] = field(default_factory=list)
    by_popularity: list[float] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation of each metric over seeds."""

    def metrics(self, users: np.ndarray | None = None) -> dict[str, float]:
        """Means over users who count (those of the mask, if given), and what is of all lists together."""
        if users is not None:
            return {name: mean_of_users(v[users]) for name, v in self.values.items()}
        # A measure that is no mean over users stands in `whole` with its exact value, beside its pseudo-values.
        return {name: mean_of_users(v) for name, v in self.values.items()} | self.whole


@dataclass
class Report:
    """What `rayfunnel evaluate` prints and writes."""

    protocol: str
    rows: list[Row]
    users: int
    warm: np.ndarray
    n_items: int
    sampled: bool = False
    stage_recall: dict[str, float] = field(default_factory=dict)
    spearman: float = float("nan")
    ks: tuple[int, ...] = ()
    history_bins: list[dict[str, Any]] = field(default_factory=list)
    """{"from", "to", "users"} of each bin of users by events of history."""
    popularity_bins: list[dict[str, Any]] = field(default_factory=list)
    """{"from", "to", "items"} of each bin of sought items by training events."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Rows that there are not, and why."""
    account: list[tuple[str, int]] = field(default_factory=list)
    seeds: int = 1
    notes: list[str] = field(default_factory=list)
    warm_rows: bool = True
    """Whether a row's values are of users, so that warm and cold ones can be told apart."""

    @property
    def lead(self) -> str:
        """The metric that rows are compared by first."""
        names = [n for row in self.rows[:1] for n in row.values]
        fitting = [n for n in LEAD if n in names] or [n for n in names if n.startswith("ndcg")] or names
        return fitting[0] if fitting else ""

    def keep(self, models: Sequence[str] | None) -> None:
        """Keep the rows of these names alone; RayfunnelError names one that is not there, and those that are."""
        if models is None:
            return
        known = [row.model for row in self.rows]
        if absent := [name for name in models if name not in known]:
            raise RayfunnelError(f"The report has no row '{absent[0]}'. Rows: {', '.join(known)}.")
        self.rows = [row for row in self.rows if row.model in models]

    def best(self) -> str | None:
        """The row with the highest lead metric; of equal ones the first."""
        means = {row.model: row.metrics().get(self.lead, float("nan")) for row in self.rows}
        known = {name: value for name, value in means.items() if not math.isnan(value)}
        return max(known, key=lambda name: known[name]) if known else None

    def compared(self, reference: str) -> dict[str, dict[str, Comparison]]:
        """Row -> metric -> the row against `reference`; each metric's p are corrected over the rows."""
        same = [row.model for row in self.rows if row.same_as is not None and row.same_as != reference]
        out: dict[str, dict[str, Comparison]] = {}
        for metric in self.rows[0].values if self.rows else ():
            values = {row.model: row.values[metric] for row in self.rows if metric in row.values}
            if reference in values:
                for name, comparison in against(values, reference, same=same).items():
                    out.setdefault(name, {})[metric] = comparison
        return out

    def as_json(self) -> dict[str, Any]:
        """{"protocol", "rows": [{"model", "metrics", "seconds", …}], …}: keys others rely on. NaN is null."""
        best = self.best()
        references = [name for name in dict.fromkeys([best, "funnel"]) if name in {row.model for row in self.rows}]
        tests = {str(name): self.compared(str(name)) for name in references}
        some_cold = self.warm_rows and 0 < int(self.warm.sum()) < len(self.warm)
        found = {
            "protocol": self.protocol,
            "sampled": self.sampled,
            "users": self.users,
            "warm_users": int(self.warm.sum()),
            "items": self.n_items,
            "seeds": self.seeds,
            "lead": self.lead,
            "best": best,
            "test": TEST,
            "compared_with": references,
            "rows": [self._row(row, tests, some_cold=some_cold) for row in self.rows],
            "stage_recall": self.stage_recall,
            "coarse_fine_spearman": self.spearman,
            "ks": list(self.ks),
            "history_bins": self.history_bins,
            "popularity_bins": self.popularity_bins,
            "skipped": self.skipped,
            "account": [list(line) for line in self.account],
            "notes": self.notes,
        }
        plain: dict[str, Any] = _plain(found)
        return plain

    def _row(self, row: Row, tests: Mapping[str, dict[str, dict[str, Comparison]]], *, some_cold: bool) -> dict[str, Any]:
        return {
            "model": row.model,
            "kind": row.kind,
            "same_as": row.same_as,
            "metrics": row.metrics(),
            "warm": row.metrics(self.warm) if some_cold else None,
            "cold": row.metrics(~self.warm) if some_cold else None,
            "interval": {name: list(interval(v)) for name, v in row.values.items()},
            "sd_of_seeds": row.spread or None,
            "seconds": row.seconds,
            "peak_mib": row.mib,
            "against": {
                name: {metric: c.as_json() for metric, c in found.get(row.model, {}).items()}
                for name, found in tests.items()
                if row.model in found
            },
            "curve": row.curve,
            "by_history": row.by_history,
            "by_popularity": row.by_popularity,
        }


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for a figure that there is not."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_over_seeds(reports: Sequence[Report], users: Sequence[np.ndarray]) -> Report:
    """One report of several: the same rows judged on splits of different seeds; users[s] (B_s,) are the user rows of report s.

    A metric is the mean over seeds, its spread their standard deviation; a user's value is the mean over the seeds that
    judged them, so intervals and tests still count users, not repetitions.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    every = np.unique(np.concatenate(users))
    places = [np.searchsorted(every, u) for u in users]
    names = [row.model for row in first.rows if all(any(r.model == row.model for r in report.rows) for report in reports)]
    rows = []
    for name in names:
        of = [next(r for r in report.rows if r.model == name) for report in reports]
        means = [row.metrics() for row in of]
        values = {}
        for metric in of[0].values:
            table = np.full((len(of), len(every)), np.nan)
            for s, (row, place) in enumerate(zip(of, places, strict=True)):
                table[s, place] = row.values[metric]
            values[metric] = _nanmean(table)
        rows.append(
            Row(
                name,
                values,
                whole={m: float(np.mean([x[m] for x in means])) for m in means[0]},
                seconds={k: sum(row.seconds[k] for row in of) for k in of[0].seconds},
                mib={k: max(row.mib[k] for row in of) for k in of[0].mib},
                kind=of[0].kind,
                same_as=of[0].same_as,
                curve={m: np.mean([row.curve[m] for row in of], axis=0).tolist() for m in of[0].curve},
                by_history=_over_seeds([row.by_history for row in of]),
                by_popularity=_over_seeds([row.by_popularity for row in of]),
                spread={m: float(np.std([x[m] for x in means], ddof=1)) for m in means[0]},
            )
        )
    warm = np.zeros(len(every), bool)
    for report, place in zip(reports, places, strict=True):
        warm[place] |= report.warm
    return Report(
        first.protocol,
        rows,
        len(every),
        warm,
        first.n_items,
        first.sampled,
        {s: float(np.mean([r.stage_recall[s] for r in reports])) for s in first.stage_recall},
        float(np.mean([r.spearman for r in reports])),
        first.ks,
        first.history_bins,
        first.popularity_bins,
        first.skipped,
        first.account,
        len(reports),
        first.notes,
    )


def _over_seeds(lists: Sequence[list[float]]) -> list[float]:
    """The mean of each bin; the first seed's where the seeds have not the same number of bins."""
    if len({len(x) for x in lists}) != 1:
        return lists[0]
    means: list[float] = _nanmean(np.array(lists, np.float64)).tolist()
    return means


def _nanmean(table: np.ndarray) -> np.ndarray:
    """The mean of each column over what is not NaN; NaN where all is."""
    known = ~np.isnan(table)
    n = known.sum(0)
    mean: np.ndarray = np.divide(np.where(known, table, 0).sum(0), n, out=np.full(table.shape[1], np.nan), where=n > 0)
    return mean
