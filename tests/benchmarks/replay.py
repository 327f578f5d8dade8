"""Replay of whole logs: `python -m tests.benchmarks.replay [--json] [--quick] [--sets movielens,kuairand]`.

ML-100k and KuaiRand go event by event through the streaming road, with repeated events, their states packed and unpacked on
the way; at every example's instant its values are held to the batch road's. Once more with arrival shuffled within five
minutes: at every instant again, against the batch road over what had arrived by then and is older, and when the log ends against
the batch road over all of it. Also: bytes of the packed states against one key per feature.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from cluster.fetch import fetch, find_kuairand
from recsys.config import Config, load
from recsys.core import Vocabulary
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


def stacked(live: list[dict[str, Any]], items: Vocabulary) -> Raw:
    """What the streaming road said at n instants, as the batch road says it: lists as rows of items, NaN on the left."""
    out: Raw = {}
    for name in live[0]:
        values = [one[name] for one in live]
        if not isinstance(values[0], tuple):
            out[name] = np.array(values, np.float64)
            continue
        out[name] = np.full((len(values), max(1, *map(len, values))), np.nan)
        for line, ids in zip(out[name], values, strict=True):
            if ids:
                line[-len(ids) :] = items.rows(list(ids))
    return out


def compared(live: Raw, batch: Raw, inputs: AggregateInputs) -> tuple[int, float]:
    """(mismatches of what must be exact, largest relative difference of what decays) of equal instants."""
    assert live.keys() == batch.keys()
    wrong, worst = 0, 0.0
    for name, ours in live.items():
        theirs = batch[name]
        if theirs.ndim > 1:
            width = max(ours.shape[1], theirs.shape[1])
            ours, theirs = (np.pad(x, ((0, 0), (width - x.shape[1], 0)), constant_values=np.nan) for x in (ours, theirs))
            wrong += int((~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))).any(1).sum())
        elif inputs.plan.aggregates[name].decay is None:
            wrong += int((~np.isclose(theirs, ours, rtol=1e-12, atol=0, equal_nan=True)).sum())
        else:
            both = ~(np.isnan(ours) | np.isnan(theirs))
            wrong += int((np.isnan(ours) != np.isnan(theirs)).sum())
            worst = max(worst, float((np.abs(theirs - ours) / np.maximum(np.abs(ours), 1e-9))[both].max(initial=0.0)))
    return wrong, worst


def in_order(p: Prepared, inputs: AggregateInputs, most: int, console: Console) -> dict[str, Any]:
    """The log in order, every hundredth event told twice, states packed and read back every ten thousand events."""
    log = p.log.where(np.arange(min(most, len(p.log))))
    told = p.told[: len(log)]
    asof = AsOf(inputs.plan, log, inputs.columns, told, offset_s=inputs.config.utc_offset_s)
    start = time.perf_counter()
    batch = asof.values(asof.at_rows(np.arange(len(log))))
    batch_s = time.perf_counter() - start
    stream, live = new_stream(p, inputs), []
    duplicates, start = 0, time.perf_counter()
    for i, plain in enumerate(track(rows_of(log, told), "in order", total=len(log), console=console)):
        row = plain._replace(event_id=str(i))
        live.append(stream.values(row.user_id, row.item_id, row.context, screen(row.time) if log.impressions else Instant(row.time, i)))
        stream.apply(row)
        if i % 100 == 0:
            duplicates += not stream.apply(row)
        if i % 10_000 == 9_999:
            stream.of_items = stream.unpack(stream.pack(stream.of_items))
            stream.of_user = {u: stream.unpack(stream.pack(s)) for u, s in stream.of_user.items()}
    took = time.perf_counter() - start
    wrong, worst = compared(stacked(live, log.items), batch, inputs)
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


def as_arrived(whole: AsOf, arrival: np.ndarray, console: Console) -> Raw:
    """The batch road's values at each row of a log, asked when the row comes in, over what came in before it and is older.

    What an instant may count is another part of the log for each of them. But a key's events are its user's or its item's alone, so
    the n-th arrivals of all users are asked together, over a log of what their users told before; the items' likewise.
    """
    log, out = whole.log, {}
    place = np.empty(len(log), np.int64)
    place[arrival] = np.arange(len(log))
    for side, owner in (("user", log.user), ("item", log.item)):
        groups = tuple(g for g in whole.plan.groups if ("user" if "user" in g.key else "item") == side)
        assert all(side in g.key for g in groups), f"an aggregate of neither a user nor an item: {[g.key for g in groups]}"
        order = np.lexsort((place, owner))
        n = np.bincount(owner)
        turn = np.empty(len(log), np.int64)
        turn[order] = np.arange(len(log)) - (np.cumsum(n) - n)[owner[order]]
        for at in track(range(int(n.max())), f"as arrived, by {side}", console=console):
            asking = np.flatnonzero(turn == at)
            asof = whole.where((turn < at) & (n[owner] > at))
            one = whole.at_rows(asking)
            asked = Asked(one.users, one.items, one.times, np.searchsorted(asof.log.time, one.times, "left"), one.context)
            for name, values in asof.values(asked, groups).items():
                out.setdefault(name, np.full((len(log), *values.shape[1:]), np.nan))[asking] = values
    return out


def shuffled(p: Prepared, inputs: AggregateInputs, most: int, console: Console) -> dict[str, Any]:
    """Arrival up to five minutes late: every instant against what had arrived, and the end against everything."""
    log = p.log.where(np.arange(min(most, len(p.log))))
    told, rng = p.told[: len(log)], np.random.default_rng(0)
    whole = AsOf(inputs.plan, log, inputs.columns, told, offset_s=inputs.config.utc_offset_s)
    arrival = np.argsort(log.time + rng.uniform(0, LATE_S, len(log)), kind="stable")
    stream, live = new_stream(p, inputs), []
    for row in track(rows_of(log, told, arrival), "shuffled", total=len(log), console=console):
        live.append(stream.values(row.user_id, row.item_id, row.context, screen(row.time)))
        stream.apply(row)
    late = {name: values[arrival] for name, values in as_arrived(whole, arrival, console).items()}
    wrong, worst = compared(stacked(live, log.items), late, inputs)
    plain = whole.values(whole.at_rows(arrival))
    behind, _ = compared(late, plain, inputs)  # how much there was to get wrong

    end = float(log.time.max()) + 1.0
    one = whole.at_rows(np.arange(len(log)))
    batch = whole.values(Asked(one.users, one.items, np.full(len(log), end), np.full(len(log), len(log)), one.context))
    last = [
        stream.values(row.user_id, row.item_id, row.context, Instant(end, -1))
        for row in track(rows_of(log, told), "at the end", total=len(log), console=console)
    ]
    end_wrong, end_worst = compared(stacked(last, log.items), batch, inputs)
    return {
        "instants": len(log),
        "mismatches_late": wrong,
        "values_behind_the_whole_log": behind,
        "mismatches_end": end_wrong,
        "max_rel_diff_decay_late": max(worst, end_worst),
    }


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
        found[name] = in_order(p, p.aggregates, most, console) | shuffled(p, p.aggregates, most, console)
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
