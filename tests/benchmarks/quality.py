"""Quality of every stage over seeds: `python -m tests.benchmarks.quality [--json] [--quick] [--seeds 3] [--sets movielens,kuairand]`.

ML-100k next_item and ctr, KuaiRand by time, ctr, and ctr with counters of past events: the shipped configurations, trained in this
process (which the tests hold equal to Ray), judged on held-out events over the full catalogue. KuaiRand is left out where its
folder is absent.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cluster.fetch import fetch, find_kuairand
from recsys.batches import Examples
from recsys.config import Config, load
from recsys.ctr_protocol import judge_ctr
from recsys.errors import DataError
from recsys.evaluate import evaluate_funnel
from recsys.export import save_model
from recsys.prepared import prepare
from recsys.recipe import Recipe
from recsys.training import ModelConfig, TrainingConfig, describe, train_locally

CONFIGS = Path(__file__).parents[2] / "configs"
SHOWN = ("ndcg@10", "recall@10", "hit@10", "mrr@10")
SETS = ("movielens", "movielens_ctr", "kuairand", "kuairand_ctr", "kuairand_live")


def run(name: str, seed: int, settings: list[str], scratch: Path) -> dict[str, dict[str, float]]:
    """Model -> metric -> value of one configuration and seed."""
    folder = scratch / f"{name}-{seed}"
    sections = ("two_tower.training", "fine_rank.training")
    seeds = [f"seed={seed}", f"split.seed={seed}", *(f"{s}.seed={seed}" for s in sections), f"workdir={folder}"]
    config = load([CONFIGS / f"{name}.yaml"], [*seeds, *settings])
    if config.fetch is not None and config.fetched is not None:
        fetch(config.fetch, config.fetched)

    def train(examples: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
        start, opened = time.perf_counter(), Examples(examples)
        trained, fitted = train_locally(opened, model, training)
        out = folder / "models" / name
        save_model(out, trained.state_dict(), describe(model, opened, fitted))
        logging.info(
            "%s: %.0f s, best epoch %d of %d, %s",
            name,
            time.perf_counter() - start,
            fitted.best_epoch + 1,
            len(fitted.epochs),
            fitted.metrics,
        )
        return out

    prepared = prepare(config)
    if name.endswith(("_ctr", "_live")):
        return {row["model"]: row["metrics"] for row in judge_ctr(config, prepared, folder / "ctr", train)["rows"]}
    return _funnel(config, Recipe(config, prepared, folder, train))


def _funnel(config: Config, steps: Recipe) -> dict[str, dict[str, float]]:
    log = steps.prepared.log
    counts = np.bincount(log.item, minlength=log.n_items)
    report = evaluate_funnel(steps.judged(), steps.held_out(), counts, protocol="held-out", ks=config.evaluate.ks)
    rows = {row.model: {k: v for k, v in row.metrics().items() if k in SHOWN} for row in report.rows}
    rows["kept"] = {f"after {stage}": share for stage, share in report.stage_recall.items()} | {"coarse-fine spearman": report.spearman}
    return rows


def mean_of_seeds(name: str, seeds: int, settings: list[str], scratch: Path) -> dict[str, Any]:
    """Model -> metric -> [mean, standard deviation] over seeds."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(1, seeds + 1):
        found = run(name, seed, settings, scratch)
        logging.info("%s, seed %d: %s", name, seed, {m: {k: round(v, 4) for k, v in of.items()} for m, of in found.items()})
        for model, metrics in found.items():
            for metric, value in metrics.items():
                values[model][metric].append(value)
    return {m: {k: [float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0] for k, v in of.items()} for m, of in values.items()}


def main() -> None:
    """Run, print a table a set, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--set", action="append", default=[], help="dotted.path=value over the configurations")
    parser.add_argument("--threads", type=int, default=1, help="of torch; on a busy machine more only wait for each other")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    console = Console()
    settings = args.set + (["two_tower.training.epochs=1", "fine_rank.training.epochs=1", "evaluate.max_users=300"] if args.quick else [])
    found: dict[str, Any] = {}
    scratch = Path(tempfile.mkdtemp(prefix="rayfunnel-quality-"))
    try:
        for name in args.sets.split(","):
            try:
                if name.startswith("kuairand"):
                    find_kuairand()
            except DataError as absent:
                console.print(f"{name} is left out: {absent}")
                continue
            found[name] = mean_of_seeds(name, 1 if args.quick else args.seeds, settings, scratch)
            console.print(_table(name, found[name]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.json:
        print(json.dumps(found))


def _table(name: str, rows: dict[str, Any]) -> Table:
    metrics = list(next(iter(rows.values())))
    table = Table("model", *metrics, title=name, title_justify="left")
    for model, values in rows.items():
        if model != "kept":
            table.add_row(model, *(f"{values[m][0]:.4f} ± {values[m][1]:.4f}" for m in metrics))
    table.caption = ", ".join(f"{what} {value[0]:.3f}" for what, value in rows.get("kept", {}).items())
    return table


if __name__ == "__main__":
    main()
