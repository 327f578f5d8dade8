"""The batch road on Ray Data: aggregates at any instants of a log, each key's events and what is asked of them in one of many parts.

Events and instants are dealt by the hash of one part of a key (its user, its item, a column), so a part has all that its keys
need and runs the batch road (`features.asof`) as it is. Groups that are dealt alike share a pass, and all passes one shuffle. A
key of a list alone (tags) has a row in as many parts as it has values; the parts' amounts are merged before they become numbers.

By this road come, where it is chosen: the scales that `prepare` fits, the values in the examples of the fine ranker and of
protocol ctr, and what `features describe` shows. Bounded is what one task holds: about `EVENTS_A_PART` events and instants, or
those of one value that they are dealt by where it alone has more (a context of three values makes three parts), with some `BYTES`
for each key and signal that the batch road keeps of an event. Between tasks the shuffle holds the rows, 50 bytes each for each
pass, spread over Ray's processes.

The calling process holds no log: its columns are mapped from the prepared state's file, from which blocks are cut, and only the
instants (some 40 bytes each), their answers (8 bytes each) and the codes of context columns (4 bytes an event) are its own. 5 M events,
12 aggregates and half a million instants take 165 MiB of it, 61 of them the answers; in one process 2.8 GiB (`tests.benchmarks.aggregates`).
Reading and cleaning a new log, before all this, is `prepare`'s and is done in one process. And still by the road of one process, over the
whole log: pages that are judged offline (whose candidates nobody knows before they are asked), logged pages that `retrain` learns from,
and the states that a bundle begins with (the streaming road).
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.progress import TextColumn as Words

from cluster.aggregate_parts import ASK, PART, Shared, answer, blocks_of, deal, numbers_in, shared_by
from cluster.runtime import inside_job, start_ray
from cluster.terminal import out as terminal
from recsys.features.asof import Asked, AsOf, Raw, Road, finished
from recsys.features.groups import Counted, Group
from recsys.features.tally import Ends

if TYPE_CHECKING:
    from recsys.config import Config

log = logging.getLogger(__name__)
EVENTS_A_PART = 1_000_000
"""Events and instants that a task is given, on average."""
BYTES = 40
"""What the batch road holds of an event for one key and signal: key, row, time, amount and prefix sum, 8 bytes each."""
LARGE_GIB = 4.0
"""From here on aggregates are computed on Ray: below, they fit beside the log, and dealing rows costs more time than it saves."""


# ---- which road -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The road for each log, as `recsys.features.asof.Roads` asks. It is read-only and holds no log, so it can be sent to workers."""

    forced: bool | None = None

    @classmethod
    def of(cls, config: Config) -> Chosen:
        """As `prepare.on_ray` says, else by size."""
        return cls(config.prepare.on_ray)

    def __call__(self, asof: AsOf) -> Road | None:
        far, reason = on_ray(self.forced, asof)
        log.info("aggregates %s: %s", "by key on Ray Data" if far else "in this process", reason)
        return values if far else None


def on_ray(forced: bool | None, asof: AsOf) -> tuple[bool, str]:
    """Whether a log's aggregates are computed on Ray Data, and why."""
    if forced is not None:
        return forced, f"prepare.on_ray is {str(forced).lower()}"
    if _inside_task():
        return False, "this process is a task on Ray itself, whose processors may all be taken by its like"
    if os.environ.get("RAY_ADDRESS") or inside_job():
        return True, "a cluster is given"
    signals = sum(len(g.signals) for g in asof.plan.groups)
    gib = len(asof.log) * signals * BYTES / 2**30
    return (
        gib >= LARGE_GIB,
        f"{len(asof.log):,} events and {signals} signals take {gib:.1f} GiB; from {LARGE_GIB:g} GiB on Ray is worth its start",
    )


def _inside_task() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


# ---- the road ---------------------------------------------------------------------------------------------------------


def values(asof: AsOf, asked: Asked, groups: tuple[Group, ...]) -> Raw:
    """`asof.values` by parts on Ray Data: equal to it, decays but for the last digits. Starts Ray where none runs."""
    if not len(asked) or not groups:
        return asof.values(asked, groups)
    start_ray()  # before the first import of ray, which reads its environment then
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    parts = max(cpus, math.ceil((len(asof.log) + len(asked)) / EVENTS_A_PART))
    task = shared_by(asof, groups, parts)
    with Progress(
        Words("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=terminal, transient=True
    ) as bars:
        bar = bars.add_task("aggregates by key, parts", total=parts * len(task.passes))
        rows = [ray.put(block) for block in blocks_of(asof, asked, groups)]
        return collected(task, asked, _dealt(rows, task).iter_batches(batch_format="pyarrow", batch_size=None), partial(bars.advance, bar))


def _dealt(blocks: list[Any], task: Shared) -> Any:
    """The Dataset of answers. All passes are one shuffle: each starts processes of its own."""
    import ray.data

    shared, n = ray.put(task), task.parts * len(task.passes)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours says what is done
    rows = ray.data.from_arrow_refs(blocks).map_batches(lambda t: deal(t, ray.get(shared)), batch_format="pyarrow", batch_size=None)
    return rows.groupby(PART, num_partitions=n).map_groups(lambda t: answer(t, ray.get(shared)), batch_format="pyarrow")


def collected(task: Shared, asked: Asked, answers: Iterable[pa.Table], progress: Callable[[int], None]) -> Raw:
    """The answers of all parts by instant, as numbers. `progress` is told how many parts came that had not come before."""
    n = len(asked)
    out: Raw = {}
    for f in (f for one in task.passes for f in one.features):
        out[f.name] = np.full((n, f.monoid.n) if isinstance(f.monoid, Ends) else n, np.nan)
    merged = {f.name: [np.full(n, x) for x in (*f.nothing, -np.inf)] for one in task.passes if one.wide for f in one.features}
    came: set[int] = set()
    for table in answers:
        part = table[PART].to_numpy()
        new = set(np.unique(part).tolist()) - came
        came |= new
        progress(len(new))
        for number in np.unique(part // task.parts).tolist():
            one, mine = task.passes[number], table.filter(part // task.parts == number)
            at, found = mine[ASK].to_numpy(), numbers_in(mine)
            for f, x in zip(one.features, np.split(found, np.cumsum(one.widths)[:-1], axis=1), strict=True):
                if one.wide:
                    _merge(merged[f.name], f, at, x)
                else:
                    out[f.name][at] = x if isinstance(f.monoid, Ends) else x[:, 0]
    for f in (f for one in task.passes if one.wide for f in one.features):
        *amounts, newest = merged[f.name]
        out[f.name] = finished(f, amounts, newest, asked.times)
    return {f.name: out[f.name] for one in task.passes for f in one.features}


def _merge(held: list[np.ndarray], f: Counted, at: np.ndarray, found: np.ndarray) -> None:
    """Amounts and newest times (n, c + 1) into those held; an instant may come several times, once from each part."""
    op = {"add": np.add, "min": np.fmin, "max": np.fmax}[f.monoid.op]
    for c, amounts in enumerate(held[:-1]):
        op.at(amounts, at, found[:, c])
    np.maximum.at(held[-1], at, found[:, -1])
