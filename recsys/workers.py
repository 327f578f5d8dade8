"""The workers that train one model together: what a loss or a metric may ask of them.

A model never sees torch.distributed. Alone, every call returns what it was given; the sharded side hands in a group
whose `gather_rows` carries gradients back to the worker that made each row.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Workers(Protocol):
    """One worker's view of its group."""

    rank: int
    size: int

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(B, …) here, equally many on each worker -> (size * B, …) in order of rank; differentiable."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over workers; not differentiable."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values
