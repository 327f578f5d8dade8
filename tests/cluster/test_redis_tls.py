"""A Redis behind TLS: by rediss:// and rediss+cluster://, with an authority that the URL names, with one that nobody knows, and cut off."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import redis

from cluster.redis_items import RedisItemLog
from cluster.redis_store import RedisStore
from recsys.errors import StoreUnavailableError
from recsys.features.live_items import ItemChange
from recsys.features.store import StoreConfig
from tests.cluster.consumers import until
from tests.cluster.tls_proxy import TlsProxy, authority, tls_proxy
from tests.cluster.valkey_process import SECRET, free_port
from tests.contracts_store import event

_prefixes = itertools.count()
SCHEMES = ["rediss", "rediss+cluster"]


class Behind(NamedTuple):
    proxy: TlsProxy
    known: str
    other: str

    def url(self, scheme: str, ca: str) -> str:
        return f"{scheme}://:{SECRET}@127.0.0.1:{self.proxy.port}?ssl_ca_certs={ca}"


@pytest.fixture(scope="module")
def behind(node, tmp_path_factory) -> Iterator[Behind]:
    """A cluster of one, which answers plain commands as any server does, and tells its clients of the proxy's port alone."""
    folder = tmp_path_factory.mktemp("tls")
    (known, pair), (other, _) = authority(folder, "known"), authority(folder, "other")
    with tls_proxy(pair, free_port(), node) as proxy, redis.Redis(port=node, password=SECRET) as client:
        client.config_set("cluster-announce-port", proxy.port)
        yield Behind(proxy, str(known), str(other))


def one_slot() -> StoreConfig:
    return StoreConfig(prefix=f"s{next(_prefixes)}", partitions=1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_authority_that_the_url_names_is_enough_for_both_clients(behind, scheme):
    url, config = behind.url(scheme, behind.known), one_slot()

    async def scenario():
        store = RedisStore(url, config)
        assert (await store.append([event("u", "a", 1)])).accepted == 1
        (state,) = await store.read(["u"], timeout_s=5.0)
        assert [e.item_id for e in state.events] == ["a"]
        await store.close()

    asyncio.run(scenario())
    log = RedisItemLog(url, config)
    log.change([ItemChange("a", {"x": 1})])
    assert [r.item_id for r in log.since(0).records] == ["a"]
    log.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_certificate_of_an_unknown_authority_is_refused_with_a_sentence(behind, scheme):
    url = behind.url(scheme, behind.other)
    says = r"a certificate that cannot be trusted \(.*authority in redis_url: .*ssl_ca_certs"

    async def scenario():
        store = RedisStore(url, one_slot())
        with pytest.raises(StoreUnavailableError, match=says) as refused:
            await store.append([event("u", "a", 1)])
        await store.close()
        return str(refused.value)

    log = RedisItemLog(url, one_slot())
    with pytest.raises(StoreUnavailableError, match=says) as refused:
        log.since(0)
    log.close()
    for said in (asyncio.run(scenario()), str(refused.value)):
        assert SECRET not in said
        assert "\n" not in said


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_connection_that_was_cut_comes_back_by_itself(behind, scheme):
    url, config = behind.url(scheme, behind.known), one_slot()

    async def scenario():
        store, log = RedisStore(url, config), RedisItemLog(url, config)
        await asyncio.gather(*(store.append([event("u", "a", n)]) for n in range(8)))
        log.change([ItemChange("a", {})])
        await asyncio.to_thread(behind.proxy.cut)
        try:
            for _ in range(3):
                with pytest.raises(StoreUnavailableError, match="is not available"):
                    await store.append([event("u", "b", 1)])
                with pytest.raises(StoreUnavailableError, match="is not available"):
                    log.since(0)
        finally:
            await asyncio.to_thread(behind.proxy.start)
        assert (await store.append([event("u", "b", 1)])).accepted == 1
        assert [r.item_id for r in log.since(0).records] == ["a"]
        await asyncio.to_thread(behind.proxy.cut)
        await asyncio.to_thread(behind.proxy.start)  # nobody asked meanwhile: all pooled connections are dead

        async def answers() -> bool:
            await store.append([event("u", "c", 1)])
            return True

        await until(answers)
        assert log.since(0).position == 1
        log.close()
        await store.close()

    asyncio.run(scenario())
