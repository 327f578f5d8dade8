"""A look into a file of unknown make: its format, encoding, separator, header, and rows from its beginning, middle and end.

Small files are read whole. The trap: a log is often sorted by user or by time, so its first rows alone mislead.
"""

from __future__ import annotations

import codecs
import csv
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pds

from recsys.data.formats import NULLS, RECBOLE_TYPES, first_line
from recsys.errors import DataError

PART_BYTES = 4_000_000
"""Read from each of the beginning, the middle and the end of a text file; one of up to three parts is read whole."""
PART_ROWS = 100_000
"""The same of a Parquet file."""
DELIMITERS = ("::", "\t", ";", "|", ",")
_MAGIC = {
    b"PK\x03\x04": "a zip archive or an Excel workbook. Save the table as CSV (UTF-8)",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"\x93NUMPY": "a NumPy array. Write its columns as CSV or Parquet",
    b"%PDF": "a PDF. Export the table as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook. Save the table as CSV (UTF-8)",
}


@dataclass(frozen=True)
class Sample:
    """Rows of one file, as text for text files and as they are typed for Parquet.

    frame: (n, columns), missing cells None; `names` says that the file has no header and what its columns were called here;
    whole: every row is here; types: RecBole's type of each column, where the file states it.
    """

    path: Path
    form: str
    frame: pd.DataFrame
    whole: bool
    read: str
    """How much was read, for a person."""
    delimiter: str | None = None
    encoding: str = "utf-8"
    headless: bool = False
    types: dict[str, str] | None = None


def sample(path: Path) -> Sample:
    """Look into a file; DataError says why it can be no table, and what to do."""
    if not path.exists():
        raise DataError(f"'{path}' does not exist. Give the path of the log, then those of the item and user tables if there are any.")
    if path.is_dir() or path.name.endswith((".parquet", ".pq")):
        return _parquet(path)
    if path.stat().st_size == 0:
        raise DataError(
            f"'{path}' is empty: no byte in it. Expected a table with a row per event, and at least a user and an item in each."
        )
    parts, whole, read = _parts(path)
    for magic, what in _MAGIC.items():
        if parts[0].startswith(magic):
            raise DataError(f"'{path}' is {what}, then run this again.")
    if parts[0].startswith(b"PAR1"):
        raise DataError(f"'{path}' is a Parquet file by its first bytes. Give it the ending .parquet, then run this again.")
    encoding = _encoding(parts, path)
    texts = [part.decode(encoding, errors="replace") for part in parts]
    texts[0] = texts[0].lstrip("\ufeff")
    if texts[0].lstrip().startswith(("{", "[{")):
        raise DataError(
            f"'{path}' holds JSON. Expected a table: write its fields as the columns of a CSV or Parquet file, then run this again."
        )
    return _table(path, texts, encoding, whole, read)


def _parts(path: Path) -> tuple[list[bytes], bool, str]:
    """The bytes to look at, cut at line ends; whether that is all; and a sentence."""
    size = path.stat().st_size
    if path.name.endswith(".gz"):  # cannot be entered in the middle
        try:
            with pa.input_stream(str(path)) as stream:
                head: bytes = stream.read(3 * PART_BYTES)
                more = bool(stream.read(1))
        except (OSError, zlib.error) as fault:
            raise DataError(f"'{path}' cannot be unpacked: {first_line(fault)}. Pack it again, or give the unpacked file.") from fault
        return (
            [head.rpartition(b"\n")[0] if more else head],
            not more,
            f"its first {len(head) / 1e6:.0f} MB unpacked" if more else "the whole file",
        )
    with path.open("rb") as file:
        if size <= 3 * PART_BYTES:
            return [file.read()], True, "the whole file"
        parts = [file.read(PART_BYTES).rpartition(b"\n")[0]]
        for start in ((size - PART_BYTES) // 2, size - PART_BYTES):
            file.seek(start)
            parts.append(file.read(PART_BYTES).partition(b"\n")[2])
        parts[1] = parts[1].rpartition(b"\n")[0]
    return parts, False, f"{3 * PART_BYTES / 1e6:.0f} MB of {size / 1e6:,.0f} MB: its beginning, middle and end"


def _encoding(parts: list[bytes], path: Path) -> str:
    """utf-8 where it decodes; else gb18030 where its bytes come in pairs; else cp1252 or latin-1."""
    joined = b"\n".join(parts)
    if b"\x00" in joined[:100_000]:
        raise DataError(f"'{path}' holds binary data. Expected a table: CSV, TSV, Parquet, or a file of RecBole or GroupLens.")
    if _decodes(joined, "utf-8"):
        return "utf-8"
    # Western accents stand alone between ASCII letters; Chinese comes in pairs of high bytes.
    high = np.frombuffer(b" " + joined[: 1 << 20] + b" ", np.uint8) > 0x7F
    alone = float((high[1:-1] & ~high[:-2] & ~high[2:]).sum() / max(1, high.sum()))
    if alone < 0.3 and _decodes(joined, "gb18030"):
        return "gb18030"
    return "cp1252" if _decodes(joined, "cp1252") else "latin-1"


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(text, final=True)
    except UnicodeDecodeError:
        return False
    return True


def _table(path: Path, texts: list[str], encoding: str, whole: bool, read: str) -> Sample:
    lines = [line for line in texts[0][:200_000].splitlines() if line.strip()][:200]
    if not lines:
        raise DataError(f"'{path}' holds blank lines alone. Expected a table with a row per event.")
    recbole = path.name.removesuffix(".gz").endswith((".inter", ".user", ".item")) and _typed(lines[0])
    delimiter = "\t" if recbole else _delimiter(lines)
    if delimiter is None:
        name = lines[0].strip().strip('"')[:60]
        raise DataError(
            f"'{path}' has one column ('{name}'): none of {', '.join(repr(d) for d in DELIMITERS)} stands between cells. "
            "Expected at least a user and an item in each row."
        )
    first = _cells(lines[0], delimiter, quoted=not recbole)
    headless = not recbole and _is_data(first, [_cells(line, delimiter) for line in lines[1:]])
    names = [f"column{n + 1}" for n in range(len(first))] if headless else [cell.strip() for cell in first]
    types = dict(name.split(":") for name in names) if recbole else None
    names = list(types) if types is not None else names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"'{path}' has two columns called '{twice[0]}'. Rename one.")
    if not headless:
        texts = [texts[0].lstrip("\r\n").partition("\n")[2], *texts[1:]]
    frame = _rows("\n".join(texts), delimiter, names, quoted=not recbole)
    if frame.empty:
        raise DataError(f"'{path}' is empty: it has a header ({', '.join(names[:8])}) but no rows.")
    form = "recbole" if recbole else "movielens" if headless and _grouplens(path, delimiter, len(names)) else "csv"
    if delimiter == "::" and form == "csv":
        raise DataError(
            f"'{path}': '::' stands between the columns, which only the files of GroupLens (ratings.dat, users.dat, movies.dat) may have. "
            "Put a tab in its place."
        )
    return Sample(path, form, frame, whole, read, delimiter, encoding, headless, types)


def _typed(header: str) -> bool:
    return all(cell.partition(":")[2] in RECBOLE_TYPES for cell in header.strip().split("\t"))


def _delimiter(lines: list[str]) -> str | None:
    """The mark that cuts every line into the same number of cells, the most common first; None where none cuts the first line."""
    best, most = None, 0.0
    for mark in DELIMITERS:
        counts = [len(_cells(line, mark)) for line in lines]
        if counts[0] > 1:
            even = sum(n == counts[0] for n in counts) / len(counts)
            if even > most + 1e-9:
                best, most = mark, even
    return best


def _cells(line: str, delimiter: str, *, quoted: bool = True) -> list[str]:
    if len(delimiter) > 1:
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])


def _is_data(first: list[str], rest: list[list[str]]) -> bool:
    """Whether the first line is a row like the others: it holds a number, or cells that come again below."""
    if any(_is_number(cell) for cell in first):
        return True
    columns = list(zip(*(row for row in rest if len(row) == len(first)), strict=True))
    return bool(columns) and sum(cell in column for cell, column in zip(first, columns, strict=True)) * 2 > len(first)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell.strip().lower() not in {"nan", "inf", "infinity"}


def _grouplens(path: Path, delimiter: str, columns: int) -> bool:
    """Whether the loader reads this file as one of GroupLens' by its name alone, columns included."""
    name = path.name.removesuffix(".gz")
    if name in ("u.item", "u.user"):
        return delimiter == "|"
    return (name.endswith(".data") and delimiter == "\t" and columns == 4) or (name.endswith(".dat") and delimiter == "::")


def _rows(text: str, delimiter: str, names: list[str], *, quoted: bool) -> pd.DataFrame:
    if len(delimiter) > 1:
        text, delimiter = text.replace(delimiter, "\x1f"), "\x1f"
    try:
        return pd.read_csv(
            io.StringIO(text),
            sep=delimiter,
            names=names,
            header=None,
            index_col=False,
            dtype=str,
            keep_default_na=False,
            na_values=NULLS,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            on_bad_lines="skip",
            low_memory=False,
        )
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=names)
    except pd.errors.ParserError as fault:
        raise DataError(f"the table cannot be taken apart: {first_line(fault)}. Check its quotes.") from fault


def _parquet(path: Path) -> Sample:
    try:
        source = pds.dataset(path, format="parquet")
        rows = source.count_rows()
    except (pa.ArrowInvalid, OSError) as fault:
        raise DataError(f"'{path}' cannot be read as Parquet: {first_line(fault)}. Only Parquet may come as a folder of files.") from fault
    if rows == 0:
        raise DataError(f"'{path}' is empty: it has a schema but no rows.")
    if rows <= 3 * PART_ROWS:
        return Sample(path, "parquet", source.to_table().to_pandas(), True, "the whole file")
    taken = [range(start, start + PART_ROWS) for start in (0, (rows - PART_ROWS) // 2, rows - PART_ROWS)]
    table = source.take(pa.array([row for part in taken for row in part], pa.int64()))
    return Sample(path, "parquet", table.to_pandas(), False, f"{3 * PART_ROWS:,} of {rows:,} rows: its beginning, middle and end")
