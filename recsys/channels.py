"""Fitting, saving and loading the configured recall channels together: some lean on another channel or on a model.

To add a channel: one file under recall/ with its config (see ItemCF), its class in `recsys.config.ChannelConfig`, and a
contract test. A channel leaves out what a query must not see inside its search: `queries.bar(scores)` does it for dense
(B, I) scores; links, vector indexes and `exact_search` take `queries.exclude` and `queries.allowed` as they are. Only a
channel that needs more than the log (tables, vectors, another channel's neighbours) has a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from recsys.config import ChannelConfig
from recsys.core import Queries, Recaller
from recsys.data.interactions import Interactions
from recsys.features.catalogue import Catalogue
from recsys.recall.column_vector import ColumnVectorConfig
from recsys.recall.content import ContentConfig
from recsys.recall.popular_segment import SegmentPopularConfig
from recsys.recall.realtime import RealtimeConfig
from recsys.recall.taste import typical_users
from recsys.recall.vector import EncodesUsers, VectorConfig, VectorRecaller

Encode = Callable[[Queries], np.ndarray]
Channels = dict[str, Recaller]


def alone(config: ChannelConfig) -> bool:
    """Whether a channel is fitted on the log and nothing else, so that it can be fitted anywhere."""
    return not isinstance(config, VectorConfig | RealtimeConfig | ContentConfig | ColumnVectorConfig | SegmentPopularConfig)


def fit(
    configs: Mapping[str, ChannelConfig],
    log: Interactions,
    *,
    vectors: np.ndarray | None,
    encode: Encode,
    items: Catalogue | None = None,
    users: Catalogue | None = None,
    already: Mapping[str, Recaller] | None = None,
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Channels:
    """Every channel fitted on the positives of `log`, in the order of the configuration.

    vectors (I, d) are the two-tower's item vectors (None: it was not trained, and its channel is left out); `encode` gives
    the user vectors of a batch of queries. items and users are what the tables say of them (None: nothing).
    `already` are channels fitted elsewhere on the same log, taken as they are; each fit runs inside `around(name)`.
    """
    items, users = items or Catalogue(log.n_items), users or Catalogue(log.n_users)
    fitted: dict[str, Any] = dict(already or {})
    leaning: list[str] = []
    for name, config in configs.items():
        if name in fitted:
            continue
        if isinstance(config, RealtimeConfig):
            leaning.append(name)
            continue
        with around(name):
            if isinstance(config, VectorConfig):
                if vectors is not None:
                    fitted[name] = VectorRecaller(name, encode, config.build().fit(vectors, encode(typical_users(log))))
            elif isinstance(config, ContentConfig | ColumnVectorConfig | SegmentPopularConfig):
                fitted[name] = config.build().fit(log, items, users)
            else:
                fitted[name] = config.build().fit(log)
    for name in leaning:
        config = configs[name]
        assert isinstance(config, RealtimeConfig)  # noqa: S101 - told apart above
        with around(name):
            fitted[name] = config.build().fit(log, fitted if config.neighbors in configs else None)
    return {name: fitted[name] for name in configs if name in fitted}


def load(configs: Mapping[str, ChannelConfig], folder: Path, funnel: EncodesUsers) -> Channels:
    """Every channel that `save` wrote into `folder`, memory-mapped; `funnel` encodes the users of vector channels."""
    return {name: config.load(folder / name, funnel) for name, config in configs.items() if (folder / name).exists()}


def save(channels: Mapping[str, Recaller], folder: Path) -> None:
    """Write each channel into a folder of its own."""
    for name, channel in channels.items():
        (folder / name).mkdir(parents=True)
        channel.save(folder / name)
