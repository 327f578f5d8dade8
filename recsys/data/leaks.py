"""Columns that must not be inputs: what is known only after an item was shown, and what was summed over the whole log.

Named ones are refused when the configuration is read. `too_good` looks at the values: a context column that orders the
training labels almost perfectly is an answer in disguise, whatever its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from recsys.data.columns import FROM_TIME, ColumnConfig

AFTER: dict[str, frozenset[str]] = {
    "kuairand": frozenset(
        {
            "is_click",
            "is_like",
            "is_follow",
            "is_comment",
            "is_forward",
            "is_hate",
            "is_profile_enter",
            "long_view",
            "play_time_ms",
            "profile_stay_time",
            "comment_stay_time",
        }
    )
}
"""Format -> columns of its log that are written when the impression is over."""
TOTALS: dict[str, tuple[str, ...]] = {"kuairand": ("_cnt", "_user_num", "counts", "play_progress", "play_duration", "stay_duration")}
"""Format -> endings of item columns that sum up the whole period, the test included (KuaiRand's video_features_statistic)."""
SUSPECT_AUC = 0.97
MOST_VALUES = 1_000
FEWEST_ROWS = 200
"""Fewer rows say nothing of a column."""


def refused_columns(form: str, after: tuple[str, ...], labels: Mapping[str, str]) -> dict[str, str]:
    """Column of the log -> why it cannot be an input. labels: column -> name of the label read from it."""
    known = dict.fromkeys((*AFTER.get(form, ()), *after), "which is known only after the item was shown")
    return known | {column: f"which is label '{name}'" for column, name in labels.items()}


def future_faults(form: str, columns: Mapping[str, ColumnConfig]) -> Iterator[str]:
    """Sentences on item columns that sum up the whole log."""
    for name, column in columns.items():
        source = column.source(name)
        if source.endswith(TOTALS.get(form, ())):
            yield (
                f"items.columns.{name} reads column '{source}', which sums up the whole period and so knows the future; "
                f"declare an aggregate instead, such as {name}: {{kind: count, key: item}}"
            )


def too_good(columns: Mapping[str, ColumnConfig], values: Mapping[str, np.ndarray], label: np.ndarray) -> Iterator[str]:
    """Sentences on context columns that order the 0/1 labels (n,) of the training rows almost perfectly by themselves."""
    for name, column in columns.items():
        if column.kind in FROM_TIME or name not in values:
            continue
        auc = separation(values[name], label, numeric=column.kind in ("number", "bins"))
        if auc >= SUSPECT_AUC:
            yield (
                f"interactions.context.{name} orders the labels of the training rows by itself (AUC {auc:.3f}): it is known only after "
                "the item was shown. Take it out, or make it a label."
            )


def separation(values: np.ndarray, label: np.ndarray, *, numeric: bool) -> float:
    """AUC, at least .5, of the labels by a number, or by the mean label of each of a few values; .5 where neither can be told."""
    frame = pd.DataFrame({"x": values, "y": label > 0}).dropna()
    positives = int(frame["y"].sum())
    if len(frame) < FEWEST_ROWS or not 0 < positives < len(frame):
        return 0.5
    x: Any = pd.to_numeric(frame["x"], errors="coerce") if numeric else frame["x"]
    if not numeric:
        if frame["x"].nunique() > min(MOST_VALUES, len(frame) // 50):
            return 0.5
        x = frame.groupby("x")["y"].transform("mean")
    ranks = x.rank()
    area = (ranks[frame["y"]].sum() - positives * (positives + 1) / 2) / (positives * (len(frame) - positives))
    return float(max(area, 1 - area))
