"""Which events of the event log a version's states hold already: nobody may count them a second time on top of those states.

A version that was made from the event log itself knows up to which position it took each partition. One that was made from a
log of another road (a file, a warehouse) knows when that ended: what the event log had taken by then is presumed to stand in
it, what came in later cannot. Either way it is a beginning of each partition, since a log takes its entries in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True)
class Covered:
    """positions: partition -> the position behind the newest event taken; None where only the time `until_ms` is known, up to which
    (log's clock, itself included) events are in. The default holds nothing."""

    positions: Mapping[int, int] | None = field(default_factory=dict)
    until_ms: float = -math.inf

    def holds(self, partition: int, n: int, told_ms: int) -> bool:
        """Whether entry `n` of a partition, taken by the log at `told_ms`, is among them."""
        return told_ms <= self.until_ms if self.positions is None else n < self.positions.get(partition, 0)

    def first(self, partition: int) -> int:
        """A position of the partition before which every event is among them: 0 where only a time is known."""
        return 0 if self.positions is None else self.positions.get(partition, 0)

    def to_json(self) -> object:
        """For `of_json`."""
        if self.positions is None:
            return self.until_ms if math.isfinite(self.until_ms) else None
        return {str(p): n for p, n in self.positions.items()}

    @classmethod
    def of_json(cls, held: object) -> Self:
        """What `to_json` wrote."""
        if isinstance(held, dict):
            return cls({int(p): int(n) for p, n in held.items()})
        return cls(None, -math.inf if held is None else float(str(held)))


Since = dict[bytes, Covered]
"""By the mark of a group: what its states began with."""


def packed_since(since: Since) -> str:
    """As text, for a store."""
    return json.dumps({mark.hex(): covered.to_json() for mark, covered in since.items()})


def unpacked_since(held: bytes | str | None) -> Since:
    """What `packed_since` wrote; nothing for None."""
    return {bytes.fromhex(mark): Covered.of_json(told) for mark, told in json.loads(held).items()} if held else {}
