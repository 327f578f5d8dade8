"""Merge weights inside the recipe: learnt from what the test never sees, once, and kept in the bundle's configuration."""

import numpy as np
import pytest

from recsys import blending
from recsys.config import Config
from recsys.prepared import prepare
from tests.small import config_of, recipe_of, write_data

LEARN = "recall.merge.learn=true"


def rows_of(steps):
    return np.concatenate([steps.cut.window, steps.cut.valid])


@pytest.mark.parametrize("split", ["{by: leave_one_out}", "{by: time}", "{by: random, per_user: true}"])
def test_questions_are_about_window_and_validation_and_never_about_the_test(tmp_path, split):
    write_data(tmp_path)
    config = config_of(tmp_path, f"split={split}", LEARN)
    prepared = prepare(config)
    steps = recipe_of(config, prepared)
    asked = blending.questions(prepared, steps.moments, steps.cut.base_mask, rows_of(steps), most=1_000, seed=1)
    assert not (prepared.split.test[rows_of(steps)]).any()
    log = prepared.log
    held = {(int(u), int(i)) for u, i in zip(log.user[rows_of(steps)], log.item[rows_of(steps)], strict=True)}
    for b in range(len(asked.relevant)):
        wanted = asked.relevant.items[asked.relevant.indptr[b] : asked.relevant.indptr[b + 1]]
        assert {(int(asked.groups[b]), int(i)) for i in wanted} <= held
        assert not set(wanted.tolist()) & set(asked.ask(np.array([b])).exclude[0].tolist())
    if split == "{by: leave_one_out}":
        assert set(asked.relevant.sizes.tolist()) <= {0, 1}


def test_a_random_split_gets_a_random_window(tmp_path):
    write_data(tmp_path)
    steps = recipe_of(config_of(tmp_path, "split={by: random, per_user: true}"))
    train = np.flatnonzero(steps.prepared.split.train)
    assert len(steps.cut.window) == len(train) - int(len(train) * 0.85)
    assert len(np.unique(steps.prepared.log.user[steps.cut.window])) > 30, "users of all times, not the newest ones"


def test_the_learnt_weights_are_in_force_in_every_funnel_and_learnt_once(tmp_path, monkeypatch):
    write_data(tmp_path)
    config = config_of(tmp_path, LEARN)
    said: list[str] = []
    steps = recipe_of(config)
    steps.say = said.append
    merge = steps.merging
    assert any(line.startswith("merge weights") for line in said)
    assert any("cross-validated" in line for line in said)
    funnel = steps.funnel(steps.cut.base_mask, steps.base_tower, None)
    assert funnel.config.recall.merge == merge
    assert Config.model_validate(funnel.config.document()).recall.merge.weights == merge.weights, "as the bundle keeps it"
    given = steps.funnel(steps.cut.base_mask, None, None)
    assert given.config.recall.merge == config.recall.merge, "rows without the tower's channel keep what was configured"

    monkeypatch.setattr(blending, "learn", None)
    again = recipe_of(config, steps.prepared)
    assert again.merging == merge


def test_what_is_not_to_be_learnt_is_taken_as_it_is(tmp_path):
    write_data(tmp_path)
    config = config_of(tmp_path)
    assert recipe_of(config).merging is config.recall.merge
