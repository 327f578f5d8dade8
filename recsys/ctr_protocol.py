"""Protocol ctr: the log's own rows with a label each, and rankers on equal fields, the configured one beside logistic regression.

History and features of a row are what was known just before it; nothing of the funnel is involved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression

from recsys import examples
from recsys.config import Config
from recsys.data.interactions import POSITIVE
from recsys.errors import ConfigError, DataError
from recsys.evaluate import bins
from recsys.export import RankerEngine
from recsys.features.schema import Field
from recsys.memory import PeakMemory
from recsys.metrics import at_threshold, auc, calibration, calibration_error, gauc, logloss, mae, rmse
from recsys.models.ctr import LogisticRegressionConfig
from recsys.prepared import Prepared
from recsys.recipe import Trainer
from recsys.report import Report, Row
from recsys.significance import pseudo_values
from recsys.training import ModelConfig

ITEM_PRIOR = "item_prior"
PRIOR_ROWS = 20.0
"""Rows of the mean rate that an item's rate starts from."""
CHUNK = 4_096
CONVERGED = {"epochs": 60, "learning_rate": 0.1, "embedding_learning_rate": 0.1, "optimizer": "adagrad", "patience": 3}
"""Logistic regression is convex and needs to be trained until it has converged, or the comparison flatters the others."""


def judge_ctr(config: Config, prepared: Prepared, folder: Path, train: Trainer, *, models: Sequence[str] | None = None) -> dict[str, Any]:
    """AUC, gAUC, log loss, calibration, precision, recall and F1 at a threshold on the test rows, as `Report.as_json` gives
    rows; RMSE and MAE of ratings where the log has them.

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
    asked = {name: np.flatnonzero(getattr(prepared.split, name)) for name in ("valid", "test")}
    rows = []
    for name in wanted:
        with PeakMemory() as memory:
            start = time.perf_counter()
            if name == ITEM_PRIOR:
                score: Callable[[np.ndarray], np.ndarray] = partial(_item_prior, prepared)
            else:
                training = config.fine_rank.training
                training = training.model_copy(update=CONVERGED) if name == "lr" else training
                trained = train(folder, known[name], training, name=f"ctr_{name}")
                score = partial(predicted, RankerEngine.load(trained, prepared.item_columns), prepared, config)
            fitted = time.perf_counter() - start
        scores = {part: score(at) for part, at in asked.items()}
        took = {"fit": fitted, "predict": time.perf_counter() - start - fitted}
        rows.append(_row(name, prepared, asked, scores, config.evaluate.threshold))
        rows[-1].seconds, rows[-1].mib = took, {"fit": memory.mib}
    return _report(prepared, asked["test"], rows).as_json() | {"test_rows": len(asked["test"]), "threshold": config.evaluate.threshold}


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
    return prepared.ranked_fields(config.fine_rank.features)


def predicted(engine: RankerEngine, prepared: Prepared, config: Config, test: np.ndarray) -> np.ndarray:
    """(n,) probabilities of the rows at log positions `test`, through the engine that serves."""
    moments, live, out = prepared.moments(config), prepared.live, []
    for start in range(0, len(test), CHUNK):
        at = test[start : start + CHUNK]
        queries, items = moments.queries(at), prepared.log.item[at][:, None]
        fields = prepared.space.encode_queries(queries, prepared.user_columns)
        pairs: dict[str, np.ndarray] = {}
        if live is not None:
            fields, pairs = fields | live.query_fields(queries), live.pair_fields(queries, items)
        out.append(1 / (1 + np.exp(-engine.score(fields, items, pairs)[:, 0])))
    return np.concatenate(out)


def _item_prior(prepared: Prepared, test: np.ndarray) -> np.ndarray:
    """(n,) the training part's smoothed positive rate of each row's item."""
    log, train = prepared.log, prepared.split.train
    label, item = log.labels[POSITIVE][train], log.item[train]
    shown, taken = np.bincount(item, minlength=log.n_items), np.bincount(item, label, minlength=log.n_items)
    prior: np.ndarray = ((taken + PRIOR_ROWS * label.mean()) / (shown + PRIOR_ROWS))[log.item[test]]
    return prior


def _row(name: str, prepared: Prepared, asked: dict[str, np.ndarray], scores: dict[str, np.ndarray], threshold: float) -> Row:
    log, test, p = prepared.log, asked["test"], scores["test"]
    label, user = log.labels[POSITIVE][test], log.user[test]
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "auc": lambda m: auc(label[m], p[m]),
        "gauc": lambda m: gauc(label[m], p[m], user[m]),
        "logloss": lambda m: logloss(label[m], p[m]),
        "calibration": lambda m: calibration(label[m], p[m]),
        "calibration_error": lambda m: calibration_error(label[m], p[m]),
    }
    for measure in ("precision", "recall", "f1"):
        measures[f"{measure}@p{threshold:g}"] = lambda m, measure=measure: at_threshold(label[m], p[m], threshold)[measure]  # type: ignore[misc]
    if (rating := _ratings(prepared, asked, scores)) is not None:
        truth = log.value[test]
        measures["rmse"] = lambda m: rmse(truth[m], rating[m])
        measures["mae"] = lambda m: mae(truth[m], rating[m])
    everybody = np.ones(len(test), bool)
    row = Row(name, {n: pseudo_values(f, user) for n, f in measures.items()}, {n: f(everybody) for n, f in measures.items()})
    row.kind = "baseline" if name in (ITEM_PRIOR, "lr") else "ranker"
    history, _ = _bins_of(prepared, test)[0]
    shown, _ = _bins_of(prepared, test)[1]
    row.by_history = [auc(label[history == b], p[history == b]) for b in range(int(history.max(initial=-1)) + 1)]
    row.by_popularity = [auc(label[shown == b], p[shown == b]) for b in range(int(shown.max(initial=-1)) + 1)]
    return row


def _ratings(prepared: Prepared, asked: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> np.ndarray | None:
    """(n,) the rating that a probability stands for, where the log has ratings: isotonic regression of the validation part's
    ratings on its probabilities, so that every model is read on the one scale. None without ratings, or without validation."""
    value, valid, test = prepared.log.value, asked["valid"], asked["test"]
    if not len(valid) or not np.isfinite(value[valid]).all() or not np.isfinite(value[test]).all() or len(np.unique(value[valid])) < 3:
        return None
    scale = IsotonicRegression(out_of_bounds="clip").fit(scores["valid"], value[valid])
    out: np.ndarray = scale.predict(scores["test"])
    return out


def _bins_of(
    prepared: Prepared, test: np.ndarray
) -> tuple[tuple[np.ndarray, list[dict[str, int]]], tuple[np.ndarray, list[dict[str, int]]]]:
    """Bins of the test rows by training rows of their user, and of their item."""
    log, train = prepared.log, prepared.split.train
    rows_of_user, rows_of_item = np.bincount(log.user[train], minlength=log.n_users), np.bincount(log.item[train], minlength=log.n_items)
    return bins(rows_of_user[log.user[test]], "rows"), bins(rows_of_item[log.item[test]], "rows")


def _report(prepared: Prepared, test: np.ndarray, rows: list[Row]) -> Report:
    log, train = prepared.log, prepared.split.train
    users = np.unique(log.user[test])
    by_user, by_item = _bins_of(prepared, test)
    warm = np.bincount(log.user[train], minlength=log.n_users)[users] > 0
    found = Report("ctr", rows, len(users), warm, log.n_items, history_bins=by_user[1], popularity_bins=by_item[1])
    found.account = [*prepared.account, *((f"{n} rows", int(getattr(prepared.split, n).sum())) for n in ("train", "valid", "test"))]
    found.warm_rows = False
    return found
