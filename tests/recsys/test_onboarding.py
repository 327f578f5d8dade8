"""What `init` makes of files nobody has described: roles, units, separators, labels and splits with known answers."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from recsys.config import read
from recsys.data.events import load
from recsys.errors import DataError
from recsys.onboarding import draft
from recsys.onboarding import sample as sampling
from recsys.onboarding.look import Column
from recsys.onboarding.sample import sample
from recsys.onboarding.split import split, threshold

START = 1_700_000_000
GENRES = {"kind": "tags", "separator": "|"}


def drafted(folder: Path, *names: str) -> tuple[dict, str]:
    """(the configuration that was written, its text); it must pass the check and load its own files."""
    found = draft([folder / name for name in names], name="mine", folder=folder)
    (folder / "mine.yaml").write_text(found.text, "utf-8")
    loaded = read([folder / "mine.yaml"])
    assert [str(fault) for fault in loaded.faults] == []
    assert loaded.config is not None
    dataset = load(loaded.config.data, folder, keep=loaded.config.split.keep)
    loaded.config.split.split(dataset.interactions, dataset.parts)
    return yaml.safe_load(found.text), found.text


def rows(n: int = 600, *, users: int = 20, items: int = 30, seed: int = 1) -> list[tuple[int, int, int]]:
    """(user, item, second) of n events; every user comes in every part."""
    rng = random.Random(seed)
    return [(k % users, rng.randrange(items), START + 600 * k) for k in range(n)]


def write(path: Path, header: str, lines: list[str], encoding: str = "utf-8") -> None:
    path.write_bytes(("\n".join(([header] if header else []) + lines) + "\n").encode(encoding))


def test_plain_names_in_a_plain_csv(tmp_path):
    write(tmp_path / "log.csv", "userId,movieId,rating,timestamp", [f"{u},{i},{1 + (u + i) % 5},{t}" for u, i, t in rows()])
    got, text = drafted(tmp_path, "log.csv")
    assert got["data"]["interactions"] == {
        "path": "log.csv", "user": "userId", "item": "movieId", "time": "timestamp", "time_unit": "s", "event": {"default": "rating"},
        "value": "rating",
    }  # fmt: skip
    assert got["data"]["labels"] == {"like": {"column": "rating", "at_least": 4}}
    assert got["split"] == {"by": "time"}
    lines = [line for line in text.splitlines() if line.startswith(("    ", "split")) and not line.endswith(":")]
    assert all(" # " in line for line in lines), "every line says why"


def test_odd_names_semicolons_quotes_and_latin_1(tmp_path):
    lines = [f'"Jürgen; {u}";Äpfel {i};{pd.Timestamp(t, unit="s").isoformat()};{1 + k % 5}' for k, (u, i, t) in enumerate(rows())]
    write(tmp_path / "odd.csv", "wer;was;wann;sterne", lines, "latin-1")
    got, _ = drafted(tmp_path, "odd.csv")
    log = got["data"]["interactions"]
    assert (log["delimiter"], log["encoding"], log["time_unit"]) == (";", "cp1252", "iso")
    assert (log["user"], log["item"], log["time"], log["value"]) == ("wer", "was", "wann", "sterne")
    assert load(read([tmp_path / "mine.yaml"]).config.data, tmp_path).interactions.users.outside([0]) == ["Jürgen; 0"]  # type: ignore[union-attr]


def test_chinese_text_in_its_own_encoding(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id,城市", [f"用户{u},商品{i},北京" for u, i, _ in rows()], "gb18030")
    got, _ = drafted(tmp_path, "log.csv")
    assert got["data"]["interactions"]["encoding"] == "gb18030"


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id,ts", [f"u{u},i{i},{t * 1000}" for u, i, t in rows()], "utf-8-sig")
    got, _ = drafted(tmp_path, "log.csv")
    assert got["data"]["interactions"]["user"] == "user_id"
    assert got["data"]["interactions"]["time_unit"] == "ms"


@pytest.mark.parametrize(("factor", "unit"), [(1, "s"), (1000, "ms"), (10**6, "us"), (10**9, "ns")])
def test_the_unit_of_time_is_told_from_the_values(tmp_path, factor, unit):
    write(tmp_path / "log.csv", "user_id,item_id,t", [f"u{u},i{i},{t * factor}" for u, i, t in rows()])
    got, _ = drafted(tmp_path, "log.csv")
    assert got["data"]["interactions"]["time_unit"] == unit
    loaded = load(read([tmp_path / "mine.yaml"]).config.data, tmp_path).interactions  # type: ignore[union-attr]
    assert loaded.time[0] == START


def test_without_a_header_the_columns_are_told_by_their_values(tmp_path):
    write(tmp_path / "log.tsv", "", [f"{u + 1}\t{i + 1}\t{1 + (u + i) % 5}\t{t}" for u, i, t in rows(items=90)])
    got, _ = drafted(tmp_path, "log.tsv")
    log = got["data"]["interactions"]
    assert log["names"] == ["user_id", "item_id", "rating", "timestamp"], "of two columns of ids the first is the user"
    assert len(load(read([tmp_path / "mine.yaml"]).config.data, tmp_path).interactions) == 600  # type: ignore[union-attr]


def test_the_files_of_grouplens_need_no_words(tmp_path):
    write(tmp_path / "ratings.dat", "", [f"{u + 1}::{i + 1}::{1 + (u + i) % 5}::{t}" for u, i, t in rows()])
    write(tmp_path / "movies.dat", "", [f"{i + 1}::Film {i} (1999)::{('Comedy|Drama', 'Action', 'Drama')[i % 3]}" for i in range(30)])
    write(tmp_path / "users.dat", "", [f"{u + 1}::{'FM'[u % 2]}::{18 + u}::{u % 4}::0213{u}" for u in range(20)])
    got, _ = drafted(tmp_path, "ratings.dat", "users.dat", "movies.dat")  # the order is told by the names
    assert got["data"]["interactions"] == {
        "path": "ratings.dat", "user": "user_id", "item": "item_id", "time": "timestamp", "time_unit": "s", "value": "rating"
    }  # fmt: skip
    assert got["data"]["items"] == {"path": "movies.dat", "id": "item_id", "title": "title", "columns": {"genres": GENRES}}
    assert list(got["data"]["users"]["columns"]) == ["gender", "age", "occupation", "zip_code"]


def test_recbole_files_state_their_types(tmp_path):
    write(tmp_path / "a.inter", "user_id:token\titem_id:token\ttimestamp:float", [f"{u}\t{i}\t{t}" for u, i, t in rows()])
    got, _ = drafted(tmp_path, "a.inter")
    assert got["data"]["interactions"] == {"path": "a.inter", "user": "user_id", "item": "item_id", "time": "timestamp", "time_unit": "s"}


def test_what_is_known_after_the_click_is_named_and_is_no_feature(tmp_path):
    lines = [
        f"u{u},i{i},{t},{'web' if u % 2 else 'app'},{k % 2},{k % 9 * 1000},{int(k % 10 == 0)},x{k % 7}"
        for k, (u, i, t) in enumerate(rows())
    ]
    write(tmp_path / "log.csv", "user_id,item_id,ts,device,is_click,play_time_ms,is_like,bucket", lines)
    got, text = drafted(tmp_path, "log.csv")
    assert got["data"]["interactions"]["context"] == {"device": "category"}
    assert got["data"]["labels"] == {"click": {"column": "is_click"}, "like": {"column": "is_like"}}
    assert got["data"]["impressions"] is True
    assert "left out: play_time_ms" in text
    assert "#       bucket: {kind: category, column: bucket}" in text, "one edit takes it in"


def test_labels_that_are_all_positive_tell_nothing(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id,is_click", [f"u{u},i{i},1" for u, i, _ in rows()])
    got, text = drafted(tmp_path, "log.csv")
    assert "labels" not in got["data"]
    assert "impressions" not in got["data"]
    assert "is 1 in every row" in text


def test_events_that_are_mostly_views_enter_the_history(tmp_path):
    lines = [f"{t},u{u},{'transaction' if k % 10 == 0 else 'view'},i{i}" for k, (u, i, t) in enumerate(rows())]
    write(tmp_path / "events.csv", "timestamp,visitorid,event,itemid", lines)
    got, _ = drafted(tmp_path, "events.csv")
    assert got["data"]["interactions"]["event"] == {"column": "event"}
    assert got["features"] == {"history": {"events": ["view", "transaction"]}}


def test_exposures_by_another_name_become_impressions_with_a_label(tmp_path):
    lines = [f"u{u},i{i},{t},{'click' if k % 4 == 0 else 'show'}" for k, (u, i, t) in enumerate(rows())]
    write(tmp_path / "log.csv", "user_id,item_id,ts,action", lines)
    got, _ = drafted(tmp_path, "log.csv")
    assert got["data"]["labels"] == {"click": {"column": "action", "equals": "click"}}
    assert got["data"]["impressions"] is True
    assert got["features"] == {"history": {"events": ["click"]}}


def test_tables_are_joined_by_their_ids_and_columns_get_kinds(tmp_path):
    write(tmp_path / "log.csv", "who,thing,ts", [f"{u},{i + 1},{t}" for u, i, t in rows()])
    genres = ["rock", "rock|pop", "pop|jazz|rock", "jazz", "pop", "rock|jazz"]
    words = ["a", "quiet", "evening", "at", "the", "old", "harbour", "with", "friends", "and", "songs", "about", "nothing", "much"]
    lines = []
    for i in range(1, 61):
        vector = " ".join(f"{(i * d) % 7 / 7:.3f}" for d in range(1, 9))
        text = " ".join(words[(i * k) % len(words)] for k in range(8)) + f" {i}"
        lines.append(f'{i},Song {i},{genres[i % 6]},{i * i * i},{"ab"[i % 2]},"{text}",{vector},http://x/{i}.jpg,{i * 3},{i % 13 + 700000}')
    write(tmp_path / "catalogue.csv", "nr,title,genres,price,side,about,embedding,cover,play_cnt,artist_id", lines)
    write(tmp_path / "people.csv", "who,land,born", [f"{u},{('nl', 'fr', 'de')[u % 3]},{1950 + 2 * u}" for u in range(20)])
    got, text = drafted(tmp_path, "log.csv", "catalogue.csv", "people.csv")
    items = got["data"]["items"]
    assert (items["id"], items["title"]) == ("nr", "title")
    assert items["columns"] == {
        "genres": GENRES,
        "price": "number",
        "side": "category",
        "about": {"kind": "text", "min_count": 2},
        "embedding": {"kind": "vector", "dim": 8, "separator": " "},
        "artist_id": "category",
    }
    assert "left out: cover" in text
    assert "left out: play_cnt" in text, "a figure that grows with the log may hold the test"
    assert got["data"]["users"]["id"] == "who"
    assert got["data"]["users"]["columns"] == {"land": "category", "born": "category"}


def test_names_that_clash_are_told_apart(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id,ts", [f"u{u},i{i},{t}" for u, i, t in rows()])
    write(tmp_path / "items.csv", "item_id,country,history", [f"i{i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in range(30)])
    write(tmp_path / "users.csv", "user_id,country", [f"u{u},{'cd'[u % 2]}" for u in range(20)])
    got, _ = drafted(tmp_path, "log.csv", "items.csv", "users.csv")
    assert got["data"]["items"]["columns"] == {"country": "category", "item_history": {"kind": "category", "column": "history"}}
    assert got["data"]["users"]["columns"] == {"user_country": {"kind": "category", "column": "country"}}


def test_without_times_a_part_of_each_user_is_held_out(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id", [f"u{u},i{i}" for u, i, _ in rows()])
    got, text = drafted(tmp_path, "log.csv")
    assert "time" not in got["data"]["interactions"]
    assert got["split"] == {"by": "random", "per_user": True}
    assert "the order of the log counts" in text


def test_parquet_keeps_its_types(tmp_path):
    frame = pd.DataFrame(rows(), columns=["user_id", "item_id", "at"])
    frame["at"] = pd.to_datetime(frame["at"], unit="s")
    frame.to_parquet(tmp_path / "log.parquet")
    items = pd.DataFrame({"item_id": range(30), "tags": [["a", "b"], ["c"]] * 15, "vec": [[0.5, 1.5, 2.5]] * 30})
    items.to_parquet(tmp_path / "items.parquet")
    got, _ = drafted(tmp_path, "log.parquet", "items.parquet")
    assert got["data"]["interactions"] == {"path": "log.parquet", "user": "user_id", "item": "item_id", "time": "at"}
    assert got["data"]["items"]["columns"] == {"tags": "tags", "vec": {"kind": "vector", "dim": 3}}


def test_a_big_file_is_sampled_at_its_beginning_middle_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "PART_BYTES", 2_000)
    write(tmp_path / "log.csv", "user_id,item_id,ts", [f"u{k},i{k % 9},{START + k}" for k in range(5_000)])
    got = sample(tmp_path / "log.csv")
    users = got.frame["user_id"].str[1:].astype(int)
    assert not got.whole
    assert (users.min(), users.max()) == (0, 4_999)
    assert ((users > 2_300) & (users < 2_700)).any()
    assert len(users) < 400
    assert "beginning, middle and end" in got.read


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("log.csv", b"", "is empty: no byte in it"),
        ("log.csv", b"\n\n", "holds blank lines alone"),
        ("log.csv", b"user_id,item_id\n", "has a header (user_id, item_id) but no rows"),
        ("log.csv", b"user_id\na\nb\n", "has one column ('user_id')"),
        ("log.csv", b"PK\x03\x04rest", "an Excel workbook. Save the table as CSV"),
        ("log.csv", "user,item\na,b\n".encode("utf-16"), "UTF-16 text. Save it as UTF-8"),
        ("log.json", b'{"user": 1, "item": 2}\n', "holds JSON. Expected a table"),
        ("log.csv", b"a\x00b,c\n1,2\n", "holds binary data"),
        ("log.csv", b"PAR1xxxx", "Give it the ending .parquet"),
        ("log.parquet", b"user_id,item_id\na,b\n", "cannot be read as Parquet"),
        ("log.csv", b"a,a\n1x,2y\n", "has two columns called 'a'"),
        ("log.csv", b"price,rating\n1.5,3.5\n2.5,4.5\n", "No column of the log can be a user and an item"),
        ("log.csv", b"a::b::c\nx::y::z\n", "only the files of GroupLens"),
        ("log.csv.gz", b"no gzip at all", "cannot be unpacked"),
    ],
)
def test_bad_input_ends_in_a_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        draft([tmp_path / name], name="mine", folder=tmp_path)
    assert said in str(caught.value)


def test_a_table_that_does_not_join_is_refused_by_name(tmp_path):
    write(tmp_path / "log.csv", "user_id,item_id", [f"u{u},i{i}" for u, i, _ in rows()])
    write(tmp_path / "prices.csv", "colour,price", ["red,1.5", "blue,2.5"])
    with pytest.raises(DataError, match="no column holds ids of the log's items"):
        draft([tmp_path / "log.csv", tmp_path / "prices.csv"], name="mine", folder=tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.csv' does not exist"):
        draft([tmp_path / "absent.csv"], name="mine", folder=tmp_path)


def test_thresholds_by_hand():
    assert threshold(Column("r", pd.Series(["1", "2", "3", "4", "5"]))) == (4.0, pytest.approx(2 / 5))
    assert threshold(Column("r", pd.Series([str(n) for n in range(1, 11)]))) == (8.0, pytest.approx(3 / 10))
    # four of five are 5: the bar of 4 passes all but one in forty, so the most even cut is taken
    assert threshold(Column("r", pd.Series(["5"] * 20 + ["4"] * 19 + ["1"]))) == (5.0, pytest.approx(1 / 2))
    assert threshold(Column("r", pd.Series(["5", "5"]))) is None


def test_the_split_follows_from_the_rows():
    users = pd.Series([f"u{n // 10}" for n in range(100)])  # one user after the other
    assert split(users, np.arange(100.0), whole=True)[0] == "{by: leave_one_out}"
    assert split(users, np.arange(100.0), whole=False)[0] == "{by: time}"
    assert split(pd.Series([f"u{n % 10}" for n in range(100)]), np.arange(100.0), whole=True)[0] == "{by: time}"
    assert split(users, None, whole=True)[0] == "{by: random, per_user: true}"
    assert split(pd.Series([f"u{n}" for n in range(100)]), None, whole=True)[0] == "{by: random}"
