"""What all commands share, here and in deployments: consoles, options, how files become a configuration, how an error is told."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
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


def load(files: Sequence[Path], settings: Sequence[str] | None) -> Config:
    """The configuration of a command. Inside a submitted job, a relative workdir is refused."""
    from cluster.runtime import refuse_relative_workdir
    from recsys.config import load as load_files

    config = load_files(files, settings or ())
    refuse_relative_workdir(config.workdir)
    return config


def next_step(command: str, files: Sequence[Path], settings: Sequence[str] | None) -> str:
    """A command of ours for the same configuration, to be copied into a shell; passwords in settings are masked."""
    from recsys.config_faults import shown_setting

    given = [part for file in files for part in ("-c", str(file))] + [
        part for setting in settings or () for part in ("--set", shown_setting(setting))
    ]
    return f"rayfunnel {command} {shlex.join(given)}"


def registry(files: Sequence[Path], settings: Sequence[str] | None) -> Registry:
    """The registry of a configuration, of which nothing but names and places is read: it opens in a second."""
    from cluster.registry_url import open_registry
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


def log_to_terminal(level: int) -> None:
    """Our own packages' log at `level`, everybody else's from warnings on."""
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False, rich_tracebacks=False)
    handler.addFilter(_Masked())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    for package in ("recsys", "cluster", "deployments"):
        logging.getLogger(package).setLevel(level)
