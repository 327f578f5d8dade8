"""What is near an item or a user, as ((k',) rows, (k',) scores): answered by what recall already has, without a model of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recsys.config import ChannelConfig
from recsys.core import UNKNOWN, Queries, Recaller, top_k
from recsys.delta import Comparing, Delta, Parts
from recsys.errors import BundleError, RequestError
from recsys.recall.user_cf import UserCF, UserCFConfig

Neighbours = tuple[np.ndarray, np.ndarray]
NOTHING: Neighbours = (np.empty(0, np.int32), np.empty(0, np.float32))


def similar_items(row: int, k: int, channels: Mapping[str, Recaller], vectors: np.ndarray | None) -> Neighbours:
    """The k nearest items of one: by the first channel that has neighbours, else by two-tower vectors (I, d)."""
    for channel in channels.values():
        if hasattr(channel, "similar"):
            items, scores = channel.similar(np.array([row], np.int32), k)
            return _known(items[0], scores[0])
    if vectors is None:
        return NOTHING
    near = (vectors @ vectors[row])[None, :]
    near[0, row] = -np.inf
    items, scores = top_k(near, k)
    return _known(items[0], scores[0])


def similar_items_now(row: int, k: int, delta: Delta, parts: Parts) -> Neighbours:
    """The same among the items of now: by the first channel that knows neighbours of the item, those with neighbour lists first."""
    listed = {name: c for name, c in parts.channels.items() if hasattr(c, "similar")}
    compared = {name: c for name, c in parts.channels.items() if name not in listed and isinstance(c, Comparing)}
    for name, channel in (listed | compared).items():
        found = _known(*delta.similar(name, channel, row, parts, k))
        if len(found[0]):
            return found
    return NOTHING


def check_similar_users(queries: Queries, channels: Mapping[str, ChannelConfig], version: str) -> None:
    """RequestError (404) where `similar_users` has no answer to a batch of one: no such channel, or a user without any event."""
    if not any(isinstance(c, UserCFConfig) for c in channels.values()):
        text = f"Version {version} has no channel that compares users. Add user_cf to recall.channels and train again."
        raise RequestError("no_similar_users", text, status=404)
    if queries.users[0] == UNKNOWN and not (queries.history[0] != UNKNOWN).any():
        text = f"User '{queries.user_ids[0][:80]}' is not in version {version} and has done nothing since."
        raise RequestError("unknown_user", text, field="user_id", status=404)


def similar_users(queries: Queries, k: int, channels: Mapping[str, Recaller]) -> Neighbours:
    """The k users nearest to the history of the one query, by the first channel that compares users."""
    for channel in channels.values():
        if isinstance(channel, UserCF):
            users, scores = channel.similar_users(queries, k)
            return _known(users[0], scores[0])
    raise BundleError("This funnel was loaded without a channel that compares users. Load it with stages=('recall', …).")


def _known(rows: np.ndarray, scores: np.ndarray) -> Neighbours:
    there = rows != UNKNOWN
    return rows[there], scores[there]
