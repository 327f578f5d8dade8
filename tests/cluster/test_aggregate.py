"""Aggregates on Ray Data and in `features describe`: the same values as in one process, and a table that says what they are."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from cluster import features_report
from recsys.errors import ConfigError
from recsys.prepared import prepare
from tests.small import config_of, write_data

AGGREGATES = {
    "user_n": {"kind": "count", "key": "user", "window": "24h"},
    "item_device": {"kind": "count", "key": ["item", "device"], "decay": "7d"},
    "colour_reach": {"kind": "distinct", "key": "colour", "of": "country"},
    "newest": {"kind": "last", "key": "user", "n": 2},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aggregate")
    write_data(folder, users=20)
    return config_of(folder, f"features.aggregates={json.dumps(AGGREGATES)}")


def test_describe_says_what_each_aggregate_is_and_covers(config):
    said = io.StringIO()
    rows = {r["feature"]: r for r in features_report.describe(config, Console(file=said, width=200))}
    assert "user_n" in said.getvalue()
    assert rows["user_n"]["window"] == "24h"
    assert rows["item_device"]["window"] == "decay 7d"
    assert rows["user_n"]["coverage"] == pytest.approx(0.9), "each of 20 users has 10 events, the first has none before it"
    assert rows["user_n"]["staleness_s"] == 3_600
    assert rows["user_n"]["keys"] == 20
    assert 0 < rows["user_n"]["bytes"] < 300
    assert rows["user_n"]["distribution"][1] == pytest.approx(4.5)


def test_describe_without_aggregates_says_how_to_declare_one(tmp_path):
    write_data(tmp_path, users=4)
    with pytest.raises(ConfigError, match=r"features\.aggregates declares nothing to describe\. Declare one, such as `item_ctr"):
        features_report.describe(config_of(tmp_path), Console(file=io.StringIO()))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, which asks its own settings and pandas' old names
def test_the_log_dealt_by_key_gives_the_values_of_one_process(config, ray_cluster):
    from cluster import aggregate

    prepared = prepare(config)
    inputs, log = prepared.aggregates, prepared.log
    asof = prepared.live.source.asof
    expected = asof.values(asof.at_rows(np.arange(len(log))))
    rows = aggregate.as_dataset(log, prepared.told)
    for group in inputs.plan.groups:
        got = sorted(aggregate.values(rows, inputs, log, group, parts=3).take_all(), key=lambda row: row["position"])
        assert [row["position"] for row in got] == list(range(len(log)))
        for f in group.features:
            values = np.array([row[f.name] for row in got])
            np.testing.assert_allclose(values, expected[f.name], rtol=1e-9, err_msg=f.name)
