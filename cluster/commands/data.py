"""Commands of the data: from files to a configuration, bring, check, look, prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal import Commands, ConfigFiles, Settings, load, out

data_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Bring, check and look at the data a configuration names.")
features_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at the features that a configuration declares.")


def init(
    files: Annotated[list[Path], typer.Argument(metavar="LOG [ITEMS] [USERS]", help="The log, then tables of items and users if any.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where it goes. Default: NAME.yaml here.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the recommender. Default: the log's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Look at your files and write the configuration: roles, types, time unit, separators, labels, each with its reason.

    Examples:

      rayfunnel init clicks.csv

      rayfunnel init ratings.tsv movies.csv users.csv --output mine.yaml
    """
    from cluster import onboard

    onboard.init(files, out, output=output, name=name, force=force)


@data_app.command("fetch")
def data_fetch(config: ConfigFiles, settings: Settings = None) -> None:
    """Bring the public data set that the configuration names to its workdir, once.

    Example: rayfunnel data fetch -c configs/movielens.yaml
    """
    from cluster import data_report

    data_report.fetch(load(config, settings), out)


@data_app.command("validate")
def data_validate(config: ConfigFiles, settings: Settings = None) -> None:
    """Read the data as training would, and account for every row: read, dropped by reason, kept.

    Example: rayfunnel data validate -c mine.yaml
    """
    from cluster import data_report

    data_report.validate(load(config, settings), out)


@data_app.command("describe")
def data_describe(
    config: ConfigFiles,
    settings: Settings = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers as JSON.")] = None,
) -> None:
    """What one looks at first: counts, density, long tail, history lengths, repeats, time span, cold share.

    Example: rayfunnel data describe -c mine.yaml
    """
    from cluster import data_report

    data_report.describe(load(config, settings), out, json=json)


@features_app.command("describe")
def features_describe(config: ConfigFiles, settings: Settings = None) -> None:
    """Each declared aggregate: kind, key, window, coverage, distribution, staleness, bytes of state.

    Example: rayfunnel features describe -c configs/kuairand_live.yaml
    """
    from cluster import features_report

    features_report.describe(load(config, settings), out)


def prepare(config: ConfigFiles, settings: Settings = None) -> None:
    """Clean and split the log, fit the features, write training examples. What is up to date is kept.

    Example: rayfunnel prepare -c configs/movielens.yaml
    """
    from cluster import steps

    steps.prepare(load(config, settings), out)
