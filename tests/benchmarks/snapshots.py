"""Snapshots of the item side for rankers: `python -m tests.benchmarks.snapshots [--json] [--items 30000]`.

Every item has eight events of the last two days in the counters that the live benchmarks declare. Measured, at the consumer: the
first snapshot of all keys, one 5 s later without news, and one in which a hundredth of the items had an event; at a ranker: the
first snapshot taken over, and the next. All in this process, for one partition that holds them all.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys.core import Vocabulary
from recsys.features.aggregates import AggregateConfig
from recsys.features.counting import by_name
from recsys.features.groups import Row, compiled
from recsys.features.item_table import ItemTable
from recsys.features.keys import KeyColumns, TextColumn
from recsys.features.records import parted
from recsys.features.snapshot import coded, packed_snapshot, unpacked_snapshot
from recsys.features.states import Coder
from recsys.features.stream import States, Stream
from tests.benchmarks.live_service import DECLARED

DAY_S, EVENTS = 86_400.0, 8


def columns_of(items: int) -> KeyColumns:
    """A colour of twenty for each."""
    return KeyColumns({"user": {}, "item": {"colour": TextColumn.of([[f"c{n % 20}"] for n in range(items)])}})


def road(items: int) -> Stream:
    """The streaming road of the item side over so many items."""
    plan = compiled(
        {n: AggregateConfig.model_validate(a) for n, a in DECLARED.items()}, priors={}, lateness_s=600.0, offset_s=0.0, gap_s=1_800.0
    )
    return Stream(parted(plan)[1], Vocabulary(["u0"]), Vocabulary([f"i{n}" for n in range(items)]), columns_of(items))


def click(stream: Stream, states: States, item: int, at: float, n: int) -> None:
    """One more event of an item."""
    row = Row(at, n, "u0", f"i{item}", "click", context={"device": "web"})
    states |= stream.taken(states, by_name(stream.touched(row)))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def measured(items: int) -> dict[str, float]:
    """All figures."""
    stream, rng, now = road(items), random.Random(7), 1_700_000_000.0
    states: States = {}
    for n in range(items * EVENTS):
        click(stream, states, n // EVENTS, now - 2 * DAY_S * rng.random(), n)
    kept: dict[int, ItemTable] = {}
    first, held = timed(lambda: packed_snapshot(stream.plan, states, now, [0], kept))
    still, _ = timed(lambda: packed_snapshot(stream.plan, states, now + 5, [0], kept))
    for n in range(items // 100):
        click(stream, states, rng.randrange(items), now + 6, items * EVENTS + n)
    news, held = timed(lambda: packed_snapshot(stream.plan, states, now + 10, [0], kept))
    coder, part = Coder(columns_of(items), stream.vocabularies["item"], 0.0), unpacked_snapshot(held)

    def taken_over() -> None:
        for group, table in zip(stream.plan.groups, part.tables.values(), strict=True):
            coded(group, {0: table}, coder)

    ranker_first, ranker_next = timed(taken_over)[0], timed(taken_over)[0]
    return {
        "keys": len(states),
        "first_s": round(first, 3),
        "without_news_s": round(still, 3),
        "hundredth_changed_s": round(news, 3),
        "bytes_per_key": round(len(held) / len(states), 1),
        "ranker_first_s": round(ranker_first, 3),
        "ranker_next_s": round(ranker_next, 3),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--items", type=int, default=30_000)
    given = parser.parse_args()
    found = measured(given.items)
    table = Table("", "", title="snapshots", show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:,}")
    Console(stderr=True).print(table)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
