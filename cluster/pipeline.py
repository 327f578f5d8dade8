"""The offline commands: train, publish, recommend (evaluation.py, search.py and retrain.py have theirs)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import evaluation, report_table
from cluster.registry import Registry
from cluster.registry_url import open_registry
from cluster.steps import recipe
from cluster.workdir import state, state_key
from recsys import packing
from recsys.bundle import read_manifest
from recsys.config import Config
from recsys.core import canonical_id
from recsys.errors import BundleError, RequestError
from recsys.funnel import Funnel, FunnelRequest
from recsys.recall.cold_start import rung_of
from recsys.recipe import Recipe
from recsys.report import Report

log = logging.getLogger(__name__)


def train(config: Config, console: Console) -> str:
    """Fit everything, judge it on the test, refit on the whole log, publish; promote where nothing is in production.

    Returns the version. A configuration that was published already, on the same data, is not trained again.
    """
    registry = open_registry(config.place("registry"))
    steps, key = recipe(config, console)
    mark = state(config, "runs", key) / "published.json"
    key_of_page = state_key(config.rerank.model_dump(mode="json"))
    known: dict[str, str] = json.loads(mark.read_text()) if mark.exists() else {}
    if (version := known.get(key_of_page)) in registry.versions():
        console.print(f"{version} is this configuration on this data: nothing to train")
        _promote_first(registry, str(version), console)
        return str(version)
    report = _judge(config, steps, console)
    for table in report_table.tables(report.as_json()):
        console.print(table)
    version = _publish(config, steps, registry, report, console)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(known | {key_of_page: version}))
    _promote_first(registry, version, console)
    return version


def publish(config: Config, console: Console) -> str:
    """Publish what `train` has fitted for this configuration (fitting what is missing), without promoting it."""
    registry = open_registry(config.place("registry"))
    steps, _ = recipe(config, console)
    return _publish(config, steps, registry, _judge(config, steps, console), console)


def _publish(config: Config, steps: Recipe, registry: Registry, report: Report, console: Console) -> str:
    final = steps.final()
    rows = {row.model: row.metrics() for row in report.rows}
    shown = rows.get("funnel", rows.get("coarse", {}))
    metrics = {k: v for k, v in shown.items() if np.isfinite(v)} | {"protocol": report.protocol, "users": report.users}
    with console.status("writing the bundle"):
        version: str = registry.publish(
            lambda folder: packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker),
            metrics=metrics,
        )
    console.print(f"published [bold]{version}[/] to {config.place('registry')}")
    return version


def _promote_first(registry: Registry, version: str, console: Console) -> None:
    if registry.promote_first(version):
        console.print(f"[bold]{version}[/] is production (there was none)")


# ---- judging ----------------------------------------------------------------------------------------------------------


def _judge(config: Config, steps: Recipe, console: Console) -> Report:
    """The report that a version is published with."""
    protocol = evaluation.protocol_for(config, steps.prepared, None)
    return evaluation.judge(config, steps, evaluation.held_out_of(config, steps, protocol), console, protocol=protocol)


# ---- answers without a service ----------------------------------------------------------------------------------------


def recommend(
    config: Config, users: Sequence[str], console: Console, *, k: int = 10, version: str = "production", only: str | None = None
) -> None:
    """Print the page of each user from a published version, through the pure funnel, by the configuration's rules.

    `only`: what items must hold, a JSON object as `filter` of POST /v1/recommend. RequestError for what it cannot be.
    """
    folder = open_registry(config.place("registry")).local_copy(version)
    funnel = Funnel.load(folder)
    if faults := packing.differences(funnel, folder):
        raise BundleError(
            f"{read_manifest(folder).version} does not answer as it did when it was published: {faults[0]}. Promote another version."
        )
    for sentence in funnel.rule(config.rules, config.rerank):  # as the service does
        log.warning("%s", sentence)
    wanted = funnel.filters.parse(_asked(only)) if only is not None else None
    queries = funnel.queries([FunnelRequest(user_id=canonical_id(u), k=k, at=time.time(), filter=wanted) for u in users])
    candidates = funnel.recommend(queries)
    for b, (user, items) in enumerate(zip(users, funnel.page(queries, candidates), strict=True)):
        new = "" if (rung := rung_of(candidates, b)) is None else f" · new user, led by {rung}"
        # A table's own title is broken where the table is narrow.
        console.print(f"user {user} · {funnel.version}{new}", markup=False, highlight=False, soft_wrap=True)
        table = Table("", "item", "title", "score", "recalled by", header_style="bold")
        for n, item in enumerate(items, 1):
            table.add_row(str(n), item.item_id, item.title or "", f"{item.score:.4f}", ", ".join(item.sources))
        console.print(table)


def _asked(only: str) -> dict[str, Any]:
    try:
        given = json.loads(only)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        example = '{"genres": ["Comedy"], "price": {"max": 20}}'
        raise RequestError(
            "wrong_type", f"'filter' is '{only[:64]}', expected a JSON object by item column, such as {example}.", field="filter"
        )
    return given
