"""Protocol ctr: the log's own rows, a label each, and rankers on equal fields: the fine ranker beside logistic regression.

History and features of a row are what was known just before it; nothing of the funnel is involved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster import pipeline
from recsys import examples
from recsys.config import Config
from recsys.data.interactions import POSITIVE
from recsys.errors import ConfigError, DataError
from recsys.evidence import EVIDENCE
from recsys.export import RankerEngine
from recsys.features.schema import Field
from recsys.metrics import auc, calibration, gauc, logloss
from recsys.models.ctr import LogisticRegressionConfig
from recsys.prepared import Prepared
from recsys.training import ModelConfig

PRIOR = 20.0
"""Rows that an item's smoothed rate starts from."""


def evaluate_ctr(config: Config, console: Console, *, models: Sequence[str] | None = None) -> dict[str, Any]:
    """Rows item_prior, lr and the configured fine ranker, on the same test rows: AUC, gAUC, log loss, calibration."""
    prepared, key = pipeline.prepare(config, console, protocol="ctr")
    labels = prepared.log.labels[POSITIVE]
    if len(np.unique(labels[prepared.split.test])) < 2:
        raise DataError(
            "Protocol ctr needs rows with and without a positive label among the test rows. Declare data.labels and data.impressions: true."
        )
    configured = config.fine_rank.model
    known: dict[str, ModelConfig] = {"lr": LogisticRegressionConfig(), configured.type: configured}
    wanted = [name for name in (models or ("item_prior", *known)) if name != "item_prior"]
    if absent := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"Protocol ctr has no row '{absent[0]}'. Rows: item_prior, {', '.join(known)} (fine_rank.model.type names the last)."
        )
    fields = _fields(config, prepared)
    document = config.document()
    run = pipeline.state_key(key, document.get("fine_rank"), document.get("seed"))
    folder = pipeline.state(config, "examples", run) / "ctr"
    split = prepared.split
    if not examples.are_written(folder):
        with console.status(f"writing {len(labels):,} examples"):
            moments = prepared.moments(config)
            parts = {
                n: examples.impression_examples(prepared, moments, np.flatnonzero(getattr(split, n)), POSITIVE) for n in ("train", "valid")
            }
            examples.write(
                folder,
                task="ranker",
                fields=fields,
                labels=("label",),
                granule=config.fine_rank.training.granule,
                seed=config.seed,
                **parts,
            )
    test = np.flatnonzero(split.test)
    rows = [_row("item_prior", prepared, test, _item_prior(prepared, test), 0.0)] if models is None or "item_prior" in models else []
    for name in wanted:
        start = time.perf_counter()
        trained = pipeline.train_on_ray(
            console, str(pipeline.state(config, "runs", run)), folder, known[name], config.fine_rank.training, name=f"ctr_{name}"
        )
        fitted = time.perf_counter() - start
        scored = _scores(RankerEngine.load(trained, prepared.item_columns), prepared, config, test)
        rows.append(_row(name, prepared, test, scored, fitted))
    console.print(_table(rows, len(test)))
    return {"protocol": "ctr", "users": len(np.unique(prepared.log.user[test])), "rows": rows}


def _fields(config: Config, prepared: Prepared) -> tuple[Field, ...]:
    named = config.fine_rank.features
    return prepared.space.fields if named is None else prepared.space.select([n for n in named if n != EVIDENCE])


def _scores(engine: RankerEngine, prepared: Prepared, config: Config, test: np.ndarray) -> np.ndarray:
    """(n,) probabilities of the rows at log positions `test`, through the engine that serves."""
    moments, out = prepared.moments(config), []
    for start in range(0, len(test), 4096):
        at = test[start : start + 4096]
        queries = moments.queries(at)
        logits = engine.score(prepared.space.encode_queries(queries, prepared.user_columns), prepared.log.item[at][:, None], {})
        out.append(1 / (1 + np.exp(-logits[:, 0])))
    return np.concatenate(out)


def _item_prior(prepared: Prepared, test: np.ndarray) -> np.ndarray:
    """Each item's smoothed positive rate in the training part."""
    log, train = prepared.log, prepared.split.train
    label, item = log.labels[POSITIVE][train], log.item[train]
    shown, taken = np.bincount(item, minlength=log.n_items), np.bincount(item, label, minlength=log.n_items)
    prior: np.ndarray = ((taken + PRIOR * label.mean()) / (shown + PRIOR))[log.item[test]]
    return prior


def _row(name: str, prepared: Prepared, test: np.ndarray, scores: np.ndarray, seconds: float) -> dict[str, Any]:
    label, user = prepared.log.labels[POSITIVE][test], prepared.log.user[test]
    measured = {
        "auc": auc(label, scores),
        "gauc": gauc(label, scores, user),
        "logloss": logloss(label, scores),
        "calibration": calibration(label, scores),
    }
    return {"model": name, "metrics": measured, "seconds": {"fit": seconds}}


def _table(rows: Sequence[dict[str, Any]], n: int) -> Table:
    names = list(rows[0]["metrics"]) if rows else []
    table = Table("model", *names, "fit s", title=f"ctr: {n:,} test rows", title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(row["model"], *(f"{row['metrics'][m]:.4f}" for m in names), f"{row['seconds']['fit']:.0f}")
    return table
