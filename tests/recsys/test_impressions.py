"""Labelled examples of what was shown: by request, item and user, inside the window, each once."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.errors import DataError
from recsys.impressions import SCHEMA, Impression, joined, read, table_of


def page(request: str, user: str, time_ms: int, *items: str, cold_start: str | None = None) -> Impression:
    n = len(items)
    places, ones = list(range(1, n + 1)), [1.0] * n
    features = [("item_n", [float(i) for i in range(n)])]
    return Impression(
        request,
        user,
        time_ms,
        time_ms / 1000,
        "v1",
        "",
        cold_start,
        "{}",
        [],
        list(items),
        places,
        ones,
        ones,
        5.0,
        None,
        None,
        [],
        features,
    )


def events(*rows: tuple[str, str, str, int, str | None, str]) -> pa.Table:
    names = ("user_id", "item_id", "event", "time_ms", "request_id", "event_id")
    return pa.table({n: list(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)})


def test_an_event_of_the_request_makes_its_item_a_positive_and_nothing_else_does():
    shown = table_of([page("r1", "u", 1_000, "a", "b", "c"), page("r2", "w", 2_000, "a")])
    told = events(
        ("u", "b", "click", 1_500, "r1", "1"),
        ("u", "b", "buy", 1_600, "r1", "2"),  # the first event names the row
        ("u", "b", "click", 1_500, "r1", "1"),  # the same one told again
        ("u", "a", "view", 1_500, "r1", "3"),  # no positive
        ("u", "a", "not_interested", 1_500, "r1", "7"),  # the contrary of one
        ("u", "c", "click", 1_500, None, "4"),  # of no request
        ("w", "c", "click", 1_500, "r1", "5"),  # not that user's page
        ("w", "a", "click", 2_000 + 3_600_001, "r2", "6"),  # too late
    )
    found, account = joined(shown, told, window_s=3_600)
    rows = [(r["request_id"], r["item_id"], r["label"], r["event"], r["position"]) for r in found.to_pylist()]
    assert rows == [
        ("r1", "a", 0, "impression", 1),
        ("r1", "b", 1, "click", 2),
        ("r1", "c", 0, "impression", 3),
        ("r2", "a", 0, "impression", 1),
    ]
    assert account == {
        "clicks": 2,
        "of no logged page": 1,
        "outside the window": 1,
        "repeated": 1,
        "pages": 2,
        "examples": 4,
        "positives": 1,
    }
    only, _ = joined(shown, told, window_s=3_600, positives=("buy",))
    assert [r["event"] for r in only.to_pylist() if r["label"]] == ["buy"]


def test_event_ids_and_request_ids_are_a_users_own():
    shown = table_of([page("1", "u", 1_000, "a"), page("1", "w", 1_000, "a", "b")])
    told = events(("u", "a", "click", 1_500, "1", "7"), ("w", "b", "click", 1_600, "1", "7"))
    found, account = joined(shown, told, window_s=60)
    assert [(r["user_id"], r["item_id"], r["label"]) for r in found.to_pylist()] == [("u", "a", 1), ("w", "a", 0), ("w", "b", 1)]
    assert (account["clicks"], account["repeated"]) == (2, 0)


def test_of_pages_that_share_a_request_id_an_event_answers_the_newest_before_it(tmp_path):
    pages = [page("s", "u", at, "a") for at in (1_000_000, 1_020_000, 1_040_000)]
    pq.write_table(table_of([*pages, pages[0]]), tmp_path / "one.parquet")
    found, _ = joined(read(str(tmp_path)), events(("u", "a", "click", 1_030_000, "s", "1")), window_s=3_600)
    assert [(r["time_ms"], r["label"]) for r in found.to_pylist()] == [(1_000_000, 0), (1_020_000, 1), (1_040_000, 0)]


@pytest.mark.parametrize(("ahead_s", "label"), [(0.5, 1), (300, 1), (301, 0)])
def test_a_click_of_a_slow_clock_answers_the_page_that_it_names(ahead_s, label):
    shown = table_of([page("r", "u", 1_000_000, "a")])
    found, account = joined(shown, events(("u", "a", "click", 1_000_000 - round(1_000 * ahead_s), "r", "1")), window_s=60)
    assert found["label"].to_pylist() == [label]
    assert account["outside the window"] == 1 - label


def test_a_page_that_was_written_twice_counts_once_and_order_is_by_time(tmp_path):
    pq.write_table(table_of([page("r2", "u", 2_000, "b"), page("r1", "u", 1_000, "a")]), tmp_path / "2.parquet")
    pq.write_table(table_of([page("r2", "u", 2_000, "b")]), tmp_path / "3.parquet")
    found = read(str(tmp_path))
    assert found["request_id"].to_pylist() == ["r1", "r2"]
    assert found["item_features"].to_pylist()[0] == [("item_n", [0.0])]


def test_the_rung_of_a_new_user_goes_with_each_of_his_items_and_files_from_before_it_have_none(tmp_path):
    pq.write_table(
        table_of([page("r1", "new", 1_000, "a", "b", cold_start="segment"), page("r2", "known", 2_000, "a")]), tmp_path / "2.parquet"
    )
    before = table_of([page("r0", "old", 500, "a")]).drop_columns("cold_start").replace_schema_metadata({"rayfunnel.impressions": "2"})
    pq.write_table(before, tmp_path / "1.parquet")
    shown = read(str(tmp_path))
    assert shown["cold_start"].to_pylist() == [None, "segment", None]
    found, _ = joined(shown, events(("new", "b", "click", 1_500, "r1", "1")), window_s=3_600)
    assert [(r["user_id"], r["label"], r["cold_start"]) for r in found.to_pylist()] == [
        ("old", 0, None),
        ("new", 0, "segment"),
        ("new", 1, "segment"),
        ("known", 0, None),
    ]


def test_none_and_another_format_are_sentences(tmp_path):
    with pytest.raises(DataError, match=r"Set serve\.impressions\.sample above 0"):
        read(str(tmp_path))
    pq.write_table(SCHEMA.remove_metadata().empty_table(), tmp_path / "1.parquet")
    with pytest.raises(DataError, match="has format none of impressions, this code reads 2 and 3"):
        read(str(tmp_path))
