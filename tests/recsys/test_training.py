"""The fit: same batches for any number of workers, the best epoch is what is kept, NaN is named, the reader refuses bad files."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.batches import Batch, Examples, prefetch
from recsys.errors import TrainingError
from recsys.export import load_model, save_model
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.training import MemorySnapshots, Progress, Report, RowWiseAdagrad, TrainingConfig, describe, fit, train_locally
from recsys.validation import validate
from recsys.workers import Alone
from tests import toy_examples as toy

FAST = TrainingConfig(epochs=3, batch_size=128, granule=32, learning_rate=0.05)
SMALL = DeepFMConfig(dim=8, hidden=(8,), init_std=0.01, coarse_start=0.0)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("ranker"), "ranker")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("towers"), "two_tower")


def keys(batch: Batch) -> list[tuple[float, ...]]:
    """Rows as tuples, to compare batches as sets."""
    return sorted(map(tuple, torch.cat([batch.dense, batch.ids["history"].float()], 1).tolist()))


# ---- reading --------------------------------------------------------------------------------------------------------------


def test_two_workers_see_the_same_global_batches_as_one_and_an_epoch_sees_every_row_once(ranker: Path):
    examples = Examples(ranker)
    alone = list(examples.train_batches(128, epoch=1, seed=5))
    halves = [list(examples.train_batches(128, epoch=1, seed=5, rank=r, size=2)) for r in (0, 1)]
    assert len(alone) == examples.steps(128) == 8
    for whole, a, b in zip(alone, *halves, strict=True):
        assert len(a) == len(b) == 64
        assert keys(whole) == sorted(keys(a) + keys(b))
    assert len({k for b in alone for k in keys(b)}) == 1024


def test_epochs_and_seeds_shuffle_anew_and_a_start_skips_steps(ranker: Path):
    examples = Examples(ranker)
    first = [keys(b) for b in examples.train_batches(128, epoch=0, seed=5)]
    assert first == [keys(b) for b in examples.train_batches(128, epoch=0, seed=5)]
    assert first[3:] == [keys(b) for b in examples.train_batches(128, epoch=0, seed=5, start=3)]
    assert first != [keys(b) for b in examples.train_batches(128, epoch=1, seed=5)]
    assert first != [keys(b) for b in examples.train_batches(128, epoch=0, seed=6)]


def test_an_incomplete_last_batch_is_dropped_unless_it_is_the_only_one(tmp_path: Path):
    examples = Examples(toy.write(tmp_path / "a", "ranker", train=200))
    assert [len(b) for b in examples.train_batches(128, epoch=0)] == [128]
    only = Examples(toy.write(tmp_path / "b", "ranker", train=50))
    assert [len(b) for b in only.train_batches(128, epoch=0)] == [50]
    assert [len(b) for b in only.train_batches(128, epoch=0, rank=1, size=2)] == [25]


def test_a_batch_holds_its_one_fields_as_one_block(ranker: Path):
    batch = next(iter(Examples(ranker).train_batches(64, epoch=0)))
    assert batch.ids.stacked is not None
    assert batch.ids.stacked_names == ("user_id", "hour", "item_id")
    assert batch.ids["hour"].data_ptr() == batch.ids.stacked[1].data_ptr()
    assert batch.ids.stacked.dtype == torch.int32
    assert (batch.dense.shape, batch.ids["history"].shape) == ((64, 4), (64, toy.HISTORY))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_validation_covers_every_row_once_in_equally_many_equally_long_batches(tmp_path: Path, size: int):
    examples = Examples(toy.write(tmp_path, "ranker", valid=45))
    shares = [list(examples.valid_batches(10, rank=r, size=size)) for r in range(size)]
    assert len({tuple(len(b) for b in share) for share in shares}) == 1, "lookups are collective"
    assert sum(b.real for share in shares for b in share) == 45
    real = [row for share in shares for b in share for row in map(tuple, b.dense[: b.real].tolist())]
    assert len(set(real)) == 45


def test_batch_sizes_that_workers_cannot_share_are_refused_with_one_that_fits(ranker: Path):
    with pytest.raises(TrainingError, match=r"3 granules of 32, which 2 workers cannot share evenly.*multiple of 64"):
        Examples(ranker).train_batches(96, epoch=0, size=2)
    with pytest.raises(TrainingError, match=r"3\.125 granules"):
        Examples(ranker).train_batches(100, epoch=0)


def test_uniform_negatives_that_workers_cannot_share_are_refused(towers: Path):
    with pytest.raises(TrainingError, match=r"uniform_negatives is 5.*multiple of 2"):
        Examples(towers).train_batches(128, epoch=0, size=2, negatives=5)


def test_a_folder_without_schema_or_columns_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"holds no schema.json"):
        Examples(tmp_path)
    folder = toy.write(tmp_path / "x", "ranker")
    (folder / "schema.json").write_text((folder / "schema.json").read_text().replace('"hour"', '"weekday"'))
    with pytest.raises(TrainingError, match=r"lacks the columns \['weekday'\]"):
        Examples(folder)


def test_nan_and_ids_outside_the_table_are_named_while_reading(tmp_path: Path):
    price = np.zeros(1024, np.float32)
    price[7] = np.nan
    with pytest.raises(TrainingError, match=r"Field 'price' of train.parquet is NaN or infinite in 1 of 128 rows"):
        train_locally(Examples(toy.write(tmp_path / "a", "ranker", changed={"price": price})), SMALL, FAST)
    hour = np.full(1024, 25, np.int32)
    with pytest.raises(TrainingError, match=r"Field 'hour' of train.parquet has ids 25..25, its table 'hour' has 25 rows"):
        train_locally(Examples(toy.write(tmp_path / "b", "ranker", changed={"hour": hour})), SMALL, FAST)


def test_closing_the_iterator_ends_the_reading_thread(ranker: Path):
    batches = Examples(ranker).train_batches(32, epoch=0)
    next(batches)
    assert any(t.name == "read-ahead" for t in threading.enumerate())
    batches.close()
    assert not any(t.name == "read-ahead" for t in threading.enumerate())


def test_an_error_of_the_reading_thread_is_raised_where_batches_are_used():
    def broken() -> Any:
        yield 1
        raise TrainingError("disk gone")

    taken = prefetch(broken())
    assert next(taken) == 1
    with pytest.raises(TrainingError, match="disk gone"):
        next(taken)


class Planted(torch.nn.Module):
    """A two-tower whose vectors are given: item i is (i, 0), every user (1, 0), so larger rows rank higher."""

    task = "two_tower"
    user_fields = toy.QUERY_FIELDS

    def forward(self, batch: Batch) -> Any:
        item = batch.ids["item_id"].float()[:, None] - 2
        vectors = torch.cat([item, torch.zeros_like(item)], 1)
        return SimpleNamespace(user=torch.tensor([[1.0, 0.0]]).expand(len(batch), 2), item=vectors)


def test_ndcg_by_hand_ranks_the_whole_catalogue_without_the_history(tmp_path: Path):
    examples = Examples(toy.write(tmp_path, "two_tower", valid=7))
    batch = next(iter(examples.valid_batches(7)))
    expected = []
    for target, history in zip(batch.columns["item"].tolist(), batch.ids["history"].tolist(), strict=True):
        above = set(range(target + 1, toy.ITEMS)) - {h - 2 for h in history if h}
        expected.append(1 / np.log2(len(above) + 2) if len(above) < 10 else 0.0)
    found = validate(Planted(), Planted(), examples, Alone())
    assert found["ndcg@10"] == pytest.approx(np.mean(expected))
    assert found["recall@10"] == pytest.approx(np.mean([e > 0 for e in expected]))


# ---- fitting --------------------------------------------------------------------------------------------------------------


def test_the_saved_model_scores_the_best_epochs_metric_not_the_last_ones(tmp_path: Path, ranker: Path):
    examples = Examples(ranker)
    overfit = TrainingConfig(epochs=8, batch_size=32, granule=32, learning_rate=0.3, patience=0)
    model, fitted = train_locally(examples, DeepFMConfig(dim=8, hidden=(32,), init_std=0.1), overfit)
    metrics = [e["auc"] for e in fitted.epochs]
    assert fitted.best_epoch == int(np.argmax(metrics)) < 7, "the run overfits, or this test shows nothing"
    save_model(tmp_path, model.state_dict(), describe(model.config, examples, fitted))
    loaded = load_model(tmp_path)
    assert validate(loaded, loaded, examples, Alone())["auc"] == pytest.approx(max(metrics), abs=1e-9)


def test_patience_ends_the_run_that_many_epochs_after_the_best(ranker: Path):
    overfit = TrainingConfig(epochs=30, batch_size=32, granule=32, learning_rate=0.3, patience=2)
    _, fitted = train_locally(Examples(ranker), DeepFMConfig(dim=8, hidden=(32,), init_std=0.1), overfit)
    assert len(fitted.epochs) == fitted.best_epoch + 1 + 2 < 30


@pytest.mark.parametrize(("epochs", "best", "ends"), [(3, 2, False), (4, 2, False), (5, 2, True), (10, 9, True)])
def test_finished_by_hand(epochs: int, best: int, ends: bool):
    state = Progress(epoch=epochs, best_epoch=best, epochs=[{"epoch": 0.0, "loss": 1.0, "auc": 0.5}] * epochs)
    assert state.finished(TrainingConfig(epochs=10, patience=2)) is ends


def test_one_seed_gives_one_run_and_another_seed_another(ranker: Path):
    examples, dropped = Examples(ranker), DeepFMConfig(dim=8, hidden=(8,), dropout=0.3)
    runs = [train_locally(examples, dropped, FAST.model_copy(update={"seed": s}))[1].epochs for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_metric_counts_downwards(ranker: Path):
    _, fitted = train_locally(Examples(ranker), SMALL, FAST.model_copy(update={"metric": "logloss"}))
    losses = [e["logloss"] for e in fitted.epochs]
    assert fitted.best_epoch == int(np.argmin(losses))


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path: Path):
    _, fitted = train_locally(Examples(toy.write(tmp_path, "ranker", valid=0)), SMALL, FAST)
    assert (fitted.best_epoch, len(fitted.epochs), sorted(fitted.metrics)) == (2, 3, ["loss"])


def test_a_metric_that_validation_does_not_yield_is_refused_with_those_it_does(ranker: Path):
    with pytest.raises(TrainingError, match=r"training.metric is 'f1'.*auc, gauc, logloss"):
        train_locally(Examples(ranker), SMALL, FAST.model_copy(update={"metric": "f1"}))


def test_no_training_rows_is_a_sentence(tmp_path: Path):
    with pytest.raises(TrainingError, match="holds no training rows"):
        train_locally(Examples(toy.write(tmp_path, "ranker", train=0)), SMALL, FAST)


def test_a_diverging_table_is_named(ranker: Path):
    examples = Examples(ranker)
    model = SMALL.build(examples.fields)
    with torch.no_grad():
        model.embeddings.tables["tags"][:] = torch.nan
    with pytest.raises(TrainingError, match=r"not finite at epoch 0, step 0: the embeddings of field 'tags'"):
        fit(model, examples, FAST, forward=model, optimizers=[], snapshots=MemorySnapshots(model))


def test_nan_labels_are_named(tmp_path: Path):
    label = np.full(1024, np.nan, np.float32)
    with pytest.raises(TrainingError, match="column 'label' of the examples holds NaN"):
        train_locally(Examples(toy.write(tmp_path, "ranker", changed={"label": label})), SMALL, FAST)


def test_reports_tell_epoch_step_loss_and_metrics(ranker: Path):
    seen: list[Report] = []
    train_locally(Examples(ranker), SMALL, FAST.model_copy(update={"report_every_steps": 3, "epochs": 1}), progress=seen.append)
    assert [(r.epoch, r.step, r.steps, r.metrics is None) for r in seen] == [
        (0, 3, 8, True),
        (0, 6, 8, True),
        (0, 8, 8, True),
        (0, 8, 8, False),
    ]
    assert all(r.examples_per_s > 0 for r in seen[:3])
    assert seen[-1].metrics is not None
    assert set(seen[-1].metrics) == {"auc", "gauc", "logloss"}


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "sgd"])
def test_each_table_optimizer_learns(ranker: Path, optimizer: str):
    rate = 5.0 if optimizer == "sgd" else 0.05
    training = FAST.model_copy(update={"embedding_optimizer": optimizer, "embedding_learning_rate": rate})
    _, fitted = train_locally(Examples(ranker), DeepFMConfig(dim=8, hidden=(8,), init_std=0.1, coarse_start=0.0), training)
    assert fitted.metrics["auc"] > 0.7


def test_adam_learns_and_its_decay_is_taken(ranker: Path):
    training = FAST.model_copy(update={"optimizer": "adam", "learning_rate": 0.01, "embedding_learning_rate": 0.05, "weight_decay": 1e-4})
    assert train_locally(Examples(ranker), SMALL, training)[1].metrics["auc"] > 0.7


@pytest.mark.parametrize("sparse", [False, True])
def test_rowwise_adagrad_by_hand(sparse: bool):
    p = torch.nn.Parameter(torch.zeros(3, 2))
    step = RowWiseAdagrad([p], lr=1.0, eps=1e-12)
    grad = torch.tensor([[0.0, 0.0], [3.0, 1.0], [2.0, 2.0]])
    for _ in range(2):
        p.grad = grad.to_sparse(1) if sparse else grad.clone()
        step.step()
    root = 5**0.5  # of the mean of 9 and 1
    torch.testing.assert_close(p.data, torch.tensor([[0.0, 0.0], [3.0 / root, 1.0 / root], [1.0, 1.0]]) * -(1 + 1 / 2**0.5))


def test_lr_on_separable_columns_reaches_the_ceiling(tmp_path: Path):
    rows = toy.ranker_rows(1024, 1)
    evidence = rows["evidence"].copy()
    evidence[:, 0] = rows["label"] * 2 - 1
    examples = Examples(toy.write(tmp_path, "ranker", valid=0, changed={"evidence": evidence}))
    _, fitted = train_locally(examples, LogisticRegressionConfig(coarse_start=0.0), FAST.model_copy(update={"learning_rate": 0.5}))
    assert fitted.metrics["loss"] < 0.2
