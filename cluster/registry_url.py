"""Where a registry is: a folder of this machine, or a URI whose versions are copied here before they are used."""

from __future__ import annotations

from pathlib import Path

from cluster.registry import Registry
from cluster.remote_registry import RemoteRegistry


def open_registry(location: str | Path, *, cache: Path | None = None) -> Registry:
    """The registry at a folder or URI. `cache` is where a URI's versions are copied to (default: the user's cache folder)."""
    if "://" not in str(location) or str(location).startswith("file://"):
        return Registry(str(location).removeprefix("file://"))
    return RemoteRegistry(str(location), cache)
