"""Changing the profiles of many users in a feature store: what is not named stays, None takes away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from recsys.features.store import FeatureStore

AT_ONCE = 200
"""Profiles read or written at once."""
PATIENCE_S = 5.0


async def change_profiles(store: FeatureStore, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
    """User id -> the columns to change; None forgets the profile. Raises StoreUnavailableError; repeating is harmless."""
    users = list(changes)
    for at in range(0, len(users), AT_ONCE):
        some = users[at : at + AT_ONCE]
        states = await store.read(some, timeout_s=PATIENCE_S)
        writes = []
        for user_id, state in zip(some, states, strict=True):
            given = changes[user_id]
            merged = {} if given is None else {**state.profile, **given}
            writes.append(store.put_profile(user_id, {name: value for name, value in merged.items() if value is not None}))
        await asyncio.gather(*writes)
