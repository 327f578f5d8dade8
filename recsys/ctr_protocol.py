"""Protocol ctr: the log's own rows with a label each, and rankers on equal fields, the configured one beside logistic regression.

History and features of a row are what was known just before it; nothing of the funnel is involved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from recsys.recipe import Trainer
from recsys.training import ModelConfig

ITEM_PRIOR = "item_prior"
PRIOR_ROWS = 20.0
"""Rows of the mean rate that an item's rate starts from."""
CHUNK = 4_096
CONVERGED = {"epochs": 60, "learning_rate": 0.1, "embedding_learning_rate": 0.1, "optimizer": "adagrad", "patience": 3}
"""Logistic regression is convex and needs to be trained until it has converged, or the comparison flatters the others."""


def judge_ctr(config: Config, prepared: Prepared, folder: Path, train: Trainer, *, models: Sequence[str] | None = None) -> dict[str, Any]:
    """AUC, gAUC, log loss and calibration on the test rows, as `Report.as_json` gives rows.

    Rows: item_prior (each item's smoothed rate), lr, and fine_rank.model; `models` names a part of them. Raises DataError
    where the test has one class only, ConfigError for a row that there is not.
    """
    label = prepared.log.labels[POSITIVE]
    if len(np.unique(label[prepared.split.test])) < 2:
        raise DataError(
            "Protocol ctr needs test rows with and without a positive label, and all are alike. Declare data.labels, and data.impressions: true."
        )
    known: dict[str, ModelConfig] = {"lr": LogisticRegressionConfig(), config.fine_rank.model.type: config.fine_rank.model}
    wanted = list(models or (ITEM_PRIOR, *known))
    if absent := [name for name in wanted if name not in known and name != ITEM_PRIOR]:
        raise ConfigError(
            f"Protocol ctr has no row '{absent[0]}'. Rows: {ITEM_PRIOR}, {', '.join(known)}; fine_rank.model.type names the last."
        )
    _write(config, prepared, folder)
    test = np.flatnonzero(prepared.split.test)
    rows = []
    for name in wanted:
        start = time.perf_counter()
        if name == ITEM_PRIOR:
            rows.append(_row(name, prepared, test, _item_prior(prepared, test), 0.0))
            continue
        training = config.fine_rank.training
        trained = train(folder, known[name], training.model_copy(update=CONVERGED) if name == "lr" else training, name=f"ctr_{name}")
        fitted = time.perf_counter() - start
        rows.append(_row(name, prepared, test, _scores(RankerEngine.load(trained, prepared.item_columns), prepared, config, test), fitted))
    return {"protocol": "ctr", "users": len(np.unique(prepared.log.user[test])), "test_rows": len(test), "rows": rows}


def _write(config: Config, prepared: Prepared, folder: Path) -> None:
    if examples.are_written(folder):
        return
    moments = prepared.moments(config)
    parts = {
        name: examples.impression_examples(prepared, moments, np.flatnonzero(getattr(prepared.split, name)), POSITIVE)
        for name in ("train", "valid")
    }
    examples.write(
        folder,
        task="ranker",
        fields=_fields(config, prepared),
        labels=("label",),
        train=parts["train"],
        valid=parts["valid"],
        granule=config.fine_rank.training.granule,
        seed=config.seed,
    )


def _fields(config: Config, prepared: Prepared) -> tuple[Field, ...]:
    named = config.fine_rank.features
    return prepared.space.fields if named is None else prepared.space.select([n for n in named if n != EVIDENCE])


def _scores(engine: RankerEngine, prepared: Prepared, config: Config, test: np.ndarray) -> np.ndarray:
    """(n,) probabilities of the rows at log positions `test`, through the engine that serves."""
    moments, out = prepared.moments(config), []
    for start in range(0, len(test), CHUNK):
        at = test[start : start + CHUNK]
        fields = prepared.space.encode_queries(moments.queries(at), prepared.user_columns)
        out.append(1 / (1 + np.exp(-engine.score(fields, prepared.log.item[at][:, None], {})[:, 0])))
    return np.concatenate(out)


def _item_prior(prepared: Prepared, test: np.ndarray) -> np.ndarray:
    """(n,) the training part's smoothed positive rate of each row's item."""
    log, train = prepared.log, prepared.split.train
    label, item = log.labels[POSITIVE][train], log.item[train]
    shown, taken = np.bincount(item, minlength=log.n_items), np.bincount(item, label, minlength=log.n_items)
    prior: np.ndarray = ((taken + PRIOR_ROWS * label.mean()) / (shown + PRIOR_ROWS))[log.item[test]]
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
