"""What `data fetch`, `data validate` and `data describe` print: the account of every row, and a data set's shape."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from recsys.config import Config
from recsys.data.describe import describe as numbers_of
from recsys.data.events import Dataset
from recsys.data.events import load as load_data


def fetch(config: Config, console: Console) -> None:
    """Bring the public data set that the configuration names, once."""
    from cluster.fetch import fetch as bring

    if config.fetch is None or config.fetched is None:
        console.print(f"{config.name} names no public data set (key fetch): its files are its own.")
        return
    with console.status(f"fetching {config.fetch}"):
        folder = bring(config.fetch, config.fetched)
    console.print(f"{config.fetch}: [bold]{folder}[/]")


def load(config: Config, console: Console) -> Dataset:
    """The data set of a configuration, fetched first where it is a public one."""
    if config.fetch is not None:
        fetch(config, console)
    with console.status("reading"):
        return load_data(config.data, config.base, keep=config.split.keep)


def validate(config: Config, console: Console) -> None:
    """Read everything as training would, and account for every row."""
    dataset = load(config, console)
    table = Table("rows", "count", header_style="bold")
    for line, count in dataset.account.rows():
        table.add_row(line, f"{count:,}")
    console.print(table)
    for note in dataset.account.notes:
        console.print(note, markup=False)
    split = config.split.split(dataset.interactions, dataset.parts)
    sizes = ", ".join(
        f"{name} {int(mask.sum()):,}" for name, mask in (("train", split.train), ("valid", split.valid), ("test", split.test))
    )
    console.print(f"split by {split.by}: {sizes}; nothing after a cut is in an earlier part")


def describe(config: Config, console: Console) -> None:
    """The numbers one looks at first."""
    dataset = load(config, console)
    found = numbers_of(dataset, config.split.split(dataset.interactions, dataset.parts))
    table = Table("what", "value", header_style="bold", title=config.name)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), _shown(value))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown(child)}" for name, child in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(child) for child in value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
