"""What `rayfunnel init` does: looks at files, prints what it found as a table, writes the configuration with its reasons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recsys.config import read
from recsys.errors import ConfigError, DataError
from recsys.onboarding import draft
from recsys.onboarding.draft import Draft


def init(paths: Sequence[Path], console: Console, *, output: Path | None = None, name: str | None = None, force: bool = False) -> Path:
    """Write the configuration of a log and the tables beside it; returns its path.

    DataError where a file cannot be a table, or the configuration is there already and `force` is not given.
    """
    name = name or _name(paths[0])
    output = output or Path(f"{name}.yaml")
    if output.exists() and not force:
        raise DataError(f"'{output}' exists. Give --output another file, or --force to write over it.")
    if not output.parent.is_dir():
        raise DataError(f"'{output.parent}' is no folder. Make it, or give --output a file in one that exists.")
    with console.status("looking at the files"):
        found = draft(paths, name=name, folder=output.parent)
    before = output.read_text("utf-8") if output.exists() else None
    output.write_text(found.text, "utf-8")
    faults = [str(fault) for fault in read([output]).faults]
    if faults:  # what was drafted must hold: better nothing than a file that every other command refuses
        output.unlink() if before is None else output.write_text(before, "utf-8")
        raise ConfigError([f"The drafted configuration has a fault, and was not written: {fault}" for fault in faults])
    show(found, console)
    console.print(
        f"\nWrote [bold]{escape(str(output))}[/]: {found.text.count(chr(10))} lines, each with its reason. Next:", highlight=False
    )
    for command in ("data describe", "train"):
        console.print(f"  rayfunnel {command} -c {escape(str(output))}", highlight=False)
    return output


def show(found: Draft, console: Console) -> None:
    """What was read, and every column with its role and the reason."""
    for sentence in found.read:
        console.print(sentence, markup=False, highlight=False)
    table = Table(header_style="bold")
    table.add_column("file", overflow="fold", max_width=24)
    table.add_column("column", overflow="fold")
    table.add_column("role", no_wrap=True)
    table.add_column("why", overflow="fold")
    for line in found.findings:
        style = "dim" if line.role == "left out" else None
        table.add_row(*(escape(text) for text in (line.file, line.column, line.role, line.reason)), style=style)
    console.print(table)


def _name(log: Path) -> str:
    """The log's file name as that of a recommender."""
    stem = log.name.removesuffix(".gz")
    stem = re.sub(r"\.(csv|tsv|txt|parquet|pq|inter|dat|data)$", "", stem)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "mine"
