"""What live events say of the log's ids, event types and context, as the service reads it: a value has one spelling in both roads.

A file keeps one type a column, and clients send what they like: 5.0 for 5, true, a word where the files have numbers. It was accepted and
counted, so it must be learnt from as well; one odd value must not stop every training that comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import canonical_id
from recsys.data.cleaning import is_text, to_numbers
from recsys.data.columns import ColumnConfig

_NUMBERS = frozenset({"number", "bins"})
_CUT = frozenset({"tags", "sequence", "vector"})
"""Kinds whose cell in a file of text is cut at a separator."""


def column_of(values: Sequence[Any], column: ColumnConfig, wanted: pa.DataType) -> pa.ChunkedArray:
    """(n,) values of events as a column of the log whose type is `wanted`; as texts where that cannot hold one of them, to be put behind
    the log's own `as_texts`."""
    texts = pa.array([_text(value, column) for value in values], pa.string())
    told = pa.chunked_array([texts])
    if column.kind in _NUMBERS and (pa.types.is_integer(wanted) or pa.types.is_floating(wanted)):
        return pa.chunked_array([pa.array(to_numbers(told), pa.float64(), from_pandas=True)])
    if pa.types.is_list(wanted) or pa.types.is_large_list(wanted):
        return fitting([None if text is None else text.split(column.splits_on) for text in texts.to_pylist()], wanted)
    return exactly(texts.to_pylist(), wanted)


def exactly(texts: Sequence[str | None], wanted: pa.DataType) -> pa.ChunkedArray:
    """(n,) texts as a column of the log whose type is `wanted`; as they are where one of them is no value of it, such as the user `abc` or
    `007` among whole numbers, to be put behind the log's own `as_texts`."""
    told = pa.chunked_array([pa.array(texts, pa.string())])
    if is_text(pa.chunked_array([], wanted)):
        return told.cast(wanted.value_type).dictionary_encode() if pa.types.is_dictionary(wanted) else told.cast(wanted)
    try:
        held = told.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return told
    return held if as_texts(held).equals(told) else told


def fitting(values: Sequence[Any], wanted: pa.DataType) -> pa.ChunkedArray:
    """(n,) texts, or lists of them, as another type; null where one is none of it."""
    if not (pa.types.is_list(wanted) or pa.types.is_large_list(wanted)):
        told = pa.array(values, pa.string()).dictionary_encode()
        known = _fitting(told.dictionary.to_pylist(), pa.string(), wanted).combine_chunks()
        return pa.chunked_array([known.take(told.indices)])
    return _fitting(values, pa.list_(pa.string()), wanted)


def _fitting(values: Sequence[Any], as_told: pa.DataType, wanted: pa.DataType) -> pa.ChunkedArray:
    try:
        return pa.chunked_array([pa.array(values, as_told).cast(wanted)])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(values) == 1:
            return pa.chunked_array([pa.nulls(1, wanted)])
    half = len(values) // 2
    return pa.chunked_array([*_fitting(values[:half], as_told, wanted).chunks, *_fitting(values[half:], as_told, wanted).chunks], wanted)


def as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of the log as texts, each spelled as the service spells that value."""
    known = column.unique()
    texts = pa.array([_spelled(value) for value in known.to_pylist()], pa.string())
    return pa.chunked_array([texts.take(pc.index_in(column, value_set=known).combine_chunks())])


def _text(value: Any, column: ColumnConfig) -> str | None:
    if isinstance(value, list) and column.kind in _CUT:
        return column.splits_on.join(text for one in value if (text := _spelled(one))) or None
    if column.kind in _NUMBERS and isinstance(value, bool | list):
        return str(int(value)) if isinstance(value, bool) else None
    return _spelled(value)


def _spelled(value: Any) -> str | None:
    """As `features.encoders.spelled`."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    return canonical_id(value) or None
