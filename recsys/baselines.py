"""The rows that every report has beside the learned models: Pop, ItemKNN, EASE, Markov.

On many data sets they beat published neural results, so a report without them says little. Their names are capitalised,
configured channels are not: `EASE` is the baseline, `ease` a channel of the configuration. They see the whole history of a
user, as their definitions ask.
"""

from __future__ import annotations

from recsys.config import ChannelConfig
from recsys.recall.ease import EASEConfig
from recsys.recall.markov import MarkovConfig
from recsys.recall.neighbors import ItemCFConfig
from recsys.recall.popular import PopularConfig

EVERYTHING = 1_000_000
"""No bound, for limits that must be a number."""
DENSE_UP_TO = 5_000
"""Items up to which EASE keeps every weight; above, the 1,000 furthest from 0 of each item."""
NAMES = ("Pop", "ItemKNN", "EASE", "Markov")


def baselines(n_items: int) -> dict[str, ChannelConfig]:
    """Name -> configuration, for a catalogue of so many items.

    Pop: plain counts. ItemKNN: cosine, 100 neighbours kept per candidate item, shrink 0, no weighting, all history alike.
    EASE: lambda 500. Markov: the channel's defaults.
    """
    return {
        "Pop": PopularConfig(half_life_h=None),
        "ItemKNN": ItemCFConfig(neighbors=100, keep="candidate", weighting="none", shrink=0, decay=1, reach=EVERYTHING),
        "EASE": EASEConfig(l2=500, decay=1, links=None if n_items <= DENSE_UP_TO else 1_000),
        "Markov": MarkovConfig(),
    }
