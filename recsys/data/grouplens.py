"""The files of GroupLens: u.data, u.user, u.item (100K), *.dat with `::` (1M, 10M) and *.csv (later ones).

The first two kinds have no header; what a column is follows from the delimiter and from what the file is for. The 19 genre
flags of u.item become one text `genres`, as in the later releases: Action|Comedy.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pcsv

from recsys.data.malformed import Malformed
from recsys.errors import DataError

RENAMED = {"userId": "user_id", "movieId": "item_id"}
"""Columns of the later csv releases, by the names used here."""
LOG = ["user_id", "item_id", "rating", "timestamp"]
USERS = {"|": ["user_id", "age", "gender", "occupation", "zip_code"], "::": ["user_id", "gender", "age", "occupation", "zip_code"]}
ITEMS = {"|": ["item_id", "title", "release_date", "video_release_date", "imdb_url", "genres"], "::": ["item_id", "title", "genres"]}
_FLAGS = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|Mystery|Romance|"
    "Sci-Fi|Thriller|War|Western"
)
GENRES = _FLAGS.split("|")
"""The genre of each flag of u.item, in order."""


def delimiter(path: Path) -> str:
    """What stands between the columns, from the first line: `::`, a tab, `|` or a comma."""
    with pa.input_stream(str(path)) as stream:
        line = stream.read(1 << 16).partition(b"\n")[0]
    return next((mark for mark in ("::", "\t", "|") if mark.encode() in line), ",")


def names(path: Path, role: str) -> list[str] | None:
    """The columns of a file without a header, or None for a csv file with one."""
    mark = delimiter(path)
    if mark == ",":
        return None
    if role == "log":
        return LOG
    known = ITEMS if role == "items" else USERS
    if mark not in known:
        raise DataError(f"'{path}' is no table of GroupLens: its first line has no '|' or '::'. Declare format: csv with its delimiter.")
    return known[mark]


def read(path: Path, role: str, encoding: str) -> tuple[pa.Table, int]:
    """All columns of a file without a header, and how many rows were malformed. Tables are small and read line by line."""
    mark = delimiter(path)
    if role == "log":
        return _read_log(path, mark)
    header = {"items": ITEMS, "users": USERS}[role][mark]
    cells = [line.split(mark) for line in _text(path, encoding).splitlines() if line]
    if role == "items" and mark == "|":
        cells = [[*row[:5], "|".join(genre for genre, flag in zip(GENRES, row[5:], strict=False) if flag == "1")] for row in cells]
    rows = [row for row in cells if len(row) == len(header)]
    table = pa.table({name: pa.array([row[i] or None for row in rows], pa.string()) for i, name in enumerate(header)})
    return table, len(cells) - len(rows)


def _read_log(path: Path, mark: str) -> tuple[pa.Table, int]:
    # `::` is read as two colons round an empty column: Arrow's fast reader takes one character only.
    columns = [name for field in LOG for name in (field, f"after {field}")][:-1] if mark == "::" else LOG
    text = pa.dictionary(pa.int32(), pa.string())
    malformed = Malformed()
    table = pcsv.read_csv(
        path,
        pcsv.ReadOptions(column_names=columns),
        pcsv.ParseOptions(delimiter=mark[0], quote_char=False, invalid_row_handler=malformed),
        pcsv.ConvertOptions(include_columns=LOG, column_types={"user_id": text, "item_id": text}, strings_can_be_null=True),
    )
    return table, len(malformed)


def _text(path: Path, encoding: str) -> str:
    with pa.input_stream(str(path)) as stream:
        data: bytes = stream.read()
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise
        return data.decode("latin-1")  # GroupLens' older tables
