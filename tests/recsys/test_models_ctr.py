"""DeepFM and LR: the formula by hand, the hand-written gradient against autograd, and what each can and cannot learn."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.batches import Batch, Examples
from recsys.errors import ConfigError
from recsys.evidence import evidence_field
from recsys.features.schema import Field
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.training import TrainingConfig, train_locally
from tests import toy_examples as toy

ONES = [Field(f"s{i}", "user", "one", f"s{i}", 10, 4) for i in range(3)]
DENSE = Field("d", "context", "dense", "", 0, 0, 2)


def batch(fields: list[Field], n: int = 6, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    arrays = {f.name: rng.normal(size=(n, f.width)).astype(np.float32) for f in fields if f.shape == "dense"}
    arrays |= {f.name: rng.integers(0, f.size, n).astype(np.int32) for f in fields if f.shape == "one"}
    arrays |= {f.name: rng.integers(0, f.size, (n, f.width)).astype(np.int32) for f in fields if f.shape in ("bag", "sequence")}
    return Batch.of(fields, arrays)


def test_lr_is_the_bias_and_a_weight_per_field_value_and_dense_column():
    model = LogisticRegressionConfig().build([*ONES[:2], DENSE])
    with torch.no_grad():
        model.embeddings.tables["s0"][3, 0] = 0.5
        model.embeddings.tables["s1"][7, 0] = -2.0
        model.bias[:] = 0.25
        model.dense_weight[:] = torch.tensor([10.0, 100.0])
    one = Batch.of([*ONES[:2], DENSE], {"s0": np.array([3]), "s1": np.array([7]), "d": np.array([[1.0, 2.0]])})
    assert model(one).logit.item() == pytest.approx(0.25 + 0.5 - 2.0 + 10.0 + 200.0)


def test_deepfm_is_first_order_plus_pairwise_products_plus_mlp():
    fields = [*ONES, DENSE]
    model = DeepFMConfig(dim=4, hidden=(5,), init_std=1.0).build(fields, seed=1)
    given = batch(fields)
    rows = [model.embeddings.tables[f.table][given.ids[f.name].long()] for f in ONES]
    e = [r[:, :4] for r in rows]
    pairs = (e[0] * e[1]).sum(1) + (e[0] * e[2]).sum(1) + (e[1] * e[2]).sum(1)
    first = sum(r[:, 4] for r in rows) + given.dense @ model.dense_weight + model.bias
    deep = model.mlp(torch.cat([*e, given.dense], 1)).squeeze(1)
    torch.testing.assert_close(model(given).logit, first + pairs + deep)


def test_the_gradient_written_by_hand_is_autograds():
    fields = [*ONES, DENSE]
    model = DeepFMConfig(dim=4, hidden=(5,), init_std=1.0).build(fields, seed=1)
    given = batch(fields)
    grads = []
    for uniform in (True, False):
        assert model.uniform or not uniform
        model.uniform = uniform
        model.zero_grad()
        out = model(given)
        out.logit.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, by_hand in grads[0].items():
        torch.testing.assert_close(by_hand, grads[1][name], msg=lambda m, name=name: f"{name}: {m}")


def test_every_parameter_gets_a_gradient_with_fields_of_all_shapes_and_widths():
    model = DeepFMConfig(dim=8, hidden=(5,), init_std=1.0).build(toy.RANKER_FIELDS, seed=1)
    assert not model.uniform, "history shares the table of item_id"
    model(batch(list(toy.RANKER_FIELDS), n=64)).logit.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_fields_that_share_a_table_have_first_order_weights_of_their_own():
    model = LogisticRegressionConfig().build(toy.RANKER_FIELDS)
    with torch.no_grad():
        model.embeddings.tables["item_id"][5] = torch.tensor([1.0, 10.0, 0.0, 0.0])
    arrays = {f.name: np.zeros((1, f.width), np.float32 if f.shape == "dense" else np.int32) for f in toy.RANKER_FIELDS}
    arrays |= {name: np.zeros(1, np.int32) for name in ("user_id", "hour", "item_id")}
    arrays["history"][0, -1] = 5
    assert model(Batch.of(toy.RANKER_FIELDS, arrays)).logit.item() == 1.0
    arrays["history"][0, -1], arrays["item_id"][0] = 0, 5
    assert model(Batch.of(toy.RANKER_FIELDS, arrays)).logit.item() == 10.0


def test_a_ranker_without_fields_is_refused():
    with pytest.raises(ConfigError, match="at least one field"):
        DeepFMConfig().build([])


def test_a_padded_history_scores_like_a_shorter_one():
    model = DeepFMConfig(dim=8, hidden=(5,), init_std=1.0).build(toy.RANKER_FIELDS, seed=1)
    given = batch(list(toy.RANKER_FIELDS), n=4)
    given.ids["history"][:, :3] = 0
    shorter = batch(list(toy.RANKER_FIELDS), n=4)
    shorter.ids["history"] = given.ids["history"][:, 3:]
    torch.testing.assert_close(model(given).logit, model(shorter).logit)


def test_deepfm_learns_the_parity_interaction_that_logistic_regression_cannot(tmp_path: Path):
    examples = Examples(toy.write(tmp_path, "ranker", train=2048))
    training = TrainingConfig(epochs=3, batch_size=256, granule=32, learning_rate=0.05)
    _, deepfm = train_locally(examples, DeepFMConfig(dim=8, hidden=(16,), init_std=0.01), training)
    _, lr = train_locally(examples, LogisticRegressionConfig(), training)
    assert deepfm.metrics["auc"] > 0.85, "a tenth of the labels is turned, so 0.9 is the ceiling"
    assert lr.metrics["auc"] < 0.6, "no weight of one field alone says anything"


def test_l2_keeps_the_embeddings_small(tmp_path: Path):
    examples = Examples(toy.write(tmp_path, "ranker"))
    training = TrainingConfig(epochs=2, batch_size=256, granule=32, learning_rate=0.05)
    norms = []
    for l2 in (0.0, 0.1):
        model, _ = train_locally(examples, DeepFMConfig(dim=8, hidden=(8,), l2=l2, init_std=0.1), training)
        norms.append(float(model.embeddings.tables["user_id"].detach().norm()))
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize("config", [DeepFMConfig(dim=4, hidden=(8,)), LogisticRegressionConfig()], ids=["deepfm", "lr"])
def test_a_ranker_begins_at_the_coarse_order(config):
    field = evidence_field(1)  # found, score, depth, merged, coarse
    seen = np.array([[1, 0.5, 0.2, 0.9, 0.3], [1, 0.5, 0.2, 0.9, 0.8]], np.float32)
    model = config.build((field,), seed=0)
    for p in (p for name, p in model.named_parameters() if name.startswith("mlp")):
        torch.nn.init.zeros_(p)
    with torch.inference_mode():
        low, high = model(Batch.of((field,), {field.name: seen})).logit.tolist()
    assert (low, high) == pytest.approx((4 * 0.3, 4 * 0.8))
