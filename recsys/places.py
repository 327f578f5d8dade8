"""Where a recommender keeps its state: the few keys of a configuration that say so, readable without any model's code.

Commands that only move aliases of published versions load this much and start in a second.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_serializer

from recsys.config_faults import redact
from recsys.core import FrozenConfig

Part = Literal["data", "examples", "runs", "registry", "events", "store"]


class Places(FrozenConfig):
    """The keys that say whose state it is and where it lies."""

    name: str = Field(default="recommender", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of this recommender; letters, digits, dot, dash and underscore."""
    workdir: str | None = Field(default=None, repr=False)
    """Folder or URI of all state: data, examples, runs, registry, events, store. null: ./.rayfunnel/<name>."""
    registry: str | None = Field(default=None, repr=False)
    """Folder or URI of the published bundles. null: registry under workdir."""

    @field_serializer("workdir", "registry", when_used="json")
    def _masked_places(self, value: str | None) -> str | None:
        return redact(value) if value else value

    @property
    def root(self) -> str:
        """The workdir: an absolute path, or a URI."""
        workdir = self.workdir or f".rayfunnel/{self.name}"
        return workdir.rstrip("/") if "://" in workdir else os.path.abspath(Path(workdir).expanduser())  # noqa: PTH100 - also takes .. out

    def place(self, part: Part) -> str:
        """Where one part of the state lies: an absolute path, or a URI."""
        if part == "registry" and self.registry is not None:
            return self.registry if "://" in self.registry else os.path.abspath(Path(self.registry).expanduser())  # noqa: PTH100
        return f"{self.root}/{part}"


class OnlyPlaces(Places):
    """The same read from a whole configuration, whose other sections are not looked at."""

    model_config = ConfigDict(extra="ignore")
