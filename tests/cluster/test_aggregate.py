"""Aggregates on Ray Data and in `features describe`: the same values as in one process, and a table that says what they are."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from cluster import aggregate, aggregate_parts, features_report
from recsys.errors import ConfigError
from recsys.examples import impression_examples
from recsys.features.aggregates import AggregateConfig
from recsys.features.asof import Asked
from recsys.prepared import prepare
from tests.small import config_of, write_data

AGGREGATES = {
    "user_n": {"kind": "count", "key": "user", "window": "24h"},
    "item_device": {"kind": "count", "key": ["item", "device"], "decay": "7d"},
    "colour_reach": {"kind": "distinct", "key": "colour", "of": "country"},
    "newest": {"kind": "last", "key": "user", "n": 2},
}
MORE = {
    "devices": {"kind": "last", "key": "user", "of": "device", "n": 3},
    "device_n": {"kind": "count", "key": "device", "window": "1h"},
    "hour_rate": {"kind": "rate", "key": "hour"},
    "session_n": {"kind": "count", "key": "user", "until": "session"},
    "user_style": {"kind": "rate", "key": ["user", "style"], "until": "day", "prior": 0.25},
    "style_n": {"kind": "count", "key": "style", "window": "24h"},
    "style_now": {"kind": "count", "key": ["style", "device"], "decay": "6h"},
    "style_rate": {"kind": "rate", "key": "style"},
    "style_price": {"kind": "mean", "key": "style", "of": "price"},
    "style_dear": {"kind": "max", "key": "style", "of": "price"},
    "style_cheap": {"kind": "min", "key": "style", "of": "price", "window": "24h"},
    "style_since": {"kind": "recency", "key": "style"},
    "screen": {"kind": "mean", "key": "item", "of": "width"},
    "same_colour": {"kind": "match", "of": "colour", "n": 3},
    "dearer": {"kind": "ratio", "parts": ["price", "style_price"]},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aggregate")
    write_data(folder, users=20)
    return config_of(folder, f"features.aggregates={json.dumps(AGGREGATES)}")


def test_describe_says_what_each_aggregate_is_and_covers(config):
    said = io.StringIO()
    rows = {r["feature"]: r for r in features_report.describe(config, Console(file=said, width=80))}
    text = said.getvalue()
    cells = {cell.strip() for line in text.splitlines() for cell in line.split("│")}
    assert set(AGGREGATES) | {a["kind"] for a in AGGREGATES.values()} <= cells, "nothing is cut on a terminal of 80"
    assert rows["user_n"]["window"] == "24h"
    assert rows["item_device"]["window"] == "decay 7d"
    assert rows["user_n"]["coverage"] == pytest.approx(0.9), "each of 20 users has 10 events, the first has none before it"
    assert rows["user_n"]["staleness_s"] == 3_600
    assert rows["user_n"]["keys"] == 20
    assert 0 < rows["user_n"]["bytes"] < 300
    assert rows["user_n"]["distribution"][1] == pytest.approx(4.5)


def test_describe_names_what_no_row_of_the_log_can_be(config):
    asked = {"n": {"kind": "count", "key": "user", "events": ["clik", "click"]}, "r": {"kind": "rate", "key": "item", "of": "bought"}}
    good = {"ok": {"kind": "rate", "key": "item", "of": "click", "events": ["click"]}, "ctr": {"kind": "rate", "key": "item"}}
    declared = {name: AggregateConfig.model_validate(a) for name, a in (asked | good).items()}
    told = features_report.unheard(declared, prepare(config).log)
    assert [sentence.split(",")[0] for sentence in told] == ["n asks for 'clik'", "r asks for 'bought'"]
    assert told[0].endswith("(its events: click; its labels: positive). Misspelt, or only known live?")


def test_describe_without_aggregates_says_how_to_declare_one(tmp_path):
    write_data(tmp_path, users=4)
    with pytest.raises(ConfigError, match=r"features\.aggregates declares nothing to describe\. Declare one, such as `item_ctr"):
        features_report.describe(config_of(tmp_path), Console(file=io.StringIO()))


# ---- by key -----------------------------------------------------------------------------------------------------------


def styled(folder, declared):
    """20 users, 200 events, whose items have none to three styles; the log tells how wide the screen was."""
    write_data(folder, users=20)
    rng = np.random.default_rng(0)
    head, *lines = (folder / "log.csv").read_text().splitlines()
    (folder / "log.csv").write_text("\n".join([f"{head},width", *(f"{line},{rng.integers(300, 400)}" for line in lines)]) + "\n")
    head, *lines = (folder / "items.csv").read_text().splitlines()
    styles = ["|".join(rng.permutation(["bold", "plain", "old", "new", "odd"])[: rng.integers(0, 4)]) for _ in lines]
    (folder / "items.csv").write_text("\n".join([f"{head},style", *map(",".join, zip(lines, styles, strict=True))]) + "\n")
    columns = ["data.interactions.context.width={kind: number}", "data.items.columns.style={kind: tags, separator: '|'}"]
    return config_of(folder, f"features.aggregates={json.dumps(declared)}", *columns)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Aggregates by every kind of key: with lists, with columns of the context, with the clock."""
    return prepare(styled(tmp_path_factory.mktemp("by_key"), AGGREGATES | MORE))


def instants(prepared, n: int = 400) -> Asked:
    """Pairs that no row of the log is, strangers and unknown items among them, at times between, before and behind its events."""
    rng, log, asof = np.random.default_rng(1), prepared.log, prepared.live.source.asof
    times = rng.uniform(log.time[0] - 9_000, log.time[-1] + 90_000, n)
    context = {name: rng.integers(-1, len(column.texts), n) for name, column in asof.context.items()}
    seen = np.searchsorted(log.time, times)
    return Asked(rng.integers(-1, log.n_users, n), rng.integers(-1, log.n_items, n), times, seen, context)


def dealt_here(asof, asked, groups, parts: int) -> dict[str, np.ndarray]:
    """What Ray Data does with the tasks, without Ray: map the blocks, group by part, map the groups."""
    shared = aggregate_parts.shared_by(asof, groups, parts)
    rows = pa.concat_tables([aggregate_parts.deal(block, shared) for block in aggregate_parts.blocks_of(asof, asked, groups)])
    part = rows["part"].to_numpy()
    answers = [aggregate_parts.answer(rows.filter(part == p), shared) for p in np.unique(part)]
    told: list[int] = []
    out = aggregate.collected(shared, asked, [pa.concat_tables(answers[:2]), *answers[2:]], told.append)
    assert sum(told) <= parts * len(shared.passes)
    return out


def assert_equal(got, expected, plan) -> None:
    assert set(got) == set(expected)
    for name, values in expected.items():
        if plan.aggregates[name].decay:
            np.testing.assert_allclose(got[name], values, rtol=1e-6, atol=1e-12, err_msg=name)
        elif plan.aggregates[name].kind == "mean":  # sums of fractions, in another order
            np.testing.assert_allclose(got[name], values, rtol=1e-12, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_parts_by_key_give_the_values_of_one_process(prepared, parts):
    asof, plan = prepared.live.source.asof, prepared.aggregates.plan
    for asked in (asof.at_rows(np.arange(len(asof.log))), instants(prepared)):
        assert_equal(dealt_here(asof, asked, plan.groups, parts), asof.values(asked), plan)


def test_blocks_are_cut_and_put_together_again(prepared, monkeypatch):
    monkeypatch.setattr(aggregate_parts, "BLOCK", 17)
    asof, plan = prepared.live.source.asof, prepared.aggregates.plan
    asked = instants(prepared)
    assert_equal(dealt_here(asof, asked, plan.groups, 4), asof.values(asked), plan)


def test_a_part_has_all_events_of_its_keys_and_no_more(prepared):
    asof, plan = prepared.live.source.asof, prepared.aggregates.plan
    shared = aggregate_parts.shared_by(asof, plan.groups, 5)
    wide = {one.by: one.wide for one in shared.passes}
    assert wide == {"user": False, "item": False, "colour": False, "device": False, "style": True, "hour": False}
    number = [one.by for one in shared.passes].index("user")
    assert {g.key for g in shared.passes[number].groups} == {("user",), ("user", "style")}, "a list beside a user goes where the user goes"
    blocks = aggregate_parts.blocks_of(asof, instants(prepared), plan.groups)
    dealt = pa.concat_tables([aggregate_parts.deal(block, shared) for block in blocks]).to_pandas()
    by_user = dealt[dealt["part"] // 5 == number]
    events = by_user[by_user["ask"] < 0]
    assert len(events) == len(asof.log)
    assert (events["part"] % 5 == events["user"] % 5).all()
    strangers = by_user[(by_user["ask"] >= 0) & (by_user["user"] < 0)]
    assert strangers["part"].nunique() == 5, "who has no key waits for no hot part"


def test_the_road_is_chosen_by_size_by_cluster_or_by_the_key(prepared, monkeypatch):
    asof = prepared.live.source.asof
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    far, reason = aggregate.on_ray(None, asof)
    assert (far, reason) == (False, f"200 events and {signals_of(asof)} signals take 0.0 GiB; from 4 GiB on Ray is worth its start")
    monkeypatch.setattr(aggregate, "LARGE_GIB", 1e-6)
    assert aggregate.on_ray(None, asof)[0]
    assert aggregate.on_ray(False, asof) == (False, "prepare.on_ray is false")
    monkeypatch.setattr(aggregate, "LARGE_GIB", 4.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert aggregate.on_ray(None, asof) == (True, "a cluster is given")


def signals_of(asof) -> int:
    return sum(len(group.signals) for group in asof.plan.groups)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray, which asks its own settings and pandas' old names
def test_prepared_on_ray_and_in_one_process_are_the_same(tmp_path, ray_cluster, caplog, monkeypatch):
    import ray

    monkeypatch.setattr(aggregate, "EVENTS_A_PART", 150)
    declared = {name: (AGGREGATES | MORE)[name] for name in ("user_n", "devices", "same_colour", "style_rate", "style_now")}
    config = styled(tmp_path, declared)
    caplog.set_level("INFO")
    near, far = prepare(config), prepare(config, roads=aggregate.Chosen(forced=True))
    assert "aggregates by key on Ray Data: prepare.on_ray is true" in caplog.text
    assert far.aggregates.scales.keys() == near.aggregates.scales.keys()
    for name, scale in near.aggregates.scales.items():
        assert far.aggregates.scales[name] == pytest.approx(scale, rel=1e-9), name
    rows = np.arange(0, 200, 7)
    expected, got = (impression_examples(p, p.moments(config), rows, "positive") for p in (near, far))
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(got[name], column, rtol=1e-5, err_msg=name)
    for ours, theirs in zip(features_report.described(far), features_report.described(near), strict=True):
        shown = [*ours.pop("distribution"), ours.pop("coverage"), ours.pop("staleness_s")]
        assert shown == pytest.approx([*theirs.pop("distribution"), theirs.pop("coverage"), theirs.pop("staleness_s")], nan_ok=True)
        assert ours == theirs
    far_away, reason = ray.get(ray.remote(num_cpus=1)(aggregate.on_ray).remote(None, near.live.source.asof))
    assert not far_away, "a task that waits for tasks may wait for ever"
    assert "a task on Ray itself" in reason
