"""What a body must hold beyond its schema, and how a fault in it is put into a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from recsys.errors import RequestError
from recsys.serve_config import LimitsConfig

DEEPEST = 32
"""Levels of lists and objects in one event, item or user: more than any field takes, and few enough to be walked and shown."""


def parsed(adapter: TypeAdapter[Any], raw: bytes) -> Any:
    """A body from JSON bytes. Raises RequestError with the first fault."""
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        raise fault(error) from None


def fault(error: ValidationError) -> RequestError:
    """A validation error as a code, a sentence and the field."""
    return _fault(error.errors(include_url=False, include_context=False)[0])


def faults(error: ValidationError) -> RequestError:
    """All that is wrong, one sentence after another, under the code and the field of the first."""
    found = [_fault(one) for one in error.errors(include_url=False, include_context=False)]
    return RequestError(found[0].code, " ".join(map(str, found)), field=found[0].field, status=found[0].status)


def _fault(first: ErrorDetails) -> RequestError:
    kind, where = first["type"], ".".join(str(part) for part in first["loc"] if part != "function-before")
    if kind == "json_invalid":
        return RequestError("malformed_json", f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", status=400)
    first["msg"] = first["msg"].removeprefix("Value error, ")
    if kind == "model_type":  # pydantic's own words name our classes
        first["msg"] = "expected an object"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == "missing":
        wrapped = isinstance(first["input"], dict) and [v for v in first["input"].values() if isinstance(v, list)]
        hint = " Several go as a plain list: [{...}, {...}]." if wrapped and len(first["input"]) == 1 else ""
        return RequestError("missing_field", f"'{where}' is required.{hint}", field=where)
    if kind == "extra_forbidden":
        return RequestError("unknown_field", f"'{where}' is not a field of this request. See /docs for those that are.", field=where)
    code = (
        kind
        if kind in {"empty_id", "wrong_type", "invalid_value"}
        else "invalid_value"
        if kind.startswith(("greater", "less", "string_too", "too_"))
        else "wrong_type"
    )
    subject = f"'{where}'" if where else "The body"
    return RequestError(code, f"{subject}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {shown}.", field=where or None)


def check_id(name: str, value: str, limits: LimitsConfig) -> None:
    """Raises RequestError where an id is longer than the service takes."""
    if len(value) > limits.id_bytes or len(value.encode()) > limits.id_bytes:
        raise RequestError("id_too_long", f"'{name}' has {len(value.encode())} bytes; at most {limits.id_bytes} are taken.", field=name)


def check_ids(name: str, values: Sequence[str], limits: LimitsConfig, most: int) -> None:
    """Raises RequestError where a list of ids is too long, or one of them is."""
    if len(values) > most:
        raise RequestError("too_many_items", f"'{name}' has {len(values)} ids; at most {most} are taken.", field=name)
    for value in values:
        check_id(name, value, limits)


def check_k(k: int, limits: LimitsConfig) -> None:
    """Raises RequestError where k is out of range."""
    if not 1 <= k <= limits.k:
        raise RequestError("k_out_of_range", f"'k' must be between 1 and {limits.k}, got {k}.", field="k")


def check_text(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises RequestError where a parsed row holds text that is no UTF-8, or is nested too deep for what reads it next."""
    if depth > DEEPEST:
        subject = f"'{where}'" if where else "A list"
        raise RequestError(
            "wrong_type", f"{subject} is nested more than {DEEPEST} deep. Send values that are flat, or one list deep.", field=where or None
        )
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                subject = f"'{where}'" if where else "A name"
                raise RequestError(
                    "bad_utf8", f"{subject} holds bytes that are no UTF-8. Send text as UTF-8.", field=where or None
                ) from None
    elif isinstance(value, dict):
        for name, one in value.items():
            check_text(name)
            check_text(one, where or name[:64], depth + 1)
    elif isinstance(value, list):
        for one in value:
            check_text(one, where, depth + 1)


def check_size(row: Any, sent: int, limits: LimitsConfig) -> None:
    """Raises RequestError (413) where one row of a body of `sent` bytes is larger than a body of its own might be. After `check_text`."""
    if sent > limits.body_bytes and (size := len(json.dumps(row, ensure_ascii=False).encode())) > limits.body_bytes:
        raise RequestError("row_too_large", f"It has {size} bytes; at most {limits.body_bytes} are taken. Send less of it.", status=413)
