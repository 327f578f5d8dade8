"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow.fs as pafs
import pytest

from recsys.data.whole_files import put_whole


def broken(path: str) -> None:
    Path(path).write_text("ha")
    raise OSError("no space left")


def test_a_file_is_there_whole_and_replaces_the_one_before(tmp_path):
    for text in ("one", "another"):
        put_whole(pafs.LocalFileSystem(), str(tmp_path), "a", lambda path, text=text: Path(path).write_text(text))
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(OSError, match="no space left"):
        put_whole(pafs.LocalFileSystem(), str(tmp_path), "a", broken)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "before")]


def test_an_object_store_is_written_at_once_as_it_cannot_rename():
    store = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    store.create_dir("/whole")
    paths = []

    def write(path: str) -> None:
        paths.append(path)
        with store.open_output_stream(path) as stream:
            stream.write(b"all of it")

    put_whole(store, "/whole", "a", write)
    assert paths == ["/whole/a"]
    assert store.open_input_stream("/whole/a").read() == b"all of it"
