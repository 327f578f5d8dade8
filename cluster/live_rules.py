"""`rayfunnel rules show|set|clear`: the rules of pages that a running service obeys over those of its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.redis_items import RedisItemLog
from cluster.store_url import store_url
from recsys.config import Config
from recsys.config_faults import Fault
from recsys.config_file import read_as
from recsys.errors import ConfigError, StoreError
from recsys.rerank.live_rules import LiveRules, Stored, contradictions, from_json, in_force, origins, to_json


@contextmanager
def _log(config: Config) -> Iterator[RedisItemLog]:
    with store_url(config) as url:
        log = RedisItemLog(url, config.store)
        try:
            yield log
        finally:
            log.close()


def show(config: Config, console: Console) -> None:
    """Print what the configuration and the store come to, as YAML, each part with where it comes from."""
    with _log(config) as log:
        number, held = log.since(0).rules
    live: Stored | None = None
    try:
        live = from_json(held) if held else None
    except StoreError as error:
        console.print(
            f"Live rules {number} are passed over, those of the configuration are in force: {error}.", markup=False, soft_wrap=True
        )
    rules = live.rules if live is not None else None
    told = "" if live is None else f"; live rules {number} lie over it"
    console.print(f"# rules of the configuration{told}", markup=False, highlight=False, soft_wrap=True)
    both, origin = in_force(config.rules, rules).model_dump(mode="json"), origins(config.rules, rules)
    for line in _lines(both, origin):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(rules: dict[str, Any], origin: dict[str, str]) -> Iterator[str]:
    for name, value in rules.items():
        if isinstance(value, list):
            yield f"{name}:{'' if value else ' []'}"
            yield from (f"  - {_flat(one)}  # {origin[f'{name}.{n}']}" for n, one in enumerate(value))
        elif isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {part}: {_flat(one)}  # {origin[f'{name}.{part}']}" for part, one in value.items())
        else:
            yield f"{name}: {_flat(value)}  # {origin[name]}"


def _flat(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def put(config: Config, path: Path, console: Console) -> None:
    """Tell a document, YAML or JSON, in place of the one before. ConfigError with every fault; then nothing was changed."""
    rules = document_of(config, path)
    try:
        document = to_json(rules)
    except ValueError as fault:  # .inf is a number to YAML, and none to JSON
        raise ConfigError(f"{path}: a number is not finite ({fault}). Nothing was changed.") from fault
    with _log(config) as log:
        number = log.rule(document)
    console.print(f"Live rules {number} are in the store. Replicas obey within two looks (serve.items_poll_s).", soft_wrap=True)


def document_of(config: Config, path: Path) -> LiveRules:
    """The document of a file, checked like that of PUT /v1/rules, against the columns that the configuration declares."""
    loaded = read_as(LiveRules, [path])
    faults = list(loaded.faults)
    if loaded.config is not None:
        columns = config.data.items.columns if config.data.items is not None else {}
        kinds = {name: str(c.kind) for name, c in columns.items()}
        faults += [Fault(loaded.tree.at(tuple(w.split("."))), w, what) for w, what in contradictions(loaded.config, kinds)]
    if loaded.config is None or faults:
        raise ConfigError([str(fault) for fault in faults])
    return loaded.config


def clear(config: Config, console: Console) -> None:
    """Take the document back."""
    with _log(config) as log:
        number = log.rule(b"")
    console.print(f"Live rules are taken back ({number}): those of the configuration stand alone.", soft_wrap=True)
