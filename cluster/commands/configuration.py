"""Commands of the configuration: name its faults, show what its files add up to."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.terminal import Commands, ConfigFiles, Settings, err, out
from recsys.errors import ConfigError

config_app = typer.Typer(cls=Commands, no_args_is_help=True, help="Check a configuration, or show what its files add up to.")


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
