"""Live events as rows of the log: units of time, labels, values, context, impressions, ids of any type, and what stands in the log already."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from recsys.core import Vocabulary
from recsys.data import event_files
from recsys.data.events import load
from recsys.data.interactions import SHOWN
from recsys.data.sources import DataConfig
from recsys.errors import DataError
from recsys.features.aggregates import AggregateConfig
from recsys.features.asof import Asked, AsOf
from recsys.features.declaration import HistoryConfig
from recsys.features.encoders import as_floats, spelled, splitter
from recsys.features.generate import Instant, told
from recsys.features.groups import compiled
from recsys.features.keys import KeyColumns, key_text
from recsys.features.live_rows import row_reader
from recsys.features.refusals import Refusals
from recsys.features.store import NewEvent
from recsys.features.stream import Stream
from tests.live_events import Told, archive


def loaded(folder: Path, interactions: dict, told: list[Told], **data):
    archive(folder / "events", told, partitions=3)
    config = DataConfig.model_validate({"interactions": {**interactions, "live": "events"}, **data})
    return load(config, folder, now=2e9)


def rows(data):
    log = data.interactions
    return list(zip(log.users.outside(log.user), log.items.outside(log.item), log.time.tolist(), strict=True))


def test_live_events_follow_the_log_in_order_of_time_and_known_ones_are_dropped(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts\n7,a,100\n8,b,300\n")
    told = [Told("7", "b", 200.5), Told("8", "b", 300), Told("new", "c", 400)]
    data = loaded(tmp_path, {"path": "log.csv", "time": "ts"}, told)
    assert rows(data) == [("7", "a", 100.0), ("7", "b", 200.5), ("8", "b", 300.0), ("new", "c", 400.0)]
    assert data.account.dropped["duplicate"] == 1


@pytest.mark.parametrize("named", [False, True])
def test_live_events_of_one_instant_are_told_apart_by_their_ids(tmp_path, named):
    """A batch that names no time has one: b was seen and clicked, c clicked twice and one of these told again. The files hold a's click."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,what\nu,a,100,click\nu,a,100,click\n")
    clicks = [Told("u", "c", 300, event_id=name) for name in ("e1", "e2", "e1")]
    told = [
        Told("u", "a", 100, event_id="e8"),
        Told("u", "a", 100, event_id="e9"),
        Told("u", "b", 200, "view"),
        Told("u", "b", 200),
        *clicks,
    ]
    data = loaded(tmp_path, {"path": "log.csv", "time": "ts"} | ({"event": {"column": "what"}} if named else {}), told)
    assert rows(data) == [("u", "a", 100.0), ("u", "b", 200.0), ("u", "b", 200.0), ("u", "c", 300.0), ("u", "c", 300.0)]
    assert data.account.dropped["duplicate"] == 4


@pytest.mark.parametrize(("unit", "first"), [("s", "100"), ("ms", "100000"), ("us", "100000000"), ("iso", "1970-01-01T00:01:40Z")])
def test_times_are_in_the_logs_unit(tmp_path, unit, first):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,ts\nu,a,{first}\n")
    data = loaded(tmp_path, {"path": "log.csv", "time": "ts", "time_unit": unit}, [Told("u", "b", 250.125)])
    assert data.interactions.time.tolist() == [100.0, 250.125]


def test_labels_of_a_value_read_it_and_others_go_by_the_event(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,stars,is_like\nu,a,1,5,0\n")
    told = [Told("u", "b", 2, "rating", 4.0), Told("u", "c", 3, "rating", 2.0), Told("u", "d", 4, "like", 5.0)]
    labels = {"good": {"column": "stars", "at_least": 4}, "like": {"column": "is_like"}}
    data = loaded(tmp_path, {"path": "log.csv", "time": "ts", "value": "stars"}, told, labels=labels)
    assert data.interactions.labels["good"].tolist() == [1, 1, 0, 1]
    assert data.interactions.labels["like"].tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(data.interactions.value, [5, 4, 2, 5])


def test_impressions_are_negatives_where_the_log_has_them_and_no_events_elsewhere(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,is_click\nu,a,1,1\n")
    told = [Told("u", "b", 2, "impression"), Told("u", "c", 3, "click")]
    plain = loaded(tmp_path, {"path": "log.csv", "time": "ts"}, told)
    assert len(plain.interactions) == 2
    config = DataConfig.model_validate(
        {
            "interactions": {"path": "log.csv", "time": "ts", "live": "events"},
            "impressions": True,
            "labels": {"click": {"column": "is_click"}},
        }
    )
    archive(tmp_path / "events", [Told("u", "d", 4, "not_interested")], partitions=3)
    both = load(config, tmp_path, now=2e9).interactions
    assert both.positive.tolist()[3:] == [False], "no click of what was refused"
    both = both.where(np.arange(len(both)) < 3)
    assert both.positive.tolist() == [True, False, True]
    assert [both.event_names[e] for e in both.event] == ["click", "impression", "click"]


def test_what_a_live_event_is_stays_known_where_the_files_name_no_events(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts\nu,a,1\nu,b,2\n")
    events = [
        Told("u", "b", 2, "view"),
        Told("u", "c", 3, "view"),
        Told("u", "d", 4, "hide"),
        Told("u", "e", 5),
        Told("u", "f", 6, "impression"),
    ]
    data = loaded(tmp_path, {"path": "log.csv", "time": "ts", "event": {"default": "rating"}}, events)
    log = data.interactions
    assert rows(data) == [("u", i, t) for i, t in zip("abcde", (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)]
    assert [log.event_names[e] for e in log.event] == ["rating", "rating", "view", "hide", "click"]
    assert data.account.dropped["duplicate"] == 1, "the files hold b, though not as a view"
    assert log.positive.tolist() == [True, True, True, False, True], "hide speaks against d"
    history = HistoryConfig()
    served = row_reader(DataConfig.model_validate({"interactions": {"path": "log.csv"}}), history)
    as_served = [served(NewEvent(e.user, e.item, e.event, int(1000 * e.time_s), None, "x"), 0).told for e in events[1:4]]
    positive = [served(NewEvent(e.user, e.item, e.event, int(1000 * e.time_s), None, "x"), 0).labels["positive"] for e in events[1:4]]
    assert log.labels["positive"][2:].tolist() == positive == [1.0, 0.0, 1.0]
    assert told(log, history)[2:].tolist() == as_served == [False, False, True]


@pytest.mark.parametrize("labels", [{}, {"good": {"column": "stars", "at_least": 4}}], ids=["no label", "a label of the value"])
def test_both_roads_read_the_same_of_every_event(tmp_path, labels):
    """Refusals of one's own, impressions in a log of none, values that pass the label's test."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,stars\nu,a,1,5\n")
    events = [
        Told("u", item, 2 + n, kind, value)
        for n, (item, kind, value) in enumerate(
            [
                ("b", "nope", 5.0),
                ("c", "nope", None),
                ("d", "rating", 5.0),
                ("e", "dislike", 5.0),
                ("f", "impression", 5.0),
                ("g", "view", 5.0),
            ]
        )
    ]
    interactions = {"path": "log.csv", "time": "ts", "value": "stars", "event": {"default": "rating"}}
    log = loaded(tmp_path, interactions, events, labels=labels, refusals=["nope"]).interactions
    data = DataConfig.model_validate({"interactions": interactions, "labels": labels, "refusals": ["nope"]})
    history = HistoryConfig().refusing(data.refusals)
    read = row_reader(data, history)
    served = [read(NewEvent(e.user, e.item, e.event, int(1000 * e.time_s), e.value, "x"), 0) for e in events]
    counted = [row for row in served if row.counted]
    assert [row.item_id for row in counted] == log.items.outside(log.item)[1:] == ["b", "c", "d", "e", "g"], "no impression"
    assert [row.labels["positive"] for row in counted] == log.labels["positive"].tolist()[1:] == [0, 0, 1, 1, 1]
    assert [row.told for row in counted] == told(log, history).tolist()[1:] == [False, False, True, True, False]
    assert (
        [history.refuses(row.event) for row in counted] == Refusals.of(log, history).says.tolist()[1:] == [True, True, False, False, False]
    )


def test_a_live_event_keeps_its_type_in_a_log_of_impressions_that_names_none(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,is_click\nu,a,1,1\nu,b,2,0\n")
    events = [Told("u", "c", 3, "impression"), Told("u", "c", 4, "click"), Told("u", "d", 5, "hide"), Told("u", "e", 6, "view")]
    labels = {"click": {"column": "is_click"}}
    log = loaded(tmp_path, {"path": "log.csv", "time": "ts"}, events, labels=labels, impressions=True).interactions
    assert [log.event_names[e] for e in log.event] == ["click", "impression", "impression", "click", "hide", "view"]
    assert told(log, HistoryConfig()).tolist() == [True, False, False, True, False, False]
    assert Refusals.of(log, HistoryConfig()).says.tolist() == [False] * 4 + [True, False]
    assert log.labels[SHOWN].tolist() == [1, 1, 1, 0, 0, 0], "rows of the files were shown, and live ones that say so"
    ctr = {"ctr": AggregateConfig(kind="rate", key=("user",), prior=0.0, strength=0.0)}
    asof = AsOf(compiled(ctr, priors={}, lateness_s=0, offset_s=0, gap_s=1), log, KeyColumns(), told(log, HistoryConfig()))
    asked = Asked(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([9.0]), np.array([6]))
    # Shown: a, b, c. Clicked: a in its own row, c in another one; the view counts as a positive of the first label.
    assert asof.values(asked)["ctr"].tolist() == [1.0]


@pytest.mark.parametrize("column", [None, "what"])
def test_five_hundred_types_of_live_events_are_read_and_aggregated_as_what_they_are(tmp_path, column):
    """As retraining and the check of skew read them; codes of one byte ended at 127."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,what\nu,a,1,click\n")
    interactions = {"path": "log.csv", "time": "ts", "event": {"column": column}}
    log = loaded(tmp_path, interactions, [Told("u", "b", 2 + n, f"kind{n:03}") for n in range(500)]).interactions
    assert [log.event_names[e] for e in log.event] == ["click", *(f"kind{n:03}" for n in range(500))]
    aggregates = {"n": AggregateConfig(kind="count", key=("item",), events=("kind007", "kind300", "kind499", "absent"))}
    plan = compiled(aggregates, priors={}, lateness_s=0, offset_s=0, gap_s=1)
    asof = AsOf(plan, log, KeyColumns(), told(log, HistoryConfig()))
    times = np.array([100.0, 400.0, 600.0])
    asked = Asked(np.zeros(3, np.int64), np.full(3, log.items.row("b")), times, np.searchsorted(log.time, times))
    assert asof.values(asked)["n"].tolist() == [1, 2, 3]


def test_the_impressions_of_a_log_that_names_its_events_are_counted_in_both_roads(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,what\nu,a,1,click\n")
    interactions = {"path": "log.csv", "time": "ts", "event": {"column": "what"}}
    log = loaded(tmp_path, interactions, [Told("u", "b", 2, "impression")]).interactions
    row = row_reader(DataConfig.model_validate({"interactions": interactions}), HistoryConfig())(
        NewEvent("u", "b", "impression", 2000, None, "x"), 0
    )
    assert (len(log), row.counted, row.labels["positive"], float(log.labels["positive"][1])) == (2, True, 0, 0)


@pytest.mark.parametrize("column", [None, "stars"])
def test_the_value_of_a_live_event_is_the_same_float32_in_both_roads(tmp_path, column):
    """Also where the files of the log have no values at all."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,stars\nu,a,1,0.1\n")
    interactions = {"path": "log.csv", "time": "ts", "value": column}
    log = loaded(tmp_path, interactions, [Told("u", "b", 2, "rating", 0.1), Told("u", "c", 3, "rating", None)]).interactions
    read = row_reader(DataConfig.model_validate({"interactions": interactions}), HistoryConfig())
    served = [read(NewEvent("u", "b", "rating", 2000, value, "x"), 0).value for value in (0.1, None)]
    tenth = 0.10000000149011612
    np.testing.assert_array_equal(served, [tenth, np.nan])
    np.testing.assert_array_equal(log.value.astype(float), [tenth if column else np.nan, tenth, np.nan])


@pytest.mark.parametrize(("rule", "values"), [({"at_least": 0.7}, (0.7, 0.69)), ({"equals": 0.1}, (0.1, 0.2))])
def test_a_label_asks_the_value_of_a_live_event_as_it_came_in_both_roads(tmp_path, rule, values):
    """0.7 and 0.1 have no float32 of their own: rounded, they would pass no test."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,stars\nu,a,1,5\n")
    interactions, labels = {"path": "log.csv", "time": "ts", "value": "stars"}, {"good": {"column": "stars", **rule}}
    told = [Told("u", str(n), 2 + n, "rating", value) for n, value in enumerate(values)]
    log = loaded(tmp_path, interactions, told, labels=labels).interactions
    read = row_reader(DataConfig.model_validate({"interactions": interactions, "labels": labels}), HistoryConfig())
    served = [read(NewEvent("u", "b", "rating", 2000, value, "x"), 0).labels["good"] for value in values]
    assert served == log.labels["good"].tolist()[1:] == [1, 0]


def test_an_impression_in_a_log_of_none_is_counted_nowhere():
    plan = compiled({"n": AggregateConfig(kind="count", key=("item",))}, priors={}, lateness_s=0, offset_s=0, gap_s=1)
    stream = Stream(plan, Vocabulary([]), Vocabulary([]), KeyColumns())
    read = row_reader(DataConfig.model_validate({"interactions": {"path": "log.csv"}}), HistoryConfig())
    for n, kind in enumerate(["impression", "click", "impression", "view"]):
        stream.apply(read(NewEvent("u", "a", kind, 1000 * n, None, f"e{n}"), n))
    assert stream.values("u", "a", {}, Instant(9.0, 9))["n"] == 2


def test_declared_context_comes_from_the_events_context(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,tab_no,what\nu,a,1,3,click\n")
    interactions = {
        "path": "log.csv",
        "time": "ts",
        "event": {"column": "what"},
        "context": {"tab": {"kind": "category", "column": "tab_no"}},
    }
    told = [Told("u", "b", 2, "buy", context={"tab": "7"}), Told("u", "c", 3, "click")]
    log = loaded(tmp_path, interactions, told).interactions
    assert [float(v) for v in log.context["tab"][:2]] == [3.0, 7.0]
    assert [log.event_names[e] for e in log.event] == ["click", "buy", "click"]


@pytest.mark.parametrize(
    ("sent", "learnt"),
    [
        (7, [1, 2, 7]),
        (7.0, [1, 2, 7]),
        (" 7 ", [1, 2, 7]),
        ("", [1, 2, None]),
        ("home", ["1", "2", "home"]),
        ("0x1", ["1", "2", "0x1"]),
        (True, ["1", "2", "True"]),
        (2.5, ["1", "2", "2.5"]),
        ([1, 2], ["1", "2", "[1, 2]"]),
    ],
)
def test_a_context_that_the_files_type_cannot_hold_is_learnt_as_it_is_counted(tmp_path, sent, learnt):
    """Tabs are whole numbers in the file. Whatever a client sends was accepted: it stops no training, and has one key in both roads."""
    pd.DataFrame({"user_id": ["u", "v"], "item_id": ["a", "b"], "ts": [1, 2], "tab": [1, 2]}).to_parquet(tmp_path / "log.parquet")
    interactions = {"path": "log.parquet", "time": "ts", "context": {"tab": {"kind": "category"}}}
    log = loaded(tmp_path, interactions, [Told("u", "b", 3, context={"tab": sent})]).interactions
    assert [value if spelled(value) else None for value in log.context["tab"]] == learnt
    assert spelled(log.context["tab"][2]) == key_text(sent)


@pytest.mark.parametrize(
    ("who", "known"),
    [
        (["7", "9"], ["7", "8", "7", "9"]),
        (["7", "abc"], ["7", "8", "7", "abc"]),
        (["7", "007"], ["7", "8", "7", "007"]),
        (["7", "99999999999999999999"], ["7", "8", "7", "99999999999999999999"]),
    ],
)
def test_ids_of_live_events_need_not_be_of_the_files_type(tmp_path, who, known):
    """Users are whole numbers in the file. 7 is who he was, 007 is somebody else, as in service; nobody's id stops a training."""
    pd.DataFrame({"user_id": [7, 8], "item_id": [1, 2], "ts": [1, 2]}).to_parquet(tmp_path / "log.parquet")
    told = [Told(user, f"i{n}", n) for n, user in enumerate(who, 3)]
    log = loaded(tmp_path, {"path": "log.parquet", "time": "ts"}, told).interactions
    assert log.users.outside(log.user) == known
    assert log.items.outside(log.item) == ["1", "2", "i3", "i4"]


def test_tags_and_numbers_of_a_context_are_those_that_the_service_reads(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,moods,hours\nu,a,1,calm,2\n")
    context = {"moods": {"kind": "tags"}, "hours": {"kind": "number"}}
    told = [Told("u", "b", n, context=c) for n, c in enumerate([{"moods": ["calm", 5.0], "hours": True}, {"moods": [], "hours": [3]}], 2)]
    log = loaded(tmp_path, {"path": "log.csv", "time": "ts", "context": context}, told).interactions
    assert [splitter("tags", " ")(cell) for cell in log.context["moods"]] == [["calm"], ["calm", "5"], []]
    np.testing.assert_array_equal(as_floats(log.context["hours"]), [2.0, 1.0, np.nan])


def test_a_context_is_known_by_its_declared_name_alone(tmp_path):
    """As the service reads it: under the name that the file has for it, it is anything else worth keeping."""
    (tmp_path / "log.csv").write_text("user_id,item_id,ts,tab_no\nu,a,1,3\n")
    interactions = {"path": "log.csv", "time": "ts", "context": {"tab": {"kind": "category", "column": "tab_no"}}}
    told = [Told("u", "b", 2, context={"tab": "7"}), Told("u", "c", 3, context={"tab_no": "8"})]
    assert loaded(tmp_path, interactions, told).interactions.context["tab"].tolist() == ["3", "7", None]


def test_a_log_without_time_cannot_go_on(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\nu,a\n")
    with pytest.raises(DataError, match=r"Declare interactions\.time"):
        loaded(tmp_path, {"path": "log.csv"}, [Told("u", "b", 2)])


def test_a_file_without_the_columns_is_named(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,ts\nu,a,1\n")
    pq.write_table(event_files.SCHEMA.empty_table().drop_columns(["position"]), tmp_path / "some.parquet")
    config = DataConfig.model_validate({"interactions": {"path": "log.csv", "time": "ts", "live": "some.parquet"}})
    with pytest.raises(DataError, match="lacks the columns position of live events"):
        load(config, tmp_path)
