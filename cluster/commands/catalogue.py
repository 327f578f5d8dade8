"""Commands of the catalogue and of profiles: `items` and `users` are brought to a running service in the same two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.terminal import Commands, ConfigFiles, Settings, load, out

RowsFile = Annotated[Path, typer.Argument(metavar="FILE", help="csv, Parquet or JSON lines (.jsonl), with the declared columns.")]
IdsFile = Annotated[Path, typer.Argument(metavar="FILE", help="One id a line (.txt), or a table that has the ids.")]


def _writes(kind: Literal["items", "users"], *, what: str, upsert: str, delete: str) -> typer.Typer:
    """The group of one kind, with what it and its two commands say of themselves."""
    group = typer.Typer(cls=Commands, no_args_is_help=True, help=what)

    @group.command("upsert", help=upsert)
    def _upsert(file: RowsFile, config: ConfigFiles, settings: Settings = None) -> None:
        from cluster import catalogue

        catalogue.upsert(load(config, settings), kind, file, out)

    @group.command("delete", help=delete)
    def _delete(file: IdsFile, config: ConfigFiles, settings: Settings = None) -> None:
        from cluster import catalogue

        catalogue.delete(load(config, settings), kind, file, out)

    return group


items_app = _writes(
    "items",
    what="Bring new, changed and deleted items to a running service.",
    upsert="""New and changed items: recommended within a second. A column that the file lacks keeps its values; an empty cell has none.

    Example: rayfunnel items upsert -c mine.yaml new_items.csv
    """,
    delete="""Items that must never be shown again.

    Example: rayfunnel items delete -c mine.yaml sold_out.txt
    """,
)
users_app = _writes(
    "users",
    what="Bring what is known of users to a running service.",
    upsert="""What is known of users: counts from their next request on. A column that the file lacks keeps its values.

    Example: rayfunnel users upsert -c mine.yaml users.csv
    """,
    delete="""Profiles to forget.

    Example: rayfunnel users delete -c mine.yaml left.txt
    """,
)
