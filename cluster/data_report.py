"""What `data fetch`, `data validate` and `data describe` print: the account of every row, and a data set's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
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


BAR = 24
"""Characters of the longest bar."""


def describe(config: Config, console: Console, *, json: Path | None = None) -> None:
    """The numbers one looks at first; with `json`, also as a file."""
    from json import dumps

    dataset = load(config, console)
    found = numbers_of(dataset, config.split.split(dataset.interactions, dataset.parts))
    for table in tables(config.name, found):
        console.print(table)
    if json is not None:
        json.write_text(dumps(found, indent=1, ensure_ascii=False), "utf-8")


def tables(name: str, found: dict[str, Any]) -> list[Table]:
    """The description as tables: what there is, the long tail, history lengths, labels, parts, missing values."""
    first = Table("what", "value", header_style="bold", title=name, title_justify="left")
    for key, value in found.items():
        if key not in _APART:
            first.add_row(key.replace("_", " "), escape(_shown(value)))
    out = [first, _bars("events on the most popular items", found["head_share"], share=True)]
    out.append(_bars("users by events", found["history_lengths"]))
    for title, key in (("rows where a label is 1", "label_rates"), ("missing values by column", "missing")):
        if found[key]:
            out.append(_bars(title, found[key], share=True))
    if "split" in found:
        parts = Table("part", "rows", "by users unseen in train", "of items unseen in train", header_style="bold")
        for part, numbers in found["split"].items():
            parts.add_row(part, f"{numbers['rows']:,}", f"{numbers['cold_user_share']:.1%}", f"{numbers['cold_item_share']:.1%}")
        out.append(parts)
    return out


_APART = {"head_share", "history_lengths", "label_rates", "missing", "split"}


def _bars(title: str, values: Mapping[str, float], *, share: bool = False) -> Table:
    """One row per name with its value and a bar; shares are of 1, counts of the largest."""
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    top = 1.0 if share else max(values.values(), default=0) or 1
    for name, value in values.items():
        table.add_row(escape(str(name)), f"{value:.1%}" if share else f"{value:,}", "█" * round(BAR * value / top))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown(child)}" for name, child in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(child) for child in value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
