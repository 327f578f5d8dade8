"""The `rayfunnel` command: the offline commands of `cluster.cli`, and those that serve."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.cli import app
from cluster.terminal import ConfigFiles, Settings, load, out

if TYPE_CHECKING:
    from recsys.config import Config

SERVING = "Serving"


@app.command(rich_help_panel=SERVING)
def serve(
    config: ConfigFiles,
    settings: Settings = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, instead of serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port to listen on, instead of serve.port.")] = None,
) -> None:
    """Serve the promoted version over HTTP until Ctrl-C, which stops everything that was started.

    Examples:

      rayfunnel serve -c configs/movielens.yaml

      rayfunnel serve -c configs/movielens.yaml --port 8080 --set serve.topology.fine_rank=own

    On a cluster, use Serve's own deploy: serve deploy configs/serve/cluster.yaml
    """
    from deployments.replica_log import log_folder
    from deployments.serving import running, until_interrupted

    chosen = at(load(config, settings), host, port)
    with running(chosen, out.print) as url:
        out.print(f"Serving at [bold]{url}[/] (documents: {url}/docs). Ctrl-C stops it. What its replicas meet is in")
        out.print(f"  {log_folder()}", markup=False, highlight=False, soft_wrap=True)
        until_interrupted()


@app.command(rich_help_panel=SERVING)
def quickstart(
    config: ConfigFiles,
    settings: Settings = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port to listen on, instead of serve.port.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit after the three pages instead of staying up.")] = False,
) -> None:
    """From nothing to a page: bring the data, train, publish, serve, and ask for three pages. A second run reuses what it can.

    Example: rayfunnel quickstart -c configs/quickstart.yaml
    """
    from deployments.quickstart import tour

    tour(at(load(config, settings), None, port), out, stay=not once)


def at(config: Config, host: str | None, port: int | None) -> Config:
    """The configuration with another address."""
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return config.model_copy(update={"serve": config.serve.model_copy(update=changes)})


def main() -> NoReturn:
    """Entry point of `rayfunnel`."""
    app()
    sys.exit(0)
