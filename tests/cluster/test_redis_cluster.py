"""The store on a Redis Cluster: one real Valkey with cluster-enabled that holds all slots, so that every key must keep to its slot.

A server in cluster mode refuses a script, MGET or XREAD over two slots (CROSSSLOT) whether one node holds them or three.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
import redis

from cluster.event_log import RedisLog
from cluster.ingest import Ingest
from cluster.ingest_status import memory
from cluster.redis_items import RedisItemLog
from cluster.redis_store import RedisStore, connected, redacted
from cluster.snapshots import SnapshotReader
from recsys.errors import ConfigError, StoreUnavailableError
from recsys.features.declaration import HistoryConfig
from recsys.features.store import StoreConfig
from tests.cluster.consumers import archived_all, config_of, load, same_as_the_batch_road, some_events, told
from tests.cluster.test_redis_items import ItemLogContract
from tests.cluster.valkey_process import SECRET
from tests.contracts_store import FeatureStoreContract, event

_prefixes = itertools.count()


@pytest.fixture(scope="module")
def url(node):
    return f"redis+cluster://:{SECRET}@127.0.0.1:{node}"


class TestClusterStore(FeatureStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, url):
        self.url = url

    def make(self, config, history):
        return RedisStore(self.url, config.model_copy(update={"prefix": f"t{next(_prefixes)}"}), history)


def test_a_server_in_cluster_mode_refuses_two_slots_so_this_proves_something(node):
    with redis.Redis(port=node, password=SECRET) as client, pytest.raises(redis.exceptions.ResponseError, match="hash to the same slot"):
        client.mget("rf:{0}:a", "rf:{1}:a")


def test_consumers_count_archive_trim_and_publish_as_on_one_server(url, tmp_path):
    """Three partitions, three slots: the counters are the batch road's over what is in Parquet."""
    config = config_of(tmp_path, partitions=3, snapshot_every_s=0.01)

    async def scenario():
        await told(config, url, some_events(120))
        ingest = Ingest(config, url, load)
        await archived_all(ingest)
        await same_as_the_batch_road(config, url, tmp_path)
        assert await ingest.publish() == 3
        client = connected(url)
        reader = SnapshotReader(client, config.store.prefix, 3)
        assert await reader.read() == 3
        log = RedisLog(client, config.store.prefix)
        assert sum(end.total for end in await log.ends(3)) == 120
        assert sum(await log.firsts(3)) == 120, "trimmed behind Parquet"
        assert await log.read(dict.fromkeys(range(3), ""), 10) == {}
        assert (await memory(client))["used_mb"] > 0
        await client.aclose()
        await ingest.give_free()
        await ingest.close()

    asyncio.run(scenario())


def test_a_reader_of_many_slots_waits_for_the_first_entry(url, tmp_path):
    config = config_of(tmp_path, partitions=3)

    async def scenario():
        client = connected(url)
        log = RedisLog(client, config.store.prefix)
        began = time.monotonic()
        waiting = asyncio.create_task(log.read(dict.fromkeys(range(3), ""), 10, wait_ms=10_000))
        await asyncio.sleep(0.05)
        await told(config, url, some_events(1))
        assert [len(page) for page in (await waiting).values()] == [1]
        assert time.monotonic() - began < 10
        await client.aclose()

    asyncio.run(scenario())


class TestClusterItemLog(ItemLogContract):
    @pytest.fixture
    def log(self, url):
        log = RedisItemLog(url, StoreConfig(prefix=f"t{next(_prefixes)}"))
        yield log
        log.close()


def test_more_nodes_may_be_named_and_one_that_is_away_does_not_matter(url, node):
    async def scenario():
        store = RedisStore(
            f"redis+cluster://:{SECRET}@127.0.0.1:1,127.0.0.1:{node}", StoreConfig(prefix=f"t{next(_prefixes)}"), HistoryConfig()
        )
        assert (await store.append([event("u", "a", 1)])).accepted == 1
        await store.close()

    asyncio.run(scenario())


def test_a_wrong_password_and_a_cluster_that_is_away_are_sentences_without_the_password(node):
    async def scenario(where: str, match: str):
        store = RedisStore(where, StoreConfig(prefix=f"t{next(_prefixes)}"), HistoryConfig())
        with pytest.raises(StoreUnavailableError, match=match) as raised:
            await store.append([event("u", "a", 1)])
        assert "guess" not in str(raised.value)
        await store.close()

    asyncio.run(scenario(f"redis+cluster://:guess@127.0.0.1:{node}", r"redis\+cluster://:\*\*\*@127.* refuses us"))
    asyncio.run(scenario("redis+cluster://:guess@127.0.0.1:1", "is not available"))
    away = RedisItemLog("redis+cluster://:guess@127.0.0.1:1")
    with pytest.raises(StoreUnavailableError, match="is not available"):
        away.since(0)
    away.close()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("redis+cluster://127.0.0.1:7000/3", "a cluster has database 0 alone, not '3'"),
        ("http+cluster://127.0.0.1:7000", "Redis URL must specify one of the following schemes"),
        ("redis+cluster://127.0.0.1:7000,", "names a node without a host"),
    ],
)
def test_addresses_that_are_none_are_faults_of_the_configuration(wrong, why):
    with pytest.raises(ConfigError, match=r"is no address of a Redis .*redis\+cluster://host:6379") as raised:
        RedisStore(wrong)
    assert why in str(raised.value)
    with pytest.raises(ConfigError, match="is no address"):
        RedisItemLog(wrong)


def test_the_environment_may_hold_the_password_and_tls_is_by_the_scheme(node, monkeypatch):
    monkeypatch.setenv("RAYFUNNEL_REDIS_PASSWORD", SECRET)

    async def scenario():
        store = RedisStore(f"redis+cluster://127.0.0.1:{node}", StoreConfig(prefix=f"t{next(_prefixes)}"), HistoryConfig())
        await store.ping()
        await store.close()

    asyncio.run(scenario())
    secured = connected("rediss+cluster://user:pass@example.invalid:6379?ssl_cert_reqs=required")
    assert secured.connection_kwargs["ssl_context" if "ssl_context" in secured.connection_kwargs else "ssl_cert_reqs"]
    assert redacted("rediss+cluster://user:pass@a:1,b:2") == "rediss+cluster://user:***@a:1,b:2"
