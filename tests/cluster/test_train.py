"""Training under Ray: what comes back, a worker killed mid-run, errors that no retry would mend, and names that are taken."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from cluster.train import run
from recsys.batches import Examples
from recsys.errors import TrainingError
from recsys.export import load_model
from recsys.models.ctr import DeepFMConfig
from recsys.models.two_tower import TwoTower, TwoTowerConfig
from recsys.training import Report, TrainingConfig, train_locally
from recsys.validation import validate
from recsys.workers import Alone
from tests import toy_examples as toy

pytestmark = pytest.mark.ray
TOWER = TwoTowerConfig(dim=8, user_hidden=(8,), item_hidden=(8,))
TWO = TrainingConfig(
    epochs=3,
    batch_size=128,
    granule=32,
    learning_rate=0.05,
    patience=0,
    workers=2,
    cpus_per_worker=0.5,
    sharding="row_wise",
    checkpoint_every_steps=3,
    report_every_steps=1,
)


def test_a_worker_killed_mid_run_changes_nothing(ray_cluster: str, tmp_path: Path):
    examples = toy.write(tmp_path / "examples", "two_tower", train=1024)
    killed: list[int] = []
    seen: list[Report] = []

    def kill_once(report: Report) -> None:
        seen.append(report)
        if not killed and report.epoch == 1 and report.step >= 4:
            killed.append(report.pid)
            os.kill(report.pid, signal.SIGKILL)

    trained = run(examples, TOWER, TWO, storage=str(tmp_path / "runs"), name="killed", progress=kill_once)
    _, undisturbed = train_locally(Examples(examples), TOWER, TWO)
    assert killed, "the run ended before it could be disturbed"
    assert len({r.pid for r in seen}) == 2, "a new worker went on"
    assert trained.best_epoch == undisturbed.best_epoch
    assert trained.metrics == pytest.approx(undisturbed.metrics, abs=1e-3)
    np.testing.assert_allclose([e["loss"] for e in trained.epochs], [e["loss"] for e in undisturbed.epochs], atol=1e-4)
    vectors = TwoTower.load(trained.folder).item_vectors(toy.item_columns())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_one_worker_reports_live_exports_the_best_epoch_and_a_second_call_takes_the_finished_run(ray_cluster: str, tmp_path: Path):
    examples = toy.write(tmp_path / "examples", "ranker")
    config = DeepFMConfig(dim=8, hidden=(32,), init_std=0.1)
    training = TrainingConfig(epochs=4, batch_size=32, granule=32, learning_rate=0.3, patience=0, report_every_steps=8)
    seen: list[Report] = []
    trained = run(examples, config, training, storage=str(tmp_path / "runs"), name="ranker", progress=seen.append)
    metrics = [e["auc"] for e in trained.epochs]
    assert trained.best_epoch == int(np.argmax(metrics)) < 3, "the run overfits, or this test shows nothing"
    model, opened = load_model(trained.folder), Examples(examples)
    assert validate(model, model, opened, Alone())["auc"] == pytest.approx(max(metrics), abs=1e-6)
    saved = json.loads((trained.folder / "model.json").read_text())
    assert (saved["best_epoch"], saved["model"]["type"], saved["task"]) == (trained.best_epoch, "deepfm", "ranker")
    assert [r.epoch for r in seen if r.metrics is not None] == [0, 1, 2, 3]
    assert sum(r.metrics is None for r in seen) == 16
    assert trained.notices == []

    again = run(examples, config, training, storage=str(tmp_path / "runs"), name="ranker", progress=lambda r: pytest.fail("trained twice"))
    assert again.epochs == trained.epochs
    with pytest.raises(TrainingError, match=r"started with another model\. Give this run another name"):
        run(examples, DeepFMConfig(dim=8, hidden=(4,)), training, storage=str(tmp_path / "runs"), name="ranker")


def test_nan_in_the_examples_ends_the_run_at_once_with_the_fields_name(ray_cluster: str, tmp_path: Path):
    price = np.zeros(1024, np.float32)
    price[500] = np.inf
    examples = toy.write(tmp_path / "examples", "ranker", changed={"price": price})
    training = TrainingConfig(epochs=1, batch_size=128, granule=32, max_failures=0)
    with pytest.raises(TrainingError, match=r"Field 'price' of train.parquet is NaN or infinite in 1 of"):
        run(examples, DeepFMConfig(dim=8), training, storage=str(tmp_path / "runs"), name="nan")


def test_a_batch_that_workers_cannot_share_is_refused_before_anything_starts(tmp_path: Path):
    examples = toy.write(tmp_path, "ranker", train=64)
    with pytest.raises(TrainingError, match="cannot share evenly"):
        run(examples, DeepFMConfig(), TWO.model_copy(update={"batch_size": 96}), storage=str(tmp_path), name="x")
