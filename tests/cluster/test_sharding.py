"""Sharded training is one-process training: every sharding, 1 and 2 workers, checkpoints that move between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.batches import Examples
from recsys.errors import ConfigError, TrainingError
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.models.two_tower import TwoTowerConfig
from recsys.training import TrainingConfig, train_locally
from tests import toy_examples as toy
from tests.cluster.sharded_runs import Curve, run_group

BASE = TrainingConfig(epochs=2, batch_size=128, granule=32, learning_rate=0.05, patience=0, report_every_steps=1)
KINDS = ("planner", "table_wise", "column_wise", "row_wise", "data_parallel")
MODELS: dict[str, tuple[Any, str]] = {
    "two_tower": (TwoTowerConfig(dim=8, user_hidden=(8,), item_hidden=(8,), uniform_negatives=8), "two_tower"),
    "deepfm": (DeepFMConfig(dim=8, hidden=(8,), l2=1e-3, init_std=0.1), "ranker"),
    "attended": (DeepFMConfig(dim=8, hidden=(8,), init_std=0.1), "attended"),
    "lr": (LogisticRegressionConfig(), "ranker"),
    "numbers": (DeepFMConfig(dim=8, hidden=(8,)), "numbers"),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{m}-{k}": (m, {"sharding": k}) for m in ("two_tower", "deepfm", "attended") for k in KINDS
}
CASES |= {
    "deepfm-by-table": ("deepfm", {"sharding": "row_wise", "sharding_by_table": {"item_id": "column_wise", "hour": "data_parallel"}}),
    "deepfm-rowwise_adagrad": ("deepfm", {"sharding": "row_wise", "embedding_optimizer": "rowwise_adagrad"}),
    "deepfm-sgd": ("deepfm", {"sharding": "table_wise", "embedding_optimizer": "sgd"}),
    "deepfm-adam": ("deepfm", {"sharding": "table_wise", "optimizer": "adam", "embedding_learning_rate": 0.1}),
    "lr-row_wise": ("lr", {"sharding": "row_wise"}),
    "numbers-planner": ("numbers", {"sharding": "planner"}),
}


def examples_in(folder: Path) -> None:
    for task in ("two_tower", "ranker"):
        toy.write(folder / task, task, train=512, valid=101)
    toy.write(folder / "attended", "ranker", train=512, valid=101)
    schema = json.loads((folder / "attended" / "schema.json").read_text())
    for f in schema["fields"]:
        f["combiner"] = "none" if f["name"] == "history" else f["combiner"]
    (folder / "attended" / "schema.json").write_text(json.dumps(schema))
    toy.write(folder / "numbers", "ranker", train=512, valid=101)
    schema = json.loads((folder / "numbers" / "schema.json").read_text())
    schema["fields"] = [f for f in schema["fields"] if f["shape"] == "dense"]
    (folder / "numbers" / "schema.json").write_text(json.dumps(schema))


def sharded(folder: Path, case: str, *, snapshots: Any = None, **change: Any) -> dict[str, Any]:
    """One case in the present process group: {"losses", "metrics"}."""
    from cluster.sharding import ProcessGroupWorkers, Sharding
    from recsys.training import fit

    name, given = CASES[case]
    config, task = MODELS[name]
    training = BASE.model_copy(update=given | change)
    examples, curve = Examples(folder / task), Curve()
    sharding = Sharding(training)
    model = config.build(examples.fields, seed=training.seed, factory=sharding.tables)
    sharding.apply(model)
    keep = snapshots(sharding) if snapshots else _Nowhere()
    fitted = fit(
        model,
        examples,
        training,
        forward=sharding.wrapped,
        optimizers=sharding.optimizers,
        snapshots=keep,
        workers=ProcessGroupWorkers(),
        progress=curve,
    )
    return {"losses": curve.losses, "metrics": curve.metrics, "epochs": fitted.epochs}


class _Nowhere:
    def resume(self) -> None:
        return None

    def save(self, progress: Any, *, best: bool) -> None: ...

    def restore_best(self) -> None: ...


def two_workers(folder: Path) -> dict[str, Any]:
    return {case: sharded(folder, case) for case in CASES}


def one_worker(folder: Path) -> dict[str, Any]:
    return {case: sharded(folder, case) for case in ("two_tower-planner", "deepfm-data_parallel", "attended-row_wise", "deepfm-sgd")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    examples_in(folder)
    return folder


@pytest.fixture(scope="module")
def of_two(folder: Path) -> dict[str, Any]:
    return run_group(2, two_workers, folder)


@pytest.fixture(scope="module")
def of_one(folder: Path) -> dict[str, Any]:
    return run_group(1, one_worker, folder)


def local(folder: Path, case: str, **change: Any) -> Curve:
    """The same run on plain tables in this process."""
    name, given = CASES[case]
    config, task = MODELS[name]
    curve = Curve()
    train_locally(Examples(folder / task), config, BASE.model_copy(update=given | change), progress=curve)
    return curve


def agree(got: dict[str, Any], want: Curve) -> None:
    assert len(got["losses"]) == len(want.losses)
    np.testing.assert_allclose(got["losses"], want.losses, atol=1e-4)
    for a, b in zip(got["metrics"], want.metrics, strict=True):
        assert a == pytest.approx(b, abs=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_two_workers_follow_the_loss_curve_of_one_process_step_by_step(of_two: dict[str, Any], folder: Path, case: str):
    agree(of_two[case], local(folder, case))


@pytest.mark.parametrize("case", ["two_tower-planner", "deepfm-data_parallel", "attended-row_wise", "deepfm-sgd"])
def test_one_worker_on_the_fused_kernel_follows_it_too(of_one: dict[str, Any], folder: Path, case: str):
    agree(of_one[case], local(folder, case))


# ---- checkpoints ----------------------------------------------------------------------------------------------------------

SAVED = "deepfm-row_wise"


def _snapshots(folder: Path, notices: list[str]) -> Any:
    from cluster.checkpoint import Checkpoints, RunSnapshots

    return lambda sharding: RunSnapshots(Checkpoints(str(folder / "checkpoints")), sharding.state, {"seed": 0}, notices.append)


def two_workers_save(folder: Path) -> dict[str, Any]:
    from cluster.checkpoint import Checkpoints

    run = sharded(folder, SAVED, snapshots=_snapshots(folder, []), checkpoint_every_steps=3)
    return {"names": Checkpoints(str(folder / "checkpoints")).names(), **run}


def one_worker_goes_on(folder: Path) -> dict[str, Any]:
    """Resumes a copy of the two workers' checkpoints for a third epoch, sound and damaged."""
    import shutil

    results = {}
    for name in ("sound", "damaged"):
        copy = folder / name
        shutil.copytree(folder / "checkpoints", copy / "checkpoints")
        shutil.copytree(folder / "ranker", copy / "ranker")
        if name == "damaged":
            newest = max((copy / "checkpoints").iterdir())
            data = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        notices: list[str] = []
        results[name] = sharded(copy, SAVED, snapshots=_snapshots(copy, notices), epochs=3) | {"notices": notices}
    return results


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    return run_group(2, two_workers_save, folder)


@pytest.fixture(scope="module")
def resumed(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    return run_group(1, one_worker_goes_on, folder)


def test_the_newest_two_checkpoints_and_the_best_epochs_are_kept(saved: dict[str, Any]):
    best = int(np.argmax([m["auc"] for m in saved["metrics"]])) + 1
    names = saved["names"]
    assert names[0] == "00002.00000000"
    assert f"{best:05d}.00000000" in names
    assert len(names) <= 3


def test_a_checkpoint_of_two_row_wise_workers_goes_on_in_one_process_as_if_nothing_had_been(folder: Path, resumed: dict[str, Any]):
    want = local(folder, SAVED, epochs=3)
    assert resumed["sound"]["notices"] == []
    np.testing.assert_allclose(resumed["sound"]["losses"], want.losses[8:], atol=1e-4)
    np.testing.assert_allclose(
        [e["loss"] for e in resumed["sound"]["epochs"]], [np.mean(want.losses[i : i + 4]) for i in (0, 4, 8)], atol=1e-4
    )


def test_a_flipped_byte_is_noticed_said_and_the_checkpoint_before_it_taken(folder: Path, resumed: dict[str, Any]):
    (notice,) = resumed["damaged"]["notices"]
    assert "00002.00000000' is damaged" in notice
    assert "is not what was written. Going on from the one before it." in notice
    want = local(folder, SAVED, epochs=3)
    np.testing.assert_allclose(resumed["damaged"]["losses"][-4:], want.losses[-4:], atol=1e-4)
    assert len(resumed["damaged"]["losses"]) > 4, "what the damaged one held was trained again"


def test_a_checkpoint_loads_into_a_plain_model(folder: Path, saved: dict[str, Any]):
    from cluster.checkpoint import Checkpoints
    from recsys.validation import validate
    from recsys.workers import Alone

    examples, checkpoints = Examples(folder / "ranker"), Checkpoints(str(folder / "checkpoints"))
    model = MODELS["deepfm"][0].build(examples.fields)
    state = model.state_dict()
    checkpoints.load(checkpoints.names()[0], state)
    model.load_state_dict(state)
    found = validate(model.eval(), model, examples, Alone())
    assert found == pytest.approx({k: v for k, v in saved["epochs"][-1].items() if k in found}, abs=1e-5)


def test_when_every_checkpoint_is_damaged_the_run_stops_with_a_sentence(tmp_path: Path):
    from cluster.checkpoint import COMPLETE, Checkpoints

    (tmp_path / "00001.00000000").mkdir()
    (tmp_path / "00001.00000000" / COMPLETE).write_text("{")
    with pytest.raises(TrainingError, match=r"Every checkpoint in .* is damaged.*Remove the folder"):
        Checkpoints(str(tmp_path)).newest()


def test_a_run_of_another_model_under_the_same_name_is_refused():
    from cluster.checkpoint import check_same_run

    with pytest.raises(TrainingError, match=r"started with another examples, model\. Give this run another name"):
        check_same_run("/runs/x", {"examples": 1, "model": 2, "training": 3}, {"examples": 2, "model": 3, "training": 3})


def test_impossible_shardings_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed as dist

    from cluster.sharding import Sharding
    from recsys.models.layers import tables_of

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    tables = tables_of(toy.RANKER_FIELDS)
    column = BASE.model_copy(update={"sharding": "column_wise", "embedding_optimizer": "rowwise_adagrad"})
    with pytest.raises(ConfigError, match="column_wise tables cannot use rowwise_adagrad"):
        Sharding(column).tables(toy.RANKER_FIELDS, tables, 0.1, 0)
    unknown = BASE.model_copy(update={"sharding_by_table": {"itemid": "row_wise"}})
    with pytest.raises(ConfigError, match=r"names \['itemid'\], which are no tables. Known: hour, item_id, tags, user_id"):
        Sharding(unknown).tables(toy.RANKER_FIELDS, tables, 0.1, 0)
