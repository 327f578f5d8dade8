"""The Redis store on a real Valkey: the contract, what is on the server, and every way in which a server can be away."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal

import numpy as np
import pytest
from redis import exceptions as faults
from redis.asyncio import Redis

from cluster.embedded import EmbeddedValkey
from cluster.redis_store import PASSWORD_VARIABLE, RedisStore, redacted
from recsys.config import Config
from recsys.core import Vocabulary
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import told
from recsys.features.store import StoreConfig, partition_of
from recsys.recipe import past
from recsys.requests import FunnelRequest, query_of
from tests.cluster.valkey_process import kill, pid_of
from tests.contracts_store import FeatureStoreContract, event, items_of, seen_by, whole_log

_prefixes = itertools.count()


@pytest.fixture
def own_valkey(tmp_path):
    """A server that a test may hurt."""
    with EmbeddedValkey(tmp_path / "store") as server:
        yield server


def fresh(**settings) -> StoreConfig:
    return StoreConfig(prefix=f"t{next(_prefixes)}", **settings)


async def command(server: EmbeddedValkey, *words):
    async with Redis.from_url(server.url) as redis:
        return await redis.execute_command(*words)


class TestRedisStore(FeatureStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, valkey):
        self.url = valkey.url

    def make(self, config, history):
        return RedisStore(self.url, config.model_copy(update={"prefix": f"t{next(_prefixes)}"}), history)


def test_only_what_can_be_rebuilt_expires_and_all_of_a_user_is_in_one_slot(valkey):
    config = fresh(user_ttl_h=2.0, duplicate_ttl_h=0.5)

    async def scenario():
        store = RedisStore(valkey.url, config)
        await store.append([event("u", "a", 1)])
        await store.change_profiles({"u": {"age": 3}})
        await store.close()
        async with Redis.from_url(valkey.url) as redis:
            keys = [key async for key in redis.scan_iter(match=f"{config.prefix}:{{*")]
            return {key.split(b":")[2]: (await redis.ttl(key), await redis.execute_command("CLUSTER", "KEYSLOT", key)) for key in keys}

    found = asyncio.run(scenario())
    assert found[b"log"][0] == -1
    assert found[b"p"][0] == -1
    assert 7190 <= found[b"h"][0] <= 7200
    assert 1790 <= found[b"e"][0] <= 1800
    assert len({slot for _, slot in found.values()}) == 1


def test_two_gateways_that_tell_the_same_events_tell_them_once(valkey):
    config = fresh()

    async def scenario():
        stores = [RedisStore(valkey.url, config) for _ in range(4)]
        told = [event(f"u{i % 3}", f"i{i}", i) for i in range(300)]
        results = await asyncio.gather(*(s.append(told) for s in stores))
        assert sum(r.accepted for r in results) == 300
        assert len(await whole_log(stores[0], config.partitions)) == 300
        for store in stores:
            await store.close()

    asyncio.run(scenario())


def test_what_was_answered_survives_a_killed_server_and_the_store_finds_the_new_one_by_itself(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url)
        await asyncio.gather(*(store.append([event(f"u{i}", "a", i)]) for i in range(20)))  # fills the pool with connections
        kill(own_valkey)
        for _ in range(20):
            with pytest.raises(StoreUnavailableError, match="not available"):
                await store.append([event("u1", "lost", 9)])
            with pytest.raises(StoreUnavailableError, match="not available"):
                await store.read(["u1"], timeout_s=1.0)
        own_valkey.check()
        states = await asyncio.gather(*(store.read([f"u{i}"], timeout_s=5.0) for i in range(20)))
        assert [s[0].events[0].time_ms for s in states] == list(range(20))
        assert await store.append([event("u1", "b", 10)]) == (1, 0)  # the script is loaded again
        assert await items_of(store, "u1") == ["a", "b"]
        await store.close()

    asyncio.run(scenario())


def test_no_answered_event_is_lost_while_the_server_is_killed_again_and_again(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url)
        answered = []
        for round_ in range(3):
            telling = asyncio.create_task(tell(store, round_, answered))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(kill, own_valkey)
            await telling
            await asyncio.to_thread(own_valkey.check)
        held = {e.event_id for e in await whole_log(store, store.config.partitions)}
        assert len(answered) > 0
        assert set(answered) <= held
        await store.close()

    async def tell(store, round_, answered):
        for i in range(100_000):
            try:
                await store.append([event(f"u{i % 5}", "a", i, f"{round_}-{i}")])
            except StoreUnavailableError:
                return
            answered.append(f"{round_}-{i}")

    asyncio.run(scenario())


def test_a_hanging_server_costs_the_timeout_and_leaves_no_answer_to_the_wrong_question(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url)
        await store.append([event("u", "a", 1), event("v", "b", 1)])
        os.kill(pid_of(own_valkey), signal.SIGSTOP)
        try:
            for _ in range(3):
                with pytest.raises(StoreUnavailableError, match="did not answer within 50 ms"):
                    await store.read(["u"], timeout_s=0.05)
        finally:
            os.kill(pid_of(own_valkey), signal.SIGCONT)
        for _ in range(5):
            assert await items_of(store, "v") == ["b"]
        await store.close()

    asyncio.run(scenario())


def test_a_server_that_never_was_is_a_sentence_not_a_stack(tmp_path):
    async def scenario():
        store = RedisStore(f"unix://{tmp_path}/nothing.sock")
        with pytest.raises(StoreUnavailableError, match=r"The feature store at unix://.*nothing.sock is not available"):
            await store.ping()
        await store.close()
        tcp = RedisStore("redis://127.0.0.1:1/0")
        with pytest.raises(StoreUnavailableError, match="not available"):
            await tcp.append([event("u", "a", 1)])
        await tcp.close()

    asyncio.run(scenario())


def test_a_full_server_refuses_events_and_keeps_the_log(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url)
        await store.append([event("u", "a", 1)])
        await command(own_valkey, "CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreUnavailableError, match="reached its maxmemory, and the log is never evicted"):
            await store.append([event("u", "b", 2)])
        await command(own_valkey, "CONFIG", "SET", "maxmemory", "0")
        assert [e.item_id for e in await whole_log(store, store.config.partitions)] == ["a"]
        await store.close()

    asyncio.run(scenario())


def test_a_replica_is_named_as_such(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url)
        await store.append([event("u", "a", 1)])
        await command(own_valkey, "REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailableError, match="read-only replica"):
            await store.append([event("u", "b", 2)])
        assert await items_of(store, "u") == ["a"]
        await store.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (faults.BusyLoadingError("LOADING"), "still loading its data"),
        (faults.AuthenticationError("WRONGPASS"), "refuses us"),
        (faults.MasterDownError("MASTERDOWN"), "not available"),
        (faults.ResponseError("MISCONF Errors writing to the AOF file"), "MISCONF"),
        (ConnectionResetError("reset"), "not available"),
    ],
    ids=["loading", "password", "primary down", "disk", "reset"],
)
def test_whatever_a_server_says_instead_of_an_answer_is_unavailable(fault, text):
    async def says():
        raise fault

    async def scenario():
        store = RedisStore("redis://localhost")
        with pytest.raises(StoreUnavailableError, match=text):
            await store._answered(says(), 1.0)
        await store.close()

    asyncio.run(scenario())


def test_a_password_is_taken_from_the_environment_and_never_shown(own_valkey, monkeypatch, caplog):
    assert redacted("redis://user:s3cret@host:6379/0") == "redis://user:***@host:6379/0"
    assert redacted("unix:///tmp/x.sock") == "unix:///tmp/x.sock"
    assert redacted("redis://host:6379/0?password=s3cret&db=2") == "redis://host:6379/0?password=***&db=2"
    assert redacted("redis://user:it's@host?db=1&Password=s3cret") == "redis://user:***@host?db=1&Password=***"
    asyncio.run(command(own_valkey, "CONFIG", "SET", "requirepass", "s3cret"))

    async def ping(url):
        store = RedisStore(url)
        try:
            await store.ping()
        finally:
            await store.close()

    with pytest.raises(StoreUnavailableError, match="refuses us") as without:
        asyncio.run(ping(own_valkey.url))
    wrong = own_valkey.url.replace("unix://", "unix://:wr0ng@")
    with pytest.raises(StoreUnavailableError, match="refuses us") as refused:
        asyncio.run(ping(wrong))
    assert "wr0ng" not in str(refused.value) + str(without.value)
    monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret")
    asyncio.run(ping(own_valkey.url))
    assert "s3cret" not in caplog.text
    monkeypatch.delenv(PASSWORD_VARIABLE)
    own_valkey._end(5.0)  # the fixture's PING has no password


def test_an_address_that_is_none_is_a_fault_of_the_configuration():
    with pytest.raises(ConfigError, match=r"redis_url 'http://:\*\*\*@x' is no address of a Redis .* Expected redis://host:6379/0"):
        RedisStore("http://:secret@x")


def test_another_number_of_partitions_is_refused_before_events_scatter(valkey):
    config = fresh(partitions=4)

    async def scenario():
        first = RedisStore(valkey.url, config)
        await first.append([event("u", "a", 1)])
        await first.close()
        second = RedisStore(valkey.url, config.model_copy(update={"partitions": 8}))
        with pytest.raises(StoreError, match=r"holds 4 partitions, the configuration says 8. Set store.partitions: 4"):
            await second.append([event("u", "b", 1)])
        with pytest.raises(StoreError, match="holds 4 partitions"):
            await second.read(["u"], timeout_s=5.0)
        await second.close()

    asyncio.run(scenario())


def test_a_server_that_syncs_now_and_then_is_asked_to_sync_before_the_answer(own_valkey, caplog):
    async def scenario(*settings):
        for name, value in settings:
            await command(own_valkey, "CONFIG", "SET", name, value)
        store = RedisStore(own_valkey.url)
        result = await store.append([event("u", "a", 1, str(settings))])
        waits = store._kept.disk
        await store.close()
        return result.accepted, waits

    assert asyncio.run(scenario()) == (1, False)
    assert asyncio.run(scenario(("appendfsync", "everysec"))) == (1, True)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(scenario(("appendonly", "no"))) == (1, False)
    assert "accepted events do not survive its end" in caplog.text


def test_a_profile_is_confirmed_when_the_disk_has_it_as_an_event_is(own_valkey):
    """A server that syncs now and then, and whose disk then takes nothing any more."""

    async def scenario():
        await command(own_valkey, "CONFIG", "SET", "appendfsync", "everysec")
        store = RedisStore(own_valkey.url)
        await store.change_profiles({"u": {"age": 1}})
        await command(own_valkey, "CONFIG", "SET", "appendonly", "no")
        for call in (store.change_profiles({"u": {"age": 2}}), store.append([event("u", "a", 1)])):
            with pytest.raises(StoreUnavailableError, match=r"did not reach its disk .* Nothing is confirmed; send again"):
                await call
        await store.close()

    asyncio.run(scenario())


def test_a_shorter_history_length_takes_hold_with_the_next_event(valkey):
    config = fresh()

    async def scenario():
        long = RedisStore(valkey.url, config, HistoryConfig(length=10))
        await long.append([event("u", str(t), t) for t in range(10)])
        await long.close()
        short = RedisStore(valkey.url, config, HistoryConfig(length=3))
        await short.append([event("u", "new", 99)])
        assert await items_of(short, "u") == ["8", "9", "new"]
        assert await seen_by(short, "u") == set("01234567")
        await short.close()

    asyncio.run(scenario())


def test_a_history_of_an_earlier_release_holds_refusals_which_are_read_as_such(valkey):
    config = fresh()

    async def scenario():
        before = RedisStore(valkey.url, config, HistoryConfig().refusing(()))
        await before.append([event("u", "a", 1), event("u", "b", 2, kind="dislike"), event("u", "c", 3, kind="hide"), event("u", "d", 4)])
        await before.close()
        now = RedisStore(valkey.url, config)
        await now.append([event("u", "c", 5, kind="dislike")])
        (state,) = await now.read(["u"], timeout_s=5.0)
        assert [e.item_id for e in state.events] == ["a", "d"]
        assert state.refused == {"b": 2, "c": 5}
        await now.close()

    asyncio.run(scenario())


def test_refusals_survive_a_killed_server_and_expire_by_their_own_time(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url, history=HistoryConfig(refused_days=2))
        await store.append([event("u", "a", 1), event("u", "b", 2, kind="dislike")])
        kill(own_valkey)
        own_valkey.check()
        (state,) = await store.read(["u"], timeout_s=5.0)
        assert ([e.item_id for e in state.events], state.refused) == (["a"], {"b": 2})
        async with Redis.from_url(own_valkey.url) as redis:
            (key,) = [key async for key in redis.scan_iter(match="rf:*:r:u")]
            assert 2 * 86_400 - 60 < await redis.ttl(key) <= 2 * 86_400
        await store.close()

    asyncio.run(scenario())


def test_a_user_of_before_what_fell_was_kept_goes_on_with_the_history_that_he_has(valkey):
    config = fresh()

    async def scenario():
        before = RedisStore(valkey.url, config, HistoryConfig(length=3, seen=0))
        await before.append([event("u", str(t), t) for t in range(5)])
        await before.close()
        now = RedisStore(valkey.url, config, HistoryConfig(length=3))
        (state,) = await now.read(["u"], timeout_s=5.0)
        assert ([e.item_id for e in state.events], state.seen) == (["2", "3", "4"], set())
        await now.append([event("u", "5", 5), event("u", "6", 6)])
        (state,) = await now.read(["u"], timeout_s=5.0)
        assert ([e.item_id for e in state.events], state.seen) == (["4", "5", "6"], {"2", "3"})
        await now.close()

    asyncio.run(scenario())


def test_what_fell_is_one_list_that_is_pruned_lives_as_long_as_the_history_and_is_absent_where_it_is_not_kept(own_valkey):
    async def scenario():
        store = RedisStore(own_valkey.url, StoreConfig(user_ttl_h=2), HistoryConfig(length=2, seen=8))
        async with Redis.from_url(own_valkey.url) as redis:
            for t in range(40):
                await store.append([event("u", f"i{t}", t)])
                (key,) = [key async for key in redis.scan_iter(match="rf:*:b:u")] or [None]
                assert (await redis.llen(key) if key else 0) <= 10, "8 and a quarter"
                assert (key is None) == (t < 2)
                assert await seen_by(store, "u") == {f"i{n}" for n in range(max(0, t - 9), t - 1)}
            assert 7_000 < await redis.ttl(key) <= 7_200
            await store.close()
            store = RedisStore(own_valkey.url, StoreConfig(), HistoryConfig(length=2, seen=0))
            await store.append([event("v", f"i{t}", t) for t in range(40)])
            assert [key async for key in redis.scan_iter(match="rf:*:b:v")] == []
            kill(own_valkey)
            own_valkey.check()
        again = RedisStore(own_valkey.url, StoreConfig(), HistoryConfig(length=2, seen=8))
        assert await seen_by(again, "u") == {f"i{n}" for n in range(30, 38)}, "on disk before the answer"
        await again.close()
        await store.close()

    asyncio.run(scenario())


def test_of_more_than_a_thousand_live_items_none_of_the_newest_is_asked_for_again(valkey):
    """1,300 items, the defaults' history of 50 and 1,000 before it: the oldest 250 are forgotten, and no other."""
    users, items = Vocabulary(["u"]), Vocabulary([f"i{n}" for n in range(1_300)])
    config = Config.model_validate({"data": {"interactions": {"path": "log.csv"}}})
    trained = Interactions.of([], [], np.empty(0), users=users, items=items)
    bundle = past(trained, told(trained, config.history), config.history)

    async def scenario():
        store = RedisStore(valkey.url, fresh(), config.history)
        await store.append([event("u", f"i{n}", 1_000 * n) for n in range(1_300)])
        (state,) = await store.read(["u"], timeout_s=5.0)
        request = FunnelRequest("u", 5, 1_300.0, state.events, state.refused, state.seen)
        query = query_of(request, users=users, items=items, past=bundle, config=config)
        assert sorted(query.exclude.tolist()) == list(range(250, 1_300))
        assert query.items.tolist() == list(range(1_250, 1_300))
        await store.close()

    asyncio.run(scenario())


def test_a_history_of_another_version_counts_as_none_and_is_begun_again(valkey):
    config = fresh()
    key = f"{config.prefix}:{{{partition_of('u', config.partitions)}}}:h:u"

    async def scenario():
        await command(valkey, "SET", key, b"\x09what a later release wrote")
        store = RedisStore(valkey.url, config)
        assert await items_of(store, "u") == []
        await store.append([event("u", "a", 1)])
        assert await items_of(store, "u") == ["a"]
        await store.close()

    asyncio.run(scenario())


def test_an_event_too_long_for_a_history_is_refused_with_a_sentence(valkey):
    async def scenario():
        store = RedisStore(valkey.url, fresh())
        with pytest.raises(StoreError, match=r"takes 70,0\d\d bytes, a history holds 65,535 each. Shorten its ids"):
            await store.append([event("u", "x" * 70_000, 1, "id")])
        with pytest.raises(StoreError, match="a time_ms since 1970"):
            await store.append([event("u", "x", 2**80, "id")])
        await store.close()

    asyncio.run(scenario())
