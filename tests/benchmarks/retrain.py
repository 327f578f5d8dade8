"""How long new events take to a promoted version: `python -m tests.benchmarks.retrain [--json] [--quick]`.

ML-100k up to a time is the log of a first version; what came later comes in live, as Parquet of the event log. Measured is
`rayfunnel retrain` from the last event's file to the promoted version, going on from the serving version's weights and fitting
anew, with what the gate said. --quick: fewer epochs of the first version, and no fit anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from cluster.fetch import fetch
from cluster.registry_url import open_registry
from cluster.retrain import Retrained, retrain
from cluster.steps import recipe
from recsys import packing
from recsys.config import Config, load
from recsys.errors import RetrainRefusedError
from tests.live_events import Told, archive

CONFIGS = Path(__file__).parents[2] / "configs"
LIVE = 0.1
"""Share of the log that comes in live."""


def first_version(scratch: Path, *, quick: bool) -> Config:
    """The configuration of a recommender that was trained on what came first and whose events folder holds the rest."""
    plain = load([CONFIGS / "movielens.yaml"], [f"workdir={scratch}"])
    if plain.fetch is not None and plain.fetched is not None:
        fetch(plain.fetch, plain.fetched)
    folder = Path(str(plain.fetched))
    log = pd.read_csv(folder / "ml-100k.inter", sep="\t")
    names = [column.split(":")[0] for column in log.columns]
    order = log.iloc[:, names.index("timestamp")].argsort(kind="stable")
    log = log.iloc[order]
    cut = int(len(log) * (1 - LIVE))
    log.iloc[:cut].to_csv(folder / "first.inter", sep="\t", index=False)
    settings = [f"workdir={scratch}", f"data.interactions.path={folder / 'first.inter'}", "split.by=time", "evaluate.on_ray=false"]
    settings += ["two_tower.training.epochs=3", "fine_rank.training.epochs=2"] if quick else []
    config = load([CONFIGS / "movielens.yaml"], settings)
    later = [Told(str(u), str(i), float(t), "rating", float(v)) for u, i, v, t in log.iloc[cut:, :4].itertuples(index=False)]
    archive(Path(config.place("events")), later, partitions=4)
    return config


def measured(*, quick: bool, console: Console) -> dict[str, Any]:
    """Seconds and the gate's figures of both roads."""
    scratch = Path(tempfile.mkdtemp(prefix="rayfunnel-retrain-"))
    try:
        config = first_version(scratch, quick=quick)
        began = time.perf_counter()
        steps, _ = recipe(config, console, in_process=lambda _: True)
        registry = open_registry(config.place("registry"))
        final = steps.final()
        first = registry.publish(lambda folder: packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker))
        registry.promote(first)
        out: dict[str, Any] = {"first_fit_s": time.perf_counter() - began}
        for name, anew in (("warm", False), *(() if quick else (("anew", True),))):
            begun = time.perf_counter()
            try:
                done = retrain(config, console, since=first, promote=False, anew=anew)
            except RetrainRefusedError as refused:  # a figure too: what was tried, how long it took, and what the gate held against it
                out[name] = {"seconds": time.perf_counter() - begun, "passed": False, "why": str(refused)}
                continue
            out[name] = _figures(done)
            shutil.rmtree(registry.bundles / str(done.version))  # the next road takes the same events
        return out
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _figures(done: Retrained) -> dict[str, Any]:
    verdict = done.verdict
    assert verdict is not None
    return {"seconds": done.seconds, "new_events": done.new_events, "warm": done.warm, **verdict._asdict()}


def main() -> None:
    """The command."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true")
    asked = arguments.parse_args()
    console = Console(quiet=asked.json)
    found = measured(quick=asked.quick, console=console)
    if asked.json:
        print(json.dumps(found))
        return
    table = Table("road", "seconds", "new", "serving", "error", "users", "passed")
    for road in ("warm", "anew"):
        if road in found:
            f = found[road]
            figures = (f"{f[k]:.4f}" if k in f else "" for k in ("seconds", "new", "serving", "error"))
            table.add_row(road, *figures, str(f.get("users", "")), str(f["passed"]) if f["passed"] else f["why"])
    console.print(table)


if __name__ == "__main__":
    main()
