"""Rules told to a running service, laid over those of its configuration: what such a document may hold, and what comes of both."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import orjson
from pydantic import Field, ValidationError

from recsys.core import FrozenConfig
from recsys.errors import StoreError
from recsys.rerank.rules import BoostConfig, MatchConfig, PinConfig, RulesConfig, unfit

FORMAT = 1
MOST_VALUES = 1_000
"""Values of one boost or block at most."""
LISTS = ("boosts", "pins", "blocks")


class LiveRules(RulesConfig):
    """What somebody changes while a service runs. Its lists come before those of the configuration, which stay in force; any other value
    that it names stands in place of the configuration's."""

    boosts: tuple[BoostConfig, ...] = Field(default=(), max_length=64)
    """Items whose scores are multiplied."""
    pins: tuple[PinConfig, ...] = Field(default=(), max_length=50)
    """Items at fixed places."""
    blocks: tuple[MatchConfig, ...] = Field(default=(), max_length=100)
    """Items that are never shown, on any rung."""
    instead: tuple[Literal["boosts", "pins", "blocks"], ...] = ()
    """Lists of the configuration that are out of force as long as this document stands."""


class Stored(NamedTuple):
    """A document of the store: when it was told, and its rules."""

    time_ms: int
    rules: LiveRules


def to_json(rules: LiveRules) -> bytes:
    """A document for the store, told now: what was named, so that a default stays a default."""
    told = rules.model_dump(mode="json", exclude_unset=True)
    return json.dumps({"format": FORMAT, "time_ms": int(1000 * time.time()), "rules": told}, allow_nan=False).encode()


def from_json(held: bytes) -> Stored:
    """What `to_json` wrote. StoreError where another release wrote it, or nobody can read it."""
    try:
        document = orjson.loads(held)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else None
            raise StoreError(f"the store's document is of format {found}, this release reads {FORMAT}")
        return Stored(int(document["time_ms"]), LiveRules.model_validate(document["rules"]))
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"the store's document cannot be read by this release ('{where}': {first['msg']})") from fault
    except (ValueError, KeyError, TypeError) as fault:
        raise StoreError(f"the store's document is no such document ({type(fault).__name__}: {fault})") from fault


def contradictions(rules: LiveRules, kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(dotted path, sentence) of what does not fit the items' columns, name -> kind."""
    for part in ("boosts", "blocks"):
        for index, match in enumerate(getattr(rules, part)):
            if len(match.values) > MOST_VALUES:
                yield f"{part}.{index}.values", f"are {len(match.values)}; at most {MOST_VALUES} are taken"
    yield from unfit(rules, kinds)


def in_force(configured: RulesConfig, live: LiveRules | None) -> RulesConfig:
    """Both as one."""
    if live is None:
        return configured
    lists = {n: (*getattr(live, n), *(() if n in live.instead else getattr(configured, n))) for n in LISTS}
    named = {n: _over(getattr(configured, n), getattr(live, n)) for n in live.model_fields_set - {*LISTS, "instead"}}
    return configured.model_copy(update=lists | named)


def _over(own: Any, told: Any) -> Any:
    if isinstance(told, FrozenConfig):
        return own.model_copy(update={name: getattr(told, name) for name in told.model_fields_set})
    return told


def origins(configured: RulesConfig, live: LiveRules | None) -> dict[str, str]:
    """Dotted path of each part of `in_force` -> `live` or `configuration`."""
    out: dict[str, str] = {}
    for name in RulesConfig.model_fields:
        own, told = getattr(configured, name), getattr(live, name) if live is not None and name in live.model_fields_set else None
        if name in LISTS:
            n = len(told or ())
            kept = 0 if live is not None and name in live.instead else len(own)
            out |= {f"{name}.{i}": "live" if i < n else "configuration" for i in range(n + kept)}
        elif isinstance(own, FrozenConfig):
            given = told.model_fields_set if told is not None else ()
            out |= {f"{name}.{part}": "live" if part in given else "configuration" for part in type(own).model_fields}
        else:
            out[name] = "configuration" if told is None else "live"
    return out
