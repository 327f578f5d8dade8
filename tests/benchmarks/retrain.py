"""How long new events take to a promoted version: `python -m tests.benchmarks.retrain [--json] [--quick] [--live 0.1,0.2,0.3]`.

ML-100k up to a time is the log of a first version; what came later comes in live, as Parquet of the event log. Measured is
`rayfunnel retrain` from the last event's file to the promoted version, going on from the serving version's weights and fitting
anew, with what the shipped gate said and which version is production afterwards. `--live`: shares of the log that come in live, each
with a first version of its own; few new events are few users to judge by. --quick: fewer epochs of the first version, the first
share alone, and no fit anew.
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
from cluster.retrain import retrain
from cluster.steps import recipe
from recsys import packing
from recsys.config import Config, load
from recsys.errors import RetrainRefusedError
from tests.live_events import Told, archive

CONFIGS = Path(__file__).parents[2] / "configs"
LIVE = (0.1, 0.2, 0.3)
"""Shares of the log that come in live."""


def first_version(scratch: Path, live: float, *, quick: bool) -> Config:
    """The configuration of a recommender that was trained on what came first and whose events folder holds the rest."""
    plain = load([CONFIGS / "movielens.yaml"], [f"workdir={scratch}"])
    if plain.fetch is not None and plain.fetched is not None:
        fetch(plain.fetch, plain.fetched)
    folder = Path(str(plain.fetched))
    log = pd.read_csv(folder / "ml-100k.inter", sep="\t")
    names = [column.split(":")[0] for column in log.columns]
    order = log.iloc[:, names.index("timestamp")].argsort(kind="stable")
    log = log.iloc[order]
    cut = int(len(log) * (1 - live))
    log.iloc[:cut].to_csv(folder / "first.inter", sep="\t", index=False)
    settings = [f"workdir={scratch}", f"data.interactions.path={folder / 'first.inter'}", "split.by=time", "evaluate.on_ray=false"]
    settings += ["two_tower.training.epochs=3", "fine_rank.training.epochs=2"] if quick else []
    config = load([CONFIGS / "movielens.yaml"], settings)
    later = [Told(str(u), str(i), float(t), "rating", float(v)) for u, i, v, t in log.iloc[cut:, :4].itertuples(index=False)]
    archive(Path(config.place("events")), later, partitions=4)
    return config


def measured(live: float, *, quick: bool, console: Console) -> dict[str, Any]:
    """Seconds and the gate's figures of both roads, where the share `live` of the log came in live."""
    scratch = Path(tempfile.mkdtemp(prefix="rayfunnel-retrain-"))
    try:
        config = first_version(scratch, live, quick=quick)
        began = time.perf_counter()
        steps, _ = recipe(config, console, in_process=lambda _: True)
        registry = open_registry(config.place("registry"))
        final = steps.final()
        first = registry.publish(lambda folder: packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker))
        out: dict[str, Any] = {"live": live, "first_fit_s": time.perf_counter() - began}
        for name, anew in (("warm", False), *(() if quick else (("anew", True),))):
            registry.promote(first)  # each road goes on from it, with the same events
            out[name] = _road(config, console, anew=anew)
            now = registry.aliases()["production"]
            out[name]["production"] = "the new version" if now != first else "the first version"
            if now != first:
                registry.promote(first)
                shutil.rmtree(registry.bundles / now)
        return out
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _road(config: Config, console: Console, *, anew: bool) -> dict[str, Any]:
    """A refusal is a figure too: how long it took, and what the gate held against the version."""
    begun = time.perf_counter()
    try:
        done = retrain(config, console, anew=anew)
    except RetrainRefusedError as refused:
        return {"seconds": time.perf_counter() - begun, "passed": False, "why": str(refused)}
    assert done.verdict is not None
    return {"seconds": done.seconds, "new_events": done.new_events, "warm": done.warm, **done.verdict._asdict()}


def main() -> None:
    """The command."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--live", type=lambda given: tuple(map(float, given.split(","))), default=LIVE)
    asked = arguments.parse_args()
    console = Console(quiet=asked.json)
    found = [measured(live, quick=asked.quick, console=console) for live in (asked.live[:1] if asked.quick else asked.live)]
    if asked.json:
        print(json.dumps({"runs": found}))
        return
    table = Table("live", "road", "seconds", "new", "serving", "error", "users", "passed", "production")
    for run in found:
        for road in ("warm", "anew"):
            if road in run:
                f = run[road]
                figures = (f"{f[k]:.4f}" if k in f else "" for k in ("seconds", "new", "serving", "error"))
                table.add_row(
                    str(run["live"]),
                    road,
                    *figures,
                    str(f.get("users", "")),
                    str(f["passed"]) if f["passed"] else f["why"],
                    f["production"],
                )
    console.print(table)


if __name__ == "__main__":
    main()
