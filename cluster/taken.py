"""Which events of the event log a version has taken, as its bundle says: read by `retrain`, and by consumers that count on top of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from recsys.features.covered import Covered

TAKEN = "taken.json"
Positions = dict[int, int]
"""Partition -> the position behind the newest event taken."""


class Taken(NamedTuple):
    """positions; own: whether they are of the workdir's own event log, not of a file from elsewhere; until_ms: when the log took the newest."""

    positions: Positions
    own: bool
    until_ms: int

    @classmethod
    def of(cls, held: pa.Table, before: Mapping[int, int], *, own: bool) -> Taken:
        """Everything in `held` (columns of `event_files`), on top of what was taken before."""
        return cls(ends(held, before), own, int(pc.max(held["logged_ms"]).as_py() or 0) if len(held) else 0)

    def as_json(self) -> dict[str, Any]:
        """For the bundle."""
        return {"positions": {str(p): n for p, n in self.positions.items()}, "own": self.own, "until_ms": self.until_ms}


def taken_in(folder: Path) -> Taken | None:
    """Of a bundle; None for one that `train` made."""
    if not (folder / TAKEN).exists():
        return None
    held = json.loads((folder / TAKEN).read_text())
    return Taken({int(p): n for p, n in held["positions"].items()}, held.get("own", True), held.get("until_ms", 0))


def ends(events: pa.Table, before: Mapping[int, int]) -> Positions:
    """The positions behind these events and those before."""
    out = dict(before)
    newest = events.group_by("partition").aggregate([("position", "max")])
    for p, n in zip(newest["partition"].to_pylist(), newest["position_max"].to_pylist(), strict=True):
        out[p] = max(out.get(p, 0), n + 1)
    return dict(sorted(out.items()))


def covered(folder: Path) -> Covered:
    """The events of the workdir's event log that a bundle's states hold."""
    taken = taken_in(folder)
    if taken is not None and taken.own:
        return Covered(taken.positions)
    states = folder / "aggregates" / "states.json"
    newest_ms = 1000 * float(json.loads(states.read_text())["at"]) if states.exists() else 0.0
    return Covered(None, max(newest_ms, taken.until_ms if taken is not None else 0.0))
