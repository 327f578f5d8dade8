"""The command `evaluate`: protocols and splits, files in parts, the report as JSON and page, and Ray's road equal to the other."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster import evaluation, report_table, trainers
from recsys.baselines import NAMES
from recsys.config import Config, load
from recsys.contenders import assemble, contenders, fit_here
from recsys.errors import DataError
from recsys.evaluate import judge_here
from recsys.report_page import page
from tests.small import Small, config_of, recipe_of, write_data


def console() -> Console:
    return Console(record=True, width=150, force_terminal=False)


def rows_of(document):
    return {row["model"]: row for row in document["rows"]}


def parts(folder: Path, ordered: bool) -> Config:
    """Three files: each user's last event is the test; with `ordered` the parts follow each other in time as well."""
    lines = {"train": [], "valid": [], "test": []}
    for u in range(12):
        for n in range(6):
            part = ("train", "train", "train", "train", "valid", "test")[n]
            time = 1_000 * n + u if ordered else 10_000 * u + n
            lines[part].append(f"u{u},i{(u * 5 + n * (1 + u % 2)) % 17},{time}")
    for part, rows in lines.items():
        (folder / f"{part}.csv").write_text("user_id,item_id,ts\n" + "\n".join(rows) + "\n")
    (folder / "c.yaml").write_text(
        f"name: parts\nworkdir: {folder}/state\ndata:\n  interactions: {{train: train.csv, valid: valid.csv, test: test.csv, time: ts}}\n"
    )
    return load([folder / "c.yaml"])


@pytest.mark.parametrize(("ordered", "protocol"), [(True, "time"), (False, "next_item")])
def test_files_in_parts_are_judged_as_they_are_cut(tmp_path, ordered, protocol):
    config = parts(tmp_path, ordered)
    document = evaluation.evaluate(config, console(), models=["popular"])
    assert document["protocol"] == protocol
    assert document["users"] == 12
    assert dict(map(tuple, document["account"]))["test (by parts)"] == 12
    for asked in ("next_item", "top_n", "ncf"):
        found = evaluation.evaluate(config, console(), protocol=asked, models=["popular"])
        assert (found["protocol"], found["users"], found["seeds"]) == (asked, 12, 1)
        assert set(rows_of(found)) == {"popular", *NAMES}


def test_parts_that_mix_times_are_top_n(tmp_path):
    config = parts(tmp_path, ordered=False)
    test = (tmp_path / "test.csv").read_text().replace(",5\n", ",1\n")  # u0's test event comes early
    (tmp_path / "test.csv").write_text(test)
    assert evaluation.evaluate(config, console(), models=["popular"])["protocol"] == "top_n"


def test_parts_fit_on_train_alone(tmp_path):
    config = parts(tmp_path, ordered=False)
    steps = recipe_of(config)
    np.testing.assert_array_equal(steps.cut.judged_mask, steps.prepared.split.train)


def test_a_protocol_brings_its_split_where_the_configurations_own_is_another(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path)
    assert evaluation.split_for(config, None) == config.split
    assert evaluation.split_for(config, "ncf") == config.split  # leave one out serves ncf
    assert evaluation.split_for(config, "ctr") == config.split
    top_n = evaluation.split_for(config, "top_n")
    assert (top_n.by, top_n.ratio, top_n.per_user) == ("random", (8, 1, 1), True)
    assert evaluation.split_for(config, "time").by == "time"


def test_top_n_is_the_mean_of_its_seeds(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path, "evaluate.seeds=2")
    both = evaluation.evaluate(config, console(), protocol="top_n", models=["popular"])
    one, two = (
        evaluation.evaluate(config_of(tmp_path, "evaluate.seeds=1", f"split.seed={seed}"), console(), protocol="top_n", models=["popular"])
        for seed in (1, 2)
    )
    for metric in ("ndcg@10", "coverage@10"):
        mean = (rows_of(one)["EASE"]["metrics"][metric] + rows_of(two)["EASE"]["metrics"][metric]) / 2
        assert rows_of(both)["EASE"]["metrics"][metric] == pytest.approx(mean)
    assert both["seeds"] == 2
    assert rows_of(both)["EASE"]["sd_of_seeds"]["ndcg@10"] >= 0


def test_cold_and_warm_users_are_told_apart(tmp_path):
    write_data(tmp_path)
    with (tmp_path / "log.csv").open("a") as log:
        log.writelines(f"new{n},i{n},{1_700_500_000 + n},web\n" for n in range(8))
    document = evaluation.evaluate(config_of(tmp_path, "split.by=time"), console(), models=["item_cf", "popular"])
    assert 0 < document["warm_users"] < document["users"]
    rows = rows_of(document)
    assert rows["item_cf"]["cold"]["ndcg@10"] == 0  # no history, no neighbours
    n, warm = document["users"], document["warm_users"]
    parts = rows["popular"]["warm"]["hit@10"] * warm + rows["popular"]["cold"]["hit@10"] * (n - warm)
    assert rows["popular"]["metrics"]["hit@10"] == pytest.approx(parts / n, abs=0.02)  # users whose items were all had count in neither
    shown = console()
    for table in report_table.tables(document):
        shown.print(table)
    assert "cold" in shown.export_text()


def test_ncf_with_a_file_of_negatives(tmp_path):
    write_data(tmp_path)
    lines = [f"(u{u},x)\t" + "\t".join(f"i{(2 * n + (u + 1) % 2) % 40}" for n in range(6)) for u in range(60)]
    (tmp_path / "negatives").write_text("\n".join(lines) + "\n")
    config = config_of(tmp_path, "evaluate.given.path=negatives")
    document = evaluation.evaluate(config, console(), protocol="ncf", models=["item_cf"])
    assert document["sampled"] is True
    # Negatives are all of the other half, which an item-based model tells apart without fail.
    assert rows_of(document)["ItemKNN"]["metrics"]["hit@5"] == 1.0
    told = console()
    told.print(report_table.tables(document)[0])
    assert "sampled" in told.export_text()
    (tmp_path / "negatives").write_text(lines[0] + "\n")
    with pytest.raises(DataError, match="no negatives for user"):
        evaluation.evaluate(config, console(), protocol="ncf", models=["item_cf"])


def test_the_whole_command_writes_json_and_a_page(tmp_path):
    """Everything that learns is trained in this process: the log is small, and the reason is logged."""
    write_data(tmp_path)
    told = console()
    document = evaluation.evaluate(config_of(tmp_path), told, json=tmp_path / "r.json", html=tmp_path / "r.html")
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["rows"] == document["rows"]
    assert [r["kind"] for r in kept["rows"]] == sorted((r["kind"] for r in kept["rows"]), key=["channel", "stage", "baseline"].index)
    names = set(rows_of(document))
    assert names >= {"two_tower", "item_cf", "merged", "coarse", "fine", "funnel", *NAMES}
    html = (tmp_path / "r.html").read_text()
    assert "<script" not in html
    assert not re.findall(r"(?:src|href)=|https?://|url\(", html)
    for name in names:
        assert name in html
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) >= 7 + 2 * 12  # dots, two curves, two scatters, waterfall, forest; bars of every row, twice
    assert all("<title>" in d and "<desc>" in d and 'role="img"' in d for d in drawings)
    assert "prefers-color-scheme:dark" in html
    assert "leave one out by time" in html
    text = told.export_text()
    assert "two_tower" in text
    assert "still there after" in text
    again = evaluation.evaluate(config_of(tmp_path), console())
    for name in names:  # what is trained is kept, and the figures are the same
        assert rows_of(again)[name]["metrics"] == rows_of(document)[name]["metrics"]


def test_a_page_escapes_what_a_data_set_brings(tmp_path):
    write_data(tmp_path)
    document = evaluation.evaluate(config_of(tmp_path), console(), models=["popular"])
    document["rows"][0]["model"] = "<b>bold</b>"
    html = page("<script>alert(1)</script>", document)
    assert "<script" not in html
    assert "<b>bold</b>" not in html


def test_by_size_or_by_word_ray_is_used_or_not(small: Small, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    steps = recipe_of(small.config)
    assert evaluation.on_ray(small.config, steps.prepared) == (False, "600 events; from 2,000,000 on Ray is worth its start")
    monkeypatch.setattr(evaluation, "LARGE", 500)
    assert evaluation.on_ray(small.config, steps.prepared)[0]
    said = small.config.model_copy(update={"evaluate": small.config.evaluate.model_copy(update={"on_ray": False})})
    assert evaluation.on_ray(said, steps.prepared) == (False, "evaluate.on_ray is false")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert evaluation.on_ray(small.config, steps.prepared) == (True, "a cluster is given")


def test_a_model_that_was_trained_before_is_not_trained_again(small: Small, tmp_path):
    steps = recipe_of(small.config)
    assert steps.base_tower.exists()
    done = tmp_path / "two_tower" / "model"
    done.mkdir(parents=True)
    (done / "model.json").write_text("{}")
    section = small.config.two_tower
    trained = trainers.train_here(console(), tmp_path, tmp_path / "nothing", section.model, section.training, name="two_tower")
    assert trained == done


@pytest.mark.ray
def test_fits_and_judging_on_ray_equal_those_in_process(small: Small, ray_cluster, monkeypatch):
    steps = recipe_of(small.config)
    known = steps.prepared.log.where(steps.cut.judged_mask)
    held_out = steps.held_out("next_item")
    who = contenders(steps.config, None, known.n_items)
    monkeypatch.setattr("recsys.judging.CHUNK", 16)
    told: list[str] = []
    here, rows = assemble(steps, who, held_out, width=20, fit_all=fit_here)
    far, far_rows = assemble(steps, who, held_out, width=20, fit_all=lambda c, log: evaluation.fit_on_ray(c, log, told.append))
    assert set(told) == set(rows.fits) - {"two_tower", "realtime", "merged", "coarse", "fine", "funnel", "Markov"}
    assert set(far_rows.fits) == set(rows.fits)
    users: list[int] = []
    one, two = judge_here(here, held_out), evaluation.judge_on_ray(far, held_out, users.append)
    assert sum(users) == 60
    assert set(one.ranked) == set(two.ranked)
    for name, lists in one.ranked.items():
        np.testing.assert_array_equal(lists, two.ranked[name], err_msg=name)
    for stage, share in one.kept.items():
        np.testing.assert_array_equal(share, two.kept[stage])
    np.testing.assert_allclose(one.agreement, two.agreement)
    given = replace(held_out, given=np.tile(np.arange(12, dtype=np.int32), (60, 1)))
    one, two = judge_here(here, given), evaluation.judge_on_ray(far, given, users.append)
    for name, lists in one.ranked.items():
        np.testing.assert_array_equal(lists, two.ranked[name], err_msg=f"{name}, given")


def test_pipelines_evaluate_is_this(tmp_path):
    write_data(tmp_path)
    assert set(rows_of(evaluation.evaluate(config_of(tmp_path), console(), models=["popular"]))) == {"popular", *NAMES}
