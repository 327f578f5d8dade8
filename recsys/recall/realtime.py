"""The recent-history trigger: what goes with the few things that the user did just now.

It has no model of its own: it looks up the item links of another channel (ItemCF's), and shares its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from recsys.core import FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, NotFittedError
from recsys.recall.links import Decay, HalfLife, ItemLinks, recency
from recsys.recall.neighbors import ItemCFConfig


class RealtimeConfig(FrozenConfig):
    type: Literal["realtime"] = "realtime"
    """What goes with the newest events: the recent-history trigger."""
    neighbors: str = "item_cf"
    """Channel whose item links are triggered. Where no such channel is configured, this one fits an ItemCF of its own."""
    newest: PositiveInt = 10
    """Events that trigger at most, the newest of the history."""
    window_h: PositiveFloat | None = 168.0
    """Only events of this many hours before the request trigger; null: however old. Events without a time always do."""
    decay: Decay = 0.8
    half_life_h: HalfLife = 24.0

    def build(self) -> Realtime:
        """The channel, not yet fitted."""
        return Realtime(self)

    def load(self, folder: Path, _funnel: object = None) -> Realtime:
        """The channel that was saved in `folder`."""
        return Realtime.load(folder, self)


class Realtime:
    """score(user, item) = sum over the newest events of link weight * decay ** (events since) * 0.5 ** (age / half-life)."""

    name = "realtime"

    def __init__(self, config: RealtimeConfig) -> None:
        self.config = config
        self._links: ItemLinks | None = None
        self._shared = False

    @property
    def links(self) -> ItemLinks:
        """From an event's item to the items that it triggers."""
        if self._links is None:
            raise NotFittedError("Realtime has no item links yet. Call fit(interactions) or share(channels) first.")
        return self._links

    def fit(self, interactions: Interactions, channels: Mapping[str, Any] | None = None) -> Self:
        """Share the links of the fitted channel `neighbors`; where `channels` is not given, fit an ItemCF."""
        if channels is not None:
            return self.share(channels)
        self._links, self._shared = ItemCFConfig(keep="history", neighbors=50).build().fit(interactions).links, False
        return self

    def share(self, channels: Mapping[str, Any]) -> Self:
        """Use the links of channels[config.neighbors]; they are not saved again. ConfigError where it has none."""
        source = channels.get(self.config.neighbors)
        if source is None or not hasattr(source, "links"):
            known = ", ".join(sorted(name for name, channel in channels.items() if hasattr(channel, "links"))) or "none"
            raise ConfigError(f"realtime.neighbors names '{self.config.neighbors}', which is no channel with item links. Known: {known}.")
        self._links, self._shared = source.links, True
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that the newest events trigger most."""
        c = self.config
        weights = recency(queries, newest=c.newest, decay=c.decay, half_life_h=c.half_life_h, window_h=c.window_h)
        # Older events have no weight: cutting them here saves looking at them.
        return self.links.recall(queries.history[:, -c.newest :], weights[:, -c.newest :], queries.exclude, k, queries.allowed)

    def save(self, folder: Path) -> None:
        """Write `links/`, unless they are another channel's."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self._shared:
            self.links.save(folder / "links")

    @classmethod
    def load(cls, folder: Path, config: RealtimeConfig) -> Self:
        """Read what `save` wrote, or the links of the channel `neighbors` in the folder beside this one, memory-mapped."""
        self = cls(config)
        own = folder / "links"
        self._shared = not own.exists()
        self._links = ItemLinks.load(folder.parent / config.neighbors / "links" if self._shared else own)
        return self
