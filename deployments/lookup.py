"""GET of one item or user: what the service holds of it now, for whoever asks why a page looks as it does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson

from deployments.checks import check_id
from deployments.rollout import Rollout
from recsys.core import UNKNOWN
from recsys.delta import value_of
from recsys.errors import RequestError
from recsys.features.live_items import ItemRecord
from recsys.features.store import FeatureStore
from recsys.serve_config import LimitsConfig

READ_S = 1.0
"""How long a user may be waited for: whoever asks is a person."""


class Lookups:
    """What of the gateway shows single items and users, by the version that answers and by what came since."""

    def __init__(self, rollout: Rollout, store: FeatureStore, limits: LimitsConfig) -> None:
        self._rollout, self._store, self._limits = rollout, store, limits

    async def item(self, item_id: str) -> bytes:
        """The answer of GET /v1/items/{id} as JSON. Raises RequestError (404)."""
        check_id("item_id", item_id, self._limits)
        funnel = self._rollout.funnel()
        delta, row = funnel.delta, funnel.items.row(item_id)
        if row == UNKNOWN:
            text = f"Item '{item_id[:80]}' is not in version {funnel.version}, and nobody told of it since (PUT /v1/items)."
            raise RequestError("unknown_item", text, field="item_id", status=404)
        told = delta.told.get(row) if delta is not None else None
        deleted = told is not None and told.columns is None
        record = told or ItemRecord(item_id, UNKNOWN, {}, None, 0)
        columns = {} if deleted else {name: value_of(funnel.catalogue, name, row, record) for name in funnel.catalogue.columns}
        title = funnel.titles[row].as_py() if not deleted and funnel.titles is not None and row < len(funnel.items) else None
        if delta is not None and not deleted:
            title = delta.title(row, title)
        return orjson.dumps(
            {
                "item_id": item_id,
                "known": "production" if row < len(funnel.items) else "live",
                "model_version": funnel.version,
                "deleted": deleted,
                "blocked": not deleted and bool(funnel.blocked(np.array([row]))[0]),
                "title": title,
                "columns": {name: _shown(value) for name, value in columns.items()},
                "changed_ms": None if told is None else told.time_ms,
                "shown": funnel.exposures.get(row),
            }
        )

    async def user(self, user_id: str) -> bytes:
        """The answer of GET /v1/users/{id} as JSON. Raises RequestError (404), StoreUnavailableError."""
        check_id("user_id", user_id, self._limits)
        (state,) = await self._store.read([user_id], timeout_s=READ_S)
        funnel = self._rollout.funnel()
        row = funnel.users.row(user_id)
        if row == UNKNOWN and not (state.events or state.profile or state.counters):
            text = f"User '{user_id[:80]}' is not in version {funnel.version}, has done nothing since and has no profile (PUT /v1/users)."
            raise RequestError("unknown_user", text, field="user_id", status=404)
        return orjson.dumps(
            {
                "user_id": user_id,
                "known": "production" if row != UNKNOWN else "live",
                "model_version": funnel.version,
                "profile": state.profile,
                "trained_events": len(funnel.past.history(row)[0]),
                "live_events": len(state.events),
                "newest_event_ms": max((event.time_ms for event in state.events), default=None),
                "has_counters": bool(state.counters),
            }
        )


def _shown(value: Any) -> Any:
    """A missing number is null: JSON has no NaN."""
    if isinstance(value, list):
        return None if value and all(isinstance(x, float) and math.isnan(x) for x in value) else value
    return None if isinstance(value, float) and math.isnan(value) else value
