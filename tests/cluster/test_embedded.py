"""The owner of the embedded Valkey: one per folder, taken over after a kill, nothing answered is ever lost."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster.embedded import EmbeddedValkey, check_single_node
from cluster.redis_store import RedisStore
from recsys.errors import ConfigError, StoreError
from tests.cluster.valkey_process import kill, pid_of
from tests.contracts_store import event, items_of

OWNER = """
import sys, time
from cluster.embedded import EmbeddedValkey
server = EmbeddedValkey(sys.argv[1])
server.start()
print(server.owner, flush=True)
time.sleep(600)
"""


def wait_until(holds) -> None:
    while not holds():  # the test's own time limit ends a wait that never comes true
        time.sleep(0.01)


def tell(url: str, item: str, time_ms: int) -> None:
    async def scenario():
        store = RedisStore(url)
        await store.append([event("u", item, time_ms)])
        await store.close()

    asyncio.run(scenario())


def told(url: str) -> list[str]:
    async def scenario():
        store = RedisStore(url)
        items = await items_of(store, "u")
        await store.close()
        return items

    return asyncio.run(scenario())


@pytest.fixture
def other_owner(tmp_path):
    """Another process that owns the folder `store`."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "store")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"True\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_was_answered_is_there_after_the_server_was_killed(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        tell(server.url, "a", 1)
        kill(server)
    with EmbeddedValkey(tmp_path) as server:
        assert told(server.url) == ["a"]


def test_what_was_answered_is_there_after_an_orderly_stop(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        tell(server.url, "a", 1)
    assert not server._answers()
    with EmbeddedValkey(tmp_path) as server:
        assert told(server.url) == ["a"]


def test_after_a_sigkill_of_owner_and_server_the_next_owner_has_every_answered_event(tmp_path, other_owner):
    server = EmbeddedValkey(tmp_path / "store")
    tell(server.url, "a", 1)
    other_owner.kill()
    other_owner.wait()
    os.kill(pid_of(server), signal.SIGKILL)
    with server:
        assert server.owner
        assert told(server.url) == ["a"]


def test_a_server_whose_owner_was_killed_is_taken_over_not_doubled(tmp_path, other_owner):
    server = EmbeddedValkey(tmp_path / "store")
    tell(server.url, "a", 1)
    before = pid_of(server)
    other_owner.kill()
    other_owner.wait()
    server.start()
    assert server.owner
    assert pid_of(server) == before
    assert told(server.url) == ["a"]
    server.stop()
    assert not server._answers(), "who took it over also ends it"
    assert server._gone(0.0)


def test_a_second_process_is_a_guest_and_does_not_end_the_server(tmp_path, other_owner):
    guest = EmbeddedValkey(tmp_path / "store")
    url = guest.start()
    assert not guest.owner
    tell(url, "a", 1)
    guest.stop()
    assert guest._answers()
    EmbeddedValkey(tmp_path / "store").stop()
    assert guest._answers()
    other_owner.kill()
    other_owner.wait()
    with guest:  # the fixture's server is ended by its new owner
        assert guest.owner


def test_a_guest_of_an_owner_without_a_server_is_told_so(tmp_path, other_owner):
    guest = EmbeddedValkey(tmp_path / "store", start_timeout_s=0.2)
    os.kill(pid_of(guest), signal.SIGKILL)
    wait_until(lambda: not guest._answers())
    assert guest.check() is False, "a guest starts nothing"
    with pytest.raises(StoreError, match=r"Another process owns the feature store in .* has not answered"):
        guest.start()


def test_a_dead_server_is_started_again_by_the_supervisor_at_the_same_address(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        url, first = server.url, pid_of(server)
        tell(url, "a", 1)
        server.supervise(interval_s=0.02)
        kill(server)
        wait_until(server._answers)
        assert server.url == url
        assert pid_of(server) != first
        assert told(url) == ["a"]
    assert not server._answers()


def test_a_server_that_hangs_is_neither_doubled_nor_waited_for_without_end(tmp_path):
    server = EmbeddedValkey(tmp_path)
    server.start()
    os.kill(pid_of(server), signal.SIGSTOP)
    server.start_timeout_s = 0.1
    with pytest.raises(StoreError, match=r"did not answer within 0\.1 s"):
        server.check()
    server.stop(timeout_s=0.1)  # SIGTERM waits in vain, SIGKILL does not
    assert server._gone(0.0)


def test_the_owners_terminal_does_not_reach_the_server(tmp_path):
    with EmbeddedValkey(tmp_path) as server:
        assert os.getsid(pid_of(server)) != os.getsid(0)


def test_it_listens_on_a_private_socket_and_syncs_every_answer(tmp_path):
    with EmbeddedValkey(tmp_path, max_memory_mb=64) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert path.parent == tmp_path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        settings = (tmp_path / "valkey.conf").read_text().splitlines()
    assert {"port 0", "appendonly yes", "appendfsync always", "maxmemory-policy volatile-lru", "maxmemory 64mb"} <= set(settings)


def test_a_path_too_long_for_a_socket_gets_a_private_folder_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/tmp")
    deep = tmp_path / ("long-" * 15) / ('quo"ted ' * 5)
    with EmbeddedValkey(deep) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert len(os.fsencode(path)) <= 100
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        tell(server.url, "a", 1)
        kill(server)
        server.check()
        assert server.url == f"unix://{path}"
        assert told(server.url) == ["a"]
    with EmbeddedValkey(deep) as server:
        assert server.url == f"unix://{path}"
    path.parent.chmod(0o755)  # as if another user had made it: not trusted any more
    with EmbeddedValkey(deep) as server:
        assert Path(server.url.removeprefix("unix://")).parent != path.parent
        assert told(server.url) == ["a"]
    Path(server.url.removeprefix("unix://")).parent.rmdir()
    path.parent.rmdir()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write in its folder '.*file/store' .* Choose another workdir"):
        EmbeddedValkey(tmp_path / "file" / "store").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user for a moment")
def test_a_folder_of_another_user_is_named(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match=r"cannot write in its folder .*Permission denied.* change its owner"):
            EmbeddedValkey(tmp_path).start()
    finally:
        os.seteuid(0)


def test_a_server_that_cannot_start_gives_its_own_reason(tmp_path):
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    server = EmbeddedValkey(tmp_path)
    with pytest.raises(StoreError, match=r"ended at once with code 1. Its log says: .*manifest"):
        server.start()
    server.stop()


def test_the_url_of_a_store_that_never_was_is_a_sentence(tmp_path):
    with pytest.raises(StoreError, match=r"No feature store was ever started in .* Call start\(\) first"):
        _ = EmbeddedValkey(tmp_path).url


def test_more_than_one_node_needs_a_redis_that_all_of_them_reach():
    check_single_node(1)
    with pytest.raises(ConfigError, match=r"serves one host, this cluster has 2 nodes. Set redis_url"):
        check_single_node(2)


def test_a_workdir_that_is_a_uri_needs_a_redis_of_its_own():
    with pytest.raises(
        ConfigError, match=r"cannot lie at 's3://\S*@bucket/rf/store': it needs a folder of this host\. Set redis_url"
    ) as raised:
        EmbeddedValkey("s3://key:hush@bucket/rf/store")
    assert "hush" not in str(raised.value)
