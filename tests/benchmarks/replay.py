"""Replay of whole logs: `python -m tests.benchmarks.replay [--json] [--quick] [--sets movielens,kuairand]`.

ML-100k and KuaiRand go event by event through the streaming road, with repeated events, their states packed and unpacked on
the way; at every example's instant its values are held to the batch road's. Once more with arrival shuffled within five
minutes: at sampled instants against the batch road over what had arrived, and when the log ends against the batch road of
all. Also: bytes of the packed states against one key per feature.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cluster.fetch import fetch, find_kuairand
from recsys.config import Config, load
from recsys.core import canonical_id
from recsys.errors import DataError
from recsys.features.asof import Asked, AsOf, Raw
from recsys.features.generate import Instant, screen
from recsys.features.inputs import AggregateInputs
from recsys.features.states import rows_of
from recsys.features.stream import Stream
from recsys.prepared import Prepared, prepare

CONFIGS = Path(__file__).parents[2] / "configs"
LATE_S = 300.0
KEY_OVERHEAD = 56
"""Bytes that a server keeps for a key beside its name and value (dict entry, two object headers; Valkey 9 measures 56 to 72)."""
DECLARED = {
    "item_n": {"kind": "count", "key": "item"},
    "item_n_24h": {"kind": "count", "key": "item", "window": "24h"},
    "item_recent": {"kind": "rate", "key": "item", "decay": "24h"},
    "item_reach": {"kind": "distinct", "key": "item", "of": "{user_column}", "cap": 32},
    "user_n_1h": {"kind": "count", "key": "user", "window": "1h"},
    "user_days": {"kind": "rate", "key": "user", "until": "day"},
    "user_visits": {"kind": "rate", "key": "user", "until": "session"},
    "user_faded": {"kind": "count", "key": "user", "decay": "7d"},
    "user_tag": {"kind": "rate", "key": ["user", "{tags}"], "window": "30d"},
    "user_item_n": {"kind": "count", "key": ["user", "item"]},
    "user_since": {"kind": "recency", "key": "user"},
    "user_newest": {"kind": "last", "key": "user", "n": 5},
    "user_hours": {"kind": "count", "key": ["user", "hour"]},
}
COLUMNS = {"movielens": ("occupation", "genres"), "kuairand": ("user_active_degree", "tag")}


def data_set(name: str, scratch: Path) -> tuple[Config, Prepared]:
    """The data set with the declared aggregates, prepared."""
    user_column, tags = COLUMNS[name]
    declared = json.dumps(DECLARED).replace("{user_column}", user_column).replace("{tags}", tags)
    config = load([CONFIGS / f"{name}.yaml"], [f"features.aggregates={declared}", f"workdir={scratch}"])
    if config.fetch is not None and config.fetched is not None:
        fetch(config.fetch, config.fetched)
    return config, prepare(config)


def compared(live: dict[str, Any], batch: Raw, at: int, inputs: AggregateInputs, items: Any) -> tuple[int, float]:
    """(mismatches of what must be exact, largest relative difference of what decays) at one instant."""
    wrong, worst = 0, 0.0
    for name, value in live.items():
        a, other = inputs.plan.aggregates[name], batch[name][at]
        if isinstance(value, tuple):
            wrong += items.outside(other[~np.isnan(other)].astype(np.int64)) != list(value)
        elif a.decay is not None:
            worst = max(worst, abs(other - value) / max(abs(value), 1e-9)) if value or other else worst
        else:
            wrong += not np.isclose(other, value, rtol=1e-12, atol=0, equal_nan=True)
    return wrong, worst


def in_order(p: Prepared, inputs: AggregateInputs, most: int) -> dict[str, Any]:
    """The log in order, every hundredth event told twice, states packed and read back every ten thousand events."""
    log = p.log.where(np.arange(min(most, len(p.log))))
    told = p.told[: len(log)]
    asof = AsOf(inputs.plan, log, inputs.columns, told, offset_s=inputs.config.utc_offset_s)
    start = time.perf_counter()
    batch = asof.values(asof.at_rows(np.arange(len(log))))
    batch_s = time.perf_counter() - start
    stream = new_stream(p, inputs)
    wrong, worst, duplicates, start = 0, 0.0, 0, time.perf_counter()
    for i, plain in enumerate(rows_of(log, told)):
        row = plain._replace(event_id=str(i))
        at = screen(row.time) if log.impressions else Instant(row.time, i)
        mismatches, difference = compared(stream.values(row.user_id, row.item_id, row.context, at), batch, i, inputs, log.items)
        wrong, worst = wrong + mismatches, max(worst, difference)
        stream.apply(row)
        if i % 100 == 0:
            duplicates += not stream.apply(row)
        if i % 10_000 == 9_999:
            stream.of_items = stream.unpack(stream.pack(stream.of_items))
            stream.of_user = {u: stream.unpack(stream.pack(s)) for u, s in stream.of_user.items()}
    took = time.perf_counter() - start
    return {
        "examples": len(log),
        "values": len(log) * len(batch),
        "mismatches_exact": wrong,
        "max_rel_diff_decay": worst,
        "duplicates_told": duplicates,
        "batch_s": round(batch_s, 2),
        "stream_events_per_s": round(len(log) / took),
        **sizes(stream),
    }


def shuffled(p: Prepared, inputs: AggregateInputs, most: int, instants: int) -> dict[str, Any]:
    """Arrival up to five minutes late: sampled instants against what had arrived, and the end against everything."""
    log = p.log.where(np.arange(min(most, len(p.log))))
    told, rng = p.told[: len(log)], np.random.default_rng(0)
    whole = AsOf(inputs.plan, log, inputs.columns, told, offset_s=inputs.config.utc_offset_s)
    arrival = np.argsort(log.time + rng.uniform(0, LATE_S, len(log)), kind="stable")
    sampled = set(rng.choice(len(log), min(instants, len(log)), replace=False).tolist())
    stream, wrong, worst = new_stream(p, inputs), 0, 0.0
    for n, row in enumerate(rows_of(log, told, arrival)):
        if n in sampled:
            came = np.sort(arrival[:n])
            asof = AsOf(inputs.plan, log.where(came), inputs.columns, told[came], offset_s=inputs.config.utc_offset_s)
            one = whole.at_rows(arrival[n : n + 1])
            context = {c: np.array([column.index.get(canonical_id(row.context[c]), -1)]) for c, column in asof.context.items()}
            asked = Asked(one.users, one.items, one.times, np.searchsorted(asof.log.time, one.times, "left"), context)
            got = stream.values(row.user_id, row.item_id, row.context, screen(row.time))
            mismatches, difference = compared(got, asof.values(asked), 0, inputs, log.items)
            wrong, worst = wrong + mismatches, max(worst, difference)
        stream.apply(row)
    end = float(log.time.max()) + 1.0
    last = rng.choice(len(log), min(5_000, len(log)), replace=False)
    one = whole.at_rows(last)
    batch = whole.values(Asked(one.users, one.items, np.full(len(last), end), np.full(len(last), len(log)), one.context))
    end_wrong = 0
    for j, row in enumerate(rows_of(log, told, last)):
        mismatches, difference = compared(
            stream.values(row.user_id, row.item_id, row.context, Instant(end, -1)), batch, j, inputs, log.items
        )
        end_wrong, worst = end_wrong + mismatches, max(worst, difference)
    return {"instants": len(sampled), "mismatches_late": wrong, "mismatches_end": end_wrong, "max_rel_diff_decay_late": worst}


def present() -> bool:
    """Whether the KuaiRand slice is here."""
    try:
        find_kuairand()
    except DataError:
        return False
    return True


def new_stream(p: Prepared, inputs: AggregateInputs) -> Stream:
    """An empty stream over the data set's ids."""
    return Stream(inputs.plan, p.log.users, p.log.items, inputs.columns, offset_s=inputs.config.utc_offset_s)


def sizes(stream: Stream) -> dict[str, float]:
    """Bytes a user and an item: packed, and as one key per feature (name, eight bytes a number, the server's own)."""

    def naive(states: Any) -> int:
        names = [(f.name, key) for number, key in states for f in stream.plan.groups[number].features]
        return sum(len(f"rf:{name}:" + ":".join(key)) + 8 + KEY_OVERHEAD for name, key in names)

    users = len(stream.of_user) or 1
    items = len({key[0] for number, key in stream.of_items if stream.plan.groups[number].key == ("item",)}) or 1
    return {
        "user_bytes": round(sum(len(stream.pack(s)) for s in stream.of_user.values()) / users),
        "user_bytes_naive": round(sum(naive(s) for s in stream.of_user.values()) / users),
        "item_bytes": round(len(stream.pack(stream.of_items)) / items),
        "item_bytes_naive": round(naive(stream.of_items) / items),
    }


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--sets", default="movielens,kuairand")
    given = arguments.parse_args()
    console, found = Console(stderr=given.json), {}
    for name in given.sets.split(","):
        if name == "kuairand" and not present():
            console.print("kuairand: left out, its folder is absent (KUAIRAND_DIR)")
            continue
        most = 5_000 if given.quick else 1 << 40
        _, p = data_set(name, Path(".rayfunnel/replay").absolute())
        assert p.aggregates is not None
        found[name] = in_order(p, p.aggregates, most) | shuffled(p, p.aggregates, most, 5 if given.quick else 40)
        console.print(name, found[name])
    if given.json:
        total = {
            "examples": sum(f["examples"] for f in found.values()),
            "mismatches_exact": sum(f["mismatches_exact"] + f["mismatches_late"] + f["mismatches_end"] for f in found.values()),
            "max_abs_diff_decay": max((max(f["max_rel_diff_decay"], f["max_rel_diff_decay_late"]) for f in found.values()), default=0.0),
        }
        print(json.dumps(total | {"sets": found}))


if __name__ == "__main__":
    main()
