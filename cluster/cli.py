"""The command line: every offline command, thin over `cluster.pipeline` and the registry.

Start-up stays quick because nothing heavy is imported before a command needs it. `deployments.cli` takes the same `app` and
adds what serves.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from recsys.errors import ConfigError, RayfunnelError

if TYPE_CHECKING:
    from cluster.registry import Registry
    from recsys.config import Config

out = Console()
err = Console(stderr=True)
DEBUG = "RAYFUNNEL_DEBUG"

ConfigFiles = Annotated[
    list[Path], typer.Option("--config", "-c", metavar="FILE", help="Configuration file. Give it again to lay more files over the first.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="PATH=VALUE", help="One value by its dotted path, over all files: fine_rank.training.epochs=3"),
]
SHOWN_METRICS = ("ndcg@10", "recall@10", "hit@10", "mrr@10", "auc", "gauc")
"""What `versions` shows of a version's quality, where it was measured."""
DATA, MODEL, REGISTRY, LIVE, CONFIG = "Data", "Model", "Versions", "Events", "Configuration"


class Commands(TyperGroup):
    """Turns every error that is written for a person into one red sentence on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; --debug (or RAYFUNNEL_DEBUG=1) lets the traceback through."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("Stopped.")
            raise typer.Exit(130) from None
        except RayfunnelError as error:
            if debugging(ctx):
                raise
            say(error)
            raise typer.Exit(2) from None
        except OSError as error:
            if debugging(ctx) or error.filename is None:
                raise
            say(RayfunnelError(f"'{error.filename}' cannot be used: {error.strerror}. Check that it exists and who may read or write it."))
            raise typer.Exit(2) from None


def debugging(ctx: typer.Context) -> bool:
    """Whether the user asked for tracebacks."""
    return bool(ctx.meta.get(DEBUG) or os.environ.get(DEBUG))


app = typer.Typer(
    name="rayfunnel", cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False
)
data_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Bring, check and look at the data a configuration names.")
config_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Check a configuration, or show what its files add up to.")
features_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at the features that a configuration declares.")
app.add_typer(data_app, name="data", rich_help_panel=DATA)
app.add_typer(features_app, name="features", rich_help_panel=DATA)
app.add_typer(config_app, name="config", rich_help_panel=CONFIG)
items_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Bring new, changed and deleted items to a running service.")
users_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Bring what is known of users to a running service.")
app.add_typer(items_app, name="items", rich_help_panel=DATA)
app.add_typer(users_app, name="users", rich_help_panel=DATA)
ingest_app = typer.Typer(cls=Commands, invoke_without_command=True)
app.add_typer(ingest_app, name="ingest", rich_help_panel=LIVE)


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
    _log_to_terminal(logging.WARNING if quiet else logging.INFO)


# Data.


@app.command(rich_help_panel=DATA)
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


@app.command(rich_help_panel=DATA)
def prepare(config: ConfigFiles, settings: Settings = None) -> None:
    """Clean and split the log, fit the features, write training examples. What is up to date is kept.

    Example: rayfunnel prepare -c configs/movielens.yaml
    """
    from cluster import pipeline

    pipeline.prepare(load(config, settings), out)


RowsFile = Annotated[Path, typer.Argument(metavar="FILE", help="csv, Parquet or JSON lines (.jsonl), with the declared columns.")]
IdsFile = Annotated[Path, typer.Argument(metavar="FILE", help="One id a line (.txt), or a table that has the ids.")]


@items_app.command("upsert")
def items_upsert(file: RowsFile, config: ConfigFiles, settings: Settings = None) -> None:
    """New and changed items: recommended within a second. A column that the file lacks keeps its values; an empty cell has none.

    Example: rayfunnel items upsert -c mine.yaml new_items.csv
    """
    from cluster import catalogue

    catalogue.upsert(load(config, settings), "items", file, out)


@items_app.command("delete")
def items_delete(file: IdsFile, config: ConfigFiles, settings: Settings = None) -> None:
    """Items that must never be shown again.

    Example: rayfunnel items delete -c mine.yaml sold_out.txt
    """
    from cluster import catalogue

    catalogue.delete(load(config, settings), "items", file, out)


@users_app.command("upsert")
def users_upsert(file: RowsFile, config: ConfigFiles, settings: Settings = None) -> None:
    """What is known of users: counts from their next request on. A column that the file lacks keeps its values.

    Example: rayfunnel users upsert -c mine.yaml users.csv
    """
    from cluster import catalogue

    catalogue.upsert(load(config, settings), "users", file, out)


@users_app.command("delete")
def users_delete(file: IdsFile, config: ConfigFiles, settings: Settings = None) -> None:
    """Profiles to forget.

    Example: rayfunnel users delete -c mine.yaml left.txt
    """
    from cluster import catalogue

    catalogue.delete(load(config, settings), "users", file, out)


# Model.


@app.command(rich_help_panel=MODEL)
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


@app.command(rich_help_panel=MODEL)
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


@app.command(rich_help_panel=DATA)
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


@app.command(rich_help_panel=DATA)
def skew(
    config: ConfigFiles,
    settings: Settings = None,
    *,
    folder: Annotated[str | None, typer.Option(metavar="FOLDER", help="Logged impressions. Default: the workdir's.")] = None,
    events: Annotated[str | None, typer.Option(metavar="PATH", help="Live events as Parquet. Default: the workdir's.")] = None,
) -> None:
    """Compute the logged feature values once more from the log, as of what each page knew, and report what differs.

    None is expected. Exit code 1 where there is any.

    Example: rayfunnel skew -c configs/kuairand_live.yaml
    """
    from cluster import impressions_report

    if impressions_report.skew(load(config, settings), out, folder=folder, events=events):
        raise typer.Exit(1)


@app.command(rich_help_panel=MODEL)
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
    from cluster import pipeline

    pipeline.tune(load(config, settings), space, out, trials=trials, write=write)


@app.command(rich_help_panel=MODEL)
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
    from cluster import pipeline

    names = [name.strip() for name in models.split(",") if name.strip()] if models else None
    pipeline.evaluate(load(config, settings), out, protocol=protocol, models=names, json=json, html=html)


@app.command(rich_help_panel=MODEL)
def recommend(
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="Ids of users; one that nobody knows gets what is popular.")],
    config: ConfigFiles,
    settings: Settings = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Items per user.")] = 10,
    version: Annotated[str, typer.Option("--version", help="Alias, name or number of a version.")] = "production",
) -> None:
    """The page that a promoted version gives, computed here, without a service.

    Example: rayfunnel recommend -c configs/movielens.yaml 196 nobody -k 5
    """
    from cluster import pipeline

    pipeline.recommend(load(config, settings), users, out, k=k, version=version)


# Versions.


@app.command(rich_help_panel=REGISTRY)
def publish(
    config: ConfigFiles,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="FOLDER", help="A bundle from elsewhere. Default: the newest training.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Put a trained bundle into the registry as its next version, whole or not at all.

    Example: rayfunnel publish -c configs/movielens.yaml --folder /mnt/other/registry/bundles/v000007-0a1b2c3d
    """
    if folder is None:
        from cluster import pipeline

        version = pipeline.publish(load(config, settings), out)
    else:
        version = registry(config, settings).publish(folder)
    out.print(f"Published [bold]{version}[/]. Put it to work: rayfunnel promote {version}")


@app.command(rich_help_panel=REGISTRY)
def promote(
    config: ConfigFiles,
    version: Annotated[str, typer.Argument(help="latest, a number, or the name of a version or its beginning.")] = "latest",
    settings: Settings = None,
    canary: Annotated[bool, typer.Option("--canary", help="Make it the canary instead of production.")] = False,
) -> None:
    """Verify a version and make it production. A running service takes it up within seconds.

    Examples: rayfunnel promote -c configs/movielens.yaml, or with a version: rayfunnel promote -c configs/movielens.yaml 3
    """
    alias: Literal["canary", "production"] = "canary" if canary else "production"
    out.print(f"[bold]{registry(config, settings).promote(version, alias=alias)}[/] is {alias}")


@app.command(rich_help_panel=REGISTRY)
def rollback(config: ConfigFiles, settings: Settings = None) -> None:
    """Make the previous version production again. A second rollback goes forward.

    Example: rayfunnel rollback -c configs/movielens.yaml
    """
    out.print(f"[bold]{registry(config, settings).rollback()}[/] is production again")


@app.command(rich_help_panel=REGISTRY)
def versions(config: ConfigFiles, settings: Settings = None) -> None:
    """List what is published, newest first, with aliases and measured quality.

    Example: rayfunnel versions -c configs/movielens.yaml
    """
    held = registry(config, settings)
    found = held.list()
    if not found:
        out.print(f"No version in {held.where} yet. Publish one: rayfunnel train")
        return
    measured = {name for listed in found for name, value in listed.manifest.metrics.items() if isinstance(value, float)}
    names = [name for name in SHOWN_METRICS if name in measured] or sorted(measured)[:4]
    table = Table("version", "is", "created", "MB", *names, header_style="bold")
    for listed in found:
        metrics = [f"{value:.4f}" if isinstance(value := listed.manifest.metrics.get(name), float) else "" for name in names]
        table.add_row(listed.version, ", ".join(listed.aliases), listed.manifest.created, f"{listed.bytes / 1e6:.1f}", *metrics)
    out.print(table)


@features_app.command("describe")
def features_describe(config: ConfigFiles, settings: Settings = None) -> None:
    """Each declared aggregate: kind, key, window, coverage, distribution, staleness, bytes of state.

    Example: rayfunnel features describe -c configs/kuairand_live.yaml
    """
    from cluster import features_report

    features_report.describe(load(config, settings), out)


# Events.


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


# Configuration.


@config_app.command("check")
def config_check(config: ConfigFiles, settings: Settings = None) -> None:
    """Name every fault at once: file, line, key, value, what was expected, the nearest valid name. Exit code 2 if any.

    Example: rayfunnel config check -c mine.yaml
    """
    from recsys.config import read

    loaded = read(config, settings or ())
    if not loaded.faults:
        out.print(f"{', '.join(str(file) for file in config)}: no faults.")
        return
    table = Table(header_style="bold")
    for column in ("where", "key", "value", "fault", "did you mean"):
        table.add_column(column, overflow="fold")
    for fault in loaded.faults:
        table.add_row(
            *(escape(text) for text in (str(fault.origin), fault.path.rstrip(":"), fault.shown, fault.sentence, fault.hint or ""))
        )
    (err if err.is_terminal else Console(stderr=True, width=180)).print(table)  # a file has no edge to wrap at
    err.print(f"[red]{len(loaded.faults)} fault{'s' if len(loaded.faults) > 1 else ''}.[/] Every key is explained in configs/base.yaml.")
    raise typer.Exit(2)


@config_app.command("show")
def config_show(
    config: ConfigFiles,
    settings: Settings = None,
    origins: Annotated[bool, typer.Option("--origins", help="Say beside each value which file and line it comes from.")] = False,
    documented: Annotated[bool, typer.Option("--documented", help="Explain every key in a comment.")] = False,
) -> None:
    """Print what all files and settings add up to, as YAML that can be used as a file. Passwords are masked.

    Example: rayfunnel config show -c configs/movielens.yaml --origins
    """
    from recsys import config_manual
    from recsys.config import read

    loaded = read(config, settings or ())
    if loaded.config is None:
        raise ConfigError([str(fault) for fault in loaded.faults])
    where = {path: str(origin) for path, origin in loaded.tree.leaves()} if origins else None
    out.print(
        config_manual.document(loaded.config, comments=documented, origins=where), markup=False, highlight=False, soft_wrap=True, end=""
    )


# Shared by all commands, here and in deployments.


def load(files: Sequence[Path], settings: Sequence[str] | None) -> Config:
    """The configuration of a command. Inside a submitted job, a relative workdir is refused."""
    from cluster.runtime import refuse_relative_workdir
    from recsys.config import load as load_files

    config = load_files(files, settings or ())
    refuse_relative_workdir(config.workdir)
    return config


def registry(files: Sequence[Path], settings: Sequence[str] | None) -> Registry:
    """The registry of a configuration, of which nothing but names and places is read: it opens in a second."""
    from cluster.registry import open_registry
    from cluster.runtime import refuse_relative_workdir
    from recsys.config_file import read_as
    from recsys.places import OnlyPlaces

    loaded = read_as(OnlyPlaces, files, settings or ())
    if loaded.config is None:
        raise ConfigError([str(fault) for fault in loaded.faults])
    if loaded.config.registry is None:
        refuse_relative_workdir(loaded.config.workdir)
    return open_registry(loaded.config.place("registry"))


def say(error: RayfunnelError) -> None:
    """The error's sentences in red on stderr."""
    # Ray hands a worker's error on with the worker's traceback in its text; `cause` is the error itself.
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, RayfunnelError) else error
    if isinstance(told, ConfigError) and len(told.faults) > 1:
        err.print(f"[red]The configuration has {len(told.faults)} faults:[/]")
        for fault in told.faults:
            err.print(f"[red]- {escape(fault)}[/]", highlight=False, soft_wrap=True)
    else:
        err.print(f"[red]{escape(str(told))}[/]", highlight=False, soft_wrap=True)


class _Masked(logging.Filter):
    """No password of a URL reaches the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        from recsys.config_faults import redact

        record.msg, record.args = redact(record.getMessage()), None
        return True


def _log_to_terminal(level: int) -> None:
    """Our own packages' log at `level`, everybody else's from warnings on."""
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False, rich_tracebacks=False)
    handler.addFilter(_Masked())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    for package in ("recsys", "cluster", "deployments"):
        logging.getLogger(package).setLevel(level)


def main() -> NoReturn:
    """Entry point of `python -m cluster`."""
    app()
    sys.exit(0)
