"""The steps that training, judging, searching and retraining share: fetch, prepare, and the recipe from data to funnel.

Each is idempotent: what is up to date is kept (see `cluster.workdir`).
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.aggregate import Chosen
from cluster.fetch import fetch as bring
from cluster.trainers import counting_bar, say, trainer
from cluster.workdir import NOT_LEARNT_FROM, input_files, settle, state, state_key
from recsys.config import Config
from recsys.data.split import SplitConfig
from recsys.prepared import Prepared
from recsys.prepared import prepare as prepare_data
from recsys.recipe import Recipe


def fetch(config: Config, console: Console) -> None:
    """Bring the public data set that the configuration names, if any."""
    if config.fetch is not None and config.fetched is not None:
        with console.status(f"fetching {config.fetch}"):
            bring(config.fetch, config.fetched)


def prepare(config: Config, console: Console, *, split: SplitConfig | None = None, like: Path | None = None) -> tuple[Prepared, str]:
    """The prepared data set and its key, from disk where nothing changed. Prints the account of the cleaning.

    `split` stands in for the configuration's own, where a protocol of evaluation asks for another; `like`: see `recsys.prepared`.
    """
    fetch(config, console)
    split = split or config.split
    document = config.document()
    key = state_key(
        input_files(config), document.get("data"), split.model_dump(mode="json"), document.get("features"), *([str(like)] if like else [])
    )
    folder, roads = state(config, "data", key), Chosen.of(config)
    if (folder / "prepared.json").exists():
        prepared = Prepared.load(folder, roads)
        console.print(
            f"Data is up to date: {len(prepared.log):,} events of {prepared.log.n_users:,} users and {prepared.log.n_items:,} items"
        )
        return prepared, key
    start = time.perf_counter()
    with console.status("reading and cleaning the log, fitting the features"):
        prepared = prepare_data(config, split, like, roads)
        unfinished = folder.with_name(f".unfinished-{uuid.uuid4().hex[:8]}")
        unfinished.mkdir(parents=True)
        try:
            prepared.save(unfinished)
            settle(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    table = Table("rows", "", title=f"{config.name}: {time.perf_counter() - start:.1f} s", header_style="bold", title_justify="left")
    for what, n in prepared.account:
        table.add_row(what, f"{n:,}")
    sizes = {name: int(getattr(prepared.split, name).sum()) for name in ("train", "valid", "test")}
    for name, n in sizes.items():
        table.add_row(f"{name} (by {prepared.split.by})", f"{n:,}")
    console.print(table)
    return Prepared.load(folder, roads), key


def recipe(
    config: Config, console: Console, *, split: SplitConfig | None = None, in_process: Callable[[Prepared], bool] = lambda _: False
) -> tuple[Recipe, str]:
    """The steps from data to funnel for this configuration, each trained when it is asked for; and their key.

    Models are trained on Ray, unless `in_process` says of the prepared data that starting it is not worth while.
    """
    prepared, data_key = prepare(config, console, split=split)
    document = {k: v for k, v in config.document().items() if k not in NOT_LEARNT_FROM}
    key = state_key(data_key, document)
    storage = f"{config.root}/runs/{key}" if "://" in config.root else str(state(config, "runs", key))
    train = trainer(console, storage, in_process=in_process(prepared))
    return Recipe(config, prepared, state(config, "examples", key), train, partial(say, console), partial(counting_bar, console)), key
