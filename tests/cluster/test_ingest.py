"""Consumers of the event log: what they count is the streaming road's, whatever repeats, dies or cannot be read."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.embedded import EmbeddedValkey
from cluster.ingest import Ingest
from recsys.data import event_files
from tests.cluster.consumers import LONG_AGO, batch_road, config_of, drained, held, load, same_values, some_events, told

END = LONG_AGO / 1000 + 20_000.0
USERS = [f"u{n}" for n in range(6)]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


def test_counters_in_the_store_are_those_of_the_streaming_road(url, tmp_path):
    config = config_of(tmp_path)

    async def scenario():
        await told(config, url, some_events(300))
        ingest = Ingest(config, url, load)
        await drained(ingest)
        await ingest.archiving.all()
        same_values(await held(config, url, USERS), batch_road(event_files.read(str(tmp_path / "events")), at=END), at=END)
        await ingest.close()

    asyncio.run(scenario())


def test_duplicates_late_events_and_random_kills_change_nothing(url, tmp_path):
    """Consumers are dropped in the middle of whatever they do, and new ones go on from what the store says."""
    config = config_of(tmp_path, lease_s=0.05)
    rng = random.Random(1)
    events = some_events(400, 1, late_s=300)

    async def scenario():
        kills = 0
        sent = 0
        while sent < len(events) or kills < 12:
            ingest = Ingest(config, url, load)
            run = asyncio.create_task(ingest.run())
            for _ in range(rng.randrange(1, 6)):
                step = events[sent : sent + 20]
                sent += len(step)
                await told(config, url, step + rng.sample(events[: sent or 1], min(sent, 5)))
                await asyncio.sleep(rng.uniform(0, 0.03))
            run.cancel()  # wherever it is
            await asyncio.gather(run, return_exceptions=True)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await ingest.close()
            kills += 1
        await asyncio.sleep(0.1)
        last = Ingest(config_of(tmp_path, prefix=config.store.prefix, keep_h=1.0), url, load)
        await drained(last)
        await last.archiving.all()
        await last.close()
        same_values(await held(config, url, USERS), batch_road(event_files.read(str(tmp_path / "events")), at=END), at=END)
        return kills

    assert asyncio.run(scenario()) >= 12
    table = event_files.read(str(tmp_path / "events"))
    assert sorted(table["event_id"].to_pylist()) == sorted(e.event_id for e in events), "each event is in Parquet exactly once"
