"""The command line: every offline command, put together from `cluster.commands`.

Start-up stays quick because nothing heavy is imported before a command needs it. `deployments.cli` takes the same `app` and
adds what serves.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from cluster.commands import catalogue, configuration, data, live, model, versions
from cluster.terminal import DEBUG, Commands, log_to_terminal

DATA, MODEL, REGISTRY, LIVE, CONFIG = "Data", "Model", "Versions", "Events", "Configuration"

app = typer.Typer(
    name="rayfunnel", cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False
)


@app.callback()
def root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error instead of its sentence.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only; no log of choices made.")] = False,
) -> None:
    """From a log of events to a ranked page: train on Ray, publish, serve.

    A first tour, on MovieLens-100k:

      rayfunnel data fetch  -c configs/movielens.yaml
      rayfunnel train       -c configs/movielens.yaml
      rayfunnel versions    -c configs/movielens.yaml
      rayfunnel recommend   -c configs/movielens.yaml 196

    Every key of a configuration is explained in configs/base.yaml.
    """
    if debug:
        ctx.meta[DEBUG] = True
    log_to_terminal(logging.WARNING if quiet else logging.INFO)


# In the order in which --help lists them.
app.add_typer(data.data_app, name="data", rich_help_panel=DATA)
app.add_typer(data.features_app, name="features", rich_help_panel=DATA)
app.add_typer(configuration.config_app, name="config", rich_help_panel=CONFIG)
app.add_typer(catalogue.items_app, name="items", rich_help_panel=DATA)
app.add_typer(catalogue.users_app, name="users", rich_help_panel=DATA)
app.add_typer(catalogue.rules_app, name="rules", rich_help_panel=DATA)
app.add_typer(live.ingest_app, name="ingest", rich_help_panel=LIVE)
COMMANDS: tuple[tuple[str, tuple[Callable[..., None], ...]], ...] = (
    (DATA, (data.init, data.prepare, live.impressions, live.skew)),
    (MODEL, (model.train, model.retrain, model.tune, model.evaluate, model.recommend)),
    (REGISTRY, (versions.publish, versions.promote, versions.rollback, versions.versions)),
)
for panel, commands in COMMANDS:
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main() -> NoReturn:
    """Entry point of `python -m cluster`."""
    app()
    sys.exit(0)
