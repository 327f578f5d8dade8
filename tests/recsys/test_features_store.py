"""The memory store keeps the contract of every feature store; what identifies an event is pinned."""

from __future__ import annotations

import asyncio

from recsys.features.declaration import HistoryConfig
from recsys.features.store import MemoryStore, StoreConfig, event_identity, partition_of
from tests.contracts_store import FeatureStoreContract, event


class TestMemoryStore(FeatureStoreContract):
    def make(self, config, history):
        return MemoryStore(config, history)


def test_an_event_without_an_id_is_known_by_user_item_event_and_time():
    first = event_identity("u", "i", "click", 5)
    assert first == event_identity("u", "i", "click", 5)
    assert len(first) == 32
    others = [("v", "i", "click", 5), ("u", "j", "click", 5), ("u", "i", "like", 5), ("u", "i", "click", 6), ("ui", "", "click", 5)]
    assert len({first, *(event_identity(*o) for o in others)}) == 6


def test_a_user_keeps_its_partition_in_every_process():
    assert [partition_of(u, 16) for u in ("196", "u1", "用户")] == [2, 2, 7]
    assert {partition_of(str(u), 4) for u in range(100)} == {0, 1, 2, 3}


def test_a_repeat_is_recognised_only_while_its_mark_lives():
    now = [0.0]
    store = MemoryStore(StoreConfig(duplicate_ttl_h=1.0), HistoryConfig(), clock=lambda: now[0])

    async def scenario():
        told = [event("u", "a", 1, "x")]
        assert await store.append(told) == (1, 0)
        now[0] = 3599.0
        assert await store.append(told) == (0, 1)
        now[0] = 3600.0
        assert await store.append(told) == (1, 0)

    asyncio.run(scenario())
