"""Writes a configuration as YAML: every key and value, and if asked each field's docstring as a comment, or where it came from.

`configs/base.yaml` is what this module writes for the defaults, so the manual cannot disagree with the code.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from recsys.config_faults import flatten, redact, shown, tag_of

WIDTH = 118


def document(model: BaseModel, *, comments: bool = True, origins: Mapping[str, str] | None = None) -> str:
    """The model as YAML. Comments of a class stand where it first appears; `origins` names by dotted path where a value is from."""
    return redact("\n".join(_Writer(comments, origins).section(model, ())) + "\n")


class _Writer:
    def __init__(self, comments: bool, origins: Mapping[str, str] | None) -> None:
        self.comments, self.origins = comments, origins
        self.explained: set[type] = set()

    def section(self, model: BaseModel, path: tuple[str, ...]) -> Iterator[str]:
        schema, pad = type(model), "  " * len(path)
        first = schema not in self.explained
        self.explained.add(schema)
        for index, (name, info) in enumerate(schema.model_fields.items()):
            if self.comments and not path and index:
                yield ""
            if self.comments and first:
                yield from _wrapped(comment(name, info.description, info.annotation), pad)
            yield from self.entry(info.alias or name, shown(model, name), path)

    def entry(self, name: str, value: Any, path: tuple[str, ...]) -> Iterator[str]:
        pad, here = "  " * len(path), (*path, name)
        if isinstance(value, BaseModel):
            yield f"{pad}{scalar(name)}:"
            yield from self.section(value, here)
        elif isinstance(value, Mapping) and any(isinstance(child, BaseModel) for child in value.values()):
            yield f"{pad}{scalar(name)}:"
            for key, child in value.items():
                yield from self.entry(str(key), child, here)
        else:
            line = f"{pad}{scalar(name)}: {scalar(value)}"
            yield line if self.origins is None else f"{line}  # {self.origins.get('.'.join(here), 'default')}"


def template(model: BaseModel, commented: str) -> str:
    """The model as a base file: the section `commented`, which has no defaults, is an example behind `#`, ready to be taken over."""
    lines, inside = [], False
    for line in document(model).splitlines():
        inside = line == f"{commented}:" or (inside and (line.startswith(" ") or not line))
        lines.append(f"#{line}" if inside and line else line)
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, tuple | set | frozenset):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def comment(name: str, description: str | None, annotation: Any) -> str:
    """The field's docstring, and which types its section may have where it has a choice."""
    text = " ".join((description or ("What this section describes." if name == "type" else "")).split())
    arguments = [member for outer in flatten(annotation) for member in (outer, *flatten_values(outer))]
    tags = [tag for member in arguments if (tag := tag_of(member)) is not None]
    return f"{text} Types: {', '.join(tags)}." if len(tags) > 1 else text


def flatten_values(annotation: Any) -> list[Any]:
    """The classes that the values of a mapping may have."""
    arguments = getattr(annotation, "__args__", ())
    return [member for argument in arguments[1:] for member in flatten(argument)]


def _wrapped(text: str, pad: str) -> list[str]:
    return [f"{pad}# {line}" for line in textwrap.wrap(text, WIDTH - len(pad))]
