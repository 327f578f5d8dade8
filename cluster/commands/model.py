"""Commands of the models: train, retrain, tune, evaluate, ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.terminal import ConfigFiles, Settings, load, out


def train(
    config: ConfigFiles,
    settings: Settings = None,
) -> None:
    """Prepare what is stale, fit every model on Ray, evaluate, publish. Promotes only where nothing is in production.

    Interrupted runs go on where they stopped: give the same command again.

    Examples:

      rayfunnel train -c configs/movielens.yaml

      rayfunnel train -c configs/movielens.yaml --set fine_rank.model.type=lr

      ray job submit --working-dir . -- python -m cluster train -c configs/movielens.yaml --set workdir=/data/rayfunnel
    """
    from cluster import pipeline

    version = pipeline.train(load(config, settings), out)
    out.print(f"Published [bold]{version}[/]")


def retrain(
    config: ConfigFiles,
    settings: Settings = None,
    *,
    since: Annotated[
        str, typer.Option(metavar="last|VERSION", help="Take what this version has not taken; last: the one in production.")
    ] = "last",
    events: Annotated[
        str | None, typer.Option(metavar="PATH", help="Live events as Parquet, file or folder. Default: the workdir's events.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make it production where it passes the gate.")] = True,
    anew: Annotated[bool, typer.Option("--anew", help="Fit from nothing instead of going on from the serving version's weights.")] = False,
) -> None:
    """Take the events that came since, go on from the serving version, judge both by the newest events, publish and promote.

    A version that does not pass retrain.gate is refused with a sentence and exit code 2, and the serving one stays. Nothing new
    is nothing to do: give it to cron.

    Examples:

      rayfunnel retrain -c configs/movielens.yaml --since last

      rayfunnel retrain -c configs/movielens.yaml --events /mnt/exported/events --no-promote
    """
    from cluster import retrain as retraining

    retraining.retrain(load(config, settings), out, since=since, events=events, promote=promote, anew=anew)


def tune(
    config: ConfigFiles,
    space: Annotated[Path, typer.Option("--space", metavar="FILE", help="Search space: dotted paths into the configuration.")],
    settings: Settings = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials, instead of what the space says.")] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Where the best values go, as an overlay for train.")
    ] = None,
) -> None:
    """Search over any values of the configuration with Ray Tune, print the table, write the best as an overlay.

    Example:

      rayfunnel tune  -c configs/movielens.yaml --space configs/tune/movielens.yaml --write best.yaml

      rayfunnel train -c configs/movielens.yaml -c best.yaml
    """
    from cluster import search

    search.search_config(load(config, settings), space, out, trials=trials, write=write)


def evaluate(
    config: ConfigFiles,
    settings: Settings = None,
    *,
    protocol: Annotated[
        Literal["next_item", "top_n", "time", "ncf", "ctr"] | None,
        typer.Option(help="How to judge, instead of what the configuration says."),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(help="Rows to report, by comma: item_cf,popular,merged,funnel. Nothing else is fitted but the baselines beside them."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as one HTML page.")] = None,
) -> None:
    """An honest offline report: every channel, every stage, the whole funnel and four baselines on the same held-out events.

    Examples:

      rayfunnel evaluate -c configs/movielens.yaml --html report.html --json report.json

      rayfunnel evaluate -c configs/movielens.yaml --protocol top_n --models ease,ials
    """
    from cluster import evaluation

    names = [name.strip() for name in models.split(",") if name.strip()] if models else None
    evaluation.evaluate(load(config, settings), out, protocol=protocol, models=names, json=json, html=html)


def recommend(
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="Ids of users; one that nobody knows gets what is popular.")],
    config: ConfigFiles,
    *,
    settings: Settings = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Items per user.")] = 10,
    version: Annotated[str, typer.Option("--version", help="Alias, name or number of a version.")] = "production",
    only: Annotated[
        str | None, typer.Option("--filter", metavar="JSON", help="What items must hold, by item column, as `filter` over HTTP.")
    ] = None,
) -> None:
    """The page that a promoted version gives, computed here, without a service.

    Examples: rayfunnel recommend -c configs/movielens.yaml 196 nobody -k 5

      rayfunnel recommend -c configs/movielens.yaml 196 --filter '{"genres": ["Comedy", "Drama"]}'
    """
    from cluster import pipeline

    pipeline.recommend(load(config, settings), users, out, k=k, version=version, only=only)
