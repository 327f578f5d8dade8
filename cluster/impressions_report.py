"""What is made of logged impressions: labelled examples, and the check of their feature values against the log."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from cluster.registry_url import open_registry
from cluster.steps import fetch
from cluster.taken import NOTHING, taken_in
from recsys import impressions
from recsys.config import Config
from recsys.core import canonical_id
from recsys.data import live_log
from recsys.data.events import load
from recsys.errors import BundleError, DataError
from recsys.features.generate import told
from recsys.funnel import Funnel
from recsys.skew import Came, Report, compared


def join(config: Config, console: Console, *, output: Path, folder: str | None, events: str | None, window_h: float) -> int:
    """Write the labelled examples of all logged pages; returns how many. The file is whole or not there."""
    shown = impressions.read(folder or f"{config.root}/impressions")
    came_in = live_log.read(events or config.place("events"))
    examples, account = impressions.joined(shown, came_in, window_s=window_h * 3_600, refusals=config.data.refusals)
    unfinished = output.with_name(f".unfinished-{output.name}")
    try:
        pq.write_table(examples, unfinished)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    table = Table("", "", title=str(output), title_justify="left", header_style="bold")
    for what, n in account.items():
        table.add_row(what, f"{n:,}")
    console.print(table)
    return len(examples)


def skew(config: Config, console: Console, *, folder: str | None, events: str | None) -> bool:
    """Print the report by feature; returns whether all agrees. DataError where no logged page holds values to compare."""
    report = recomputed(config, console, folder=folder, events=events)
    if not any(found.compared for found in report.features.values()):
        raise DataError(
            f"None of {report.pages + report.without:,} logged pages holds a feature value that could be computed once more, so nothing is "
            "known of skew. Declare features.aggregates, serve a version trained with them, and log pages (serve.impressions.sample)."
        )
    return report.mismatches == 0


def recomputed(config: Config, console: Console, *, folder: str | None, events: str | None) -> Report:
    """Every logged value once more from the log, printed by feature."""
    shown = impressions.read(folder or f"{config.root}/impressions")
    fetch(config, console)
    # A version that was trained on the log alone has pages from before the first event came in.
    came_in = live_log.read(events or config.place("events"))
    with tempfile.TemporaryDirectory() as frozen:  # more may come in meanwhile, and they may lie in an object store
        pq.write_table(came_in, f"{frozen}/live.parquet")
        rows = config.data.interactions.model_copy(update={"live": f"{frozen}/live.parquet"})
        log = load(config.data.model_copy(update={"interactions": rows}), config.base).interactions
    came = Came(log, told(log, config.history), *live_log.arrivals(log, came_in))
    registry, report = open_registry(config.place("registry")), Report()
    for version in sorted({canonical_id(v) for v in shown["model_version"].to_pylist()}):
        try:
            bundle = registry.local_copy(version, contents=False)
        except BundleError:
            console.print(f"{version} is not in the registry any more; its pages are left out")
            continue
        taken = taken_in(bundle) or NOTHING  # of a file's positions none is the log's, and the other way round
        trained = taken.positions if taken.own == (events is None) else {}
        compared(shown, Funnel.load(bundle, stages=("fine_rank",)), came, report, trained=trained)
    table = Table("feature", "compared", "mismatches", "largest", "for example", header_style="bold")
    for name, found in sorted(report.features.items(), key=lambda e: -e[1].mismatches):
        table.add_row(name, f"{found.compared:,}", f"{found.mismatches:,}", f"{found.largest:.2g}", found.example)
    console.print(table)
    console.print(f"{report.pages:,} pages compared, {report.without:,} without values: {report.mismatches:,} mismatches")
    if missing := len(came_in) - int((came.partition >= 0).sum()):
        console.print(f"{missing:,} of {len(came_in):,} live events are no rows of the log: its cleaning left them out, counters did not")
    if report.mixed:
        console.print(
            f"{report.mixed:,} pages were ranked by item counters of several instants, or not of all partitions; their item side is left out"
        )
    return report
