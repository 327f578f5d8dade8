"""Which live events a version has taken, as its bundle says: read by `retrain`, and by consumers that count on top of it.

The workdir's own event log numbers its events, so a position per partition says it all. A file from elsewhere has a numbering of
its own, or none that goes on in the next file: of these the bundle keeps a mark of every event taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.features.covered import Covered

TAKEN = "taken.json"
ELSEWHERE = "taken_elsewhere.npy"
Positions = dict[int, int]
"""Partition -> the position behind the newest event taken."""


class Taken(NamedTuple):
    """positions: what the version's states hold of the log that it was made from; own: whether that is the workdir's own event log, not a
    file from elsewhere; until_ms: when that log took the newest. log: up to where the own event log is taken, by this version or one
    that it went on from; elsewhere: (n,) uint64, ascending, `marks` of the events taken from files."""

    positions: Positions
    own: bool
    until_ms: int
    log: Positions
    elsewhere: np.ndarray

    def and_now(self, held: pa.Table, *, own: bool) -> Taken:
        """Everything in `held` (columns of `event_files`), on top of what was taken before."""
        until_ms = int(pc.max(held["logged_ms"]).as_py() or 0) if len(held) else 0
        if own:
            log = ends(held, self.log)
            return Taken(log, own, until_ms, log, self.elsewhere)
        return Taken(ends(held, {}), own, until_ms, self.log, np.union1d(self.elsewhere, marks(held)))

    def behind(self, events: pa.Table) -> np.ndarray:
        """(E,) bool: events of the own log that stand behind what is taken of it."""
        partition, position = events["partition"].to_numpy(), events["position"].to_numpy()
        starts = np.zeros(int(partition.max(initial=0)) + 1, np.int64)
        for p, n in self.log.items():
            if p < len(starts):
                starts[p] = n
        out: np.ndarray = position >= starts[partition]
        return out

    def equals(self, other: Taken) -> bool:
        """Whether both have taken the same events."""
        return (self.own, self.log) == (other.own, other.log) and np.array_equal(self.elsewhere, other.elsewhere)

    def write(self, folder: Path, more: Mapping[str, Any]) -> None:
        """Into a bundle, `more` beside it for people."""
        positions, log = ({str(p): n for p, n in held.items()} for held in (self.positions, self.log))
        said = {"positions": positions, "own": self.own, "until_ms": self.until_ms, "log": log, **more}
        (folder / TAKEN).write_text(json.dumps(said))
        if len(self.elsewhere):
            np.save(folder / ELSEWHERE, self.elsewhere)


NOTHING = Taken({}, own=True, until_ms=0, log={}, elsewhere=np.zeros(0, np.uint64))


def taken_in(folder: Path) -> Taken | None:
    """Of a bundle; None for one that `train` made.

    Bundles from before there was a "log" kept one numbering for all sources. Where the last was a file, nobody can tell which of its
    positions are the log's: nothing counts as taken, as an event learnt twice does less harm than one that is never learnt.
    """
    if not (folder / TAKEN).exists():
        return None
    held = json.loads((folder / TAKEN).read_text())
    positions, own = _positions(held["positions"]), held.get("own", True)
    log = _positions(held["log"]) if "log" in held else positions if own else {}
    elsewhere = np.load(folder / ELSEWHERE) if (folder / ELSEWHERE).exists() else NOTHING.elsewhere
    return Taken(positions, own, held.get("until_ms", 0), log, elsewhere)


def _positions(held: Mapping[str, int]) -> Positions:
    return {int(p): n for p, n in held.items()}


def ends(events: pa.Table, before: Mapping[int, int]) -> Positions:
    """The positions behind these events and those before."""
    out = dict(before)
    newest = events.group_by("partition").aggregate([("position", "max")])
    for p, n in zip(newest["partition"].to_pylist(), newest["position_max"].to_pylist(), strict=True):
        out[p] = max(out.get(p, 0), n + 1)
    return dict(sorted(out.items()))


def marks(events: pa.Table) -> np.ndarray:
    """(E,) uint64: who, what, when and the event's id, hashed; the same of a copy of the event in any file, wherever it stands there.

    Not the id alone: a file whose ids are empty or begin anew would be taken for one that is known.
    """
    columns = (events[name].to_pylist() for name in ("user_id", "item_id", "event", "time_ms", "event_id"))
    hashed = (hashlib.blake2b(repr(told).encode(), digest_size=8).digest() for told in zip(*columns, strict=True))
    return np.frombuffer(b"".join(hashed), "<u8").astype(np.uint64)


def covered(folder: Path) -> Covered:
    """The events of the workdir's event log that a bundle's states hold."""
    taken = taken_in(folder)
    if taken is not None and taken.own:
        return Covered(taken.positions)
    states = folder / "aggregates" / "states.json"
    newest_ms = 1000 * float(json.loads(states.read_text())["at"]) if states.exists() else 0.0
    return Covered(None, max(newest_ms, taken.until_ms if taken is not None else 0.0))
