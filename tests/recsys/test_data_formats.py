"""Files are read as declared, and a file that cannot be says why and what to do."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recsys.data.events import Dataset, load
from recsys.data.sources import DataConfig
from recsys.errors import DataError

LOG = "user_id,item_id,ts\nu1,007,100\nu2,8,200\n"


def loaded(folder: Path, text: str | bytes = LOG, name: str = "log.csv", **interactions) -> Dataset:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(DataConfig.model_validate({"interactions": {"path": name, **interactions}}), folder)


def refused(folder: Path, text: str | bytes = LOG, name: str = "log.csv", **interactions) -> str:
    with pytest.raises(DataError) as fault:
        loaded(folder, text, name, **interactions)
    return str(fault.value)


def ids(dataset: Dataset) -> list[tuple[str, str]]:
    log = dataset.interactions
    return list(zip(log.users.outside(log.user), log.items.outside(log.item), strict=True))


def test_ids_stay_as_they_are_written(tmp_path):
    assert ids(loaded(tmp_path)) == [("u1", "007"), ("u2", "8")]


def test_a_byte_order_mark_spaces_in_the_header_and_windows_line_ends_do_no_harm(tmp_path):
    assert ids(loaded(tmp_path, b"\xef\xbb\xbfuser_id , item_id\r\na,b\r\n")) == [("a", "b")]


def test_other_delimiters_and_compression(tmp_path):
    assert ids(loaded(tmp_path, "user_id;item_id\na;b\n", delimiter=";")) == [("a", "b")]
    assert ids(loaded(tmp_path, "user_id\titem_id\na\tb\n", "log.tsv")) == [("a", "b")]
    assert ids(loaded(tmp_path, gzip.compress(LOG.encode()), "log.csv.gz")) == [("u1", "007"), ("u2", "8")]


def test_a_declared_encoding_is_read(tmp_path):
    assert ids(loaded(tmp_path, "user_id,item_id\ncafé,ü\n".encode("latin-1"), encoding="latin-1")) == [("café", "ü")]


def test_parquet_numbers_are_the_same_ids_as_text(tmp_path):
    pd.DataFrame({"user_id": [196.0, np.nan, 3], "item_id": [1, 2, 3], "t": pd.to_datetime([1, 2, 3], unit="s")}).to_parquet(
        tmp_path / "log.parquet"
    )
    dataset = load(DataConfig.model_validate({"interactions": {"path": "log.parquet", "time": "t"}}), tmp_path)
    assert ids(dataset) == [("196", "1"), ("3", "3")]
    assert dataset.interactions.time.tolist() == [1.0, 3.0]
    assert dict(dataset.account.rows()) == {"rows read": 3, "dropped: missing user id": 1, "kept": 2}


def test_recbole_files_know_their_columns(tmp_path):
    dataset = loaded(tmp_path, 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t"2\t4.5\t30\n1\t3\t2\t20\n', "x.inter")
    log = dataset.interactions
    assert ids(dataset) == [("1", "3"), ("1", '"2')]  # by time; a quote is a letter
    assert log.value.tolist() == [2.0, 4.5]
    assert log.event_names == ("rating",)


def test_recbole_files_without_time_and_rating_keep_the_order_of_the_log(tmp_path):
    log = loaded(tmp_path, "user_id:token\titem_id:token\nb\t2\na\t1\n", "x.inter").interactions
    assert not log.has_time
    assert log.users.outside(log.user) == ["b", "a"]
    assert log.time.tolist() == [0.0, 1.0]
    assert np.isnan(log.value).all()


@pytest.mark.parametrize("text", ["1\t2\t5\t30\n1\t3\t4\t20\n", "1::2::5::30\n1::3::4::20\n"])
def test_grouplens_logs_have_no_header(tmp_path, text):
    dataset = loaded(tmp_path, text, "u.data")
    assert ids(dataset) == [("1", "3"), ("1", "2")]
    assert dataset.interactions.value.tolist() == [4.0, 5.0]


def test_grouplens_csv_releases_are_renamed(tmp_path):
    assert ids(loaded(tmp_path, "userId,movieId,rating,timestamp\n1,2,5,30\n", format="movielens")) == [("1", "2")]


def test_grouplens_tables_of_both_kinds(tmp_path):
    flags = "0|1|0|0|0|1" + "|0" * 13
    (tmp_path / "u.item").write_bytes(f"2|Léon (1994)|01-Jan-1994||http://x|{flags}\n".encode("latin-1"))
    (tmp_path / "users.dat").write_text("1::F::25::10::48067\n")
    (tmp_path / "u.data").write_text("1\t2\t5\t30\n")
    dataset = load(
        DataConfig.model_validate(
            {
                "interactions": {"path": "u.data"},
                "items": {"path": "u.item", "columns": {"title": "text", "genres": {"kind": "tags", "separator": "|"}}},
                "users": {"path": "users.dat", "columns": {"age": {"kind": "bins", "edges": [18]}, "gender": "category"}},
            }
        ),
        tmp_path,
    )
    assert dataset.items.loc[0].tolist() == ["Léon (1994)", "Action|Comedy"]
    assert dataset.users.loc[0].tolist() == ["25", "F"]


def test_movies_dat_keeps_colons_in_titles(tmp_path):
    (tmp_path / "movies.dat").write_text("2::Se7en: the film::Crime|Thriller\n")
    (tmp_path / "ratings.dat").write_text("1::2::5::30\n")
    config = {"interactions": {"path": "ratings.dat"}, "items": {"path": "movies.dat", "columns": {"title": "text"}}}
    assert load(DataConfig.model_validate(config), tmp_path).items["title"].tolist() == ["Se7en: the film"]


def test_kuairand_takes_csv_and_knows_its_columns(tmp_path):
    dataset = loaded(tmp_path, "user_id,video_id,time_ms,is_click\n1,2,1650812741436,1\n", format="kuairand")
    assert ids(dataset) == [("1", "2")]
    assert dataset.interactions.time.tolist() == [1650812741.436]


def test_malformed_lines_are_counted_not_fatal(tmp_path):
    dataset = loaded(tmp_path, "user_id,item_id\na,b\nc\nd,e,f\n")
    assert dict(dataset.account.rows()) == {"rows read": 3, "dropped: malformed line": 2, "kept": 1}


def test_several_files_follow_each_other(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,ts\nx,1,5\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,ts\ny,2,4\n")
    dataset = load(DataConfig.model_validate({"interactions": {"path": ["a.csv", "b.csv"], "time": "ts"}}), tmp_path)
    assert ids(dataset) == [("y", "2"), ("x", "1")]


def test_paths_take_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", str(tmp_path))
    (tmp_path / "log.csv").write_text(LOG)
    for path in ("${WHERE}/log.csv", "${WHERE:-/nowhere}/log.csv", f"${{UNSET_NAME:-{tmp_path}}}/log.csv"):
        assert len(load(DataConfig.model_validate({"interactions": {"path": path}}), Path("/")).interactions) == 2
    with pytest.raises(
        DataError, match=r"needs the environment variable UNSET_NAME, which is not set. Set it, or write \$\{UNSET_NAME:-default\}"
    ):
        load(DataConfig.model_validate({"interactions": {"path": "${UNSET_NAME}/log.csv"}}), Path("/"))


def test_a_missing_file_is_named_with_the_key_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"interactions: there is no file '.*gone.csv'. Relative paths start at"):
        load(DataConfig.model_validate({"interactions": {"path": "gone.csv"}}), tmp_path)
    (tmp_path / "log.csv").write_text(LOG)
    with pytest.raises(DataError, match=r"items: there is no file '.*gone.csv'"):
        load(DataConfig.model_validate({"interactions": {"path": "log.csv"}, "items": {"path": "gone.csv"}}), tmp_path)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "log.csv", "is empty. Expected a header and at least one row."),
        ("user_id,item_id\n", "log.csv", "is empty: it has a header but no rows."),
        ("user_id:token\titem_id:token\n", "log.inter", "is empty: it has a header but no rows."),
        ("\nuser_id,item_id\n", "log.csv", "starts with an empty line. Expected a header"),
        ("user_id,user_id,item_id\na,b,c\n", "log.csv", "has two columns called 'user_id'. Rename one."),
        ("uid,item_id\na,b\n", "log.csv", "interactions.user: "),
        ("uid,item_id\na,b\n", "log.csv", "has no column 'user_id'. Did you mean 'uid'? It has: uid, item_id."),
        ("user_id;item_id\na;b\n", "log.csv", "the header 'user_id;item_id' has no ',' between columns. Declare delimiter: ';'."),
        ("1\t2\t5\n1\t3\t4\n", "u.data", "has no line of 4 columns (user_id, item_id, rating, timestamp)."),
        ("not parquet at all", "log.parquet", "cannot be read as Parquet"),
        ("user_id\titem_id:token\na\tb\n", "log.inter", "'user_id' is no typed column of a RecBole file. Expected name:type"),
        ("user_id:word\titem_id:token\na\tb\n", "log.inter", "'user_id:word' is no typed column"),
        ("1,2,5,30\n", "u.data", "has no column 'user_id'"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, text, name, said):
    assert said in refused(tmp_path, text, name)


def test_every_missing_column_is_reported_at_once(tmp_path):
    said = refused(tmp_path, "x,y\n1,2\n", context={"tab": "category"})
    assert "interactions.user" in said
    assert "interactions.item" in said
    assert "interactions.context.tab" in said


@pytest.mark.parametrize("bad", ["caf\xe9".encode("latin-1"), "用户".encode("gb18030")])
def test_a_foreign_byte_is_found_by_its_offset(tmp_path, bad):
    text = b"user_id,item_id\nok,1\n" + bad + b",2\n"
    offset = next(i for i, byte in enumerate(text) if byte > 127)
    said = refused(tmp_path, text)
    assert f"the byte 0x{text[offset]:02X} at offset {offset} is not utf-8" in said
    assert "encoding: latin-1 or encoding: gb18030" in said


def test_a_foreign_byte_in_the_header_or_in_an_inferred_column_is_found_too(tmp_path):
    assert "at offset 4 is not utf-8" in refused(tmp_path, b"user\xe9,item_id\na,b\n")
    (tmp_path / "items.csv").write_bytes(b"item_id,price\n1,\xe9\n")
    (tmp_path / "log.csv").write_text(LOG)
    config = {"interactions": {"path": "log.csv"}, "items": {"path": "items.csv", "columns": {"price": "number"}}}
    with pytest.raises(DataError, match="0xE9 at offset 16"):
        load(DataConfig.model_validate(config), tmp_path)


def test_an_unknown_encoding_and_a_long_delimiter_are_refused(tmp_path):
    assert "there is no encoding 'klingon'" in refused(tmp_path, encoding="klingon")
    assert "Only format: movielens knows '::'" in refused(tmp_path, delimiter="::")


def test_files_of_one_log_must_agree(tmp_path):
    pd.DataFrame({"user_id": [1], "item_id": [1]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"user_id": ["x"], "item_id": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the files of the log have columns of different types"):
        load(DataConfig.model_validate({"interactions": {"path": ["a.parquet", "b.parquet"]}}), tmp_path)


def test_grouplens_lines_of_the_wrong_length_are_counted(tmp_path):
    assert dict(loaded(tmp_path, "1\t2\t5\t30\n1\t3\n", "u.data").account.rows()) == {
        "rows read": 2,
        "dropped: malformed line": 1,
        "kept": 1,
    }
    (tmp_path / "movies.dat").write_text("2::Seven::Crime\nbroken\n")
    config = {"interactions": {"path": "u.data"}, "items": {"path": "movies.dat", "columns": {"title": "text"}}}
    assert load(DataConfig.model_validate(config), tmp_path).account.notes == ["items: 1 malformed lines left out"]


def test_a_table_that_is_not_grouplens_is_refused(tmp_path):
    (tmp_path / "movies.dat").write_text("2\tSeven\tCrime\n")
    (tmp_path / "log.csv").write_text(LOG)
    config = {"interactions": {"path": "log.csv"}, "items": {"path": "movies.dat", "columns": {"title": "text"}}}
    with pytest.raises(DataError, match=r"is no table of GroupLens: its first line has no '\|' or '::'"):
        load(DataConfig.model_validate(config), tmp_path)


def test_a_folder_of_parquet_files_is_one_log_and_any_other_folder_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    for name in ("b", "a"):
        pd.DataFrame({"user_id": [name], "item_id": [1]}).to_parquet(tmp_path / f"logs/{name}.parquet")
    assert ids(load(DataConfig.model_validate({"interactions": {"path": "logs"}}), tmp_path)) == [("a", "1"), ("b", "1")]
    with pytest.raises(DataError, match=r"interactions: '.*logs' is a folder. Expected a file; only Parquet"):
        load(DataConfig.model_validate({"interactions": {"path": "logs", "format": "csv"}}), tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("recsys.data.formats.pcsv.read_csv", closed)
    assert "log.csv' cannot be opened: [Errno 13] Permission denied." in refused(tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    assert "cannot be opened" in refused(tmp_path, gzip.compress(LOG.encode() * 100)[:40], "log.csv.gz")
