"""The batch road on Ray Data: aggregates of a log that no process holds, each key's events together in one of many parts.

A log is dealt by the hash of a key, so every part has all events of its keys and runs the batch road (`features.asof`) as it
is. One pass per key; the columns of several keys are joined by log position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import ray.data

from recsys.data.interactions import Interactions
from recsys.errors import ConfigError
from recsys.features.asof import AsOf
from recsys.features.groups import Group
from recsys.features.inputs import AggregateInputs

POSITION = "position"
_PART = "part"


def as_dataset(log: Interactions, told: np.ndarray) -> Any:
    """A log that fits in memory as a Dataset of the columns that `values` takes; larger ones are read from Parquet alike."""
    return ray.data.from_pandas(frame_of(log, told))


def frame_of(log: Interactions, told: np.ndarray) -> pd.DataFrame:
    """One row per event: position, user, item (rows of the vocabularies), time, event, value, told, label:… and context:…."""
    columns: dict[str, Any] = {POSITION: np.arange(len(log)), "told": told}
    columns |= {name: getattr(log, name) for name in ("user", "item", "time", "event", "value")}
    columns |= {f"label:{name}": label for name, label in log.labels.items()}
    return pd.DataFrame(columns | {f"context:{name}": column for name, column in log.context.items()})


def values(rows: Any, inputs: AggregateInputs, like: Interactions, group: Group, *, parts: int = 16) -> Any:
    """A Dataset of position and the group's aggregates just before every row. `like` names the vocabularies and events.

    ConfigError for a key with a list in it (tags): one row has several keys then, and cannot be dealt by them.
    """
    wide = [p for p in group.key if (side := inputs.columns.side_of(p)) and inputs.columns.texts[side][p].codes.shape[1] > 1]
    dealt = [p for p in group.key if p not in wide]
    if not dealt:
        raise ConfigError(f"The key {list(group.key)} is a list alone, which cannot be dealt to parts. Add user or item to the key.")
    empty = replace(like.where(np.empty(0, np.int64)), past=None)
    names = [f.name for f in group.features]

    def deal(batch: pd.DataFrame) -> pd.DataFrame:
        return batch.assign(**{_PART: part_of(inputs, dealt, batch, parts)})

    def compute(batch: pd.DataFrame) -> pd.DataFrame:
        batch = batch.sort_values(["time", POSITION], kind="stable")
        log = log_of(batch, empty)
        asof = AsOf(inputs.plan, log, inputs.columns, batch["told"].to_numpy(), offset_s=inputs.config.utc_offset_s)
        found = asof.values(asof.at_rows(np.arange(len(log))), (group,))
        # Lists hold codes of this part alone where they are of a context; items and columns are numbered alike everywhere.
        columns = {n: list(found[n]) if found[n].ndim > 1 else found[n] for n in names}
        return pd.DataFrame({POSITION: batch[POSITION].to_numpy()} | columns)

    dealt_rows = rows.map_batches(deal, batch_format="pandas")
    return dealt_rows.groupby(_PART).map_groups(compute, batch_format="pandas")


def part_of(inputs: AggregateInputs, dealt: Sequence[str], batch: pd.DataFrame, parts: int) -> np.ndarray:
    """(n,) the part of each row, by what it has in common with all rows of its keys: the users, the items, or else 0."""
    if "user" in dealt or "item" in dealt:
        rows = batch["user" if "user" in dealt else "item"].to_numpy()
        return np.asarray(rows % parts, np.int64)
    for part in dealt:
        side = inputs.columns.side_of(part)
        if side is not None:
            codes = inputs.columns.texts[side][part].codes[:, 0]
            return np.asarray(codes[batch[side].to_numpy()] % parts, np.int64)
    return np.zeros(len(batch), np.int64)


def log_of(batch: pd.DataFrame, empty: Interactions) -> Interactions:
    """The rows of a part as a log."""
    columns: dict[str, Any] = {name: batch[name].to_numpy() for name in ("user", "item", "time", "event", "value")}
    return replace(
        empty,
        **columns,
        labels={name: batch[f"label:{name}"].to_numpy() for name in empty.labels},
        context={name: batch[f"context:{name}"].to_numpy() for name in empty.context},
        session=None,
    )
