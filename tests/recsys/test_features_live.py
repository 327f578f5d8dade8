"""Declared aggregates from configuration to bundle: the values a loaded bundle serves are those of the log it was trained on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from recsys import examples, packing
from recsys.config import load
from recsys.data.leaks import separation
from recsys.errors import ConfigError, DataError
from recsys.features import states
from recsys.features.counting import home
from recsys.features.groups import Row
from recsys.features.live_items import ItemChange, MemoryItemLog
from recsys.features.snapshot import Bundled, Part, item_snapshot, packed_snapshot, unpacked_snapshot
from recsys.features.states import ItemSnapshot
from recsys.funnel import Funnel, FunnelRequest
from recsys.prepared import Prepared, prepare
from tests.small import YAML, bundled, config_of, write_data

AGGREGATES = {
    "item_n": {"kind": "count", "key": "item", "window": "30d"},
    "item_device_n": {"kind": "count", "key": ["item", "device"], "decay": "7d"},
    "user_n": {"kind": "count", "key": "user", "until": "day"},
    "user_colour": {"kind": "rate", "key": ["user", "colour"], "prior": 0.5},
    "user_price": {"kind": "mean", "key": "user", "of": "price"},
    "price_band": {"kind": "ratio", "parts": ["price", "user_price"]},
    "same_colour": {"kind": "match", "of": "colour", "n": 3},
    "since": {"kind": "recency", "key": "user"},
    "newest": {"kind": "last", "key": "user", "n": 2},
    "reach": {"kind": "distinct", "key": "colour", "of": "country", "window": "30d"},
    "where": {"kind": "concat", "parts": ["country", "device"], "buckets": 10},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return bundled(tmp_path_factory.mktemp("live"), f"features.aggregates={json.dumps(AGGREGATES)}")


def test_a_bundle_goes_on_from_the_states_of_its_training_log(served):
    _, final, bundle = served
    loaded = Funnel.load(bundle)
    at = float(final.live.source.asof.log.time.max()) + 1.0
    requests = [FunnelRequest(user_id=u, k=5, at=at, context={"device": d}) for u, d in (("u0", "web"), ("u7", "phone"), ("nobody", "?"))]
    offline, online = final.queries(requests), loaded.queries(requests)
    assert loaded.live.source.snapshot.at == at - 1.0
    items = np.tile(np.arange(len(final.items)), (3, 1))
    ours = final.live.query_fields(offline) | final.live.pair_fields(offline, items)
    theirs = loaded.live.query_fields(online) | loaded.live.pair_fields(online, items)
    assert set(ours) == set(theirs) == set(AGGREGATES)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    assert ours["item_n"].std() > 0
    assert len(np.unique(theirs["same_colour"][0])) == 2, "u0 has one colour only"
    assert packing.differences(loaded, bundle) == []


def test_columns_of_an_item_that_are_joined_follow_a_change_of_one_of_them(tmp_path):
    """i2 is red and cheap, i1 blue and cheap: told that i2 is blue, it has i1's joined value; told of its price alone, its own."""
    settings = ['features.aggregates.look={"kind": "concat", "parts": ["colour", "size"], "buckets": 1000}']
    settings.append('data.items.columns.size={"kind": "bins", "column": "price", "edges": [20]}')
    _, _, bundle = bundled(tmp_path, *settings)
    loaded = Funnel.load(bundle)
    red, blue = (loaded.item_columns["look"][loaded.items.row(i)] for i in ("i2", "i1"))
    assert red != blue
    for change, look in (({"colour": "blue"}, blue), ({"price": 4}, red), ({"colour": None}, None)):
        log, told = MemoryItemLog(), Funnel.load(bundle)
        log.change([ItemChange("i2", change)])
        told.follow(log.since(0).records)
        got = told.delta.columns["look"][told.delta.at[told.items.row("i2")] - len(told.items)]
        assert got == look if look is not None else got not in {red, blue}


def test_a_live_item_is_counted_as_one_of_the_bundle_is(served):
    """`new` and `cold` had three clicks each since the training, and reach a ranker as one partition's snapshot."""
    _, _, bundle = served
    loaded = Funnel.load(bundle)
    log = MemoryItemLog()
    log.change([ItemChange("new", {"colour": "red", "price": 5}), ItemChange("later", {})])
    source = loaded.live.source
    at, stream = source.snapshot.at + 10.0, source.stream
    for n, item in enumerate(["cold", "new", "ghost"] * 3):
        stream.apply(Row(at, 10**6 + n, f"u{n}", item, "click", float("nan"), {"positive": 1.0}, {"device": "web"}, told=True))
    part = unpacked_snapshot(packed_snapshot(source.inputs.plan, stream.of_items, at, (9,)))
    own = Bundled(source.snapshot, {}, source.coder, 1)
    source.snapshot = item_snapshot({0: part}, source.inputs, source.coder, own)  # before anybody told of the item
    loaded.follow(log.since(0).records)
    queries = loaded.queries([FunnelRequest("u0", 3, at, context={"device": "web"})])
    used = loaded.rank(queries, [["cold", "new", "later"]]).used
    for name in ("item_n", "item_device_n"):
        (values,) = used.pair_fields[name]
        place = {i: slot for slot, i in enumerate(loaded.items.outside(used.items[0]))}
        np.testing.assert_array_equal(values[place["new"]], values[place["cold"]])
        assert not np.allclose(values[place["new"]], values[place["later"]]), "whom nobody clicked is counted nothing"


def test_what_a_partition_has_not_published_keeps_the_bundles_counters(served):
    """Since the training each item had a click. Of three partitions one has published, then another but not yet every group, then all."""
    _, _, bundle = served
    source = Funnel.load(bundle).live.source
    plan, before, at = source.inputs.plan, source.snapshot, source.snapshot.at
    states = source.stream.unpack(source.stream.pack(source.stream.of_items))
    own = Bundled(before, states, source.coder, 3)
    for n, item in enumerate(source.coder.items.ids.to_pylist()):
        source.stream.apply(Row(at, 10**6 + n, "u1", item, "click", float("nan"), {"positive": 1.0}, {"device": "web"}, told=True))
    now = ItemSnapshot.of(source.inputs, source.coder, source.stream.of_items, at)

    def part(p: int, *, without: int | None = None) -> Part:
        mine = {(g, key): s for (g, key), s in source.stream.of_items.items() if home(key, 3) == p and g != without}
        return unpacked_snapshot(packed_snapshot(plan, mine, at, (4, 5, 6)))

    def expected(number: int, fresh: set[int]) -> dict[int, list[np.ndarray]]:
        keys = {source.coder.of_key(plan.groups[number], key, -1): home(key, 3) for g, key in source.stream.of_items if g == number}
        out = {}
        for looked, mine in ((now.groups[number], True), (before.groups[number], False)):
            out |= {c: [x[i] for x in looked.amounts] for i, c in enumerate(looked.codes) if (keys[c] in fresh) is mine}
        return out

    items = next(n for n, g in enumerate(plan.groups) if g.key == ("item",))
    homes = {home(key, 3) for g, key in states if g == items}
    assert homes == {0, 1, 2}, "each partition has an item"
    for parts, fresh, of_others in (({0: part(0)}, {0}, {0}), ({0: part(0), 1: part(1, without=items), 2: part(2)}, {0, 2}, {0, 1, 2})):
        got = item_snapshot(parts, source.inputs, source.coder, own)
        assert got.counted == (), "no one state of the log"
        for number, looked in got.groups.items():
            want = expected(number, fresh if number == items else of_others)
            assert looked.codes.tolist() == sorted(want)
            for i, code in enumerate(looked.codes):
                for x, y in zip(looked.amounts, want[code], strict=True):
                    np.testing.assert_array_equal(x[i], y)
    whole = item_snapshot({p: part(p) for p in range(3)}, source.inputs, source.coder, own)
    assert whole.counted == (4, 5, 6)
    np.testing.assert_array_equal(whole.groups[items].amounts[0], now.groups[items].amounts[0])
    assert item_snapshot({}, source.inputs, source.coder, own) is before


def test_a_users_newest_items_may_be_some_that_came_after_the_bundle(served):
    """u0 clicked `cold`, then `ghost`, which the bundle does not know: it has the row of unknown items, and nobody's page fails of it."""
    _, _, bundle = served
    loaded = Funnel.load(bundle)
    source, at = loaded.live.source, loaded.live.source.snapshot.at + 10.0
    for n, item in enumerate(["cold", "ghost"]):
        source.stream.apply(Row(at, 10**6 + n, "u0", item, "click", labels={"positive": 1.0}, context={"device": "web"}))
    counters = source.stream.pack(source.stream.of_user["u0"])
    requests = [FunnelRequest("u0", 3, at + 1.0, counters=counters), FunnelRequest("u7", 3, at + 1.0)]
    queries, table, unknown = loaded.queries(requests), loaded.live.inputs.tables["item_id"], 1
    assert loaded.live.query_fields(queries)["newest"][0].tolist() == [table.row("cold"), unknown]
    assert [len(page) for page in loaded.page(queries, loaded.recommend(queries))] == [3, 3]


def test_a_value_that_a_later_version_does_not_know_matches_nothing(served):
    """u0 took red things only; of the version there are no red ones any more, and the candidate has no colour: that is no likeness."""
    _, _, bundle = served
    loaded = Funnel.load(bundle)
    source = loaded.live.source
    colours = source.inputs.columns.texts["item"]["colour"]
    requests = loaded.queries([FunnelRequest("u0", 3, source.snapshot.at + 1.0)])
    red = np.flatnonzero(colours.codes[:, 0] == colours.index["red"])[:1]
    colourless = np.array([len(colours.codes)])  # an item behind the bundle's
    assert source.pair_values(requests, red[None, :])["same_colour"].tolist() == [1.0]
    del colours.index["red"]
    requests.memo.clear()
    assert source.pair_values(requests, colourless[None, :])["same_colour"].tolist() == [0.0]


def test_items_beyond_those_that_one_bundle_can_number_count_as_nothing(served, monkeypatch):
    coder = Funnel.load(served[2]).live.source.coder
    n = len(coder.items)
    monkeypatch.setattr(states, "MOST_LATER", 2)
    assert [coder.item(i, new=True) for i in ("a", "b", "a", "c", "i1")] == [n, n + 1, n, -1, coder.items.row("i1")]
    assert [coder.item(i) for i in ("b", "c", "")] == [n + 1, -1, -1]


def test_values_of_a_context_beyond_those_that_one_bundle_can_number_count_as_nothing(served, monkeypatch):
    coder = Funnel.load(served[2]).live.source.coder
    monkeypatch.setattr(states, "MOST_TEXTS", 2)
    assert [coder.text("mood", m, new=True) for m in ("calm", "brave", "calm", "tired")] == [0, 1, 0, -1]
    assert [coder.text("mood", m) for m in ("brave", "tired", "")] == [1, -1, -1]


def test_a_key_of_more_combinations_than_a_number_holds_is_counted(tmp_path):
    """An item and three columns of 2^20 values each are 2^76 keys: the bundle has the values of the log, and tells the keys apart."""
    declared = {
        "deep": {"kind": "count", "key": ["item", "device", "d2", "d3"]},
        "mine": {"kind": "count", "key": ["user", "item", "d2", "d3"]},
    }
    context = {"device": {"kind": "category"}} | {name: {"kind": "category", "column": "device"} for name in ("d2", "d3")}
    settings = f"features.aggregates={json.dumps(declared)}", f"data.interactions.context={json.dumps(context)}"
    _, final, bundle = bundled(tmp_path, *settings)
    loaded = Funnel.load(bundle)
    at = loaded.live.snapshot.at + 1.0
    requests = [FunnelRequest(u, 3, at, context=dict.fromkeys(context, d)) for u, d in (("u0", "web"), ("u0", "phone"), ("u1", "web"))]
    items = np.tile(np.arange(len(final.items)), (3, 1))
    ours, theirs = (f.live.pair_fields(f.queries(requests), items) for f in (final, loaded))
    for name in declared:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, err_msg=name)
        assert not (ours[name][0] == ours[name][1]).all(), "web and phone"


def test_a_page_for_which_nothing_passes_is_empty_at_every_stage(served):
    _, _, bundle = served
    loaded = Funnel.load(bundle)
    nothing = loaded.filters.parse({"colour": "a colour that no item has"})
    queries = loaded.queries([FunnelRequest(user_id=u, k=5, at=1_700_100_000.0, filter=nothing) for u in ("u0", "nobody")])
    assert loaded.page(queries, loaded.recommend(queries)) == [[], []]


def test_a_users_state_of_the_store_replaces_that_of_the_bundle(served):
    _, _, bundle = served
    loaded = Funnel.load(bundle)
    stream = loaded.live.source.stream
    state = stream.pack(loaded.live.source.read_user("u0"))
    one = loaded.queries([FunnelRequest(user_id="u0", k=5, at=1.8e9)])
    other = loaded.queries([FunnelRequest(user_id="stranger", k=5, at=1.8e9)])
    other.states = (state,)
    assert (loaded.live.query_fields(one)["user_n"] == loaded.live.query_fields(other)["user_n"]).all()
    assert (
        loaded.live.query_fields(one)["user_n"] != loaded.live.query_fields(loaded.queries([FunnelRequest("stranger", 5, 1.8e9)]))["user_n"]
    ).all()


def test_prepared_aggregates_come_back_from_disk(served, tmp_path):
    steps, _, _ = served
    steps.prepared.save(tmp_path)
    again = Prepared.load(tmp_path)
    assert again.aggregates.fields == steps.prepared.aggregates.fields
    assert again.aggregates.scales == steps.prepared.aggregates.scales
    queries = steps.moments.queries(np.arange(5))
    items = steps.prepared.log.item[:5, None]
    ours, theirs = steps.prepared.live.pair_fields(queries, items), again.live.pair_fields(queries, items)
    assert all((ours[n] == theirs[n]).all() for n in ours)


def test_a_version_that_goes_on_keeps_the_scales_of_its_inputs(served):
    steps, _, bundle = served
    before = json.loads((bundle / "aggregates" / "aggregates.json").read_text())["scales"]
    changed = steps.config.model_copy(
        update={"split": steps.config.split.model_copy(update={"by": "time", "ratio": (5, 3, 2)})}
    )  # other training rows
    anew, on = prepare(changed), prepare(changed, like=bundle / "features")
    assert {n: tuple(x) for n, x in before.items()} == on.aggregates.scales
    assert anew.aggregates.scales != on.aggregates.scales
    other = changed.features.model_copy(
        update={"aggregates": changed.features.aggregates | {"item_n": changed.features.aggregates["user_n"]}}
    )
    redeclared = prepare(changed.model_copy(update={"features": other}), like=bundle / "features").aggregates.scales
    assert redeclared["user_n"] == tuple(before["user_n"])
    assert redeclared["item_n"] != tuple(before["item_n"]), "another declaration of the same name is another number"


def test_the_ranker_learns_from_the_aggregates(served):
    steps, final, _ = served
    names = {f["name"] for f in json.loads((steps.ranker / "model.json").read_text())["fields"]}
    assert set(AGGREGATES) <= names
    assert set(AGGREGATES) - {"user_n", "user_price", "since", "newest", "where"} == {
        f.name for f in final.ranker.pair_fields if f.name != "evidence"
    }


@pytest.mark.parametrize(
    ("aggregate", "sentence"),
    [
        ({"kind": "rate", "key": "shop"}, "has 'shop' in its key, which is no id or category; known: "),
        ({"kind": "count", "key": "price"}, "has 'price' in its key, which is no id or category"),
        ({"kind": "match", "of": "country"}, "compares 'country', which is no item column"),
        ({"kind": "sum", "key": "user", "of": "colour"}, "adds up 'colour', which is neither 'value' nor a number column"),
        (
            {"kind": "last", "key": "item", "of": "country"},
            "lists 'country' by 'item': a ranker takes lists of a user, not of each candidate",
        ),
        ({"kind": "first", "key": ["user", "colour"]}, "lists 'item' by 'colour': a ranker takes lists of a user"),
        ({"kind": "ratio", "parts": ["price", "nothing"]}, "is made of 'nothing', which is neither a number column nor an aggregate"),
        ({"kind": "ratio", "parts": ["price", "heat"]}, "is made of 'heat', a column of the context; take columns of users and items"),
        ({"kind": "concat", "parts": ["country", "colour"]}, "that would be an embedding a pair"),
        ({"kind": "count", "key": "user", "window": "soon"}, "'soon' is no duration; write a number and s, m, h or d"),
        ({"kind": "count", "key": "user", "prior": 0.5}, "'prior' is not a parameter of kind 'count'; it belongs to rate"),
        ({"kind": "rate", "key": "item", "until": "session"}, "until: session needs user in the key"),
        ({"kind": "rate", "key": "item", "until": "day", "window": "1h"}, "until: day with window: 1h is always empty"),
        ({"kind": "rate", "key": "item", "decay": "1h", "window": "1h"}, "give 'window' or 'decay', not both"),
        ({"kind": "count"}, "kind 'count' needs 'key'"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_refused_with_a_sentence(tmp_path, aggregate, sentence):
    write_data(tmp_path, users=4)
    with pytest.raises(ConfigError) as raised:
        config_of(tmp_path, f"features.aggregates={json.dumps({'mine': aggregate})}", "data.interactions.context.heat=number")
    assert sentence in str(raised.value)


def test_aggregates_are_no_input_of_the_two_tower(tmp_path):
    write_data(tmp_path, users=4)
    with pytest.raises(ConfigError, match="an aggregate: those are inputs of the fine ranker only"):
        config_of(tmp_path, 'features.aggregates={"n": {"kind": "count", "key": "user"}}', "two_tower.features=[item_id, history, n]")


def test_columns_known_only_afterwards_are_refused_by_name(tmp_path):
    write_data(tmp_path, users=4)
    with pytest.raises(
        ConfigError, match=r"reads column 'device', which is known only after the item was shown; as an input it would leak"
    ):
        config_of(tmp_path, "data.interactions.after=[device]")
    document = yaml.safe_load(YAML.format(base="base.yaml", workdir="w").replace("format: csv", "format: kuairand"))
    document["data"]["interactions"]["context"] = {"play": {"kind": "number", "column": "play_time_ms"}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(document | {"extends": None}))
    with pytest.raises(ConfigError, match=r"context.play reads column 'play_time_ms', which is known only after the item was shown"):
        load([tmp_path / "bad.yaml"])


def test_a_context_column_that_gives_the_answer_away_is_refused_by_its_values(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 1_000).astype(float)
    assert separation(label * 10 + rng.random(1_000), label, numeric=True) == 1.0
    assert separation(rng.random(1_000), label, numeric=True) < 0.6
    assert separation(np.where(label > 0, "yes", "no"), label, numeric=False) == 1.0
    assert separation(np.arange(1_000).astype(str), label, numeric=False) == 0.5, "an id of its own says nothing"
    lines = [f"u{i % 50},i{i % 40},{1_700_000_000 + i},{'phone' if y else 'web'},{int(y)}" for i, y in enumerate(label)]
    write_data(tmp_path)
    (tmp_path / "log.csv").write_text("uid,sku,ts,device,bought\n" + "\n".join(lines) + "\n")
    config = config_of(tmp_path, "data.labels={bought: {column: bought}}", "data.impressions=true")
    with pytest.raises(DataError, match=r"context\.device orders the labels of the training rows by itself \(AUC 1\.000\)"):
        prepare(config)


def test_examples_ask_a_road_once_for_all_their_moments_and_are_the_same(served, monkeypatch):
    steps, _, _ = served
    monkeypatch.setattr(examples, "CHUNK", 50)
    asked: list[tuple[int, set[str]]] = []

    def road(asof, instants, groups):
        asked.append((len(instants), {f.name for g in groups for f in g.features}))
        return asof.values(instants, groups)

    near = steps.funnel(steps.cut.base_mask, steps.base_tower, None)
    far = replace(near, live=replace(near.live, source=replace(near.live.source, road=road)))
    at = steps.cut.window
    expected, got = (
        examples.ranker_examples(
            funnel, steps.moments, at, steps.config.examples, seed=1, dice=examples.Dice(0.3, np.random.default_rng(0))
        )
        for funnel in (near, far)
    )
    assert {"item_n", "user_colour", "same_colour", "newest", "price_band", "where"} <= got.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(got[name], column, err_msg=name)
    (moments, of_users), (pairs, of_pairs) = asked
    assert moments == len(at) > 50, "several lots, one question"
    assert pairs == len(at) * (1 + steps.config.examples.recalled)
    assert {"user_n", "newest", "same_colour"} <= of_users
    assert {"item_n", "user_colour", "reach"} <= of_pairs

    prepared = replace(steps.prepared, roads=lambda _: road)
    of_rows = [examples.impression_examples(p, steps.moments, at, "positive") for p in (steps.prepared, prepared)]
    assert [n for n, _ in asked[2:]] == [len(at), len(at)]
    for name, column in of_rows[0].items():
        np.testing.assert_array_equal(of_rows[1][name], column, err_msg=name)
