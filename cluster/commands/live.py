"""Commands of what happens live: the consumers of the event log, and what was logged of pages shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal import Commands, ConfigFiles, Settings, load, out
from recsys.errors import ConfigError

ingest_app = typer.Typer(cls=Commands, invoke_without_command=True)


def impressions(
    config: ConfigFiles,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Parquet of the labelled examples.")],
    settings: Settings = None,
    *,
    folder: Annotated[str | None, typer.Option(metavar="FOLDER", help="Logged impressions. Default: the workdir's.")] = None,
    events: Annotated[str | None, typer.Option(metavar="PATH", help="Live events as Parquet. Default: the workdir's.")] = None,
    window_h: Annotated[float, typer.Option(min=0.0, help="How long after a page an event of its request counts.")] = 24.0,
) -> None:
    """Join what was shown with what was then done, by request id, into labelled examples: each shown item once.

    Example: rayfunnel impressions -c configs/movielens.yaml --output examples.parquet
    """
    from cluster import impressions_report

    impressions_report.join(load(config, settings), out, output=output, folder=folder, events=events, window_h=window_h)


def skew(
    config: ConfigFiles,
    settings: Settings = None,
    *,
    folder: Annotated[str | None, typer.Option(metavar="FOLDER", help="Logged impressions. Default: the workdir's.")] = None,
    events: Annotated[str | None, typer.Option(metavar="PATH", help="Live events as Parquet. Default: the workdir's.")] = None,
) -> None:
    """Compute the logged feature values once more from the log, as of what each page knew, and report what differs.

    None is expected. Exit code 1 where there is any, 2 where no page could be compared.

    Example: rayfunnel skew -c configs/kuairand_live.yaml
    """
    from cluster import impressions_report

    if not impressions_report.skew(load(config, settings), out, folder=folder, events=events):
        raise typer.Exit(1)


@ingest_app.callback()
def ingest(
    ctx: typer.Context,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration file; several are laid over.")
    ] = None,
    settings: Settings = None,
    actors: Annotated[
        int, typer.Option("--actors", min=0, help="So many Ray actors, here or on the cluster of RAY_ADDRESS. 0: this process.")
    ] = 0,
) -> None:
    """Consume the event log without a service: counters, trending, Parquet. Beside a service, it takes its share of the partitions.

    Examples:

      rayfunnel ingest -c configs/movielens.yaml

      rayfunnel ingest status -c configs/movielens.yaml

      rayfunnel ingest dead-letters -c configs/movielens.yaml
    """
    if ctx.invoked_subcommand is not None:
        return
    from cluster import ingest_cli

    if not config:
        raise ConfigError("rayfunnel ingest needs a configuration. Name one: rayfunnel ingest -c configs/movielens.yaml")
    ingest_cli.run(load(config, settings), actors, out)


@ingest_app.command("status")
def ingest_status(
    config: ConfigFiles, settings: Settings = None, json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """How far the consumers are: lag by partition, dead letters, the last Parquet, bytes a user and item take.

    Example: rayfunnel ingest status -c configs/movielens.yaml
    """
    from cluster import ingest_cli

    ingest_cli.show_status(load(config, settings), out, as_json=json)


@ingest_app.command("dead-letters")
def ingest_dead_letters(
    config: ConfigFiles,
    settings: Settings = None,
    most: Annotated[int, typer.Option("--most", "-n", min=1, help="How many, newest first.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What stood in the event log and could not be counted, and why.

    Example: rayfunnel ingest dead-letters -c configs/movielens.yaml -n 5
    """
    from cluster import ingest_cli

    ingest_cli.show_dead_letters(load(config, settings), most, out, as_json=json)
