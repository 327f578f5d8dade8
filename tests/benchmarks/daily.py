"""KuaiRand day by day: `python -m tests.benchmarks.daily [--json] [--quick] [--set path=value]`.

A ranker is fitted on the first days of the log and then judged on every day that follows, each with the same rows for two
arms: `frozen` is never trained again; `daily` goes on from the evening before with that day's rows, as `rayfunnel retrain`
does with the ranker (tables grown by new ids, the old scales kept, `retrain.epochs` at a share of the learning rates). Neither knows anything of the day that it is judged
on: weights, vocabularies, scales and priors are of earlier days, and counters are as of the instant of each row. A user's own
rates are of earlier days, because within a day they would order that user's rows backwards (who clicked early has fewer
clicks left).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cluster.fetch import find_kuairand
from recsys import examples
from recsys.batches import Examples, save_start
from recsys.config import Config, load
from recsys.ctr_protocol import predicted
from recsys.data.interactions import POSITIVE
from recsys.data.split import SplitConfig
from recsys.export import RankerEngine, save_model
from recsys.growing import difference, grown
from recsys.metrics import auc, gauc, logloss
from recsys.prepared import Prepared, prepare
from recsys.training import TrainingConfig, describe, train_locally

CONFIGS = Path(__file__).parents[2] / "configs"
DAYS = (20220425, 20220426, 20220427, 20220428, 20220429, 20220430, 20220501, 20220502, 20220503, 20220504, 20220505, 20220506)


class Ranker(NamedTuple):
    """A fitted model and what it was fitted with."""

    folder: Path
    prepared: Prepared


def known_before(config: Config, day: int, like: Path | None) -> Prepared:
    """The log whose part train is every row before a day."""
    return prepare(config, SplitConfig(by="time", column="date", valid_from=day - 0.5, test_from=day), like)


def fitted(config: Config, prepared: Prepared, folder: Path, parts: dict[str, np.ndarray], before: Ranker | None) -> Ranker:
    """A ranker of the rows at log positions parts["train"], early-stopped on parts["valid"]; `before`: going on from there."""
    moments, fields, model = prepared.moments(config), prepared.ranked_fields(config.fine_rank.features), config.fine_rank.model
    columns = {part: examples.impression_examples(prepared, moments, at, POSITIVE) for part, at in parts.items()}
    training = config.fine_rank.training
    examples.write(
        folder / "examples", task="ranker", fields=fields, labels=("label",), granule=training.granule, seed=config.seed, **columns
    )
    if before is not None:
        if reason := difference(before.folder, fields, model):
            raise RuntimeError(reason)
        weights = grown(before.folder, before.prepared.space.tables, prepared.space.tables, fields)
        assert not isinstance(weights, str), weights
        save_start(folder / "examples", weights)
        training = gentle(config)
    opened = Examples(folder / "examples")
    trained, told = train_locally(opened, model, training)
    save_model(folder / "model", trained.state_dict(), describe(model, opened, told))
    prepared.space.save(folder / "features")
    if prepared.aggregates is not None:
        prepared.aggregates.save(folder / "aggregates")
    return Ranker(folder / "model", prepared)


def gentle(config: Config) -> TrainingConfig:
    """How `retrain` goes on: few epochs at a share of the learning rates."""
    how, training = config.retrain, config.fine_rank.training
    tables = training.embedding_learning_rate
    rates = {
        "learning_rate": how.learning_rate * training.learning_rate,
        "embedding_learning_rate": None if tables is None else how.learning_rate * tables,
    }
    return training.model_copy(update=rates | {"epochs": min(how.epochs, training.epochs), "patience": 0})


def judged(config: Config, ranker: Ranker, day: int) -> dict[str, float]:
    """On the rows of a day, each with what was known just before it."""
    p = ranker.prepared
    at = np.flatnonzero(p.log.context["date"] == day)
    said = predicted(RankerEngine.load(ranker.folder, p.item_columns), p, config, at)
    label, user = p.log.labels[POSITIVE][at], p.log.user[at]
    return {"auc": float(auc(label, said)), "gauc": float(gauc(label, said, user)), "logloss": float(logloss(label, said))}


def measured(config: Config, scratch: Path, days: tuple[int, ...], window: int) -> list[dict[str, Any]]:
    """A row per judged day: the figures of both arms, rows, and seconds of the daily training.

    The first window is the first `window` of the days, the last of them for early stopping.
    """
    last = days[window - 1]
    first = prepare(config, SplitConfig(by="time", column="date", valid_from=last, test_from=days[window]))
    parts = {part: np.flatnonzero(getattr(first.split, part)) for part in ("train", "valid")}
    frozen = daily = fitted(config, first, scratch / "frozen", parts, None)
    out: list[dict[str, Any]] = []
    for yesterday, day in zip(days[window - 1 :], days[window:], strict=False):
        start = time.perf_counter()
        prepared = known_before(config, day, daily.folder.parent / "features")
        dates = prepared.log.context["date"]
        # By date, and no row among them that is later than one of the day.
        new = np.flatnonzero(prepared.split.train & (dates == yesterday))
        # No epoch is chosen by a metric: the part valid is there for the file's shape alone, and is of rows learnt from.
        daily = fitted(config, prepared, scratch / str(day), {"train": new, "valid": new[-1_000:]}, daily)
        seconds = time.perf_counter() - start
        out.append(
            {
                "day": day,
                "rows": int((dates == day).sum()),
                "new_rows": len(new),
                "frozen": judged(config, frozen, day),
                "daily": judged(config, daily, day),
                "retrain_s": round(seconds, 1),
            }
        )
        logging.info("%s", out[-1])
    return out


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="two days, one epoch")
    parser.add_argument("--window", type=int, default=7, help="days of the first window; its last one is for early stopping")
    parser.add_argument("--days", type=int, default=len(DAYS), help="days in all: settings are chosen on days before those reported")
    parser.add_argument("--set", action="append", default=[], help="dotted.path=value over configs/kuairand_live.yaml")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    find_kuairand()
    scratch = Path(tempfile.mkdtemp(prefix="rayfunnel-daily-"))
    try:
        quick = ["fine_rank.training.epochs=1"] if args.quick else []
        config = load([CONFIGS / "kuairand_live.yaml"], [f"workdir={scratch}", *quick, *args.set])
        rows = measured(config, scratch, DAYS[: args.window + 2] if args.quick else DAYS[: args.days], args.window)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    n = np.array([row["rows"] for row in rows])
    mean = {
        arm: {m: float(np.average([row[arm][m] for row in rows], weights=n)) for m in ("auc", "gauc", "logloss")}
        for arm in ("frozen", "daily")
    }
    table = Table("day", "rows", *(f"{arm} {m}" for m in ("auc", "gauc", "logloss") for arm in ("frozen", "daily")), "retrain s")
    for row in (*rows, {"day": "mean", "rows": int(n.sum()), "retrain_s": "", **mean}):
        values = [f"{row[arm][m]:.4f}" for m in ("auc", "gauc", "logloss") for arm in ("frozen", "daily")]
        table.add_row(str(row["day"]), f"{row['rows']:,}", *values, str(row["retrain_s"]))
    Console().print(table)
    if args.json:
        print(json.dumps({"days": rows, **{f"{arm}_{m}": mean[arm][m] for arm in mean for m in mean[arm]}}))


if __name__ == "__main__":
    main()
