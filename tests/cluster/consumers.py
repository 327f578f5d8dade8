"""Consumers on a real server for tests: a declaration of every kind, events, and what the streaming road makes of them."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from cluster.ingest import Ingest
from cluster.partition import PartitionStore
from cluster.redis_store import RedisStore, connected
from recsys.config import Config
from recsys.core import Vocabulary
from recsys.data import event_files
from recsys.data.interactions import Interactions
from recsys.data.sources import DataConfig, InteractionsConfig
from recsys.features.asof import Asked, AsOf
from recsys.features.counting import Counting, home
from recsys.features.generate import Instant
from recsys.features.keys import KeyColumns, TextColumn
from recsys.features.store import NewEvent, StoreConfig, event_identity
from recsys.features.stream import Stream
from recsys.ingest_config import IngestConfig
from tests.recsys.test_features_roads import DECLARED, HOUR, PLAN

DATA = DataConfig(interactions=InteractionsConfig(path="none.csv"))
USERS, ITEMS = Vocabulary([f"u{n}" for n in range(6)]), Vocabulary([f"i{n}" for n in range(5)])
COLUMNS = KeyColumns(
    {
        "user": {},
        "item": {
            "shop": TextColumn.of([["x"], ["y"], ["x"], [], ["y"]]),
            "tags": TextColumn.of([["a", "b"], ["b"], [], ["a", "c"], ["c"]]),
        },
    },
    {"user": {}, "item": {"price": np.array([1.0, 2.5, math.nan, 8.0, 4.0])}},
)
_prefixes = itertools.count()
LONG_AGO = 1_700_000_000_000
"""When the first of `some_events` happened, in milliseconds."""
END = LONG_AGO / 1000 + 20_000.0
"""Behind all of them, in seconds."""


def config_of(folder: Path, *, partitions: int = 3, prefix: str = "", **ingest) -> Config:
    settings = {
        "batch": 7,
        "linger_ms": 1.0,
        "lease_s": 1.0,
        "items_every_s": 0.02,
        "snapshot_every_s": 0.05,
        "parquet_every_s": 0.05,
        "keep_h": 0.0,
    }
    return Config(
        data=DATA,
        workdir=str(folder),
        store=StoreConfig(partitions=partitions, prefix=prefix or f"c{next(_prefixes)}"),
        ingest=IngestConfig(**(settings | ingest)),
    )


def counting(version: str = "v1", plan=PLAN) -> Counting:
    stream = Stream(plan, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)
    return Counting.of(version, plan, stream, DATA, config_of(Path()).history, trending_half_life_h=6.0)


def load(version: str) -> Counting | None:
    return None if version else counting()


def some_events(n: int, seed: int = 0, *, users: int = 6, late_s: float = 0.0) -> list[NewEvent]:
    rng = random.Random(seed)
    out = []
    for i in range(n):
        user, item, kind = f"u{rng.randrange(users)}", f"i{rng.randrange(5)}", rng.choice(["click", "view", "like"])
        time_ms = LONG_AGO + i * 20_000 - int(1000 * rng.uniform(0, late_s))
        value = rng.choice([None, 1.0, 2.5])
        out.append(
            NewEvent(
                user,
                item,
                kind,
                time_ms,
                value,
                event_identity(user, item, kind, time_ms) + str(i),
                None,
                {"tab": rng.choice(["0", "1", ""])},
            )
        )
    return out


async def told(config: Config, url: str, events: list[NewEvent]) -> None:
    store = RedisStore(url, config.store, config.history)
    await store.append(events)
    await store.close()


def batch_road(table: pa.Table, *, at: float) -> dict[tuple[str, str, str], dict]:
    """The batch road over Parquet: every declared value of every user, item and tab at an instant."""
    order = np.lexsort((table["position"].to_numpy() * 1_000 + table["partition"].to_numpy(), table["time_ms"].to_numpy()))
    rows = table.take(order).to_pylist()
    names = tuple(sorted({r["event"] for r in rows}))
    log = Interactions.of(
        [USERS.row(r["user_id"]) for r in rows],
        [ITEMS.row(r["item_id"]) for r in rows],
        [r["time_ms"] / 1000 for r in rows],
        users=USERS,
        items=ITEMS,
        event=[names.index(r["event"]) for r in rows],
        event_names=names,
        value=[math.nan if r["value"] is None else r["value"] for r in rows],
        context={"tab": np.array([orjson.loads(r["context"])["tab"] for r in rows], object)},
    )
    admitted = np.array([r["event"] in ("click", "like") for r in rows])
    asof = AsOf(PLAN, log, COLUMNS, admitted, offset_s=8 * HOUR)
    pairs = list(itertools.product(range(len(USERS)), range(len(ITEMS)), ("0", "1")))
    n = len(pairs)
    tabs = np.array([asof.context["tab"].index.get(tab, -1) for _, _, tab in pairs])
    users, items = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    raw = asof.values(Asked(users, items, np.full(n, at), np.full(n, len(log)), {"tab": tabs}))
    return {
        (f"u{user}", f"i{item}", tab): {name: tuple(decoded(name, x[i])) if x.ndim == 2 else float(x[i]) for name, x in raw.items()}
        for i, (user, item, tab) in enumerate(pairs)
    }


def decoded(name: str, values: np.ndarray) -> list:
    """A batch list as the streaming road says it."""
    of = DECLARED[name].get("of", "item")
    kept = [v for v in values.tolist() if not math.isnan(v)]
    return kept if of == "value" else [f"i{int(v)}" if of == "item" else COLUMNS.texts["item"][of].texts[int(v)] for v in kept]


async def held(config: Config, url: str) -> Stream:
    """The counters in the store, of all users and items, in a stream."""
    users = USERS.ids.to_pylist()
    store = RedisStore(url, config.store, config.history)
    states = await store.read(users, timeout_s=5.0)
    await store.close()
    stream = Stream(PLAN, USERS, ITEMS, COLUMNS, offset_s=8 * HOUR)
    stream.of_user = {u: stream.unpack(s.counters) for u, s in zip(users, states, strict=True)}
    redis = connected(url)
    partitions = PartitionStore(redis, config.store.prefix, ttl_s=10, mark_ttl_s=10, dead_letters=10)
    for p in range(config.store.partitions):
        _, values, _ = await partitions.counted(p)
        found = stream.unpack(b"".join(values))
        assert all(home(key, config.store.partitions) == p for _, key in found)
        stream.of_items |= found
    await redis.aclose()
    return stream


def same_values(live: Stream, batch: dict[tuple[str, str, str], dict], *, at: float) -> None:
    """Every declared value of every user, item and tab: exact for counts and lists, to 1e-9 for what decays or is divided."""
    for (user, item, tab), values in batch.items():
        ours = live.values(user, item, {"tab": tab}, Instant(at, 1 << 62))
        assert ours.keys() == values.keys() == DECLARED.keys()
        for name, value in values.items():
            one = ours[name]
            exact = "decay" not in DECLARED[name] and DECLARED[name]["kind"] in (
                "count",
                "distinct",
                "min",
                "max",
                "recency",
                "last",
                "first",
            )
            same = one == value if isinstance(value, tuple) else one == value or (math.isnan(one) and math.isnan(value))
            assert same or (not exact and math.isclose(one, value, rel_tol=1e-9)), (user, item, tab, name, one, value)


def archived(folder: Path) -> pa.Table:
    """Every event that consumers wrote to Parquet below a test's folder."""
    return event_files.read(str(folder / "events"))


def each_is_in_parquet_once(folder: Path, events: list[NewEvent]) -> None:
    """None lost, none twice, and none that nobody told."""
    assert sorted(archived(folder)["event_id"].to_pylist()) == sorted(e.event_id for e in events)


async def same_as_the_batch_road(config: Config, url: str, folder: Path, *, at: float = END) -> None:
    """Every counter in the store is what the batch road makes of the events in Parquet."""
    same_values(await held(config, url), batch_road(archived(folder), at=at), at=at)


async def drained(ingest: Ingest) -> None:
    """Step by hand until nothing is left."""
    await ingest.lead()
    while await ingest.count_users():
        pass
    await ingest.count_items()


async def archived_all(ingest: Ingest) -> None:
    """Step by hand until nothing is left and all of it is in Parquet."""
    await drained(ingest)
    await ingest.archiving.all()


async def until(what, *, patience_s: float = 20.0):
    """Wait for a coroutine function to say yes."""
    deadline = asyncio.get_running_loop().time() + patience_s
    while not (said := await what()):
        assert asyncio.get_running_loop().time() < deadline, "it did not come"
        await asyncio.sleep(0.02)
    return said
