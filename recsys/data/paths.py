"""Paths in a configuration: relative to its folder, with `${NAME:-default}` from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from recsys.errors import DataError

Resolver = Callable[[str], Path]
"""A path as written -> the file."""


def resolver(base: Path) -> Resolver:
    """Paths of a configuration -> files: `${NAME:-default}` from the environment, relative ones from `base`."""

    def resolve(path: str) -> Path:
        return base / Path(expand(path)).expanduser()

    return resolve


def expand(path: str) -> str:
    """Fill in ${NAME} and ${NAME:-default}; DataError where a name without default is not set."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"]) or match["default"]
        if found is None:
            raise DataError(
                f"'{path}' needs the environment variable {match['name']}, which is not set. Set it, or write ${{{match['name']}:-default}}."
            )
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", value, path)
