"""What `features describe` prints: each declared aggregate with its key, window, coverage, distribution, staleness and bytes.

Taken at the newest rows of the log, as they were asked; bytes from replaying these rows through the streaming road. A
large log is counted on Ray Data, as for training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.steps import prepare
from recsys.config import Config
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError
from recsys.features.aggregates import AggregateConfig, Aggregates
from recsys.features.asof import AsOf
from recsys.features.groups import compiled
from recsys.features.inputs import AggregateInputs
from recsys.features.packed import pack
from recsys.features.states import replayed
from recsys.prepared import Prepared

MOST_ROWS = 20_000


def describe(config: Config, console: Console) -> list[dict[str, Any]]:
    """Print the table; returns its rows. ConfigError where no aggregate is declared."""
    if not config.features.aggregates:
        raise ConfigError(
            "features.aggregates declares nothing to describe. Declare one, such as `item_ctr: {kind: rate, key: item, window: 7d}`."
        )
    prepared, _ = prepare(config, console)
    rows = described(prepared)
    # Two tables, because one of all columns has no room for names on a terminal of 80.
    declared = Table(
        "feature", "kind", "key", "window", "of", title=f"{config.name}: aggregates", title_justify="left", header_style="bold"
    )
    title = f"values at the newest {min(MOST_ROWS, len(prepared.log)):,} rows"
    found = Table(
        *("feature", "coverage", "p10", "median", "p90", "newest", "keys", "bytes"),
        title=title,
        title_justify="left",
        header_style="bold",
    )
    for table in (declared, found):
        table.columns[0].overflow = "fold"
    for r in rows:
        declared.add_row(r["feature"], r["kind"], r["key"], r["window"], r["of"])
        spread = ["" if math.isnan(x) else f"{x:.4g}" for x in r["distribution"]]
        stale = "" if math.isnan(r["staleness_s"]) else _ago(r["staleness_s"])
        covered = "" if r["kind"] == "concat" else f"{100 * r['coverage']:.1f} %"
        keys, size = "" if r["keys"] is None else f"{r['keys']:,}", "" if r["bytes"] is None else f"{r['bytes']:.0f}"
        found.add_row(r["feature"], covered, *spread, stale, keys, size)
    console.print(declared)
    console.print(found)
    console.print(
        "coverage: rows whose key had an event before; newest: how long before its newest event was, at the median; bytes: of all features of the key"
    )
    for sentence in unheard(config.features.aggregates, prepared.log):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return rows


def unheard(aggregates: Aggregates, log: Interactions) -> list[str]:
    """A sentence for each aggregate that counts what the log does not hold: mostly a misspelt name, else something that only comes live."""
    found = []
    for name, a in aggregates.items():
        asked = set(a.events or ()) - set(log.event_names)
        if a.kind == "rate" and a.reads not in log.labels:
            asked |= {a.reads} - set(log.event_names)
        if asked:
            names = ", ".join(f"'{n}'" for n in sorted(asked))
            known = f"its events: {', '.join(sorted(log.event_names))}; its labels: {', '.join(sorted(log.labels))}"
            found.append(f"{name} asks for {names}, of which the log holds nothing ({known}). Misspelt, or only known live?")
    return found


def described(prepared: Prepared) -> list[dict[str, Any]]:
    """A row per aggregate: feature, kind, key, window, of, coverage, distribution (p10, p50, p90), staleness_s, keys, bytes."""
    inputs = prepared.aggregates
    assert inputs is not None  # noqa: S101 - something is declared
    log, rows = prepared.log, np.arange(max(0, len(prepared.log) - MOST_ROWS), len(prepared.log))
    offset_s = inputs.config.utc_offset_s
    asof = AsOf(inputs.plan, log, inputs.columns, prepared.told, offset_s=offset_s)
    raw = inputs.crossed(inputs.row_values(asof, rows, prepared.roads(asof)), log.user[rows], log.item[rows])
    ages = _ages(inputs, prepared, rows)
    bytes_of = _bytes(inputs, prepared, rows)
    found = []
    for name, a in inputs.plan.aggregates.items():
        values = raw.get(name, np.empty(0))
        values = values[np.isfinite(values)] if values.ndim == 1 else np.empty(0)
        key = ("user",) if a.kind == "match" else a.key
        age = ages.get(key, np.empty(0))
        keys, size = bytes_of.get(key, (None, None))
        found.append(
            {
                "feature": name,
                "kind": a.kind,
                "key": " x ".join(key) or " x ".join(a.parts),
                "window": f"decay {a.decay}" if a.decay else a.window + ("" if a.until == "now" else f", until {a.until}"),
                "of": "" if a.kind in ("count", "recency", "ratio", "product", "concat") else a.reads,
                "coverage": float(np.isfinite(age).mean()) if len(age) else len(values) / max(len(rows), 1),
                "distribution": np.quantile(values, [0.1, 0.5, 0.9]).tolist() if len(values) else [math.nan] * 3,
                "staleness_s": float(np.nanmedian(age)) if np.isfinite(age).any() else math.nan,
                "keys": keys,
                "bytes": size,
            }
        )
    return found


def _ages(inputs: AggregateInputs, prepared: Prepared, rows: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
    """Key -> (n,) seconds since its newest event before each row, NaN where there was none."""
    keys = {" ".join(g.key): AggregateConfig(kind="recency", key=g.key) for g in inputs.plan.groups}
    plan = compiled(keys, priors={}, lateness_s=0.0, offset_s=inputs.config.utc_offset_s, gap_s=inputs.gap_s)
    asof = AsOf(plan, prepared.log, inputs.columns, prepared.told, offset_s=inputs.config.utc_offset_s)
    ages = (prepared.roads(asof) or AsOf.values)(asof, asof.at_rows(rows), plan.groups)
    return {keys[name].key: age for name, age in ages.items()}


def _bytes(inputs: AggregateInputs, prepared: Prepared, rows: np.ndarray) -> dict[tuple[str, ...], tuple[int, float]]:
    """Key -> (how many, mean bytes of a packed state with everything that is counted by it)."""
    stream = replayed(inputs, prepared.log.where(rows), prepared.told[rows], prepared.log.users)
    sizes: dict[int, list[int]] = defaultdict(list)
    for states in (*stream.of_user.values(), stream.of_items):
        for (number, _), state in states.items():
            sizes[number].append(len(pack(inputs.plan.groups[number], state)))
    return {inputs.plan.groups[n].key: (len(s), float(np.mean(s))) for n, s in sizes.items()}


def _ago(seconds: float) -> str:
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
