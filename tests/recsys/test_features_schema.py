"""The feature space: what each kind of column becomes, what is learned from training alone, logs and queries alike."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from recsys.core import Queries, Query, Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.data.interactions import CSR, Interactions
from recsys.errors import BundleError, ConfigError, DataError
from recsys.features.declaration import FeaturesConfig, HistoryConfig, IdConfig
from recsys.features.encoders import spread_of
from recsys.features.fitting import build
from recsys.features.schema import FeatureSpace, Field

USERS = pd.DataFrame({"age": [17, 200, 30, 64], "country": ["cn", None, "us", "cn"], "income": [1.0, 3.0, np.nan, 1000.0]})
ITEMS = pd.DataFrame(
    {
        "genres": ["x|y", "y", None, "z"],
        "title": ["Toy Story", "toy 玩具!", "zzz", ""],
        "price": [0.0, 1.0, 2.0, 3.0],
        "image": [[1.0, 2.0], "3,4", None, [1.0]],
    }
)
COLUMNS = {
    "user": {
        "age": ColumnConfig(kind="bins", edges=(18, 30), min_value=0, max_value=150),
        "country": ColumnConfig(kind="id", dim=4),
        "income": ColumnConfig(kind="number"),
    },
    "item": {
        "genres": ColumnConfig(kind="tags", separator="|"),
        "title": ColumnConfig(kind="text"),
        "price": ColumnConfig(kind="number", scale="log"),
        "image": ColumnConfig(kind="vector", dim=2),
    },
    "context": {
        "device": ColumnConfig(kind="category"),
        "hour": ColumnConfig(kind="hour", timezone="Asia/Shanghai"),
        "weekday": ColumnConfig(kind="weekday"),
    },
}


def log(user=(0, 0, 1), item=(0, 1, 0), *, n_users=4, n_items=4, **rest) -> Interactions:
    """By default users 0 and 1 and items 0 and 1 are in training, users 2, 3 and items 2, 3 are not."""
    n = len(user)
    return Interactions(
        Vocabulary([f"u{i}" for i in range(n_users)]),
        Vocabulary([f"i{i}" for i in range(n_items)]),
        np.array(user, np.int32),
        np.array(item, np.int32),
        np.arange(n) * 3600.0,
        np.zeros(n, np.int8),
        ("click",),
        np.full(n, np.nan, np.float32),
        {"positive": np.ones(n, np.float32)},
        **({"context": {"device": np.array((["ios", "web", "ios"] * n)[:n], object)}} | rest),
    )


def fit(config: FeaturesConfig | None = None, columns=COLUMNS, users=USERS, items=ITEMS, interactions=None) -> FeatureSpace:
    return FeatureSpace.fit(config or FeaturesConfig(), columns, users, items, interactions or log())


def one(kind, values, seen=None, **settings) -> np.ndarray:
    """A single item column encoded, the items `seen` (all by default) being in training."""
    seen = range(len(values)) if seen is None else seen
    data = log(user=[0] * len(seen), item=list(seen), n_items=len(values))
    frame = {"f": pd.Series(values, dtype=object)}
    return fit(columns={"item": {"f": ColumnConfig(kind=kind, **settings)}}, items=frame, interactions=data).encode("item", frame)["f"]


def test_the_fields_are_declared_for_models_with_their_tables_and_widths():
    fields = {f.name: f for f in fit(FeaturesConfig(dim=8, history=HistoryConfig(length=20))).fields}
    assert list(fields)[:4] == ["user_id", "age", "country", "income"]
    assert fields["country"] == Field("country", "user", "one", "country", size=3, dim=4), "missing, unknown, cn"
    assert fields["age"] == Field("age", "user", "one", "age", size=5, dim=8), "missing, unknown, three bins"
    assert fields["income"] == Field("income", "user", "dense", "", 0, 0, width=1)
    assert fields["history"] == Field("history", "user", "sequence", "item_id", size=4, dim=8, width=20)
    assert fields["item_id"].table == fields["history"].table
    assert fields["genres"].width == 2
    assert fields["image"] == Field("image", "item", "dense", "", 0, 0, width=2)
    assert fields["hour"].size == 2 + 24


def test_ids_are_ordered_by_training_events_and_others_are_unknown():
    space = fit(interactions=log(user=(2, 2, 1), item=(3, 3, 3)))
    assert space.user_rows.tolist() == [1, 3, 2, 1]  # u2 has two events, u1 one; u0 and u3 none
    assert space.item_rows.tolist() == [1, 1, 1, 2]


def test_rare_ids_share_the_unknown_rows_of_their_hash():
    config = FeaturesConfig(min_count=2, item_id=IdConfig(min_count=1, hash_buckets=8, dim=5))
    space = fit(config, interactions=log(user=(0, 0, 1), item=(0, 0, 0), n_items=50), items=pd.DataFrame({c: [None] * 50 for c in ITEMS}))
    assert space.user_rows.tolist() == [2, 1, 1, 1]
    unknown = space.item_rows[1:]
    assert unknown.min() >= 1
    assert unknown.max() <= 8
    assert len(set(unknown.tolist())) > 4
    assert space.select(["item_id"])[0].dim == 5
    assert space.select(["item_id"])[0].size == 1 + 8 + 1


def test_what_users_did_before_the_log_counts_for_the_vocabulary():
    past = CSR(np.array([0, 0, 0, 2, 2]), np.array([2, 2], np.int32))
    assert fit(interactions=log(item=(0, 0, 0), past=past)).item_rows.tolist() == [2, 1, 3, 1]


def test_values_outside_training_are_unknown_and_blank_ones_are_missing():
    values = ["a", "b", "a", None, "", "  ", float("nan"), "new"]
    assert one("category", values, seen=range(4)).tolist() == [2, 3, 2, 0, 0, 0, 0, 1]


def test_one_value_has_one_spelling_whatever_its_type():
    values = [3, 3.0, "3", " 3 ", np.int64(3), True, "True", [3], {"a": 1}]
    assert one("category", values, seen=range(7)).tolist() == [2, 2, 2, 2, 2, 3, 3, 1, 1]


def test_rare_values_are_cut_off_and_the_default_cut_off_yields_to_a_columns_own():
    items = {"f": ["a", "a", "b", "c"], "g": ["a", "a", "b", "c"]}
    columns = {"item": {"f": ColumnConfig(kind="id"), "g": ColumnConfig(kind="id", min_count=1)}}
    space = fit(FeaturesConfig(min_count=2), columns, items=items, interactions=log(user=[0] * 4, item=[0, 1, 2, 3]))
    encoded = space.encode("item", items)
    assert encoded["f"].tolist() == [2, 2, 1, 1]
    assert encoded["g"].tolist() == [2, 2, 3, 4]


def test_tags_are_a_bag_of_distinct_values_padded_on_the_right():
    got = one("tags", ["x y x", "y", None, ["x", "new"], np.array(["y", "x"]), "", 7], seen=[0, 1, 2])
    assert got.tolist() == [[3, 2], [2, 0], [0, 0], [3, 1], [2, 3], [0, 0], [1, 0]]


def test_a_sequence_keeps_its_last_values_in_order_padded_on_the_left():
    got = one("sequence", ["a b a", "b", None, ["a", "a", "b", "a"]], length=3)
    assert got.tolist() == [[2, 3, 2], [0, 0, 3], [0, 0, 0], [2, 3, 2]]


def test_text_is_lower_cased_words_and_characters_where_a_script_has_no_spaces():
    got = one("text", ["Toy Story (1995)", "toy toy", "玩具 STORY", None])
    table = {"story": 2, "toy": 3, "1995": 4, "具": 5, "玩": 6}
    assert got.tolist() == [[table["toy"], 2, 4], [3, 0, 0], [table["玩"], table["具"], 2], [0, 0, 0]]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [1.0, 3.0, 5.0, 3.0]),
        ("standard", [-math.sqrt(1.5), 0.0, math.sqrt(1.5), 0.0]),
        ("min_max", [0.0, 0.5, 1.0, 0.5]),
        ("log", [math.log(2), math.log(4), math.log(6), (math.log(2) + math.log(4) + math.log(6)) / 3]),
    ],
)
def test_a_number_is_scaled_by_what_training_saw_and_a_missing_one_takes_the_mean(scale, expected):
    got = one("number", [1.0, "3", 5, None], seen=[0, 1, 2], scale=scale)
    assert got[:, 0] == pytest.approx(expected, abs=1e-6)
    assert got.shape == (4, 1)


def test_a_number_that_training_saw_missing_brings_a_flag():
    assert one("number", [1.0, 3.0, None, "junk"], scale="none").tolist() == [[1, 0], [3, 0], [2, 1], [2, 1]]


def test_a_constant_number_and_an_empty_one_do_not_divide_by_zero():
    assert one("number", [5.0, 5.0]).tolist() == [[0.0], [0.0]]
    assert one("number", [None, None]).tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_a_constant_whose_mean_is_rounded_scales_nothing():
    """The standard deviation of a thousand times 0.1 is 1.4e-17: by that, an item of 0.3 would be 1.4e16 from the others."""
    prices = ColumnConfig(kind="number")
    encoder = build(prices, None).fit([0.1] * 1_000)
    np.testing.assert_allclose(encoder.encode([0.1, 0.3]), [[0.0], [0.2]], atol=1e-6)
    assert spread_of(np.full(1_000, 13.815509557935021)) == 1.0, "the log odds of a rate that always hits"
    assert spread_of(np.array([1.0, 3.0])) == 1.0
    assert spread_of(np.array([1.0, 1.0 + 4e-9])) == pytest.approx(2e-9)


def test_numbers_out_of_range_are_missing_and_counted():
    space = fit(interactions=log(user=(0, 1, 2, 3), item=(0, 0, 0, 0)))
    assert space.encode("user", USERS)["age"].tolist() == [2, 0, 4, 4]  # under 18, out of range, 30 is in the bin above 30, over
    assert space.account["age"] == {"rows": 4, "missing": 1, "out_of_range": 1}
    assert space.account["income"] == {"rows": 4, "missing": 1, "out_of_range": 0}
    assert one("number", [1.0, -9.0, 3.0], scale="none", min_value=0.0).tolist() == [[1, 0], [2, 1], [3, 0]]


def test_a_vector_of_another_length_counts_as_missing():
    got = one("vector", [[1, 2], "3, 4", None, [1], [1, float("nan")], "x,y"], dim=2)
    assert got.tolist() == [[1, 2], [3, 4], [0, 0], [0, 0], [0, 0], [0, 0]]


def test_hours_and_weekdays_are_those_of_the_timezone_summer_time_included():
    frame = {"time": [0.0, 1_719_835_200.0, math.nan]}  # Thursday 1970-01-01 00:00 and Monday 2024-07-01 12:00, UTC
    columns = {
        "utc": ColumnConfig(kind="hour"),
        "shanghai": ColumnConfig(kind="hour", timezone="Asia/Shanghai"),
        "berlin": ColumnConfig(kind="hour", timezone="Europe/Berlin"),
        "day": ColumnConfig(kind="weekday"),
        "day_in_new_york": ColumnConfig(kind="weekday", timezone="America/New_York"),
    }
    got = fit(columns={"context": columns}).encode("context", frame)
    assert [got[name].tolist() for name in columns] == [
        [2 + 0, 2 + 12, 0],
        [2 + 8, 2 + 20, 0],
        [2 + 1, 2 + 14, 0],
        [2 + 3, 2 + 0, 0],
        [2 + 2, 2 + 0, 0],
    ]


def test_features_can_share_a_table():
    columns = {
        "user": {"likes": ColumnConfig(kind="sequence", table="genre"), "bought": ColumnConfig(kind="sequence", table="item_id")},
        "item": {"genre": ColumnConfig(kind="category", dim=3)},
    }
    users = {"likes": ["b a", "", "", ""], "bought": [["i1", "i0"], None, None, None]}
    items = {"genre": ["a", "a", "b", "c"]}
    space = fit(columns=columns, users=users, items=items, interactions=log(user=[0, 0, 0], item=[0, 1, 2]))
    likes, bought = space.select(["likes", "bought"])
    assert (likes.table, likes.dim, likes.size) == ("genre", 3, 4)
    assert (bought.table, bought.size) == ("item_id", 5)
    encoded = space.encode("user", users)
    assert encoded["likes"][0].tolist() == [3, 2]
    assert encoded["bought"][0].tolist() == [space.item_rows[1], space.item_rows[0]]


def test_nothing_but_training_moves_the_encoding():
    other_users, other_items = USERS.copy(), ITEMS.copy()
    other_users.loc[2:, "income"] = 1e9
    other_users.loc[2:, "country"] = "elsewhere"
    other_items.loc[2:, "genres"] = "q|r|s|t|u"
    one_space, other = fit(), fit(users=other_users, items=other_items)
    assert one_space.fields == other.fields
    for side, frame in (("user", USERS), ("item", ITEMS)):
        for name, column in one_space.encode(side, frame).items():
            assert np.array_equal(column, other.encode(side, frame)[name]), name


def test_queries_read_as_the_log_reads():
    space = fit()
    user_columns, context = space.encode("user", USERS), {"device": ["web", None], "time": [7200.0, 90_000.0]}
    queries = Queries.of(
        [
            Query("u1", 1, at=7200.0, items=np.array([0, 3, 1]), times=np.array([1.0, 2.0, 3.0]), context={"device": "web"}),
            Query("u3", 3, at=90_000.0),
        ],
        history_length=50,
    )
    got = space.encode_queries(queries, user_columns)
    for name in ("user_id", "age", "country", "income"):
        assert np.array_equal(got[name], user_columns[name][[1, 3]]), name
    for name, column in space.encode("context", context).items():
        assert np.array_equal(got[name], column), name
    rows = space.item_rows
    assert got["history"].shape == (2, 50)
    assert got["history"][0, -4:].tolist() == [0, rows[0], rows[3], rows[1]]
    assert not got["history"][1].any()
    assert got["recent"][0].tolist() == [0, 0, rows[0], rows[3], rows[1]], "the newest five once more, by themselves"


def test_a_batch_of_queries_is_as_good_as_its_queries_one_by_one():
    space = fit()
    user_columns = space.encode("user", USERS)
    singles = [
        Query("u0", 0, at=5.0, items=np.array([1]), times=np.array([1.0])),
        Query("never seen", -1, at=7.0, profile={"age": 25, "income": "2"}, context={"device": "ios"}),
        Query("u2", 2, at=1e5, profile={"country": "us", "nobody declared": [1]}, context={"device": ["odd"], "hour": 3}),
    ]
    batch = space.encode_queries(Queries.of(singles, history_length=50), user_columns)
    for i, query in enumerate(singles):
        for name, row in space.encode_queries(Queries.of([query], history_length=50), user_columns).items():
            assert np.array_equal(batch[name][i], row[0]), name


def test_an_unknown_user_has_missing_values_that_a_profile_fills():
    space = fit()
    user_columns = space.encode("user", USERS)
    queries = Queries.of([Query("never seen"), Query("never seen", profile={"age": 20, "country": "cn", "income": 3})], history_length=50)
    got = space.encode_queries(queries, user_columns)
    assert got["user_id"].tolist() == [1, 1], "unknown, as a user of the log without training events is"
    assert got["age"].tolist() == [0, 3]
    assert got["country"].tolist() == [0, 2]
    assert got["income"][:, 0].tolist() == [0.0, 1.0]
    assert user_columns["age"].tolist() == space.encode("user", USERS)["age"].tolist(), "the columns themselves are untouched"


@pytest.mark.parametrize("junk", [None, "", "1e999", "abc", [], [1, [2]], {}, {"a": [1]}, True, -1e300, 2**70, "\x00", math.nan, object()])
def test_whatever_a_request_brings_is_encoded_not_raised_and_as_a_column_would_be(junk):
    space = fit()
    names = {"user": ("age", "country", "income"), "item": ("genres", "title", "price", "image"), "context": ("device", "hour")}
    for side, columns in names.items():
        for name in columns:
            encoder = space.encoders[side][name]
            assert np.array_equal(encoder.encode([junk]), encoder.encode(pd.Series([junk], dtype=object))), name


def test_a_saved_space_encodes_alike_and_has_the_same_schema(tmp_path):
    space = fit(FeaturesConfig(min_count=1, user_id=IdConfig(hash_buckets=3)))
    space.save(tmp_path / "features")
    loaded = FeatureSpace.load(tmp_path / "features")
    assert loaded.fields == space.fields
    assert loaded.schema_hash == space.schema_hash
    assert loaded.account == space.account
    for side, frame in (("user", USERS), ("item", ITEMS), ("context", {"device": ["web", "new"], "time": [0.0, 1.0]})):
        for name, column in space.encode(side, frame).items():
            assert np.array_equal(column, loaded.encode(side, frame)[name]), name
    assert {p.suffix for p in (tmp_path / "features").iterdir()} == {".json", ".npy", ".arrow"}


def test_the_schema_hash_names_the_declaration_not_the_vocabulary():
    assert fit().schema_hash == fit(interactions=log(user=(3,), item=(3,))).schema_hash
    changed = {**COLUMNS, "user": {**COLUMNS["user"], "country": ColumnConfig(kind="id", dim=5)}}
    assert fit().schema_hash != fit(columns=changed).schema_hash
    assert fit().schema_hash != fit(FeaturesConfig(dim=17)).schema_hash
    reordered = {**COLUMNS, "user": dict(reversed(COLUMNS["user"].items()))}
    assert fit().schema_hash != fit(columns=reordered).schema_hash, "models see features in the schema's order"


def test_a_damaged_space_is_a_bundle_error(tmp_path):
    fit().save(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps({"features": {}}))
    with pytest.raises(BundleError, match=r"The feature space in .* cannot be read .* publish it again"):
        FeatureSpace.load(tmp_path)
    with pytest.raises(BundleError, match="cannot be read"):
        FeatureSpace.load(tmp_path / "absent")


def test_selecting_an_unknown_feature_names_it_and_the_nearest_known():
    space = fit()
    assert [f.name for f in space.select(["price", "age"])] == ["price", "age"]
    with pytest.raises(ConfigError) as caught:
        space.select(["pricee", "age", "qqqq"])
    assert len(caught.value.faults) == 2
    assert "Feature 'pricee' is not declared" in caught.value.faults[0]
    assert "did you mean 'price'?" in caught.value.faults[0]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"user": {"item_id": ColumnConfig(kind="id")}}, "Feature 'item_id' of the user table has a name that the system uses itself"),
        ({"user": {"a": ColumnConfig(kind="id")}, "item": {"a": ColumnConfig(kind="id")}}, "Feature 'a' is declared for user and for item"),
        ({"item": {"h": ColumnConfig(kind="hour")}}, "only context has the time of a request"),
        ({"user": {"a": ColumnConfig(kind="tags", table="item_idd")}}, "Did you mean 'item_id'?"),
        ({"user": {"a": ColumnConfig(kind="tags", table="n"), "n": ColumnConfig(kind="number")}}, "which is no feature with a vocabulary"),
        (
            {
                "user": {
                    "a": ColumnConfig(kind="id", table="b"),
                    "b": ColumnConfig(kind="id", table="c"),
                    "c": ColumnConfig(kind="id"),
                }
            },
            "Name 'c' in both",
        ),
        (
            {"user": {"a": ColumnConfig(kind="id", table="item_id", dim=3)}},
            "asks for dim 3, but the table 'item_id' that it shares has dim 16",
        ),
    ],
)
def test_faults_between_columns_are_sentences(columns, text):
    with pytest.raises(ConfigError) as caught:
        fit(columns=columns)
    assert text in str(caught.value)


def test_all_faults_come_together_and_a_log_without_times_has_no_hours():
    columns = {"user": {"item_id": ColumnConfig(kind="id")}, "context": {"hour": ColumnConfig(kind="hour")}}
    with pytest.raises(ConfigError, match="needs times, and the log has none") as caught:
        fit(columns=columns, interactions=log(has_time=False))
    assert len(caught.value.faults) == 2


def test_tables_that_do_not_fit_are_data_errors():
    with pytest.raises(DataError, match=r"The user table has no column 'income'.* It has: age, country"):
        fit(users=USERS[["age", "country"]])
    with pytest.raises(DataError, match="has 3 rows, expected 4: one per item"):
        fit(items=ITEMS[:3])
    with pytest.raises(DataError, match="Give the ids as 'item_id', or one row per row of the vocabulary"):
        fit().encode("item", ITEMS[:2])


def test_a_table_of_its_own_ids_is_encoded_row_by_row():
    space = fit()
    got = space.encode("item", pd.concat([ITEMS[1:2], ITEMS[:1]]).assign(item_id=["i1", "brand new"]))
    assert got["item_id"].tolist() == [space.item_rows[1], 1]
    assert got["price"][:, 0] == pytest.approx([math.log(2), 0.0])
