"""Item-side counters of several partitions: rankers get them together, as of one instant, and not never where one stays behind."""

import logging
import threading
from types import SimpleNamespace

import pytest

from deployments import live_counters
from deployments.live_counters import BEHIND, CountersFollower
from recsys.config import Config
from recsys.features.snapshot import Part
from recsys.ingest_config import IngestConfig
from tests.cluster.consumers import DATA


@pytest.fixture
def clock(monkeypatch):
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live_counters.time, "monotonic", lambda: found.now)
    return found


def follower(asked: list[int]) -> CountersFollower:
    def funnels():
        asked.append(1)
        return []

    return CountersFollower(SimpleNamespace(ingest=IngestConfig(), store=SimpleNamespace(partitions=2)), "redis://nowhere", funnels)


def reader(*at: float):
    return SimpleNamespace(parts={p: Part(t, (), {}) for p, t in enumerate(at)})


def test_partitions_of_different_instants_wait_for_each_other(clock):
    asked: list[int] = []
    made = follower(asked)
    made.apply(reader())
    made.apply(reader(10.0, 5.0))
    assert asked == [], "one shows 10, the other 5"
    made.apply(reader(10.0))
    assert asked == [], "the other was not published yet: its items would have no counters at all"
    made.apply(reader(10.0, 10.0))
    assert len(asked) == 1


def test_a_partition_that_stays_behind_is_waited_for_a_while_and_no_longer(clock):
    asked: list[int] = []
    made = follower(asked)
    made.apply(reader(10.0, 5.0))
    clock.now += BEHIND * IngestConfig().snapshot_every_s + 0.1
    made.apply(reader(25.0, 5.0))
    made.apply(reader(30.0, 5.0))
    assert len(asked) == 2
    made.apply(reader(35.0, 35.0))
    made.apply(reader(40.0, 35.0))
    assert len(asked) == 3, "from the next time on they wait for each other again"


def test_a_partition_that_is_never_published_is_waited_for_no_longer_either(clock):
    asked: list[int] = []
    made = follower(asked)
    made.apply(reader(10.0))
    clock.now += BEHIND * IngestConfig().snapshot_every_s + 0.1
    made.apply(reader(25.0))
    assert len(asked) == 1


def test_whatever_a_snapshot_brings_the_thread_goes_on_and_says_so_with_a_traceback(monkeypatch, caplog):
    """A TypeError, say, of a part that nobody can read: told once, and the next snapshots are taken over."""
    read, enough = [], threading.Event()

    class Reader:
        def __init__(self, *_):
            self.parts = {}

        async def read(self):
            read.append(1)
            if len(read) <= 2:
                raise TypeError("planted")
            enough.set()
            return False

    monkeypatch.setattr(live_counters, "SnapshotReader", Reader)
    made = CountersFollower(Config(data=DATA), "redis://127.0.0.1:1", list, poll_s=0.01)
    with caplog.at_level(logging.WARNING):
        made.start()
        assert enough.wait(20), "the thread has ended"
        made.stop()
    assert caplog.text.count("Item-side counters could not be taken over. planted") == 1
    assert "Traceback" in caplog.text
    assert "TypeError: planted" in caplog.text
