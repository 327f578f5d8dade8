"""Aggregates as inputs of the fine ranker: fields, scales, and the same values from a log (offline) or from states (in service).

What a query alone decides (keys of users and context) is a field of the user's side. What needs the item, static or not, is a
dense fact of the pair: the ranker gathers it per candidate, so item-side values can change while a version serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from recsys.core import Queries, Vocabulary, id_hash
from recsys.data.columns import ColumnConfig
from recsys.data.interactions import SHOWN, Interactions
from recsys.features.aggregates import AggregateConfig
from recsys.features.asof import Asked, AsOf, Raw, Road, Roads, in_process
from recsys.features.declaration import FeaturesConfig
from recsys.features.encoders import Table, spelled, spread_of
from recsys.features.fitting import Frame
from recsys.features.groups import Group, Plan, compiled
from recsys.features.keys import KeyColumns, key_text
from recsys.features.schema import FeatureSpace, Field

MOST_FITTED = 100_000
"""Rows of the training log that scales are taken from, evenly spread."""
_LOGARITHMIC = frozenset({"count", "sum", "distinct", "recency"})
_CAN_LACK = frozenset({"mean", "min", "max", "recency", "ratio", "product"})


class Source(Protocol):
    """Where raw values come from: `AsOf` of a log through `LogSource`, or states through `states.StateSource`."""

    def query_values(self, queries: Queries) -> Raw:
        """Aggregates that need no item, (B,) each."""
        ...

    def pair_values(self, queries: Queries, items: np.ndarray) -> Raw:
        """Aggregates of the pairs with items (B, N), -1 in empty slots: (B · N,) each; a match: (B · N,) shares."""
        ...


@dataclass(frozen=True)
class AggregateInputs:
    """What was declared, compiled and fitted. scales: name -> (centre, spread) of the transformed value."""

    config: FeaturesConfig
    gap_s: float
    plan: Plan
    columns: KeyColumns
    tables: Mapping[str, Table]
    dims: Mapping[str, int]
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        space: FeatureSpace,
        columns: Mapping[str, Mapping[str, ColumnConfig]],
        users: Frame,
        items: Frame,
        log: Interactions,
        *,
        train: np.ndarray,
        told: np.ndarray,
        gap_s: float,
        roads: Roads = in_process,
    ) -> Self:
        """Priors and scales from the training rows (E,) bool of `log`; what each value was just before its row."""
        config = space.config
        keys = KeyColumns.of(config.aggregates, columns, users, items)
        learned = log.where(train)
        priors = {n: _mean_rate(a, learned) for n, a in config.aggregates.items() if a.kind == "rate" and a.prior is None}
        tables = {t.table: t for t in space.fields if t.table}
        out = cls(config, gap_s, _plan(config, priors, gap_s), keys, space.tables, {n: f.dim for n, f in tables.items()})
        rows = np.flatnonzero(train)
        rows = rows[:: max(1, len(rows) // MOST_FITTED)]
        asof = AsOf(out.plan, log, keys, told, offset_s=config.utc_offset_s)
        raw = out.crossed(out.row_values(asof, rows, roads(asof)), log.user[rows], log.item[rows])
        for name in out.names:
            if name in raw and raw[name].ndim == 1:
                x = _transformed(out.plan.aggregates[name].kind, raw[name])
                known = x[np.isfinite(x)]
                out.scales[name] = (float(known.mean()), spread_of(known)) if len(known) else (0.0, 1.0)
        return out

    # ---- what is declared ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Every aggregate, in order of declaration."""
        return list(self.plan.aggregates)

    def needs_item(self, name: str) -> bool:
        """Whether a value belongs to a pair, not to the query."""
        a = self.plan.aggregates.get(name)
        if a is None:
            return name == "item" or self.columns.side_of(name) == "item"
        parts = a.parts if a.parts else a.key
        return a.kind == "match" or any(self.needs_item(p) for p in parts)

    def groups(self, *, pairs: bool) -> tuple[Group, ...]:
        """The groups whose key needs an item, or those whose key does not. A match is of the user's group."""
        return tuple(g for g in self.plan.groups if any(self.needs_item(p) for p in g.key) is pairs)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The aggregates as a model sees them."""
        return tuple(self._field(name, a) for name, a in self.plan.aggregates.items())

    def _field(self, name: str, a: AggregateConfig) -> Field:
        pair = self.needs_item(name)
        if a.kind == "concat":
            return Field(name, "item" if pair else "user", "one", name, 1 + a.buckets, self.config.dim)
        side: Any = "candidate" if pair else "user"
        if a.kind in ("last", "first"):
            table = self._table(a)
            if table is None:
                return Field(name, side, "dense", "", 0, 0, a.n)
            return Field(name, side, "sequence", table, self.tables[table].size, self.dims[table], a.n)
        return Field(name, side, "dense", "", 0, 0, 2 if a.kind in _CAN_LACK else 1)

    def _table(self, a: AggregateConfig) -> str | None:
        return None if a.reads == "value" else "item_id" if a.reads == "item" else a.reads

    # ---- raw values to inputs -----------------------------------------------------------------------------------------

    def row_values(self, asof: AsOf, rows: np.ndarray, road: Road | None = None) -> Raw:
        """The raw values at rows of a log, matches as shares, crosses left out; by `road`, else in this process."""
        asked = asof.at_rows(rows)
        return self.matched(
            (road or AsOf.values)(asof, asked, self.plan.groups), lambda of: asof.value_codes(of, asked.users, asked.items, asked.context)
        )

    def matched(self, raw: Raw, wanted: Any) -> Raw:
        """Each match as the share of the list that has the candidate's value; `wanted(column)` gives (n,) codes, -1 none."""
        for name, a in self.plan.aggregates.items():
            if a.kind == "match" and name in raw:
                held = raw[name]
                same = (held == wanted(a.reads)[:, None]).sum(1)
                raw[name] = same / np.maximum((~np.isnan(held)).sum(1), 1)
        return raw

    def crossed(self, raw: Raw, users: np.ndarray, items: np.ndarray) -> Raw:
        """With every ratio and product whose parts are there; `users` and `items` (n,) rows give number columns."""
        for name, a in self.plan.crosses.items():
            if a.kind == "concat" or any(p in self.plan.aggregates and p not in raw for p in a.parts):
                continue
            left, right = (raw[p] if p in raw else self._numbers(p, users, items) for p in a.parts)
            with np.errstate(invalid="ignore", divide="ignore"):
                x = left / right if a.kind == "ratio" else left * right
            raw[name] = np.where(np.isfinite(x), x, np.nan)
        return raw

    def _numbers(self, name: str, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        side = self.columns.side_of(name)
        if side is None:
            return np.full(len(users), np.nan)
        rows, column = (users if side == "user" else items), np.asarray(self.columns.numbers[side][name])
        known = (rows >= 0) & (rows < len(column))
        numbers: np.ndarray = np.where(known, column[np.where(known, rows, 0)] if len(column) else np.nan, np.nan)
        return numbers

    def encoded(self, raw: Raw, texts: Any = None) -> dict[str, np.ndarray]:
        """Raw values as inputs: dense (n, W) float32, sequences (n, N) int32 rows. `texts(name, of)` turns codes into texts."""
        out: dict[str, np.ndarray] = {}
        for name, x in raw.items():
            a = self.plan.aggregates[name]
            if a.kind in ("last", "first"):
                out[name] = self._listed(a, x, texts)
                continue
            centre, spread = self.scales.get(name, (0.0, 1.0))
            scaled = (_transformed(a.kind, x) - centre) / spread
            known = np.isfinite(scaled)
            columns = [np.where(known, np.clip(scaled, -8, 8), 0.0), *([known] if a.kind in _CAN_LACK else [])]
            out[name] = np.stack(columns, 1).astype(np.float32)
        return out

    def _listed(self, a: AggregateConfig, x: np.ndarray, texts: Any) -> np.ndarray:
        table = self._table(a)
        if table is None:
            return np.asarray(np.nan_to_num(x), np.float32)
        rows = np.zeros(x.shape, np.int32)
        codes, at = np.unique(x[~np.isnan(x)].astype(np.int64), return_inverse=True)
        rows[~np.isnan(x)] = np.array([self.tables[table].row(t) for t in texts(a.reads, codes)], np.int32)[at]
        return rows

    def joined(self, name: str, cells: list[list[str]]) -> np.ndarray:
        """(n,) int32 rows of a concat: 0 where a part is missing, else the hash of the joined texts."""
        a = self.plan.aggregates[name]
        return np.array([1 + id_hash("\0".join(c)) % a.buckets if all(c) else 0 for c in cells], np.int32)

    def item_columns(self, n_items: int) -> dict[str, np.ndarray]:
        """The concats of item columns, (I,) int32 each: static, so the engine takes them as any item column."""
        out = {}
        for name, a in self.plan.crosses.items():
            if a.kind == "concat" and self.needs_item(name):
                columns = [self.columns.texts["item"][p] for p in a.parts]
                out[name] = self.joined(name, [[" ".join(c.at(i)) for c in columns] for i in range(n_items)])
        return out

    # ---- disk ---------------------------------------------------------------------------------------------------------

    def keeping(self, before: Path) -> None:
        """Take the scales of an earlier fit from its folder, for aggregates of the same declaration: its models' inputs mean the same then."""
        held = json.loads((before / "aggregates.json").read_text())
        for name, (centre, spread) in held["scales"].items():
            if name in self.scales and held.get("declared", {}).get(name) == self._declared(name):
                self.scales[name] = (float(centre), float(spread))

    def _declared(self, name: str) -> object:
        return self.plan.aggregates[name].model_dump(mode="json")

    def save(self, folder: Path) -> None:
        """Write aggregates.json and the key columns into a new folder."""
        folder.mkdir(parents=True)
        self.columns.save(folder)
        written = {
            "gap_s": self.gap_s,
            "priors": self.plan.priors,
            "scales": self.scales,
            "declared": {n: self._declared(n) for n in self.scales},
        }
        (folder / "aggregates.json").write_text(json.dumps(written, indent=1))

    @classmethod
    def load(cls, folder: Path, space: FeatureSpace) -> Self:
        """Read what `save` wrote."""
        held = json.loads((folder / "aggregates.json").read_text())
        dims = {f.table: f.dim for f in space.fields if f.table}
        plan = _plan(space.config, held["priors"], held["gap_s"])
        scales = {name: (float(c), float(s)) for name, (c, s) in held["scales"].items()}
        return cls(space.config, held["gap_s"], plan, KeyColumns.load(folder), space.tables, dims, scales)


@dataclass(frozen=True)
class Live:
    """The inputs of one funnel and where their values come from."""

    inputs: AggregateInputs
    source: Source
    items: Vocabulary

    @property
    def snapshot(self) -> Any:
        """The `states.ItemSnapshot` in use; None where values are of a log."""
        return getattr(self.source, "snapshot", None)

    def item_rows(self, item_ids: Sequence[str]) -> np.ndarray:
        """(n,) rows by which `pair_fields` takes items: those of the bundle, and behind them those of items that came later and that
        states tell of. -1 where nothing does; it has the values of an item without events."""
        of_states = getattr(self.source, "item_row", None)
        return np.fromiter(map(of_states or self.items.row, item_ids), np.int32, len(item_ids))

    def query_fields(self, queries: Queries) -> dict[str, np.ndarray]:
        """The user-side fields of B queries, (B, …) each."""
        i, users = self.inputs, queries.users
        raw = {n: x for n, x in self.source.query_values(queries).items() if not i.needs_item(n)}
        out = i.encoded({n: x for n, x in i.crossed(raw, users, np.full(len(users), -1)).items() if not i.needs_item(n)}, self._texts)
        for name, a in i.plan.crosses.items():
            if a.kind == "concat" and not i.needs_item(name):
                out[name] = i.joined(name, [[self._user_text(p, queries, b) for p in a.parts] for b in range(len(queries))])
        return out

    def pair_fields(self, queries: Queries, items: np.ndarray) -> dict[str, np.ndarray]:
        """The dense facts of B x N pairs, (B, N, W) each; items (B, N) rows (see `item_rows`), -1 in empty slots.

        An item behind those of the bundle has what is keyed by itself; of its columns, which the bundle does not have, nothing.
        """
        i, (B, N) = self.inputs, items.shape
        users, flat = np.repeat(queries.users, N), items.reshape(-1)
        raw = self.source.pair_values(queries, items)
        needed = {
            p for n, a in i.plan.crosses.items() if i.needs_item(n) for p in a.parts if p in i.plan.aggregates and not i.needs_item(p)
        }
        if needed:
            raw |= {n: np.repeat(x, N) for n, x in self.source.query_values(queries).items() if n in needed}
        found = {n: x for n, x in i.crossed(raw, users, flat).items() if i.needs_item(n)}
        return {n: x.reshape(B, N, x.shape[1]) for n, x in i.encoded(found).items()}

    def _texts(self, of: str, codes: np.ndarray) -> list[str]:
        if of == "item":
            of_states = getattr(self.source, "item_ids", None)
            found: list[str] = (of_states or self.items.outside)(codes)
            return found
        side = self.inputs.columns.side_of(of)
        column = self.inputs.columns.texts[side][of] if side else self.source.context_texts(of)  # type: ignore[attr-defined]
        return [column.texts[c] for c in codes]

    def _user_text(self, part: str, queries: Queries, b: int) -> str:
        side = self.inputs.columns.side_of(part)
        if side is None:
            return spelled(queries.contexts[b].get(part))
        return " ".join(self.inputs.columns.texts["user"][part].at(int(queries.users[b])))


@dataclass(frozen=True)
class LogSource:
    """Values as of instants of a log: what training and offline evaluation use.

    `road` computes those of many instants at once elsewhere (`ahead.counted` takes it); None: all in this process.
    """

    inputs: AggregateInputs
    asof: AsOf
    road: Road | None = None

    def asked(self, queries: Queries) -> Asked:
        """The instants of queries: their log positions where they have them, else their times."""
        log = self.asof.log
        seen = np.searchsorted(log.time, queries.at, "left")
        if queries.positions is not None and not log.impressions:
            seen = queries.positions
        context = {}
        for name, column in self.asof.context.items():
            index = column.index
            context[name] = np.array([index.get(key_text(c.get(name)), -1) for c in queries.contexts], np.int64)
        return Asked(queries.users, np.full(len(queries), -1), queries.at, seen, context)

    def query_values(self, queries: Queries) -> Raw:
        """See Source."""
        return self.of_queries(self.asof.values(self.asked(queries), self.inputs.groups(pairs=False)))

    def pair_values(self, queries: Queries, items: np.ndarray) -> Raw:
        """See Source."""
        one = self.asked(queries)
        pairs = one.paired(items)
        raw, lists = self.asof.values(pairs, self.inputs.groups(pairs=True)), Raw()
        if self._matches:
            lists = self.asof.values(one, tuple(g for g in self.inputs.groups(pairs=False) if g.key == ("user",)))
        return self.of_pairs(raw, lists, pairs, items.shape[1])

    def of_queries(self, raw: Raw) -> Raw:
        """What a query has of the values of the groups without an item."""
        return {n: x for n, x in raw.items() if n not in self._matches}

    def of_pairs(self, raw: Raw, of_queries: Raw, pairs: Asked, N: int) -> Raw:
        """What pairs have: `raw` of the groups with an item, and matches with the lists of their queries, N pairs each."""
        out = raw | {n: np.repeat(of_queries[n], N, axis=0) for n in self._matches}
        return self.inputs.matched(out, lambda of: self.asof.value_codes(of, pairs.users, pairs.items, pairs.context))

    @property
    def _matches(self) -> list[str]:
        return [n for n, a in self.inputs.plan.aggregates.items() if a.kind == "match"]

    def context_texts(self, of: str) -> Any:
        """The texts of a context column."""
        return self.asof.context[of]


def _plan(config: FeaturesConfig, priors: Mapping[str, float], gap_s: float) -> Plan:
    return compiled(config.aggregates, priors=priors, lateness_s=config.lateness_s, offset_s=config.utc_offset_s, gap_s=gap_s)


def _mean_rate(a: AggregateConfig, log: Interactions) -> float:
    hit = log.labels[a.reads] if a.reads in log.labels else np.array([n == a.reads for n in log.event_names])[log.event]
    counted = np.ones(len(log), bool) if a.events is None else np.array([n in a.events for n in log.event_names])[log.event]
    trials = float(log.labels[SHOWN][counted].sum()) if SHOWN in log.labels else float(counted.sum())
    return min(float(hit[counted].sum()) / trials, 1.0) if trials else 0.0


def _transformed(kind: str, x: np.ndarray) -> np.ndarray:
    """Long-tailed numbers by logarithm, rates by their odds, others as they are."""
    if kind in _LOGARITHMIC or kind == "ratio":
        return np.asarray(np.sign(x) * np.log1p(np.abs(x)), np.float64)
    if kind == "rate":
        p = np.clip(x, 1e-6, 1 - 1e-6)
        return np.asarray(np.log(p / (1 - p)))
    return np.asarray(x, np.float64)
