"""The log of changed items: one contract for the log in memory and for the one on a real Valkey, and what only a server can do."""

from __future__ import annotations

import itertools
import threading

import pytest
import redis

from cluster.embedded import EmbeddedValkey
from cluster.redis_items import ITEMS_A_CALL, RedisItemLog
from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.live_items import ItemChange, ItemLog, MemoryItemLog
from recsys.features.store import StoreConfig

_prefixes = itertools.count()


class ItemLogContract:
    @pytest.fixture
    def log(self) -> ItemLog:
        raise NotImplementedError

    def test_an_empty_log_has_nothing(self, log: ItemLog) -> None:
        assert log.since(0).records == []
        assert log.since(0).position == 0

    def test_what_was_told_comes_back_in_the_order_of_the_changes(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {"x": 1.5, "tags": ["p", 2], "none": None}, "Äpfel"), ItemChange("b", None)])
        a, b = log.since(0).records
        assert (a.item_id, a.number, a.columns, a.title) == ("a", 0, {"x": 1.5, "tags": ["p", 2], "none": None}, "Äpfel")
        assert (b.item_id, b.number, b.columns, b.title) == ("b", 1, None, None)
        assert a.time_ms > 1_600_000_000_000

    def test_only_what_lies_behind_a_position_comes(self, log: ItemLog) -> None:
        first = log.change([ItemChange("a", {}), ItemChange("b", {})])
        assert log.since(first).records == []
        second = log.change([ItemChange("a", {"x": 1})])
        assert second > first
        assert [(r.item_id, r.number) for r in log.since(first).records] == [("a", 0)]
        assert [r.item_id for r in log.since(0).records] == ["b", "a"], "an item stands once, where it changed last"
        assert log.since(0).epoch == log.since(second).epoch

    def test_an_upsert_keeps_what_it_does_not_name_and_null_takes_away(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {"x": 1, "y": 2}, "A")])
        log.change([ItemChange("a", {"x": None, "z": 3})])
        (record,) = log.since(0).records
        assert record.columns == {"x": None, "y": 2, "z": 3}
        assert record.title == "A"

    def test_an_item_twice_in_one_call_is_changed_twice(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {"x": 1, "y": 1}), ItemChange("b", {}), ItemChange("a", {"x": 2}), ItemChange("a", {"z": 3})])
        assert {r.item_id: r.columns for r in log.since(0).records} == {"a": {"x": 2, "y": 1, "z": 3}, "b": {}}

    def test_a_deletion_forgets_and_numbers_stay(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {"x": 1}, "A"), ItemChange("b", {})])
        log.change([ItemChange("a", None)])
        log.change([ItemChange("a", {"y": 1})])
        found = {r.item_id: r for r in log.since(0).records}
        assert (found["a"].number, found["a"].columns, found["a"].title) == (0, {"y": 1}, None)

    def test_an_item_that_was_deleted_and_put_again_is_marked_for_good(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {"x": 1}), ItemChange("never told of", None), ItemChange("b", {})])
        assert not any(r.anew for r in log.since(0).records)
        log.change([ItemChange("a", None), ItemChange("a", {"y": 1})])
        log.change([ItemChange("never told of", {"y": 1})])
        log.change([ItemChange("a", {"z": 1}), ItemChange("b", {"z": 1})])
        assert {r.item_id: r.anew for r in log.since(0).records} == {"a": True, "never told of": True, "b": False}
        log.change([ItemChange("a", None)])
        assert next(r for r in log.since(0).records if r.item_id == "a").columns is None

    def test_more_than_one_call_holds(self, log: ItemLog) -> None:
        n = 2 * ITEMS_A_CALL + 3
        log.change([ItemChange(f"i{i}", {"x": i}) for i in range(n)])
        records = log.since(0).records
        assert sorted(r.number for r in records) == list(range(n))
        assert all(r.columns == {"x": int(r.item_id[1:])} for r in records)

    def test_exposures_add_up(self, log: ItemLog) -> None:
        assert log.shown() == {}
        log.show({"a": 2, "b": 1})
        log.show({"a": 3})
        assert log.shown() == {"a": 5, "b": 1}

    def test_the_newest_rules_stand_and_every_telling_has_a_number(self, log: ItemLog) -> None:
        assert log.since(0).rules == (0, b"")
        assert log.rule(b'{"a": " 7"}') == 1
        position = log.change([ItemChange("a", {})])
        assert log.since(0).rules == log.since(position).rules == (1, b'{"a": " 7"}')
        assert [log.rule(b""), log.since(position).rules] == [2, (2, b"")], "taken back"
        assert log.rule("Äpfel".encode()) == 3
        assert log.since(0).rules == (3, "Äpfel".encode())

    def test_what_json_cannot_hold_is_refused(self, log: ItemLog) -> None:
        with pytest.raises(StoreError, match="Item 'a' cannot be written as JSON"):
            log.change([ItemChange("a", {"x": object()})])

    def test_an_item_told_of_a_hundred_times_in_one_call_has_it_all(self, log: ItemLog) -> None:
        log.change([ItemChange("a", {f"c{n % 70}": n}) for n in range(100)] + [ItemChange("b", {"x": 1}), ItemChange("b", None)])
        a, b = log.since(0).records
        assert a.columns == {f"c{n}": n + 70 if n < 30 else n for n in range(70)}
        assert b.columns is None

    def test_changes_of_many_at_once_are_all_kept(self, log: ItemLog) -> None:
        def work(name: str) -> None:
            for n in range(20):
                log.change([ItemChange("a", {f"{name}{n}": n})])

        threads = [threading.Thread(target=work, args=(name,)) for name in "pqr"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (record,) = log.since(0).records
        assert len(record.columns or {}) == 60


class TestMemoryItemLog(ItemLogContract):
    @pytest.fixture
    def log(self) -> ItemLog:
        return MemoryItemLog()


class TestRedisItemLog(ItemLogContract):
    @pytest.fixture
    def log(self, valkey):
        log = RedisItemLog(valkey.url, StoreConfig(prefix=f"t{next(_prefixes)}"))
        yield log
        log.close()

    def test_two_readers_of_one_server_see_one_log(self, valkey, log) -> None:
        other = RedisItemLog(valkey.url, StoreConfig(prefix=log._keys[0].split(":")[0]))
        log.change([ItemChange("a", {"x": 1})])
        assert other.since(0).records == log.since(0).records
        other.close()

    def test_an_emptied_server_has_another_epoch(self, valkey, log) -> None:
        position = log.change([ItemChange("a", {"x": 1})])
        epoch = log.since(position).epoch
        with redis.Redis.from_url(valkey.url) as server:
            server.delete(*log._keys)
        assert log.since(position).epoch != epoch
        log.change([ItemChange("b", {})])
        assert log.since(0).epoch != epoch


def test_a_restarted_server_has_what_was_answered(tmp_path) -> None:
    with EmbeddedValkey(tmp_path / "store") as server:
        log = RedisItemLog(server.url)
        position = log.change([ItemChange("a", {"x": 1}), ItemChange("b", None)])
        log.rule(b"rules")
        before = log.since(0)
        assert before.rules == (1, b"rules")
        log.close()
    with EmbeddedValkey(tmp_path / "store") as server:
        log = RedisItemLog(server.url)
        assert log.since(0) == before
        assert log.since(0).position == position
        log.close()


def test_a_server_that_is_away_is_named() -> None:
    log = RedisItemLog("redis://:secret@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailableError, match=r"redis://:\*\*\*@127.0.0.1:1/0 is not available"):
        log.since(0)
    with pytest.raises(ConfigError, match="is no address of a Redis"):
        RedisItemLog("http://x")
