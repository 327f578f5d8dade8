"""Which table beside a log is the items' and which the users', and on which columns they join: told by the ids themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from recsys.data import grouplens
from recsys.errors import DataError
from recsys.onboarding.look import Column, columns_of, normal, tokens
from recsys.onboarding.roles import ITEM, USER
from recsys.onboarding.sample import Sample

Side = Literal["item", "user"]
SIDES: tuple[Side, ...] = ("item", "user")
_WORDS: dict[Side, set[str]] = {
    "item": set(ITEM.split()) | {"items", "movies", "products", "articles", "videos", "books", "songs", "tracks", "catalog", "catalogue"},
    "user": set(USER.split()) | {"users", "customers", "members", "visitors", "clients", "profiles"},
}


@dataclass(frozen=True)
class Joined:
    """A table beside the log: whose it is, its key, the log's column with the same ids, and the share of those it knows."""

    sample: Sample
    columns: dict[str, Column]
    side: Side
    key: str
    log_column: str | None
    share: float
    reason: str


def join(log: Mapping[str, Column], tables: Sequence[Sample]) -> list[Joined]:
    """Match the tables with the log. DataError where one has no column of ids, or both are of one side."""
    found: list[Joined] = []
    for place, table in enumerate(tables):
        named, why = _side_by_name(table)
        columns = columns_of(framed(table, f"{named or SIDES[place]}s"))
        key, other, share = _match(log, columns)
        if named is None and other is not None:
            told = [side for side in SIDES if _says(other, side) or _says(key, side)]
            named, why = (told[0], f"its ids are those of '{other}'") if len(told) == 1 else (None, "")
        side = named or SIDES[place]
        if named is None:
            why = f"the {('first', 'second')[place]} table is the {side}s'"
        if not key:
            key = _named_key(columns, side, table)
        found.append(Joined(table, columns, side, key, other, share, why))
    if len({table.side for table in found}) < len(found):
        raise DataError(
            f"'{found[0].sample.path}' and '{found[1].sample.path}' both look like the {found[0].side} table ({found[0].reason}; {found[1].reason}). "
            "Give one of them, and add the other to the configuration by hand."
        )
    return found


def framed(table: Sample, role: str) -> pd.DataFrame:
    """The sample with its column names: GroupLens' own where the file has no header."""
    if table.form == "movielens":
        frame: pd.DataFrame = grouplens.read(table.path, role, table.encoding)[0].to_pandas()
        return frame
    return table.frame


def _side_by_name(table: Sample) -> tuple[Side | None, str]:
    name = table.path.name.removesuffix(".gz")
    words = {*tokens(name), normal(table.path.stem)}
    told = [side for side in SIDES if words & _WORDS[side]]
    return (told[0], f"the name {name} says so") if len(told) == 1 else (None, "")


def _says(name: str, side: Side) -> bool:
    return normal(name) in _WORDS[side] or side in tokens(name)


def _match(log: Mapping[str, Column], columns: Mapping[str, Column]) -> tuple[str, str | None, float]:
    """(key, log column, share of the log column's ids that the key holds): an equal name first, then the largest share."""
    best: tuple[tuple[bool, float, int], str, str | None, float] = ((False, 0.0, 0), "", None, 0.0)
    for key, column in columns.items():
        if not len(column.present) or column.is_list or column.repeats > 1.5:
            continue
        ids = set(column.ids)
        for name, other in log.items():
            if not len(other.present) or other.is_list or other.distinct < 1:
                continue
            share = float(other.ids.isin(ids).mean())
            if share >= 0.05:
                # Small numbers (a rating) are among any table's ids: of equal shares the column with more values is the id.
                fit = (normal(key) == normal(name), round(share, 1), other.distinct)
                if fit > best[0]:
                    best = (fit, key, name, share)
    return best[1:]


def _named_key(columns: Mapping[str, Column], side: Side, table: Sample) -> str:
    known = [*(ITEM if side == "item" else USER).split(), "id"]
    named = next((name for word in known for name in columns if normal(name) == word), None)
    if named is None:
        raise DataError(
            f"'{table.path}': no column holds ids of the log's {side}s. Its columns are {', '.join(list(columns)[:20])}. "
            "Expected a row per id, with the ids written as in the log."
        )
    return named
