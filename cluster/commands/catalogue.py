"""Commands of the catalogue, of profiles and of rules: what is brought to a running service, and taken back, without a restart."""

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


rules_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Change the rules of pages on a running service, without a restart.")
RulesFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON: what stands below `rules` of a configuration.")]


@rules_app.command("show")
def rules_show(config: ConfigFiles, settings: Settings = None) -> None:
    """What is in force: the configuration's rules and what was told over them, each with where it comes from.

    Example: rayfunnel rules show -c mine.yaml
    """
    from cluster import live_rules

    live_rules.show(load(config, settings), out)


@rules_app.command("set")
def rules_set(file: RulesFile, config: ConfigFiles, settings: Settings = None) -> None:
    """Lay a document over the configuration's rules, in place of the one before: obeyed within a second, kept over restarts.

    Its blocks, boosts and pins come before the configuration's; `instead: [pins]` puts those of the configuration out of force.

    Example: rayfunnel rules set -c mine.yaml recall_of_a_product.yaml
    """
    from cluster import live_rules

    live_rules.put(load(config, settings), file, out)


@rules_app.command("clear")
def rules_clear(config: ConfigFiles, settings: Settings = None) -> None:
    """Take the document back: the configuration's rules stand alone.

    Example: rayfunnel rules clear -c mine.yaml
    """
    from cluster import live_rules

    live_rules.clear(load(config, settings), out)
