"""The vector channel: exact where it says so, tuned where it is not, and k items whatever is excluded."""

from __future__ import annotations

import json
import logging

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.allowed import Allowed, Mask
from recsys.errors import BundleError, ConfigError
from recsys.recall import exact as exact_module
from recsys.recall import vector as vector_module
from recsys.recall.exact import exact_search
from recsys.recall.vector import VectorConfig, VectorIndex, VectorRecaller
from tests.contracts import RecallerContract, queries_of

KINDS = ("flat", "hnsw", "ivf")
NONE = np.empty((0, 0), np.int32)


def cloud(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    """(n, d) unit vectors in clusters, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, d))
    v = centres[rng.integers(0, 8, n)] + 0.5 * rng.normal(size=(n, d))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


class VectorContract(RecallerContract):
    """Item vectors are the items' parities, user vectors the mean of the history's: a two-tower that has learnt the checkerboard."""

    kind = "flat"

    def encode(self, queries):
        known = (queries.history >= 0) & (queries.history < len(self.item_vectors))
        mean = (self.item_vectors[np.where(known, queries.history, 0)] * known[:, :, None]).sum(1)
        mean[~known.any(1)] = np.nan  # nothing is known of this user
        return mean

    def make(self, interactions):
        n = interactions.n_items
        parity = np.eye(2, 8, dtype=np.float32)[np.arange(n) % 2]
        noise = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32) * 0.01
        self.item_vectors = parity + noise
        config = VectorConfig(kind=self.kind, lists=2 if n > 2 else 1)
        return VectorRecaller("two_tower", self.encode, config.build().fit(self.item_vectors))

    def reload(self, folder, channel):
        class Tower:
            user_vectors = staticmethod(self.encode)

        return channel.index.config.load(folder, Tower())


class TestFlat(VectorContract):
    kind = "flat"


class TestHNSW(VectorContract):
    kind = "hnsw"


@pytest.mark.filterwarnings("ignore:.*clustering.*")
class TestIVF(VectorContract):
    kind = "ivf"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over_fetch", [0, 512])
@pytest.mark.parametrize("n_excluded", [0, 50, 390, 399])
def test_filtered_search_equals_exact_search_then_filter(monkeypatch, kind, over_fetch, n_excluded):
    """Over-fetching and filtering inside the walk alike: k items come back whenever k others exist."""
    monkeypatch.setattr(vector_module, "OVER_FETCH", over_fetch)
    items, queries = cloud(400), cloud(20, seed=1)
    index = VectorConfig(kind=kind, recall_goal=1.0, lists=4, threads=1).build().fit(items, queries)
    rng = np.random.default_rng(0)
    # Half of the exclusions are the nearest themselves: the hard case.
    nearest = np.argsort(-(queries @ items.T), axis=1)[:, : n_excluded // 2]
    exclude = np.stack([np.concatenate([row, rng.permutation(np.setdiff1d(np.arange(400), row))])[:n_excluded] for row in nearest]).astype(
        np.int32
    )
    got, scores = index.recall_vectors(queries, exclude, 20)
    full = queries @ items.T
    np.put_along_axis(full, exclude.astype(np.int64), -np.inf, 1)
    want = np.argsort(-full, axis=1, kind="stable")[:, :20]
    left = min(20, 400 - n_excluded)
    assert ((got >= 0).sum(1) == left).all()
    assert (got[:, :left] == want[:, :left]).mean() >= (1.0 if kind == "flat" else 0.97)
    np.testing.assert_allclose(scores[:, :left], np.take_along_axis(full, got[:, :left].astype(np.int64), 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_a_search_that_ends_early_is_finished_exactly(kind):
    items, queries = cloud(500), cloud(6, seed=1)
    index = VectorConfig(kind=kind, hnsw_links=2, ef_construction=2, ef_search=1, lists=50, probes=1, recall_goal=0.01).build().fit(items)
    index.effort = 1
    exclude = np.argsort(-(queries @ items.T), axis=1)[:, :100].astype(np.int32)
    exclude = np.tile(exclude, (1, 3))  # naming an item again excludes no other
    got, _ = index.recall_vectors(queries, exclude, 400)
    assert [sorted(row.tolist()) for row in got] == [sorted(set(range(500)) - set(out.tolist())) for out in exclude]


def test_exact_search_in_blocks_equals_one_block(monkeypatch):
    items, queries = cloud(300), cloud(33, seed=2)
    whole = exact_search(items, queries, 10)
    monkeypatch.setattr(exact_module, "BLOCK", 300 * 4)
    for got, want in zip(exact_search(items, queries, 10), whole, strict=True):
        np.testing.assert_array_equal(got, want)


def test_equal_vectors_come_in_the_order_of_their_rows():
    items = np.tile(cloud(1), (30, 1))
    for kind in ("flat", "hnsw"):
        got, _ = VectorConfig(kind=kind).build().fit(items).recall_vectors(cloud(1), np.empty((1, 0), np.int32), 30)
        assert got.tolist() == [list(range(30))]


@pytest.mark.parametrize(("n", "kind"), [(99, "flat"), (100, "hnsw"), (999, "hnsw"), (1_000, "ivf")])
def test_the_index_is_chosen_by_size_and_says_why(caplog, n, kind):
    with caplog.at_level(logging.INFO):
        index = VectorConfig(flat_below=100, ivf_from=1_000, device="cpu").build().fit(cloud(n))
    assert index.kind == kind
    assert f"faiss index={kind} device=cpu (items={n:,}; " in caplog.text


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_effort_is_raised_until_the_recall_goal_holds_on_new_queries(kind, caplog):
    items, typical, new = cloud(3_000, 32), cloud(200, 32, seed=1), cloud(200, 32, seed=2)
    config = VectorConfig(kind=kind, hnsw_links=8, ef_construction=40, ef_search=1, lists=100, probes=1, recall_goal=0.99)
    with caplog.at_level(logging.INFO):
        index = config.build().fit(items, typical)
    assert index.measured_recall >= 0.99
    assert f"recall@100={index.measured_recall:.4f} (goal 0.99)" in caplog.text
    found, _ = index.recall_vectors(new, np.empty((200, 0), np.int32), 100)
    truth, _ = exact_search(items, new, 100)
    assert np.mean([len(set(a) & set(b)) / 100 for a, b in zip(found.tolist(), truth.tolist(), strict=True)]) >= 0.98


def test_a_graph_too_thin_for_its_goal_is_warned_of(caplog):
    config = VectorConfig(kind="hnsw", hnsw_links=2, ef_construction=2, ef_search=1, recall_goal=1.0)
    assert config.build().fit(cloud(2_000)).measured_recall < 1
    assert "misses its recall goal at any effort: raise hnsw_links" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_similar_items_leave_the_item_itself_out(kind, tmp_path):
    items = cloud(200)
    built = VectorConfig(kind=kind, lists=4, recall_goal=1.0).build().fit(items)
    built.save(tmp_path)
    truth = items @ items.T
    np.fill_diagonal(truth, -np.inf)
    for index in (built, VectorIndex.load(tmp_path, built.config)):
        got, scores = index.similar(np.array([7, -1, 10_000], np.int32), 5)
        assert got[0].tolist() == np.argsort(-truth[7], kind="stable")[:5].tolist()
        np.testing.assert_allclose(scores[0], truth[7][got[0]], atol=1e-5)
        assert (got[1:] == -1).all()


def test_an_index_keeps_what_was_tuned_and_measured(tmp_path):
    index = VectorConfig(kind="hnsw", ef_search=4).build().fit(cloud(2_000))
    index.save(tmp_path)
    loaded = VectorIndex.load(tmp_path, index.config)
    assert (loaded.kind, loaded.effort, loaded.measured_recall, len(loaded)) == ("hnsw", index.effort, index.measured_recall, 2_000)
    np.testing.assert_array_equal(loaded.vectors(), index.vectors())


def test_no_items_at_all_give_no_answer():
    index = VectorConfig().build().fit(np.empty((0, 8), np.float32))
    items, scores = index.recall_vectors(cloud(2, 8), np.empty((2, 0), np.int32), 5)
    assert items.shape == scores.shape == (2, 0)


def test_a_damaged_index_is_a_sentence(tmp_path):
    VectorConfig().build().fit(cloud(50)).save(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"Faiss cannot read '.*index\.faiss'.*Rebuild the index from vectors\.npy"):
        VectorIndex.load(tmp_path, VectorConfig())


def test_an_index_of_another_size_is_refused(tmp_path):
    VectorConfig().build().fit(cloud(50)).save(tmp_path)
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(facts | {"items": 51}))
    with pytest.raises(BundleError, match=r"holds 50 x 16 vectors, index\.json says 51 x 16"):
        VectorIndex.load(tmp_path, VectorConfig())


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="this host has a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="device is 'gpu', but faiss sees no GPU here"):
        VectorConfig(device="gpu").build().fit(cloud(10))


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Faiss as it looks on a GPU host; the copy 'on the GPU' is the index itself, and refuses what a GPU refuses."""
    calls = []

    class OnGPU:
        def __init__(self, index):
            self.index = index

        def search(self, vectors, k, params=None):
            assert k <= 2_048
            assert getattr(params, "sel", None) is None
            calls.append(k)
            return self.index.search(vectors, k, params=params)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, device, index: OnGPU(index), raising=False)
    return calls


def test_on_a_gpu_the_index_is_flat_and_searched_there(pretended_gpu, caplog, tmp_path):
    items, queries = cloud(3_000), cloud(5, seed=1)
    exclude = np.tile(np.arange(2_500, dtype=np.int32), (5, 1))
    exclude[:3, 30:] = -1
    with caplog.at_level(logging.INFO):
        built = VectorConfig(flat_below=100).build().fit(items)
    assert "faiss index=flat device=gpu (items=3,000; on a GPU flat below 2,000,000)" in caplog.text
    built.save(tmp_path)
    want = exact_search(items, queries, 20, exclude)
    for index in (built, VectorIndex.load(tmp_path, built.config), VectorIndex.load(tmp_path, VectorConfig(device="cpu"))):
        got = index.recall_vectors(queries, exclude, 20)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    assert pretended_gpu == [50, 50], "over-fetched for the light ones; the heavy ones, and the stand-in on the CPU, are exact"


def test_hnsw_is_refused_on_a_gpu(pretended_gpu):
    with pytest.raises(ConfigError, match=r"'hnsw' has no GPU version\. Use kind: flat or ivf there, or device: cpu"):
        VectorConfig(kind="hnsw").build().fit(cloud(10))


def test_the_channel_excludes_and_encodes_the_queries():
    items = cloud(20)
    channel = VectorRecaller("two_tower", lambda queries: items[queries.history[:, -1]], VectorConfig().build().fit(items))
    got, _ = channel.recall(queries_of([4], [9], exclude=[[4], [9]]), 3)
    truth = items @ items.T
    np.fill_diagonal(truth, -np.inf)
    assert got.tolist() == np.argsort(-truth[[4, 9]], axis=1, kind="stable")[:, :3].tolist()


WHOLE = {
    kind: VectorConfig(kind=kind, flat_below=40, lists=4, probes=4, ef_search=300, threads=1).build().fit(cloud(300, 8)) for kind in KINDS
}
"""Indexes whose effort leaves nothing out; filters that pass 40 items or more are walked, stricter ones compared."""


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    shares=st.lists(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]), min_size=1, max_size=3),
    n_excluded=st.integers(0, 60),
    k=st.sampled_from([1, 10, 120]),
    seed=st.integers(0, 999),
)
def test_search_among_what_a_filter_passes_equals_exact_search_then_filter(kind, shares, n_excluded, k, seed):
    """Five queries of one batch with filters of their own, exclusions besides."""
    rng, items, queries = np.random.default_rng(seed), cloud(300, 8), cloud(5, 8, seed=seed)
    masks = tuple(Mask(rng.random(300) < share) for share in shares)
    allowed = Allowed(masks, rng.integers(-1, len(masks), 5).astype(np.int32))
    exclude = rng.integers(-1, 300, (5, n_excluded)).astype(np.int32)
    got, scores = WHOLE[kind].recall_vectors(queries, exclude, k, allowed)
    full = (queries @ items.T).astype(np.float64)
    for b in range(5):
        if allowed.of[b] >= 0:
            full[b, ~masks[allowed.of[b]].items] = -np.inf
        full[b, exclude[b][exclude[b] >= 0]] = -np.inf
        want = [i for i in np.argsort(-full[b], kind="stable")[:k].tolist() if np.isfinite(full[b, i])]
        assert got[b][got[b] >= 0].tolist() == want
        np.testing.assert_allclose(scores[b, : len(want)], full[b, want], atol=1e-5)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_index_that_answers_worse_than_when_it_was_saved_is_refused(tmp_path, kind):
    items = cloud(600, 8)
    config = VectorConfig(kind=kind, lists=16)
    index = config.build().fit(items)
    index.save(tmp_path)
    loaded = VectorIndex.load(tmp_path, config)
    assert loaded.probed() == index.probed() >= 0.98
    faiss.write_index(config.build().fit(np.roll(items, 1, axis=0)).index, str(tmp_path / "index.faiss"))  # as large, but another
    with pytest.raises(BundleError, match=r"finds 0\.\d+ of its probes' nearest items, .* when it was saved"):
        VectorIndex.load(tmp_path, config)


def test_a_loaded_index_that_missed_its_goal_is_told_and_served(tmp_path, caplog):
    config = VectorConfig(kind="hnsw", hnsw_links=2, ef_construction=2, ef_search=1, recall_goal=1.0)
    config.build().fit(cloud(2_000)).save(tmp_path)
    caplog.clear()
    assert len(VectorIndex.load(tmp_path, config)) == 2_000
    assert "has recall 0." in caplog.text
