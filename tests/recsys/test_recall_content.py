"""Content and given vectors: the contract of every channel, new items and users, and answers worked out by hand."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys import channels
from recsys.config import Config
from recsys.data.columns import ColumnConfig
from recsys.errors import ConfigError, NotFittedError
from recsys.features.catalogue import Catalogue
from recsys.prepared import Prepared, prepare
from recsys.recall.column_vector import ColumnVectorConfig
from recsys.recall.content import ContentConfig
from recsys.recall.content_space import ContentSpace
from recsys.recall.taste import typical_users
from tests.contracts import RecallerContract, log_of, queries_of

PARITY = {"parity": ColumnConfig(kind="category")}


def catalogue_of(columns: dict, n: int | None = None, **kinds) -> Catalogue:
    """A catalogue of raw columns; kinds are their declarations, category where none is given."""
    declared = {name: ColumnConfig.model_validate(kinds.get(name, "category")) for name in columns}
    return Catalogue.of(declared, {k: pd.Series(v) for k, v in columns.items()}, n or len(next(iter(columns.values()))))


def parities(n: int) -> Catalogue:
    return catalogue_of({"parity": [("even", "odd")[i % 2] for i in range(n)]})


class TestContent(RecallerContract):
    def make(self, interactions):
        return ContentConfig().build().fit(interactions, parities(interactions.n_items))


class TestContentFolded(RecallerContract):
    """More values than floats, so that the SVD works, and a vector column beside them."""

    def make(self, interactions):
        n = interactions.n_items
        words = [f"{('even', 'odd')[i % 2]} w{i} x{i // 2}" for i in range(n)]
        vectors = [[1.0, 0.0, 0.1] if i % 2 else [0.0, 1.0, 0.1] for i in range(n)]
        items = catalogue_of({"title": words, "image": vectors}, title="text", image={"kind": "vector", "dim": 3})
        return ContentConfig(dim=2).build().fit(interactions, items)


class TestColumnVector(RecallerContract):
    def make(self, interactions):
        vectors = ["3 0.1" if i % 2 else "0 1" for i in range(interactions.n_items)]
        items = catalogue_of({"image": vectors}, image={"kind": "vector", "dim": 2, "separator": " "})
        return ColumnVectorConfig(column="image").build().fit(interactions, items)


LOG = log_of([0, 1], [1, 2], n_items=5)


def test_a_rare_value_counts_more_than_a_frequent_one():
    items = catalogue_of({"tags": ["a r", "a", "a r", "a", "b"]}, tags="tags")
    channel = ContentConfig().build().fit(LOG, items)
    found, scores = channel.recall(queries_of([0], exclude=[[0]]), 4)
    a, r = np.log(6 / 5) + 1, np.log(6 / 3) + 1  # idf: ln((1 + 5 items) / (1 + holders)) + 1; b has one holder and matches nothing
    assert found.tolist() == [[2, 1, 3, 4]]
    assert scores[0] == pytest.approx([1, a / np.hypot(a, r), a / np.hypot(a, r), 0], abs=1e-5)


def test_weights_say_which_column_decides():
    items = catalogue_of({"tag": ["x", "y", "y", "x", "x"], "year": ["1", "1", "2", "2", "2"]})
    for weights, first in (({"tag": 2.0, "year": 1.0}, 3), ({"tag": 1.0, "year": 2.0}, 1), ({"year": 1.0}, 1)):
        found, _ = ContentConfig(columns=weights).build().fit(LOG, items).recall(queries_of([0], exclude=[[0, 4]]), 1)
        assert found.tolist() == [[first]], weights


def test_near_numbers_are_alike_and_missing_ones_match_nothing():
    items = catalogue_of({"price": [1.0, 2.0, 500.0, None, 1.5]}, price="number")
    found, scores = ContentConfig().build().fit(LOG, items).recall(queries_of([0], exclude=[[0]]), 4)
    ranks = {0: 0, 4: 1 / 3, 1: 2 / 3, 2: 1}  # 1.0 < 1.5 < 2.0 < 500: only the order counts
    assert found.tolist() == [[4, 3, 1, 2]]
    assert scores[0] == pytest.approx([np.cos(np.pi * ranks[4]), 0, np.cos(np.pi * ranks[1]), -1], abs=0.02)


def test_a_fold_keeps_inner_products_as_the_svd_does():
    rng = np.random.default_rng(0)
    tags = [" ".join(f"t{t}" for t in rng.integers(0, 12, 4)) for _ in range(60)]
    items = catalogue_of({"tags": tags}, tags="tags")
    whole, folded = ContentSpace.fit(items, {"tags": 1.0}, 64), ContentSpace.fit(items, {"tags": 1.0}, 9)
    rows = whole.items(items)
    assert rows.shape == (60, 12)
    assert folded.items(items).shape == (60, 9)
    left, values, right = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    best = (left[:, :9] * values[:9]) @ right[:9]
    best /= np.linalg.norm(best, axis=1, keepdims=True)
    np.testing.assert_allclose(folded.items(items) @ folded.items(items).T, best @ best.T, atol=1e-3)


def test_an_item_without_events_is_recalled_and_has_neighbours():
    channel = ContentConfig().build().fit(log_of([0], [0, 2], n_items=4), parities(4))  # items 1 and 3 have no event
    assert channel.similar(np.array([3]), 1)[0].tolist() == [[1]]
    assert channel.recall(queries_of([1], exclude=[[1]]), 1)[0].tolist() == [[3]]


def test_newer_events_count_more():
    channel = ContentConfig(decay=0.5).build().fit(log_of([0, 1], n_items=6), parities(6))
    found, _ = channel.recall(queries_of([0, 1], [1, 0], exclude=[[0, 1], [0, 1]]), 1)
    assert found.tolist() == [[3], [2]]


class TestInterests:
    """A user who has taken nothing, but says what he likes."""

    items = catalogue_of({"genres": ["Comedy", "Horror", "Comedy|Drama", "Horror", "Drama"]}, genres={"kind": "tags", "separator": "|"})
    users = catalogue_of({"likes": ["Horror", None, "Western"]}, likes={"kind": "tags", "separator": "|"})
    log = log_of([0], [0], [0], n_items=5)

    def fit(self, **more):
        return ContentConfig(interests={"likes": "genres"}, **more).build().fit(self.log, self.items, self.users)

    def test_the_user_table_speaks_where_there_is_no_history(self):
        found, _ = self.fit().recall(queries_of([], [], [], users=[0, 1, 2]), 2)
        assert found.tolist() == [[1, 3], [-1, -1], [-1, -1]]  # nothing said, and what no item has

    def test_the_profile_of_a_request_overrides_the_table(self, tmp_path: Path):
        channel = self.fit()
        queries = replace(queries_of([], [], users=[0, -1]), profiles=[{"likes": "Comedy"}, {"likes": ["Drama", "Horror"]}])
        found, _ = channel.recall(queries, 3)
        assert found[0, :2].tolist() == [0, 2]
        assert sorted(found[1].tolist()) == [1, 3, 4]
        channel.save(tmp_path)
        np.testing.assert_array_equal(channel.config.load(tmp_path).recall(queries, 3)[0], found)

    def test_history_outweighs_interests_as_it_grows(self):
        found, _ = self.fit().recall(queries_of([2], [2, 0, 2, 0], users=[0, 0], exclude=[[0, 2], [0, 2]]), 1)
        assert found.tolist() == [[1], [4]]
        found, _ = self.fit(interest_weight=0).recall(queries_of([2], users=[0], exclude=[[0, 2]]), 1)
        assert found.tolist() == [[4]]

    def test_columns_read_from_one_name_need_no_line(self):
        users = catalogue_of({"likes": ["Horror", None, None]}, likes={"kind": "tags", "separator": "|", "column": "genres"})
        channel = ContentConfig().build().fit(self.log, self.items, users)
        assert channel.recall(queries_of([], users=[0]), 2)[0].tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ContentConfig(columns={"genre": 1}), "names 'genre', which no item column declares. Known: parity."),
        (ContentConfig(columns={"parity": 0}), "has no item column to compare by. Declare data.items.columns"),
        (
            ContentConfig(interests={"likes": "parity"}),
            "interests names 'likes', no user column of values and no context column. Known: none.",
        ),
        (ColumnVectorConfig(column="parity"), "column 'parity' is no item column of kind vector. Known: none."),
    ],
)
def test_what_cannot_be_compared_by_is_refused(config, told):
    with pytest.raises(ConfigError) as caught:
        config.build().fit(LOG, parities(5), None)
    assert told in str(caught.value)


def test_a_column_without_any_vector_is_refused():
    items = catalogue_of({"image": ["1,2,3", None, "x,y"]}, image={"kind": "vector", "dim": 2})
    with pytest.raises(ConfigError, match=r"no item has a vector of 2 floats in column 'image'. Check its dim and separator"):
        ColumnVectorConfig(column="image").build().fit(log_of([0], n_items=3), items)


def test_what_was_not_fitted_says_so():
    for config in (ContentConfig(), ColumnVectorConfig(column="image")):
        with pytest.raises(NotFittedError, match="Call fit"):
            config.build().recall(queries_of([0]), 1)


def test_items_without_a_vector_never_come_and_have_no_neighbours():
    items = catalogue_of({"image": ["1,0", None, "0.9,0.1", "0,0", "0,1"]}, image={"kind": "vector", "dim": 2})
    channel = ColumnVectorConfig(column="image").build().fit(LOG, items)
    assert channel.recall(queries_of([0], exclude=[[0]]), 5)[0].tolist() == [[2, 4, -1]]
    assert channel.similar(np.array([1, 0]), 2)[0].tolist() == [[-1, -1], [2, 4]]


def test_approximate_indexes_are_tuned_on_users(monkeypatch, caplog):
    asked = []
    from recsys.recall.vector import VectorIndex

    tune = VectorIndex._tune
    monkeypatch.setattr(VectorIndex, "_tune", lambda self, vectors, queries: (asked.append(queries), tune(self, vectors, queries)))
    log = log_of(*[[i, i + 1] for i in range(0, 40, 2)], n_items=60)
    with caplog.at_level(logging.INFO):
        channel = ContentConfig(kind="hnsw", decay=1).build().fit(log, parities(60))
    np.testing.assert_allclose(asked[0], channel.user_vectors(typical_users(log)), atol=1e-6)
    assert "content vectors: 2 floats of parity=2; interests: none" in caplog.text


# From files to answers.

YAML = {
    "data": {
        "interactions": {"path": "log.csv", "user": "u", "item": "i", "time": "t"},
        "items": {"id": "i", "columns": {"image": {"kind": "vector", "dim": 3}, "kind": "category"}},
    },
    "recall": {"channels": {"look": {"type": "vector", "column": "image"}, "content": {"columns": {"image": 1.0}}}},
}


@pytest.mark.parametrize("form", ["comma", "space", "json", "parquet lists"])
def test_vectors_of_a_file_feed_recall_whatever_their_form(tmp_path: Path, form: str):
    vectors = {f"i{n}": [float(n % 2), float(1 - n % 2), n / 100] for n in range(8)} | {"new": [1.0, 0.0, 0.02], "bare": None}
    config = json.loads(json.dumps(YAML))
    column = config["data"]["items"]["columns"]["image"]
    if form == "parquet lists":
        pq.write_table(pa.table({"i": list(vectors), "image": list(vectors.values()), "kind": ["k"] * 10}), tmp_path / "items.parquet")
        config["data"]["items"]["path"] = str(tmp_path / "items.parquet")
    else:
        written = {"comma": ",", "space": " ", "json": ", "}[form].join
        cells = ["" if v is None else written(map(str, v)) for v in vectors.values()]
        cells = [f"[{c}]" if form == "json" and c else c for c in cells]
        if form == "space":
            column["separator"] = " "
        pd.DataFrame({"i": list(vectors), "image": cells, "kind": "k"}).to_csv(tmp_path / "items.csv", index=False)
        config["data"]["items"]["path"] = str(tmp_path / "items.csv")
    rows = [(f"u{u}", f"i{(2 * n + u) % 8}", 1_600_000_000 + 60 * (8 * u + n)) for u in range(6) for n in range(3)]
    pd.DataFrame(rows, columns=["u", "i", "t"]).to_csv(tmp_path / "log.csv", index=False)
    config["data"]["interactions"]["path"] = str(tmp_path / "log.csv")
    prepared = prepare(Config.model_validate(config))
    (tmp_path / "state").mkdir()
    prepared.save(tmp_path / "state")
    prepared = Prepared.load(tmp_path / "state")
    np.testing.assert_allclose(prepared.catalogue.vectors["image"][prepared.log.items.row("i3")], [1, 0, 0.03], atol=1e-6)
    fitted = channels.fit(
        Config.model_validate(config).recall.channels,
        prepared.log,
        vectors=None,
        encode=lambda _: np.empty((0, 0)),
        items=prepared.catalogue,
    )
    odd = [prepared.log.items.row(i) for i in ("i1", "i3")]
    for name in ("look", "content"):
        found, _ = fitted[name].recall(queries_of(odd, exclude=[odd]), 3)
        assert set(prepared.log.items.outside(found[0])) == {"i5", "i7", "new"}, name
