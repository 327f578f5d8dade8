"""A log becomes sorted arrays; every row that does not is in the account."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.data import cleaning
from recsys.data.events import Dataset, load
from recsys.data.sources import DataConfig
from recsys.errors import DataError

NOW = 1_000_000.0


def loaded(folder: Path, text: str, *, now: float = NOW, keep: tuple[str, ...] = (), **config) -> Dataset:
    """A csv with columns u, i, t and whatever else."""
    (folder / "log.csv").write_text(text)
    interactions = {"path": "log.csv", "user": "u", "item": "i", "time": "t"} | config.pop("interactions", {})
    return load(DataConfig.model_validate({"interactions": interactions, **config}), folder, keep=keep, now=now)


def rows(dataset: Dataset) -> list[tuple[str, str, float]]:
    log = dataset.interactions
    return list(zip(log.users.outside(log.user), log.items.outside(log.item), log.time.tolist(), strict=True))


def test_each_reason_to_drop_a_row_is_counted_and_the_rest_sorted_by_time_then_position(tmp_path):
    text = "u,i,t,v\nb,y,30,1\na,x,20,1\n,x,1,1\na, ,1,1\na,x,soon,1\na,x,-5,1\na,x,1000001,1\na,x,5,9\na,x,20,3\na,z,20,3\n"
    dataset = loaded(tmp_path, text, interactions={"value": "v", "max_value": 5})
    assert dataset.account.rows() == [
        ("rows read", 10),
        ("dropped: missing user id", 1),
        ("dropped: missing item id", 1),
        ("dropped: bad time", 2),
        ("dropped: future time", 1),
        ("dropped: value out of range", 1),
        ("dropped: duplicate", 1),
        ("kept", 3),
    ]
    assert rows(dataset) == [("a", "x", 20.0), ("a", "z", 20.0), ("b", "y", 30.0)]
    assert str(dataset.account).splitlines()[0].split() == ["rows", "read", "10"]


def test_ids_that_no_counter_could_be_kept_by_are_left_out_and_counted(tmp_path):
    fits = "é" * 512  # 1,024 bytes
    dataset = loaded(tmp_path, f"u,i,t\na,{fits},1\na,{fits}x,2\na\0b,x,3\n{'u' * 1_025},x,4\nb,x,5\n")
    assert ("dropped: id too long or with a NUL", 3) in dataset.account.rows()
    assert rows(dataset) == [("a", fits, 1.0), ("b", "x", 5.0)]


def test_a_log_of_which_nothing_is_left_is_refused_with_its_account(tmp_path):
    with pytest.raises(DataError, match=r"no row is left of 2\.(.|\n)*dropped: bad time +2"):
        loaded(tmp_path, "u,i,t\na,x,?\nb,y,?\n")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", " ", "", "é"]),
            st.sampled_from(["1", "2", ""]),
            st.sampled_from(["1", "2", "x", "", "-1", "2e6", "9"]),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_kept_and_dropped_add_up_to_what_was_read(tmp_path_factory, given_rows):
    folder = tmp_path_factory.mktemp("log")
    text = "u,i,t\na,1,0\n" + "".join(f"{u},{i},{t}\n" for u, i, t in given_rows)
    dataset = loaded(folder, text)
    account = dataset.account
    assert account.read == 1 + len(given_rows)
    assert account.kept == len(dataset.interactions)
    good = [("a", "1", 0.0), *((u.strip(), i, float(t)) for u, i, t in given_rows if u.strip() and i and t in ("1", "2", "9"))]
    distinct = sorted(dict.fromkeys(good), key=lambda row: row[2])  # sorted is stable: ties stay in file order
    assert rows(dataset) == distinct


def test_users_196_and_196_0_and_text_196_are_one(tmp_path):
    assert cleaning.code_ids(pa.chunked_array([pa.array([196.0, None, float("nan"), 7.5])])).ids == ["196", "7.5"]
    assert cleaning.code_ids(pa.chunked_array([pa.array([" 196", "196 ", "  "])])).codes.tolist() == [0, 0, -1]
    assert cleaning.code_ids(pa.chunked_array([pa.array([196, 3])])).ids == ["196", "3"]


def test_without_a_time_the_order_of_the_log_counts_and_repeats_stay(tmp_path):
    (tmp_path / "log.csv").write_text("u,i,timestamp\nb,x,9\n,x,5\na,x,5\nb,x,9\n")
    dataset = load(DataConfig.model_validate({"interactions": {"path": "log.csv", "user": "u", "item": "i"}}), tmp_path)
    assert rows(dataset) == [("b", "x", 0.0), ("a", "x", 1.0), ("b", "x", 2.0)]
    assert not dataset.interactions.has_time
    assert dataset.interactions.session is None
    assert "column 'timestamp' looks like one" in dataset.account.notes[0]


@pytest.mark.parametrize(
    ("stamps", "unit", "said"),
    [
        (
            "1700000000000",
            "s",
            "holds values such as 1700000000000, which are milliseconds (year 2023), but time_unit is s. Declare time_unit: ms.",
        ),
        ("1700000000", "ms", "which are seconds (year 2023), but time_unit is ms. Declare time_unit: s."),
        ("1700000000000000", "ms", "which are microseconds (year 2023), but time_unit is ms. Declare time_unit: us."),
        ("2023-11-14 10:00 h", "s", None),
        ("20231114", "iso", "holds numbers, but time_unit is iso. Declare time_unit: s, ms, us or ns."),
    ],
)
def test_a_wrong_time_unit_is_told_from_the_values(tmp_path, stamps, unit, said):
    with pytest.raises(DataError) as fault:
        loaded(tmp_path, f"u,i,t\na,x,{stamps}\na,y,{stamps}\n", interactions={"time_unit": unit}, now=2e9)
    assert (said or "no row is left of 2") in str(fault.value)


def test_iso_text_declared_as_seconds_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds text such as '2023-11-14T10:00:00\+08:00', but time_unit is s. Declare time_unit: iso"):
        loaded(tmp_path, "u,i,t\na,x,2023-11-14T10:00:00+08:00\na,x,2023-11-14\nb,x,nonsense\n")


def test_iso_times_with_and_without_a_zone(tmp_path):
    text = "u,i,t\na,x,1970-01-02T00:00:00Z\na,y,1970-01-01T08:00:00+08:00\na,z,1970-01-01\na,w,gibberish\n"
    dataset = loaded(tmp_path, text, interactions={"time_unit": "iso"})
    assert rows(dataset) == [("a", "y", 0.0), ("a", "z", 0.0), ("a", "x", 86400.0)]
    assert dataset.account.dropped["bad time"] == 1


def test_an_empty_time_column_is_all_bad_times_and_a_time_of_day_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"dropped: bad time +1"):
        loaded(tmp_path, "u,i,t\na,x,\n", interactions={"time_unit": "iso"})
    with pytest.raises(DataError, match=r"column 't' holds time32\[s\] such as 10:30:00. Expected a date with its time"):
        loaded(tmp_path, "u,i,t\na,x,10:30:00\n", interactions={"time_unit": "iso"})


def test_ids_must_be_single_values(tmp_path):
    pd.DataFrame({"u": [[1, 2]], "i": [1]}).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"interactions.user: the column holds list<.*>. Expected one id per row"):
        load(DataConfig.model_validate({"interactions": {"path": "log.parquet", "user": "u", "item": "i"}}), tmp_path)


def test_categorical_columns_of_parquet_are_read_by_their_values(tmp_path):
    frame = pd.DataFrame({"u": [7, 8], "i": ["x", "y"], "t": [2, 1], "c": [1, 0]}).astype("category")
    frame.to_parquet(tmp_path / "log.parquet")
    config = {"interactions": {"path": "log.parquet", "user": "u", "item": "i", "time": "t"}, "labels": {"c": {"column": "c"}}}
    dataset = load(DataConfig.model_validate(config), tmp_path)
    assert rows(dataset) == [("8", "y", 1.0), ("7", "x", 2.0)]
    assert dataset.interactions.labels["c"].tolist() == [0, 1]


def test_infinite_values_are_out_of_range_and_missing_ones_are_kept(tmp_path):
    dataset = loaded(tmp_path, "u,i,t,v\na,1,1,inf\na,2,2,\n", interactions={"value": "v"})
    assert dataset.account.dropped["value out of range"] == 1
    assert np.isnan(dataset.interactions.value).tolist() == [True]


def test_milliseconds_become_seconds_exactly(tmp_path):
    assert loaded(tmp_path, "u,i,t\na,x,1650812741436\n", interactions={"time_unit": "ms"}, now=2e9).interactions.time[0] == 1650812741.436


def test_the_clock_is_the_default_for_what_is_future(tmp_path):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,t\na,x,{time.time() - 60:.0f}\na,y,{time.time() + 3600:.0f}\n")
    dataset = load(DataConfig.model_validate({"interactions": {"path": "log.csv", "time": "t"}}), tmp_path)
    assert dataset.account.dropped["future time"] == 1


def test_visits_end_with_half_an_hour_of_silence_per_user(tmp_path):
    text = "u,i,t\na,1,0\nb,1,10\na,2,1800\na,3,3601\nb,2,1811\n"
    log = loaded(tmp_path, text).interactions
    of = dict(zip(zip(log.users.outside(log.user), log.items.outside(log.item), strict=True), log.session.tolist(), strict=True))
    assert of["a", "1"] == of["a", "2"] < of["a", "3"]
    assert of["b", "1"] < of["b", "2"]
    assert len(set(of.values())) == 4


def test_declared_visits_are_kept_apart_by_user(tmp_path):
    log = loaded(tmp_path, "u,i,t,s\na,1,0,s1\nb,1,1,s1\na,2,999999,s1\n", interactions={"session": "s"}).interactions
    assert log.session.tolist() == [0, 1, 0]


def test_events_have_their_names_and_missing_ones_the_default(tmp_path):
    log = loaded(
        tmp_path, "u,i,t,e\na,1,0,view\na,1,0,buy\na,2,1,\n", interactions={"event": {"column": "e", "default": "look"}}
    ).interactions
    assert log.event_names == ("buy", "look", "view")
    assert [log.event_names[e] for e in log.event] == ["view", "buy", "look"]


def test_five_hundred_event_types_keep_their_names(tmp_path):
    text = "u,i,t,e\n" + "".join(f"a,{n},{n},kind{n:03}\n" for n in range(500))
    log = loaded(tmp_path, text, interactions={"event": {"column": "e"}}).interactions
    assert [log.event_names[e] for e in log.event] == [f"kind{n:03}" for n in range(500)]


def test_a_column_that_holds_no_event_types_is_refused(tmp_path):
    text = "u,i,t,e\n" + "".join(f"a,{n},{n},kind{n}\n" for n in range(32_768))
    with pytest.raises(
        DataError, match=r"'e' holds 32,768 different values, such as 'kind0' and 'kind1'. Expected event types, at most 32,767"
    ):
        loaded(tmp_path, text, interactions={"event": {"column": "e"}})


def test_labels_by_bar_by_value_and_by_truth(tmp_path):
    text = "u,i,t,r,w,c\na,1,0,5,yes,true\na,2,1,3,no,false\na,3,2,,,\n"
    log = loaded(
        tmp_path,
        text,
        labels={
            "like": {"column": "r", "at_least": 4},
            "three": {"column": "r", "equals": 3},
            "yes": {"column": "w", "equals": "yes"},
            "c": {"column": "c"},
        },
    ).interactions
    assert {name: label.tolist() for name, label in log.labels.items()} == {
        "like": [1, 0, 0],
        "three": [0, 1, 0],
        "yes": [1, 0, 0],
        "c": [1, 0, 0],
        "positive": [1, 0, 0],  # the first declared
    }


def test_labels_that_do_not_fit_their_column_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"labels.w: column 'w' holds text such as 'yes'. Say which text means yes, with equals"):
        loaded(tmp_path, "u,i,t,w\na,1,0,yes\n", labels={"w": {"column": "w"}})
    with pytest.raises(DataError, match=r"labels.w: equals is 'yes', but column 'w' holds numbers such as 1"):
        loaded(tmp_path, "u,i,t,w\na,1,0,1\n", labels={"w": {"column": "w", "equals": "yes"}})
    with pytest.raises(DataError, match=r"labels.w.column: .* has no column 'wx'. Did you mean 'w'"):
        loaded(tmp_path, "u,i,t,w\na,1,0,1\n", labels={"w": {"column": "wx"}})


def test_without_labels_all_but_impressions_are_positives(tmp_path):
    log = loaded(tmp_path, "u,i,t,e\na,1,0,view\na,2,1,impression\n", interactions={"event": {"column": "e"}}).interactions
    assert log.labels["positive"].tolist() == [1, 0]
    assert len(log.positives()) == 1


def test_rows_of_an_impression_log_are_clicks_and_impressions(tmp_path):
    log = loaded(tmp_path, "u,i,t,c\na,1,0,1\na,2,1,0\n", labels={"click": {"column": "c"}}, impressions=True).interactions
    assert [log.event_names[e] for e in log.event] == ["click", "impression"]


def test_context_is_carried_as_it_was_written(tmp_path):
    text = "u,i,t,tab,n,day\nb,1,5,007,1.5,20220505\na,1,4,,,20220504\n"
    context = {"tab": "category", "load": {"kind": "number", "column": "n"}, "hour": "hour"}
    log = loaded(tmp_path, text, interactions={"context": context}, keep=("day",)).interactions
    assert list(log.context) == ["tab", "load", "day"]
    assert log.context["tab"].tolist() == [None, "007"]
    assert np.isnan(log.context["load"][0])
    assert log.context["day"].tolist() == [20220504, 20220505]


def test_cold_users_and_items_have_rows_after_those_of_the_log(tmp_path):
    (tmp_path / "items.csv").write_text("sku,cat,price\n9,new,1.5\n2,007,\n9,newer,2.5\n,lost,1\n")
    (tmp_path / "users.csv").write_text("user_id,age\nz,30\na,20\n")
    dataset = loaded(
        tmp_path,
        "u,i,t\nb,2,0\na,1,1\n",
        items={"path": "items.csv", "id": "sku", "columns": {"category": {"kind": "category", "column": "cat"}, "price": "number"}},
        users={"path": "users.csv", "columns": {"age": "number"}},
    )
    log = dataset.interactions
    assert log.items.ids.to_pylist() == ["2", "1", "9"]
    assert log.users.ids.to_pylist() == ["b", "a", "z"]
    assert dataset.items["category"].tolist()[0] == "007"
    assert pd.isna(dataset.items["category"][1])
    assert dataset.items["category"].tolist()[2] == "newer"  # the last row of an id counts
    assert dataset.users["age"].tolist()[1:] == [20, 30]
    assert dataset.account.notes == ["items: 1 rows without an id left out", "items: 1 rows whose id comes again left out"]
    assert dataset.account.kept == 2


def test_a_title_may_be_shown_without_being_a_feature(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,name\n1,One\n")
    dataset = loaded(tmp_path, "u,i,t\na,1,1\n", items={"path": "items.csv", "title": "name"})
    assert dataset.items["title"].tolist() == ["One"]


def test_a_table_without_a_single_id_is_refused(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,name\n,One\n")
    with pytest.raises(DataError, match=r"items: .* has no row with an id in column 'item_id'"):
        loaded(tmp_path, "u,i,t\na,1,1\n", items={"path": "items.csv", "columns": {"name": "text"}})


@pytest.mark.parametrize("text", [False, True])
def test_history_seeds_what_was_before_the_log(tmp_path, text):
    frame = pd.DataFrame({"who": [7, 1, 7], "seq": [[5], [3, 1, 3], [2, 9]]})
    if text:
        frame["seq"] = [" ".join(map(str, seq)) for seq in frame["seq"]]
    frame.to_parquet(tmp_path / "before.parquet")
    log = loaded(tmp_path, "u,i,t\n1,1,1\n2,2,2\n", history={"path": "before.parquet", "user": "who", "items": "seq"}).interactions
    assert log.users.ids.to_pylist() == ["1", "2", "7"]
    assert log.past.indptr.tolist() == [0, 3, 3, 5]
    assert log.items.outside(log.past.items) == ["3", "1", "3", "2", "9"]  # oldest first; of a user's rows the last counts


def test_a_history_that_holds_no_lists_is_refused(tmp_path):
    pd.DataFrame({"user_id": [1], "items": [5]}).to_parquet(tmp_path / "before.parquet")
    with pytest.raises(DataError, match=r"history.items: column 'items' of .* holds int64. Expected a list of item ids, oldest first"):
        loaded(tmp_path, "u,i,t\n1,1,1\n", history={"path": "before.parquet"})


def test_explicit_parts_are_told_apart_after_sorting_and_not_deduplicated_across(tmp_path):
    (tmp_path / "train.csv").write_text("user_id,item_id,t\na,1,5\na,1,5\n")
    (tmp_path / "test.csv").write_text("user_id,item_id,t\na,1,5\nb,2,1\n")
    dataset = load(DataConfig.model_validate({"interactions": {"train": "train.csv", "test": "test.csv", "time": "t"}}), tmp_path)
    assert rows(dataset) == [("b", "2", 1.0), ("a", "1", 5.0), ("a", "1", 5.0)]
    assert dataset.parts.tolist() == [2, 0, 2]
    assert dataset.account.dropped["duplicate"] == 1


@pytest.mark.parametrize(
    ("interactions", "said"),
    [
        ({}, "give either 'path' (one log) or 'train' with 'valid' and/or 'test'"),
        ({"path": "a", "train": "b", "test": "c"}, "give either 'path'"),
        ({"train": "a"}, "a log in parts needs 'train' and at least one of 'valid' and 'test', got train"),
        ({"path": "a", "min_value": 2, "max_value": 1}, "min_value 2 is above max_value 1"),
        ({"path": "a", "time_unit": "hours"}, "Input should be 's', 'ms', 'us', 'ns' or 'iso'"),
    ],
)
def test_a_contradictory_declaration_is_refused(interactions, said):
    with pytest.raises(ValidationError) as fault:
        DataConfig.model_validate({"interactions": interactions})
    assert said in str(fault.value)


def test_labels_and_tables_refuse_what_they_cannot_hold():
    log = {"interactions": {"path": "a"}}
    with pytest.raises(ValidationError, match=r"a label takes at_least or equals, not both"):
        DataConfig.model_validate({**log, "labels": {"x": {"column": "c", "at_least": 1, "equals": 2}}})
    with pytest.raises(ValidationError, match=r"'positive' is the name of the first label's role"):
        DataConfig.model_validate({**log, "labels": {"positive": {"column": "c"}}})
    with pytest.raises(ValidationError, match=r"'h': kind hour is read from the time of an event; declare it in interactions.context"):
        DataConfig.model_validate({**log, "items": {"path": "a", "columns": {"h": "hour"}}})


def test_an_answer_is_refused_as_an_input():
    with pytest.raises(
        ValidationError, match=r"interactions.context.c reads column 'is_click', which is label 'click': the answer would be an input"
    ):
        DataConfig.model_validate(
            {
                "interactions": {"path": "a", "context": {"c": {"kind": "category", "column": "is_click"}}},
                "labels": {"click": {"column": "is_click"}},
            }
        )


def test_a_feature_may_not_hide_the_column_of_the_split(tmp_path):
    context = {"day": {"kind": "category", "column": "weekday"}}
    with pytest.raises(
        DataError, match=r"interactions.context.day reads column 'weekday', but split.column means the column 'day'. Rename"
    ):
        loaded(tmp_path, "u,i,t,day,weekday\na,1,1,5,6\n", interactions={"context": context}, keep=("day",))


TEN_LINES = """
data:
  interactions: {path: log.csv, format: csv, user: uid, item: sku, time: ts, time_unit: s, event: {column: action, default: click}}
  labels: {click: {column: is_click}, like: {column: rating, at_least: 4}}
  impressions: true
  items: {path: items.csv, id: sku, columns: {category: id, tags: {kind: tags, separator: " "}, price: {kind: number, scale: log}, title: text,
    image: {kind: vector, dim: 2}}}
  users: {path: users.csv, id: uid, columns: {age: {kind: bins, edges: [18, 25, 35, 50], min_value: 0, max_value: 150}, country: id}}
  history: {path: before.parquet, user: user_id, items: watch_seq}
"""


def test_a_data_set_by_ten_lines_of_yaml_alone(tmp_path):
    (tmp_path / "log.csv").write_text("uid,sku,ts,action,is_click,rating\n1,A,10,click,1,5\n1,B,11,,0,\n2,A,12,like,1,2\n")
    (tmp_path / "items.csv").write_text(
        'sku,category,tags,price,title,image\nA,7,red big,1.5,First thing,"0.5,1"\nC,8,blue,20,Third,"1,0"\n'
    )
    (tmp_path / "users.csv").write_text("uid,age,country\n1,33,NA\n3,200,FR\n")
    pd.DataFrame({"user_id": [2], "watch_seq": [["C", "B"]]}).to_parquet(tmp_path / "before.parquet")
    dataset = load(DataConfig.model_validate(yaml.safe_load(TEN_LINES)["data"]), tmp_path)
    log = dataset.interactions
    assert (log.users.ids.to_pylist(), log.items.ids.to_pylist()) == (["1", "2", "3"], ["A", "B", "C"])
    assert [log.event_names[e] for e in log.event] == ["click", "click", "like"]
    assert {name: label.tolist() for name, label in log.labels.items()} == {"click": [1, 0, 1], "like": [1, 0, 0], "positive": [1, 0, 1]}
    assert dataset.items.loc[0].tolist() == ["7", "red big", 1.5, "First thing", "0.5,1"]
    assert dataset.items.loc[1].isna().all()
    assert dataset.users["country"].tolist()[0] == "NA"  # Namibia, not a missing value
    assert dataset.users["age"].tolist()[0] == 33
    assert log.past.indptr.tolist() == [0, 0, 2, 2]
    assert log.impressions
    assert dataset.account.kept == 3
