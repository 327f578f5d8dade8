"""The offline commands: prepare, train, publish, recommend (evaluation.py and search.py have theirs). Each is idempotent: what is up to date is kept.

State is named by what made it: a change of data, of the code's version or of a key that matters gives another folder, so
nothing stale is ever reused and nothing has to be deleted by hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster import report_table
from cluster.aggregate import Chosen
from cluster.fetch import fetch as bring
from cluster.registry import Registry, open_registry
from cluster.runtime import start_ray
from recsys import packing
from recsys.bundle import read_manifest
from recsys.config import Config
from recsys.core import canonical_id
from recsys.data.paths import resolver
from recsys.data.split import SplitConfig
from recsys.errors import BundleError, RequestError
from recsys.funnel import Funnel, FunnelRequest
from recsys.prepared import Prepared
from recsys.prepared import prepare as prepare_data
from recsys.recipe import Recipe, Trainer
from recsys.report import Report
from recsys.training import ModelConfig, TrainingConfig
from recsys.training import Report as StepReport

log = logging.getLogger(__name__)

STATE_FORMAT = "5"
"""Part of every state folder's name: raised when what is written there changes."""
NOT_LEARNT_FROM = {
    "name",
    "workdir",
    "registry",
    "redis_url",
    "serve",
    "evaluate",
    "fetch",
    "prepare",
    "rerank",
    "retrain",
    "ingest",
    "store",
}
"""Sections that change nothing in what is trained."""


# ---- state that is named by what made it ------------------------------------------------------------------------------


def state_key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([STATE_FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(config: Config) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of every input file that lies on this machine."""
    data, resolve = config.data, resolver(config.base)
    paths = [path for path, _ in data.interactions.files()]
    paths += [p for t in (data.items, data.users) if t is not None for p in ((t.path,) if isinstance(t.path, str) else t.path)]
    paths += [data.history.path] if data.history is not None else []
    live = [] if data.interactions.live is None else [resolve(data.interactions.live)]
    live += [p for folder in live for p in sorted(folder.rglob("*"))]
    found = []
    for path in (*map(resolve, paths), *live):
        stat = os.stat(path) if os.path.exists(path) else None  # noqa: PTH110, PTH116 - it may be a URI
        found.append((str(path), stat.st_size if stat else -1, stat.st_mtime_ns if stat else -1))
    return found


def state(config: Config, part: Literal["data", "examples", "runs"], key: str) -> Path:
    """A local folder of the workdir; for a workdir that is a URI, one of this machine's temporary folder."""
    if "://" in config.root:
        return Path(tempfile.gettempdir()) / f"rayfunnel-{state_key(config.root)}" / part / key
    return Path(config.place(part)) / key


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
        _files(config), document.get("data"), split.model_dump(mode="json"), document.get("features"), *([str(like)] if like else [])
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
            if not folder.exists():
                unfinished.rename(folder)
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


# ---- training ---------------------------------------------------------------------------------------------------------


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
    return Recipe(config, prepared, state(config, "examples", key), train, partial(_say, console), partial(counting_bar, console)), key


def trainer(console: Console, storage: str, *, in_process: bool) -> Trainer:
    """What trains the models of a recipe, on Ray or here; runs are kept under `storage`."""
    if in_process and "://" not in storage:
        from cluster.evaluation import train_here

        return partial(train_here, console, Path(storage))
    return partial(train_on_ray, console, storage)


def _say(console: Console, sentence: str) -> None:
    console.print(f"[dim]{escape(sentence)}[/]", highlight=False)


def train_on_ray(console: Console, storage: str, examples: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
    """One model on Ray Train, with a live bar; a finished run of this name is taken as it is."""
    start_ray()  # before the first import of ray, which reads its environment then
    from cluster.train import run

    with training_bar(console, name) as tell:
        trained = run(examples, model, training, storage=storage, name=name, progress=tell)
    for notice in trained.notices:
        console.print(f"[yellow]{escape(notice)}[/]")
    tell_trained(console, name, trained.best_epoch, len(trained.epochs), trained.metrics)
    return trained.folder


@contextmanager
def training_bar(console: Console, name: str) -> Iterator[Callable[[StepReport], None]]:
    """A live bar for the training of one model; gives what takes its reports."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
        transient=True,
    ) as bars:
        bar = bars.add_task(f"training {name}", total=None, told="starting")

        def tell(report: StepReport) -> None:
            metrics = " ".join(f"{k} {v:.4f}" for k, v in (report.metrics or {}).items() if k in ("ndcg@10", "auc"))
            told = f"epoch {report.epoch + 1}/{report.epochs} loss {report.loss:.4f} {report.examples_per_s:,.0f} examples/s {metrics}"
            done = report.epoch + (report.step / report.steps if report.steps else 0)
            bars.update(bar, total=report.epochs, completed=min(done, report.epochs), told=told)

        yield tell


@contextmanager
def counting_bar(console: Console, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A live bar for a step of many like parts; gives what takes how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(name, total=total)
        yield partial(bars.advance, bar)


def tell_trained(console: Console, name: str, best_epoch: int, epochs: int, metrics: dict[str, float]) -> None:
    """One line on a trained model."""
    shown = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
    console.print(f"[bold]{name}[/] best epoch {best_epoch + 1} of {epochs}: {shown}", highlight=False)


def train(config: Config, console: Console) -> str:
    """Fit everything, judge it on the test, refit on the whole log, publish; promote where nothing is in production.

    Returns the version. A configuration that was published already, on the same data, is not trained again.
    """
    registry = open_registry(config.place("registry"))
    steps, key = recipe(config, console)
    mark = state(config, "runs", key) / "published.json"
    key_of_page = state_key(config.rerank.model_dump(mode="json"))
    known: dict[str, str] = json.loads(mark.read_text()) if mark.exists() else {}
    if (version := known.get(key_of_page)) in registry.versions():
        console.print(f"{version} is this configuration on this data: nothing to train")
        _promote_first(registry, str(version), console)
        return str(version)
    report = _judge(config, steps, console)
    for table in report_table.tables(report.as_json()):
        console.print(table)
    version = _publish(config, steps, registry, report, console)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(known | {key_of_page: version}))
    _promote_first(registry, version, console)
    return version


def publish(config: Config, console: Console) -> str:
    """Publish what `train` has fitted for this configuration (fitting what is missing), without promoting it."""
    registry = open_registry(config.place("registry"))
    steps, _ = recipe(config, console)
    return _publish(config, steps, registry, _judge(config, steps, console), console)


def _publish(config: Config, steps: Recipe, registry: Registry, report: Report, console: Console) -> str:
    final = steps.final()
    rows = {row.model: row.metrics() for row in report.rows}
    shown = rows.get("funnel", rows.get("coarse", {}))
    metrics = {k: v for k, v in shown.items() if np.isfinite(v)} | {"protocol": report.protocol, "users": report.users}
    with console.status("writing the bundle"):
        version: str = registry.publish(
            lambda folder: packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker),
            metrics=metrics,
        )
    console.print(f"published [bold]{version}[/] to {config.place('registry')}")
    return version


def _promote_first(registry: Registry, version: str, console: Console) -> None:
    if registry.promote_first(version):
        console.print(f"[bold]{version}[/] is production (there was none)")


# ---- judging ----------------------------------------------------------------------------------------------------------


def _judge(config: Config, steps: Recipe, console: Console) -> Report:
    """The report that a version is published with."""
    from cluster import evaluation

    protocol = evaluation.protocol_for(config, steps.prepared, None)
    return evaluation.judge(config, steps, evaluation.held_out_of(config, steps, protocol), console, protocol=protocol)


# ---- answers without a service ----------------------------------------------------------------------------------------


def recommend(
    config: Config, users: Sequence[str], console: Console, *, k: int = 10, version: str = "production", only: str | None = None
) -> None:
    """Print the page of each user from a published version, through the pure funnel, by the configuration's rules.

    `only`: what items must hold, a JSON object as `filter` of POST /v1/recommend. RequestError for what it cannot be.
    """
    folder = open_registry(config.place("registry")).local_copy(version)
    funnel = Funnel.load(folder)
    if faults := packing.differences(funnel, folder):
        raise BundleError(
            f"{read_manifest(folder).version} does not answer as it did when it was published: {faults[0]}. Promote another version."
        )
    funnel.config = funnel.config.model_copy(update={"rules": config.rules})  # as the service does
    wanted = funnel.filters.parse(_asked(only)) if only is not None else None
    queries = funnel.queries([FunnelRequest(user_id=canonical_id(u), k=k, at=time.time(), filter=wanted) for u in users])
    for user, items in zip(users, funnel.page(queries, funnel.recommend(queries)), strict=True):
        table = Table(
            "", "item", "title", "score", "recalled by", title=f"user {user} · {funnel.version}", title_justify="left", header_style="bold"
        )
        for n, item in enumerate(items, 1):
            table.add_row(str(n), item.item_id, item.title or "", f"{item.score:.4f}", ", ".join(item.sources))
        console.print(table)


def _asked(only: str) -> dict[str, Any]:
    try:
        given = json.loads(only)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        example = '{"genres": ["Comedy"], "price": {"max": 20}}'
        raise RequestError(
            "wrong_type", f"'filter' is '{only[:64]}', expected a JSON object by item column, such as {example}.", field="filter"
        )
    return given
