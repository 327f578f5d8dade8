"""Files to Arrow tables: csv, Parquet, RecBole's atomic files, GroupLens' files, KuaiRand.

Only the columns that are asked for are read. Ids and categories stay text, so "007" is not 7. Rows of a text file with
too few or too many cells are skipped and counted.
"""

from __future__ import annotations

import codecs
import csv
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.dataset as pds

from recsys.data import grouplens
from recsys.data.malformed import Malformed
from recsys.data.sources import FileConfig
from recsys.errors import DataError

Role = Literal["log", "items", "users", "history"]

NULLS = ["", "NaN", "nan", "null", "NULL", "None", "\\N"]
"""Cells of a text file that say nothing. NA is not among them: it is a country's code."""
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")


class Need(NamedTuple):
    """Why a column is read: the key of the configuration that names it, whether as text, and whether it may be absent."""

    key: str
    text: bool = False
    optional: bool = False


class Raw(NamedTuple):
    """What a file gave: the asked columns that it has, how many rows were malformed, and all its column names."""

    table: pa.Table
    malformed: int
    header: tuple[str, ...]


def format_of(path: Path, config: FileConfig) -> str:
    """The declared format, or the one that the file's name tells."""
    if config.format != "auto":
        return config.format
    name = path.name.removesuffix(".gz")
    if name in ("u.item", "u.user") or name.endswith((".data", ".dat")):
        return "movielens"
    if name.endswith((".inter", ".user", ".item")):
        return "recbole"
    return "parquet" if name.endswith((".parquet", ".pq")) or path.is_dir() else "csv"


def read(path: Path, config: FileConfig, role: Role, needs: Mapping[str, Need]) -> Raw:
    """Read the needed columns of one file; DataError says what is wrong with it and what to do."""
    key = next(iter(needs.values())).key.rpartition(".")[0]
    check_present(path, key)
    form = format_of(path, config)
    if form == "parquet" or (form == "kuairand" and not path.name.removesuffix(".gz").endswith(".csv")):
        return _read_parquet(path, needs)
    if path.is_dir():
        raise DataError(f"{key}: '{path}' is a folder. Expected a file; only Parquet may come as a folder of files.")
    try:
        if form == "movielens" and (names := grouplens.names(path, role)) is not None:
            columns = present(names, path, needs)
            table, malformed = grouplens.read(path, role, config.encoding)
            if len(table) == 0:
                raise DataError(f"'{path}' has no line of {len(names)} columns ({', '.join(names)}).")
            return Raw(table.select(columns), malformed, tuple(names))
        return _read_text(path, config, form, needs)
    except UnicodeError as fault:
        raise not_utf8(path, config.encoding) from fault
    except LookupError as fault:
        raise DataError(f"'{path}': there is no encoding '{config.encoding}'. Known are utf-8, latin-1, gb18030 and others.") from fault
    except pa.ArrowInvalid as fault:
        if "UTF8" in str(fault):
            raise not_utf8(path, config.encoding) from fault
        raise DataError(f"'{path}' cannot be read as {form}: {first_line(fault)}.") from fault
    except OSError as fault:
        raise DataError(f"{key}: '{path}' cannot be opened: {first_line(fault)}.") from fault


def check_present(path: Path, key: str) -> None:
    """DataError where there is no such file or nothing in it."""
    if not path.exists():
        raise DataError(
            f"{key}: there is no file '{path}'. Relative paths start at the folder of the configuration; ${{NAME}} is an environment variable."
        )
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{key}: '{path}' is empty. Expected a header and at least one row.")


def _read_parquet(path: Path, needs: Mapping[str, Need]) -> Raw:
    try:
        source = pds.dataset(path, format="parquet")
        columns = present(source.schema.names, path, needs)
        table = source.to_table(columns=columns)
    except (pa.ArrowInvalid, OSError) as fault:
        raise DataError(f"'{path}' cannot be read as Parquet: {first_line(fault)}. If it is a text file, declare format: csv.") from fault
    if len(table) == 0:
        raise DataError(f"'{path}' is empty: it has a schema but no rows.")
    return Raw(table, 0, tuple(source.schema.names))


def _read_text(path: Path, config: FileConfig, form: str, needs: Mapping[str, Need]) -> Raw:
    delimiter = config.delimiter or _delimiter(path, form)
    if len(delimiter) > 1:
        raise DataError(f"'{path}': the delimiter '{delimiter}' has more than one character. Only format: movielens knows '::'.")
    line = _first_line(path, config.encoding)
    first = next(csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_NONE if form == "recbole" else csv.QUOTE_MINIMAL))
    if config.names is not None and len(config.names) != len(first):
        raise DataError(f"'{path}': names has {len(config.names)} columns, but the first line has {len(first)}: {line[:80]}")
    header = list(config.names) if config.names else _untyped(first, path) if form == "recbole" else [name.strip() for name in first]
    if form == "movielens":
        header = [grouplens.RENAMED.get(name, name) for name in header]
    if len(header) == 1 and (other := next((mark for mark in ";\t|," if mark in header[0]), None)):
        raise DataError(f"'{path}': the header '{header[0]}' has no {delimiter!r} between columns. Declare delimiter: {other!r}.")
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise DataError(f"'{path}' has two columns called '{twice[0]}'. Rename one.")
    columns = present(header, path, needs)
    malformed = Malformed()
    table = pcsv.read_csv(
        path,
        pcsv.ReadOptions(encoding=config.encoding, column_names=header, skip_rows=0 if config.names else 1, block_size=1 << 23),
        pcsv.ParseOptions(
            delimiter=delimiter,
            quote_char=False if form == "recbole" else '"',
            newlines_in_values=form != "recbole",
            invalid_row_handler=malformed,
        ),
        pcsv.ConvertOptions(
            include_columns=columns,
            column_types={name: pa.dictionary(pa.int32(), pa.string()) for name in columns if needs[name].text},
            null_values=NULLS,
            strings_can_be_null=True,
        ),
    )
    if any(pa.types.is_binary(field.type) for field in table.schema):
        raise not_utf8(path, config.encoding)
    if len(table) + len(malformed) == 0:
        raise DataError(f"'{path}' is empty: it has a header but no rows.")
    return Raw(table, len(malformed), tuple(header))


def _delimiter(path: Path, form: str) -> str:
    return "\t" if form == "recbole" or path.name.removesuffix(".gz").endswith(".tsv") else ","


def _first_line(path: Path, encoding: str) -> str:
    with pa.input_stream(str(path)) as stream:
        head: bytes = stream.read(1 << 20).partition(b"\n")[0]
    line = head.decode(encoding).lstrip("\ufeff").rstrip("\r")
    if not line.strip():
        raise DataError(f"'{path}' starts with an empty line. Expected a header with the names of the columns.")
    return line


def _untyped(fields: Iterable[str], path: Path) -> list[str]:
    names = []
    for given in fields:
        name, colon, kind = given.strip().partition(":")
        if not colon or kind not in RECBOLE_TYPES:
            raise DataError(
                f"'{path}': '{given}' is no typed column of a RecBole file. Expected name:type with a type of {', '.join(RECBOLE_TYPES)}, "
                "separated by tabs. If it is a plain table, declare format: csv."
            )
        names.append(name)
    return names


def present(header: Iterable[str], path: Path, needs: Mapping[str, Need]) -> list[str]:
    """The needed columns that there are; DataError names every one that is missing and the nearest there is."""
    names = list(header)
    faults = []
    for column, need in needs.items():
        if column not in names and not need.optional:
            near = difflib.get_close_matches(column, names, 1, 0.5) or [n for n in names if n.lower() == column.lower()]
            hint = f" Did you mean '{near[0]}'?" if near else ""
            faults.append(f"{need.key}: '{path}' has no column '{column}'.{hint} It has: {', '.join(names[:40])}.")
    if faults:
        raise DataError("\n".join(faults))
    return [column for column in needs if column in names]


def not_utf8(path: Path, encoding: str) -> DataError:
    """The error for a file in another encoding: names the first foreign byte."""
    found = foreign_byte(path, encoding)
    where = f"the byte 0x{found[1]:02X} at offset {found[0]:,} is not {encoding}" if found else f"it is not {encoding}"
    return DataError(f"'{path}': {where}. Declare what it is, such as encoding: latin-1 or encoding: gb18030.")


def foreign_byte(path: Path, encoding: str) -> tuple[int, int] | None:
    """(offset, byte) of the first byte that does not decode, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    at = 0
    with pa.input_stream(str(path)) as stream:
        while True:
            chunk: bytes = stream.read(1 << 24)
            pending: bytes = decoder.getstate()[0]
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as fault:
                return at - len(pending) + fault.start, (pending + chunk)[fault.start]
            if not chunk:
                return None
            at += len(chunk)


def first_line(fault: Exception) -> str:
    """The first line of another library's message, without its full stop."""
    return str(fault).partition("\n")[0].rstrip(". ")
