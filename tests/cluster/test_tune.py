"""Search: spaces are checked as a whole, ASHA finds the planted optimum, a second call keeps what is finished."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.tune import SearchResult, Trial, TuneConfig, load_space, overlay, search, write_overlay
from recsys.errors import ConfigError, TrainingError

Report = Callable[[Mapping[str, float]], None]


def test_a_space_with_three_faults_names_all_three(tmp_path: Path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "metric: auc\ntrials: 0\nparameters:\n  a.b: {uniform: [1, 0]}\n  a.c: {choice: [1], randint: [0, 3]}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError) as raised:
        load_space(path)
    assert len(raised.value.faults) == 3
    assert "smaller number first" in str(raised.value)
    assert "exactly one of" in str(raised.value)


@pytest.mark.parametrize("text", ["- a", "", "a: [", "\t:"])
def test_a_file_that_is_no_mapping_is_refused_with_a_sentence(tmp_path: Path, text: str):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match="search space"):
        load_space(tmp_path / "space.yaml")


def test_the_overlay_nests_dotted_paths():
    assert overlay({"a.b.c": 1, "a.b.d": 2, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


def test_the_written_overlay_is_yaml_and_says_how_good_it_was(tmp_path: Path):
    result = SearchResult("auc", [Trial({"m.lr": 0.1}, {"auc": 0.71}, 3), Trial({"m.lr": 0.2}, {"auc": 0.7}, 3)])
    write_overlay(tmp_path / "best.yaml", result)
    text = (tmp_path / "best.yaml").read_text()
    assert yaml.safe_load(text) == {"m": {"lr": 0.1}}
    assert text.startswith("# The best of 2 trials by auc: auc 0.7100")


def parabola(values: dict[str, Any], report: Report) -> None:
    """Best at lr = 0.3; its metric falls again after the third epoch, as an overfitted model's does."""
    folder = Path(values["folder"])
    with (folder / "runs").open("a") as file:
        file.write("x")
    for epoch in range(5):
        report({"ndcg@10": 1 - (values["model.lr"] - 0.3) ** 2 - 0.01 * abs(epoch - 2), "epoch": float(epoch)})


def broken(values: dict[str, Any], report: Report) -> None:
    raise TrainingError(f"lr {values['model.lr']} diverged")


@pytest.mark.ray
def test_the_search_finds_the_optimum_is_never_worse_than_the_start_and_resumes(ray_cluster: str, tmp_path: Path):
    space = TuneConfig(
        metric="ndcg@10",
        trials=6,
        grace_epochs=1,
        parameters={"model.lr": {"uniform": (0.0, 1.0)}, "folder": {"choice": (str(tmp_path),)}},  # type: ignore[dict-item]
    )
    seen: list[Trial] = []
    first = {"model.lr": 0.31, "folder": str(tmp_path)}
    result = search(space, parabola, storage=str(tmp_path), name="search", first=first, progress=seen.append)
    assert len(result.trials) == 6
    assert result.best.metrics["ndcg@10"] >= 1 - 0.01**2 - 1e-9, "the starting point scores this much in its third epoch"
    assert result.best.metrics["epoch"] == 2, "a trial counts with its best epoch, which early stopping restores"
    assert sum(t.epochs for t in result.trials) < 30, "ASHA gives weak trials up early"
    assert seen
    again = search(space, parabola, storage=str(tmp_path), name="search")
    assert again.best.values == result.best.values
    assert (tmp_path / "runs").read_text() == "x" * 6, "no finished trial runs twice"


@pytest.mark.ray
def test_when_every_trial_fails_the_reason_is_told(ray_cluster: str, tmp_path: Path):
    space = TuneConfig(metric="auc", trials=1, parameters={"model.lr": {"choice": (7,)}})  # type: ignore[dict-item]
    with pytest.raises(TrainingError, match=r"None of 1 trials gave a result.*lr 7 diverged"):
        search(space, broken, storage=str(tmp_path), name="failing")
