"""The ranker engine scores what the model's forward scores, for any mixture of fields; model folders are checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.batches import Batch, Examples
from recsys.errors import BundleError
from recsys.export import RankerEngine, load_model, save_model
from recsys.features.schema import Field
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.models.two_tower import TwoTowerConfig
from recsys.training import Fitted, describe
from tests import toy_examples as toy

CONFIGS = [
    LogisticRegressionConfig(),
    DeepFMConfig(dim=8, hidden=(16, 8), init_std=0.5),
    DeepFMConfig(dim=8, hidden=(), init_std=0.5),
    DeepFMConfig(dim=5, hidden=(7,), init_std=0.5),
]


def trained(config: Any, fields: tuple[Field, ...]) -> Any:
    """A model whose every weight is random."""
    model = config.build(fields, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4)
    return model.eval()


def request(B: int, N: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    queries, _, _ = toy.moments(B, rng)
    return queries, rng.integers(0, toy.ITEMS, (B, N)).astype(np.int32), {"evidence": rng.normal(size=(B, N, 3)).astype(np.float32)}


def plain(model: Any, fields: tuple[Field, ...], queries: Any, items: np.ndarray, pairs: Any) -> np.ndarray:
    """The model's own forward on every pair."""
    B, N = items.shape
    arrays = {k: np.repeat(v, N, axis=0) for k, v in queries.items()}
    arrays |= {k: v[items.reshape(-1)] for k, v in toy.item_columns().items()}
    arrays |= {k: v.reshape(B * N, -1) for k, v in pairs.items()}
    with torch.inference_mode():
        scores: np.ndarray = model(Batch.of(fields, {f.name: arrays[f.name] for f in fields})).logit.numpy().reshape(B, N)
    return scores


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.type}-{getattr(c, 'hidden', '')}")
@given(
    seed=st.integers(0, 99),
    B=st.integers(1, 4),
    N=st.integers(1, 9),
    left_out=st.sets(st.sampled_from([f.name for f in toy.RANKER_FIELDS])),
)
@example(seed=0, B=1, N=1, left_out={f.name for f in toy.RANKER_FIELDS if f.shape != "dense"})  # numbers alone, no table at all
@settings(max_examples=15, deadline=None)
def test_the_engine_is_the_forward_for_any_set_of_fields(config: Any, seed: int, B: int, N: int, left_out: set[str]):
    fields = tuple(f for f in toy.RANKER_FIELDS if f.name not in left_out) or toy.RANKER_FIELDS
    model = trained(config, fields)
    engine = RankerEngine(model, toy.item_columns())
    queries, items, pairs = request(B, N, seed)
    want = plain(model, fields, queries, items, pairs)
    np.testing.assert_allclose(engine.score(queries, items, pairs), want, atol=1e-5 * max(1.0, float(np.abs(want).max())))


def test_empty_slots_and_no_candidates_do_no_harm():
    model = trained(CONFIGS[1], toy.RANKER_FIELDS)
    engine = RankerEngine(model, toy.item_columns())
    queries, items, pairs = request(2, 5, 0)
    want = engine.score(queries, items, pairs)
    items[:, 3:] = -1
    got = engine.score(queries, items, pairs)
    np.testing.assert_array_equal(got[:, :3], want[:, :3])
    assert np.isfinite(got).all()
    assert engine.score(queries, np.empty((2, 0), np.int32), {"evidence": np.empty((2, 0, 3), np.float32)}).shape == (2, 0)


def test_a_batch_of_queries_scores_like_single_ones_across_chunks():
    model = trained(CONFIGS[1], toy.RANKER_FIELDS)
    engine = RankerEngine(model, toy.item_columns())
    queries, items, pairs = request(40, 300, 1)
    whole = engine.score(queries, items, pairs)
    for b in (0, 13, 39):
        one = engine.score({k: v[b : b + 1] for k, v in queries.items()}, items[b : b + 1], {k: v[b : b + 1] for k, v in pairs.items()})
        np.testing.assert_allclose(one[0], whole[b], atol=1e-5)


def test_the_engine_states_the_memory_of_its_item_rows():
    engine = RankerEngine(trained(CONFIGS[1], toy.RANKER_FIELDS), toy.item_columns())
    assert engine.item_bytes == toy.ITEMS * (16 + 8 + 1) * 4


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    examples = Examples(toy.write(tmp_path / "examples", "ranker", train=64))
    config = CONFIGS[1]
    save_model(tmp_path / "model", trained(config, toy.RANKER_FIELDS).state_dict(), describe(config, examples, Fitted([], 0, {"auc": 0.7})))
    return tmp_path / "model"


def test_a_loaded_engine_scores_like_the_saved_model(saved: Path):
    queries, items, pairs = request(3, 4, 2)
    got = RankerEngine.load(saved, toy.item_columns()).score(queries, items, pairs)
    want = plain(trained(CONFIGS[1], toy.RANKER_FIELDS), toy.RANKER_FIELDS, queries, items, pairs)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))
    assert json.loads((saved / "model.json").read_text())["metrics"] == {"auc": 0.7}


def test_faults_of_a_model_folder_are_sentences(saved: Path, tmp_path: Path):
    with pytest.raises(BundleError, match=r"lacks model.json or model.safetensors"):
        load_model(tmp_path)
    with pytest.raises(BundleError, match="no item columns"):
        RankerEngine.load(saved, {})
    document = json.loads((saved / "model.json").read_text())
    document["model"]["hidden"] = [4]
    (saved / "model.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"do not fit the model of its model.json"):
        load_model(saved)


def test_a_two_tower_folder_is_no_ranker(tmp_path: Path):
    examples, config = Examples(toy.write(tmp_path / "examples", "two_tower", train=64)), TwoTowerConfig(dim=4)
    save_model(tmp_path / "model", config.build(examples.fields).state_dict(), describe(config, examples, Fitted([], 0, {})))
    with pytest.raises(BundleError, match="holds a two_tower model, which ranks no pairs"):
        RankerEngine.load(tmp_path / "model", toy.item_columns())
