"""What is wrong with a configuration, in words: where it stands, what came, what was expected, the nearest valid name.

pydantic says what is wrong with a value; this module finds the line it was written on and the key that was meant.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

PASSWORD = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:)(?!\$\{)[^\s\"']+(?=@)")
"""The password in `scheme://user:password@host`; `${NAME}` in its place is none yet."""
QUERY_PASSWORD = re.compile(r"(?P<before>[?&]password=)(?!\$\{)[^\s\"'&#]+", re.IGNORECASE)
"""The password in `redis://host?password=…`, where clients of Redis take it as well."""
SECRET = re.compile("password|secret|token|key", re.IGNORECASE)
"""Names of options, handed to a client of somebody else's, whose values are shown to nobody."""
Path = tuple[str | int, ...]
NOTHING: Any = object()
"""No value came, or it needs no showing; None is a null that somebody wrote."""


def redact(text: str) -> str:
    """The text with the password of every URL in it replaced by ***."""
    return QUERY_PASSWORD.sub(r"\g<before>***", PASSWORD.sub(r"\g<before>***", text))


class Secrets:
    """Marks a field of options, some of which are secret by their names."""


def masked(options: Mapping[str, str]) -> dict[str, str]:
    """The options with what is secret by its name, and the password of every URL, replaced by ***."""
    return {name: "***" if SECRET.search(name) else redact(value) for name, value in options.items()}


def shown(model: BaseModel, name: str) -> Any:
    """The value of a field as it may be printed and kept."""
    value = getattr(model, name)
    return masked(value) if any(isinstance(mark, Secrets) for mark in type(model).model_fields[name].metadata) else value


def shown_setting(setting: str) -> str:
    """A `path=value` setting as it may be printed: of secret options the path alone."""
    return f"{setting.partition('=')[0]}=***" if _of_secret_options(setting) else redact(setting)


def _of_secret_options(text: str) -> bool:
    return "options" in text and SECRET.search(text) is not None


@dataclass(frozen=True)
class Origin:
    """The file and line a value was written in; a --set setting has no line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return redact(self.file if self.line is None else f"{self.file}:{self.line}")


@dataclass(frozen=True)
class Fault:
    """One thing wrong. `sentence` follows the path: "is not a known key", "must be greater than 0"."""

    origin: Origin
    path: str
    sentence: str
    value: Any = NOTHING
    hint: str | None = None

    def __str__(self) -> str:
        subject = f"{self.path} " if self.path else ""
        came = f" (got {self.shown})" if self.value is not NOTHING else ""
        meant = f" Did you mean '{self.hint}'?" if self.hint else ""
        end = "" if self.sentence.endswith((".", "?")) and not came else "."
        return redact(f"{self.origin}: {subject}{self.sentence}{came}{end}{meant}")

    @property
    def shown(self) -> str:
        """The value as one short line."""
        if self.value is NOTHING:
            return ""
        text = json.dumps(self.value, ensure_ascii=False, default=str)
        if _of_secret_options(self.path + text):
            return "***"
        return redact(text if len(text) <= 60 else text[:57] + "...")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to this one, or None where none is close."""
    names = list(known)
    by_lower = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def explain(error: ValidationError, schema: type[BaseModel], data: Any, where: Callable[[Path], Origin]) -> list[Fault]:
    """Each fault of `data` once, in the order of the file. `where` gives the origin of a path."""
    by_path: dict[Path, list[tuple[ErrorDetails, list[Any]]]] = {}
    for detail in error.errors(include_url=False):
        path, annotations = _locate(detail, schema, data)
        by_path.setdefault(path, []).append((detail, annotations))
    faults = []
    for path, details in by_path.items():
        # `str | Section`: where a section was given, the faults inside it say more than "expected a string".
        deeper = any(other[: len(path)] == path and len(other) > len(path) for other in by_path)
        if not (deeper and all(d["type"].endswith(("_type", "_parsing")) for d, _ in details)):
            faults.append(_fault(path, details, schema, where))
    return sorted(faults, key=lambda f: (f.origin.file, f.origin.line or 0))


def _fault(path: Path, details: list[tuple[ErrorDetails, list[Any]]], schema: type[BaseModel], where: Callable[[Path], Origin]) -> Fault:
    detail, annotations = details[0]
    dotted, value = ".".join(str(part) for part in path), detail["input"]
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = sorted({name for a in annotations for name in _fields(a)})
        hint = nearest(str(path[-1]), known) or _elsewhere(str(path[-1]), schema)
        listed = "" if hint or not known else f"; known here: {', '.join(known)}"
        return Fault(where(path), dotted, f"is not a known key{listed}", hint=hint)
    if kind == "missing":
        return Fault(where(path), dotted, "is missing; it has no default")
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        tags = re.findall(r"'([^']*)'", str(context.get("expected_tags", ""))) or _tags(annotations)
        if kind == "union_tag_not_found":
            return Fault(where(path), f"{dotted}.type", f"is missing; one of {', '.join(tags)}")
        given = str(context.get("tag", ""))
        return Fault(where((*path, "type")), f"{dotted}.type", f"must be one of {', '.join(tags)}", given, nearest(given, tags))
    if kind == "value_error":
        sentence = detail["msg"].removeprefix("Value error, ")
        return Fault(where(path), f"{dotted}:" if dotted else "", sentence)
    choices = [
        c for d, _ in details if d["type"] == "literal_error" for c in re.findall(r"'([^']*)'", str(d.get("ctx", {}).get("expected", "")))
    ]
    expected = list(dict.fromkeys(_expected(d) for d, _ in details))
    sentence = " or ".join([expected[0], *(other.removeprefix("be ") for other in expected[1:])])
    return Fault(where(path), dotted, f"must {sentence}", value, nearest(str(value), choices))


def _expected(detail: ErrorDetails) -> str:
    """What pydantic says should be, after `must`."""
    text = re.sub(r"^\w+ should ", "", detail["msg"])
    text = re.sub(r", unable to parse .*|, got a number with a fractional part", "", text)
    return "be a section of keys and values" if "valid dictionary" in text else text


def _locate(detail: ErrorDetails, schema: type[BaseModel], data: Any) -> tuple[Path, list[Any]]:
    """The path as the user wrote it (pydantic adds the branch of a union), and the annotations of its section."""
    path: list[str | int] = []
    annotations: list[Any] = [schema]
    at = data
    parts = detail["loc"]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        inside = (isinstance(at, Mapping) and str(part) in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at))
        if not inside and not (last and detail["type"] == "missing"):
            annotations = [a for a in annotations if str(part) in (tag_of(a), getattr(a, "__name__", None))] or annotations
            continue
        path.append(part)
        if last and detail["type"] in {"extra_forbidden", "missing"}:
            break
        annotations = [child for a in annotations for child in _children(a, part)]
        at = _entry(at, part) if inside else None
        annotations = _of_type(annotations, at)
    return tuple(path), annotations


def _entry(section: Any, part: str | int) -> Any:
    return section[int(part)] if isinstance(section, list) else section[str(part)]


def flatten(annotation: Any) -> list[Any]:
    """The classes an annotation allows: unions, Annotated and aliases taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return flatten(get_args(annotation)[0])
    if origin in {Union, types.UnionType}:
        return [member for arg in get_args(annotation) for member in flatten(arg)]
    return [annotation]


def _children(annotation: Any, part: str | int) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [m for name, info in annotation.model_fields.items() if str(part) in (name, info.alias) for m in flatten(info.annotation)]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return flatten(arguments[1])
    return [member for argument in arguments if argument is not Ellipsis for member in flatten(argument)]


def _of_type(annotations: list[Any], value: Any) -> list[Any]:
    """Of several sections, the one whose `type` was written."""
    given = value.get("type") if isinstance(value, Mapping) else None
    return [a for a in annotations if given is not None and tag_of(a) == given] or annotations


def _fields(annotation: Any) -> list[str]:
    section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [info.alias or name for name, info in annotation.model_fields.items()] if section else []


def tag_of(annotation: Any) -> str | None:
    """The `type` that a section of this class is written with, where it has one."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return None
    info = annotation.model_fields.get("type")
    values = get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()
    return str(values[0]) if values else None


def _tags(annotations: Sequence[Any]) -> list[str]:
    return [tag for a in annotations if (tag := tag_of(a)) is not None]


def _elsewhere(key: str, schema: type[BaseModel]) -> str | None:
    """The full path of a key of this very name in another section."""
    return next((path for path in dotted_paths(schema) if path.rpartition(".")[2] == key and "." in path), None)


def dotted_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted path that a configuration of this class can have, mappings of free names left out."""
    for field, info in schema.model_fields.items():
        name = info.alias or field
        yield prefix + name
        for member in flatten(info.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from dotted_paths(member, f"{prefix}{name}.")
