"""The offline commands end to end on a small log: trained on Ray, judged, published, found again, searched."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster import evaluation, pipeline
from cluster.registry_url import open_registry
from cluster.search import search_config, with_values
from cluster.steps import prepare as prepare_in_workdir
from cluster.workdir import settle
from recsys import packing
from recsys.config import load
from recsys.ctr_protocol import judge_ctr
from recsys.errors import ConfigError, DataError, RequestError
from recsys.funnel import Funnel
from recsys.prepared import Prepared, prepare
from recsys.report_page import page
from tests.small import Small, config_of, recipe_of, write_data

README = Path(__file__).parents[2] / "README.md"


def console() -> Console:
    return Console(record=True, width=160, force_terminal=False)


@pytest.mark.ray
def test_train_publishes_promotes_the_first_and_is_not_repeated(tmp_path, ray_cluster):
    write_data(tmp_path)
    config, told = config_of(tmp_path, "two_tower.refit=false"), console()
    version = pipeline.train(config, told)
    registry = open_registry(config.place("registry"))
    assert registry.aliases() == {"production": version}
    manifest = registry.manifest("production")
    assert 0 <= manifest.metrics["ndcg@10"] <= 1
    assert manifest.index_recall == 1.0
    assert manifest.bytes_per_item > 0
    folder = registry.local_copy(version)
    assert packing.differences(Funnel.load(folder), folder) == []
    text = told.export_text()
    assert "rows read" in text
    assert "still there after" in text

    again = console()
    assert pipeline.train(config, again) == version
    assert "nothing to train" in again.export_text()

    shown = console()
    pipeline.recommend(config, ["u0", "nobody"], shown, k=3)
    text = shown.export_text()
    assert "Item" in text
    assert "user nobody" in text and "new user, led by popular" in text
    assert text.count("new user") == 1, "u0 has a history"

    report = evaluation.evaluate(config, console(), models=["popular", "funnel"], json=tmp_path / "r.json", html=tmp_path / "r.html")
    baselines = {"Pop", "ItemKNN", "EASE", "Markov"}  # stand beside whatever is asked for
    assert {row["model"] for row in report["rows"]} == {"popular", "funnel"} | baselines
    assert json.loads((tmp_path / "r.json").read_text())["protocol"] == "next_item"
    assert "<table" in (tmp_path / "r.html").read_text()


@pytest.mark.ray
def test_tune_tries_the_configuration_as_it_is_and_writes_the_best(tmp_path, ray_cluster):
    write_data(tmp_path)
    config = config_of(tmp_path, "two_tower.training.learning_rate=0.0001", "two_tower.training.embedding_learning_rate=0.0001")
    space = tmp_path / "space.yaml"
    space.write_text(
        "metric: ndcg@10\ntrials: 3\nmax_epochs: 3\nparameters:\n  two_tower.training.embedding_learning_rate: {choice: [0.1, 0.2]}\n"
        "  two_tower.model.user_hidden: {choice: [[], [8]]}\n"
    )
    told = console()
    best = search_config(config, space, told, write=tmp_path / "best.yaml")
    assert set(best) == {"two_tower.training.embedding_learning_rate", "two_tower.model.user_hidden"}
    assert "as configured" in told.export_text()
    overlaid = load([tmp_path / "small.yaml", tmp_path / "best.yaml"])
    assert overlaid.two_tower.training.embedding_learning_rate == best["two_tower.training.embedding_learning_rate"]


def test_a_search_space_with_an_unknown_metric_or_path_is_refused(small):
    from cluster.search import _model_of

    with pytest.raises(ConfigError, match="no model reports"):
        _model_of("accuracy")
    with pytest.raises(ConfigError, match=r"two_tower\.training\.lr"):
        with_values(small.config.document(), small.config.base, {"two_tower.training.lr": 1})


def test_state_is_named_by_what_made_it(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path)
    _, key = prepare_in_workdir(config, console())
    again = console()
    assert prepare_in_workdir(config, again)[1] == key
    assert "up to date" in again.export_text()
    with (tmp_path / "log.csv").open("a") as log:
        log.write("u0,i39,1700500000,web\n")
    assert prepare_in_workdir(config, console())[1] != key
    assert prepare_in_workdir(config_of(tmp_path, "features.dim=4"), console())[1] != key


def test_two_that_prepare_the_same_data_at_once_both_get_it(tmp_path, monkeypatch):
    write_data(tmp_path)
    config, together, save = config_of(tmp_path), threading.Barrier(2), Prepared.save

    def save_together(self, folder):
        save(self, folder)
        together.wait(60)

    monkeypatch.setattr(Prepared, "save", save_together)
    with ThreadPoolExecutor(2) as pool:
        (first, key), (second, other) = pool.map(lambda _: prepare_in_workdir(config, console()), range(2))
    assert key == other
    assert len(first.log) == len(second.log) > 0
    assert [p.name for p in (tmp_path / "state" / "data").iterdir()] == [key], "nothing unfinished is left"


def test_a_complete_folder_takes_its_name_unless_another_has_it(tmp_path):
    for name in ("ours", "again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    assert settle(tmp_path / "ours", tmp_path / "kept")
    assert not settle(tmp_path / "again", tmp_path / "kept")
    assert (tmp_path / "kept" / "who").read_text() == "ours"
    with pytest.raises(FileNotFoundError):
        settle(tmp_path / "none", tmp_path / "kept")


def test_ctr_ranks_the_logs_own_rows(tmp_path):
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 3_000), rng.integers(0, 20, 3_000)
    rating = np.where((user + item) % 2 == 0, 5, 1)  # an interaction that no sum of a user's and an item's weight can tell
    lines = [f"{u},{i},{r},{1_700_000_000 + n}" for n, (u, i, r) in enumerate(zip(user, item, rating, strict=True))]
    (tmp_path / "r.csv").write_text("user_id,item_id,rating,ts\n" + "\n".join(lines) + "\n")
    (tmp_path / "c.yaml").write_text(
        f"name: pairs\nworkdir: {tmp_path}/state\ndata:\n  interactions: {{path: r.csv, time: ts}}\n  labels: {{like: {{column: rating, at_least: 4}}}}\n"
        "  impressions: true\nsplit: {by: random}\nfine_rank: {features: [user_id, item_id], training: {epochs: 8, batch_size: 256, granule: 64,"
        " learning_rate: 0.01, embedding_learning_rate: 0.1}}\n"
    )
    config = load([tmp_path / "c.yaml"])
    prepared = prepare(config)
    steps = recipe_of(config, prepared)
    found = judge_ctr(config, prepared, tmp_path / "examples", steps.train)
    auc = {row["model"]: row["metrics"]["auc"] for row in found["rows"]}
    assert list(auc) == ["item_prior", "lr", "deepfm"]
    assert auc["lr"] < 0.65
    assert auc["deepfm"] > 0.95
    with pytest.raises(ConfigError, match="no row 'xdeepfm'"):
        judge_ctr(config, prepared, tmp_path / "examples", steps.train, models=["xdeepfm"])
    html = page("pairs", found)
    assert "deepfm" in html
    assert "<script" not in html


def test_ctr_needs_both_classes(small, tmp_path):
    steps = recipe_of(small.config)
    with pytest.raises(DataError, match=r"Declare data\.labels"):
        judge_ctr(small.config, steps.prepared, tmp_path, steps.train)


def test_the_ten_lines_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    """The YAML under "Your own log" is taken from the README and used, on files that have the columns it names."""
    yaml = re.search(r"## Your own log.*?```yaml\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    (tmp_path / "mine.yaml").write_text(yaml)
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"s{i}", 1_700_000_000 + 600 * n, "click")
        for n, (u, i) in enumerate(zip(rng.integers(0, 40, 900), rng.integers(0, 30, 900), strict=True))
    ]
    (tmp_path / "log.csv").write_text("uid,sku,ts,action\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n")
    (tmp_path / "items.csv").write_text(
        "sku,name,category,tags,price\n" + "\n".join(f"s{i},Thing {i},c{i % 3},a b{i % 2},{i + 1}.5" for i in range(30)) + "\n"
    )
    monkeypatch.chdir(tmp_path)
    quick = [
        "two_tower.training.epochs=1",
        "fine_rank.training.epochs=1",
        "two_tower.training.batch_size=256",
        "fine_rank.training.batch_size=256",
    ]
    config = load([tmp_path / "mine.yaml"], quick)
    steps = recipe_of(config)
    funnel = steps.judged()
    queries = funnel.queries([])
    assert len(queries) == 0
    held_out = steps.held_out()
    pages = funnel.page(held_out.queries(np.arange(3)), funnel.recommend(held_out.queries(np.arange(3))))
    assert all(page for page in pages)
    assert pages[0][0].title.startswith("Thing")


def test_pages_without_a_service_take_a_filter_as_http_does(small: Small):
    config = small.config.model_copy(update={"registry": str(small.registry.root)})

    def shown(only: str) -> str:
        told = console()
        pipeline.recommend(config, ["u0"], told, k=40, only=only)
        return told.export_text()

    assert "Item 1 " in shown('{"colour": "blue"}')
    assert "Item 2 " not in shown('{"colour": "blue"}'), "even items are red"
    with pytest.raises(RequestError, match=r"'filter' is 'colour=blue', expected a JSON object by item column, such as"):
        shown("colour=blue")
    with pytest.raises(RequestError, match=r"'filter.color' is no item column that can be filtered by. Did you mean 'colour'\?"):
        shown('{"color": "blue"}')
