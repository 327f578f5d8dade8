"""What a column of a user, item or context table holds, declared once: read by the loader, encoded by features.

`category: id` is short for `category: {kind: id}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import PositiveInt, field_validator, model_validator

from recsys.core import FrozenConfig

Kind = Literal["id", "category", "tags", "sequence", "number", "bins", "text", "vector", "hour", "weekday"]
Scale = Literal["none", "log", "min_max", "standard"]
Combiner = Literal["mean", "sum", "none"]

FROM_TIME: frozenset[Kind] = frozenset({"hour", "weekday"})
"""Kinds that are read from the time of an event, not from a column."""
_VOCABULARY: frozenset[Kind] = frozenset({"id", "category", "tags", "sequence", "text"})
_LISTS: frozenset[Kind] = frozenset({"tags", "sequence", "text"})
_NUMBERS: frozenset[Kind] = frozenset({"number", "bins"})
_TAKEN_BY: dict[str, frozenset[Kind]] = {
    "min_count": _VOCABULARY,
    "hash_buckets": _VOCABULARY,
    "separator": frozenset({"tags", "sequence", "vector"}),
    "length": _LISTS,
    "combiner": _LISTS,
    "table": _VOCABULARY,
    "scale": frozenset({"number"}),
    "edges": frozenset({"bins"}),
    "min_value": _NUMBERS,
    "max_value": _NUMBERS,
    "timezone": FROM_TIME,
}


class ColumnConfig(FrozenConfig):
    kind: Kind
    """id and category: one value. tags: a bag of values. sequence: values in order, newest last. number: one float as
    it is. bins: one float, cut at `edges`. text: words, as a bag. vector: `dim` floats. hour, weekday: taken from the time."""
    column: str | None = None
    """Its name in the file, where that differs from the name of the feature."""
    dim: PositiveInt | None = None
    """Width of its embedding (default: features.dim). For kind vector: how many floats a value has; required there."""
    min_count: PositiveInt = 1
    """Values seen less often than this share the buckets of unknown values."""
    hash_buckets: PositiveInt = 1
    """Rows for unknown and rare values. More than one tells unknown values apart by their hash."""
    separator: str | None = None
    """What stands between the values of one cell (default: a space for tags and sequences, a comma for vectors)."""
    length: PositiveInt | None = None
    """Values kept per row: the first of a bag or text, the last of a sequence (default: as many as the fit sees, at most 64)."""
    combiner: Combiner = "mean"
    """How the embeddings of a bag or sequence become one; none keeps each, for models that attend."""
    table: str | None = None
    """Embedding table (and vocabulary) to share, by the name of another feature, such as item_id."""
    scale: Scale = "standard"
    """number: standard (mean 0, deviation 1), min_max (0 to 1), log (sign(x) log(1 + |x|)) or none."""
    edges: tuple[float, ...] = ()
    """bins: the increasing limits; a value equal to an edge belongs to the bin above it. n edges make n + 1 bins."""
    min_value: float | None = None
    """Smaller numbers count as missing, and are counted."""
    max_value: float | None = None
    """Larger numbers count as missing, and are counted."""
    timezone: str = "UTC"
    """Where the clock hangs that hour and weekday are read from, such as Asia/Shanghai."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @field_validator("edges")
    @classmethod
    def _increasing(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges must increase, got {list(edges)}")
        return edges

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(f"unknown timezone '{name}'; give an IANA name such as UTC or Asia/Shanghai") from None
        return name

    @model_validator(mode="after")
    def _parameters_fit_the_kind(self) -> Self:
        for name, kinds in _TAKEN_BY.items():
            if name in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"'{name}' is not a parameter of kind '{self.kind}'; it belongs to {', '.join(sorted(kinds))}")
        if self.kind == "bins" and not self.edges:
            raise ValueError("kind 'bins' needs 'edges', such as [18, 25, 35, 50]")
        if self.kind == "vector" and self.dim is None:
            raise ValueError("kind 'vector' needs 'dim', the number of floats a value has")
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value:g} is above max_value {self.max_value:g}")
        return self

    @property
    def splits_on(self) -> str:
        """The separator in force."""
        return self.separator if self.separator is not None else ("," if self.kind == "vector" else " ")

    def source(self, name: str) -> str:
        """The column of the file that the feature `name` is read from."""
        return self.column or name


Columns = Mapping[str, ColumnConfig]
"""Feature name -> what it holds, in order of declaration."""
