"""The two-tower: its loss by hand (logQ, accidental hits, mixed negatives), unit vectors, and serving equal to training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.batches import Batch, Examples
from recsys.errors import BundleError, ConfigError
from recsys.export import save_model
from recsys.models.layers import Embedded, FieldIds
from recsys.models.two_tower import TwoTower, TwoTowerConfig, Vectors
from recsys.training import Fitted, TrainingConfig, describe, train_locally
from recsys.workers import Alone
from tests import toy_examples as toy

NOTHING = Embedded(torch.zeros(3, 0), {})


def model(**given: object) -> TwoTower:
    return TwoTowerConfig(dim=8, **given).build(toy.TOWER_FIELDS, seed=1)  # type: ignore[arg-type]


def items_of(rows: list[int], log_q: list[float], negatives: int = 0) -> Batch:
    columns = {"item": torch.tensor(rows), "log_q": torch.tensor(log_q)}
    return Batch(FieldIds(), torch.zeros(len(rows), 0), columns, negatives=negatives)


def test_the_loss_by_hand_corrects_for_popularity_and_does_not_count_the_same_item_as_a_negative():
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    batch = items_of([4, 9, 4], [math.log(0.5), math.log(0.1), math.log(0.5)])
    popular, rare = 2 * math.exp(2.0), 10 * math.exp(0.0)  # exp(s / 0.5) / q
    first = -math.log(popular / (popular + rare))  # rows 0 and 2 hold one item: neither is the other's negative
    popular, rare = 2 * math.exp(0.0), 10 * math.exp(2.0)
    second = -math.log(rare / (rare + 2 * popular))
    loss = model(temperature=0.5).loss(Vectors(users, items, NOTHING), batch, Alone())
    assert float(loss) == pytest.approx((2 * first + second) / 3, rel=1e-5)


def test_without_logq_the_plain_softmax_is_taken():
    eye = torch.eye(2)
    loss = model(temperature=1.0, logq=False).loss(Vectors(eye, eye, NOTHING), items_of([1, 2], [0.0, -9.0]), Alone())
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_drawn_negatives_enter_every_users_softmax_but_have_no_loss_of_their_own():
    users, items = torch.eye(2), torch.cat([torch.eye(2), torch.tensor([[1.0, 0.0]])])
    batch = items_of([1, 2, 3], [0.0, 0.0, 0.0], negatives=1)
    loss = model(temperature=1.0).loss(Vectors(users, items, NOTHING), batch, Alone())
    e = math.e
    assert float(loss) == pytest.approx(-(math.log(e / (2 * e + 1)) + math.log(e / (e + 2))) / 2, rel=1e-5)


def test_the_rate_of_a_mixed_negative_is_that_of_both_draws(tmp_path: Path):
    examples = Examples(toy.write(tmp_path, "two_tower"))
    batch = next(iter(examples.train_batches(64, epoch=0, negatives=16)))
    assert (len(batch), batch.negatives) == (80, 16)
    share = examples.item_share[batch.columns["item"].numpy()]
    np.testing.assert_allclose(batch.columns["log_q"].exp(), (64 * share + 16 / toy.ITEMS) / 80, rtol=1e-5)
    drawn = batch.columns["item"][64:].long().numpy()
    np.testing.assert_array_equal(batch.ids["item_id"][64:], toy.item_columns()["item_id"][drawn])
    np.testing.assert_array_equal(batch.ids["user_id"][64:], 0)


def test_vectors_have_unit_length_and_serving_gives_what_training_saw(tmp_path: Path):
    m = model().eval()
    rows = toy.tower_rows(9, seed=3)
    seen = m(Batch.of(toy.TOWER_FIELDS, rows))
    users = m.user_vectors({f.name: rows[f.name] for f in toy.QUERY_FIELDS})
    items = m.item_vectors(toy.item_columns(), chunk=7)
    np.testing.assert_allclose(users, seen.user.detach(), atol=1e-6)
    np.testing.assert_allclose(items[rows["item"]], seen.item.detach(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1.0, atol=1e-5)
    assert (users.dtype, items.dtype, items.shape) == (np.float32, np.float32, (toy.ITEMS, 8))


def test_a_batch_of_n_is_n_batches_of_one():
    m = model().eval()
    rows = toy.tower_rows(5, seed=3)
    queries = {f.name: rows[f.name] for f in toy.QUERY_FIELDS}
    singles = [m.user_vectors({k: v[i : i + 1] for k, v in queries.items()}) for i in range(5)]
    np.testing.assert_allclose(m.user_vectors(queries), np.concatenate(singles), atol=1e-6)


def test_loading_gives_the_saved_vectors_and_refuses_another_model(tmp_path: Path):
    config, examples = TwoTowerConfig(dim=8), Examples(toy.write(tmp_path / "examples", "two_tower"))
    m = config.build(examples.fields, seed=5).eval()
    save_model(tmp_path / "model", m.state_dict(), describe(config, examples, Fitted([], 0, {})))
    again = TwoTower.load(tmp_path / "model")
    np.testing.assert_array_equal(again.item_vectors(toy.item_columns()), m.item_vectors(toy.item_columns()))
    (tmp_path / "model" / "model.json").write_text((tmp_path / "model" / "model.json").read_text().replace('"two_tower"', '"lr"'))
    with pytest.raises(BundleError, match="a two_tower was expected"):
        TwoTower.load(tmp_path / "model")


def test_candidate_fields_and_one_sided_schemas_are_refused():
    with pytest.raises(ConfigError, match=r"cannot use the candidate fields \['evidence'\]"):
        TwoTowerConfig().build(toy.RANKER_FIELDS)
    with pytest.raises(ConfigError, match="fields on both sides"):
        TwoTowerConfig().build(toy.QUERY_FIELDS)


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_it_learns_the_taste_by_parity_far_better_than_chance(tmp_path: Path, hidden: tuple[int, ...]):
    examples = Examples(toy.write(tmp_path, "two_tower", train=2048))
    training = TrainingConfig(epochs=3, batch_size=256, granule=32, learning_rate=0.05)
    _, fitted = train_locally(examples, TwoTowerConfig(dim=8, user_hidden=hidden, item_hidden=hidden), training)
    assert fitted.metrics["recall@10"] > 0.5, "chance is 10/40; the right half has 20 items, of which the history is taken out"
