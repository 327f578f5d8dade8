"""The declaration that consumers count by: that of the production version, read from the registry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from cluster.registry_url import open_registry
from cluster.taken import covered
from recsys.config import Config
from recsys.core import Vocabulary
from recsys.errors import RayfunnelError
from recsys.features.counting import Counting
from recsys.features.schema import FeatureSpace
from recsys.features.states import StateSource, load_live

log = logging.getLogger(__name__)


def loader(config: Config) -> Callable[[str], Counting | None]:
    """A function of the version in force: the declaration of another one that is in production, else None. It blocks.

    Without a version in production only histories, Parquet and what is trending are kept.
    """

    def load(held: str) -> Counting | None:
        version = ""
        try:
            registry = open_registry(config.place("registry"))
            version = registry.aliases().get("production", "")
            if version and version != held:
                return _counting(config, version, registry.local_copy(version))
        except RayfunnelError as fault:
            if held:
                raise
            log.warning("ingest counts no declared aggregates: %s", fault)
        return None if held else _nothing(config)

    return load


def _counting(config: Config, version: str, home: Path) -> Counting:
    half_life_h = config.ingest.trending_half_life_h
    if not (home / "aggregates").exists():
        return Counting.of(version, None, None, config.data, config.history, trending_half_life_h=half_life_h)
    space = FeatureSpace.load(home / "features")
    users, items = Vocabulary.load(home, "users"), Vocabulary.load(home, "items")
    source = load_live(home / "aggregates", space, users, items).source
    assert isinstance(source, StateSource)  # noqa: S101 - what a bundle holds
    return Counting.of(
        version,
        source.inputs.plan,
        source.stream,
        config.data,
        config.history,
        trending_half_life_h=half_life_h,
        seed_user=source.read_user,
        covered=covered(home),
    )


def _nothing(config: Config) -> Counting:
    return Counting.of("", None, None, config.data, config.history, trending_half_life_h=config.ingest.trending_half_life_h)
