"""What a scientist looks at first: counts, sparsity, the long tail, history lengths, repeats, time span, cold share."""

from __future__ import annotations

from typing import Any

import numpy as np

from recsys.data.events import Dataset
from recsys.data.interactions import Interactions
from recsys.data.split import Split, show_time

HEADS = (0.01, 0.1, 0.2)
"""The most popular parts of the catalogue whose share of the events is told."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def describe(dataset: Dataset, split: Split | None = None) -> dict[str, Any]:
    """Numbers of a data set, ready for JSON; with a split, the share of each later part that is new to train.

    sparsity: share of the (user, item) pairs that never met. tail_share: share of the events on the 80 % least popular items.
    head_share: the same of the most popular 1, 10 and 20 %. history_lengths: users by events, in bins that double.
    gini: 0 where all items are equally popular, near 1 where one has all. repeats: share of events whose user had the item before.
    cold: rows of the vocabulary without an event.
    """
    log = dataset.interactions
    E = len(log)
    per_user, per_item = np.bincount(log.user, minlength=log.n_users), np.bincount(log.item, minlength=log.n_items)
    pairs = log.matrix().nnz
    out: dict[str, Any] = {
        "events": E,
        "users": int((per_user > 0).sum()),
        "items": int((per_item > 0).sum()),
        "cold_users": int((per_user == 0).sum()),
        "cold_items": int((per_item == 0).sum()),
        "sparsity": 1 - pairs / (log.n_users * log.n_items),
        "repeats": 1 - pairs / E,
        "tail_share": _tail_share(per_item),
        "gini": _gini(per_item),
        "head_share": {f"{part:.0%}": head_share(per_item, part) for part in HEADS},
        "history_lengths": histogram(per_user[per_user > 0]),
        "impressions": log.impressions,
        "events_per_user": quantiles(per_user[per_user > 0]),
        "events_per_item": quantiles(per_item[per_item > 0]),
        "event_types": {
            name: int(n) for name, n in zip(log.event_names, np.bincount(log.event, minlength=len(log.event_names)), strict=True)
        },
        "label_rates": {name: float(label.mean()) for name, label in log.labels.items()},
        "features": {"users": list(dataset.users.columns), "items": list(dataset.items.columns), "context": list(log.context)},
        "missing": {f"{side}.{name}": float(frame[name].isna().mean()) for side, frame in _frames(dataset) for name in frame.columns},
        "account": dict(dataset.account.rows()),
        "notes": list(dataset.account.notes),
    }
    if log.has_time:
        out["from"], out["to"] = show_time(log, log.time[0]), show_time(log, log.time[-1])
        out["days"] = float(log.time[-1] - log.time[0]) / 86_400
        out["events_per_day"] = per_day(log.time)
    if log.session is not None:
        out["sessions"] = len(np.unique(log.session))
    if log.past is not None:
        out["past_per_user"] = quantiles(np.diff(log.past.indptr))
    if split is not None:
        out["split"] = {
            name: _part(log, mask, split.train) for name, mask in (("train", split.train), ("valid", split.valid), ("test", split.test))
        }
    return out


def head_share(per_item: np.ndarray, part: float) -> float:
    """Share of the events on the most popular `part` of the items, at least one of them."""
    descending = np.sort(per_item)[::-1]
    return float(descending[: max(1, round(part * len(descending)))].sum() / max(1, descending.sum()))


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Users by the length of their history, in bins that double: 1, 2-3, 4-7, 8-15, ..."""
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(bins) if len(bins) else np.zeros(0, np.int64)
    return {f"{2**b:,}" if b == 0 else f"{2**b:,}-{2 ** (b + 1) - 1:,}": int(n) for b, n in enumerate(counts)}


def per_day(time: np.ndarray) -> dict[str, float]:
    """Events of a day (UTC) from first to last, days without any among them: mean and quantiles."""
    days = np.floor(time / 86_400).astype(np.int64)
    if len(days) and days[-1] - days[0] > 100_000:  # a wrong unit of time, not a log
        return quantiles(np.unique(days, return_counts=True)[1])
    return quantiles(np.bincount(days - days.min(initial=days[0] if len(days) else 0)))


def _frames(dataset: Dataset) -> tuple[tuple[str, Any], ...]:
    return ("users", dataset.users), ("items", dataset.items)


def quantiles(numbers: np.ndarray) -> dict[str, float]:
    """Mean and quantiles by name: min, p10, … p99, max."""
    names = ["min", *(f"p{q:.0%}".rstrip("%") for q in QUANTILES[1:-1]), "max"]
    values = np.quantile(numbers, QUANTILES) if len(numbers) else np.zeros(len(QUANTILES))
    return {"mean": float(numbers.mean()) if len(numbers) else 0.0, **{name: float(v) for name, v in zip(names, values, strict=True)}}


def _tail_share(per_item: np.ndarray) -> float:
    """Share of the events that fall on the 80 % of items with the fewest."""
    ascending = np.sort(per_item)
    return float(ascending[: int(0.8 * len(ascending))].sum() / max(1, ascending.sum()))


def _gini(per_item: np.ndarray) -> float:
    n = len(per_item)
    ascending = np.sort(per_item).astype(np.float64)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * ascending.sum())) if ascending.sum() else 0.0


def _part(log: Interactions, mask: np.ndarray, train: np.ndarray) -> dict[str, float]:
    """Rows of a part, and the share of them whose user or item train does not know."""
    known_users, known_items = np.unique(log.user[train]), np.unique(log.item[train])
    n = int(mask.sum())
    return {
        "rows": n,
        "cold_user_share": float(1 - np.isin(log.user[mask], known_users).mean()) if n else 0.0,
        "cold_item_share": float(1 - np.isin(log.item[mask], known_items).mean()) if n else 0.0,
    }
