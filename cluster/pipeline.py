"""The offline commands: prepare, train, evaluate, publish, tune, recommend. Each is idempotent: what is up to date is kept.

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.fetch import fetch as bring
from cluster.registry import Registry, open_registry
from cluster.runtime import start_ray
from recsys import packing
from recsys.bundle import read_manifest
from recsys.config import Config, Protocol
from recsys.core import canonical_id
from recsys.ctr_protocol import judge_ctr
from recsys.data.paths import resolver
from recsys.data.split import SplitConfig
from recsys.errors import BundleError, ConfigError
from recsys.evaluate import Report, evaluate_funnel
from recsys.funnel import Funnel, FunnelRequest
from recsys.prepared import Prepared
from recsys.prepared import prepare as prepare_data
from recsys.recipe import Recipe
from recsys.training import ModelConfig, TrainingConfig
from recsys.training import Report as StepReport

log = logging.getLogger(__name__)

STATE_FORMAT = "3"
"""Part of every state folder's name: raised when what is written there changes."""
NOT_LEARNT_FROM = {"name", "workdir", "registry", "redis_url", "serve", "evaluate", "fetch", "rerank"}
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
    found = []
    for path in map(resolve, paths):
        stat = os.stat(path) if os.path.exists(path) else None  # noqa: PTH110, PTH116 - it may be a URI
        found.append((str(path), stat.st_size if stat else -1, stat.st_mtime_ns if stat else -1))
    return found


def _split_of(config: Config, protocol: Protocol | None) -> tuple[Protocol, SplitConfig]:
    """The protocol in force and the split that it asks for: the configuration's own wherever that fits."""
    own: dict[str, Protocol] = {"leave_one_out": "next_item", "time": "time", "random": "top_n", "parts": "time"}
    wanted = protocol or config.evaluate.protocol or own[config.split.by]
    if wanted == "ncf":
        raise ConfigError("Protocol ncf (one positive among 99 given negatives) is not built yet. Use next_item, top_n, time or ctr.")
    if wanted == "ctr" or own[config.split.by] == wanted:
        return wanted, config.split
    by: Literal["leave_one_out", "time", "random"] = {"next_item": "leave_one_out", "time": "time", "top_n": "random"}[wanted]  # type: ignore[assignment]
    return wanted, SplitConfig(by=by, seed=config.seed, per_user=wanted == "top_n")


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


def prepare(config: Config, console: Console, *, protocol: Protocol | None = None) -> tuple[Prepared, str]:
    """The prepared data set and its key, from disk where nothing changed. Prints the account of the cleaning."""
    fetch(config, console)
    _, split = _split_of(config, protocol)
    document = config.document()
    key = state_key(_files(config), document.get("data"), split.model_dump(mode="json"), document.get("features"))
    folder = state(config, "data", key)
    if (folder / "prepared.json").exists():
        prepared = Prepared.load(folder)
        console.print(
            f"Data is up to date: {len(prepared.log):,} events of {prepared.log.n_users:,} users and {prepared.log.n_items:,} items"
        )
        return prepared, key
    start = time.perf_counter()
    with console.status("reading and cleaning the log, fitting the features"):
        prepared = prepare_data(config, split)
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
    return Prepared.load(folder), key


# ---- training ---------------------------------------------------------------------------------------------------------


def recipe(config: Config, console: Console, *, protocol: Protocol | None = None) -> tuple[Recipe, str]:
    """The steps from data to funnel for this configuration, each trained on Ray when it is asked for; and their key."""
    prepared, data_key = prepare(config, console, protocol=protocol)
    document = {k: v for k, v in config.document().items() if k not in NOT_LEARNT_FROM}
    key = state_key(data_key, document)
    storage = f"{config.root}/runs/{key}" if "://" in config.root else str(state(config, "runs", key))
    return Recipe(config, prepared, state(config, "examples", key), partial(train_on_ray, console, storage), partial(_say, console)), key


def _say(console: Console, sentence: str) -> None:
    console.print(f"[dim]{escape(sentence)}[/]", highlight=False)


def train_on_ray(console: Console, storage: str, examples: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
    """One model on Ray Train, with a live bar; a finished run of this name is taken as it is."""
    start_ray()  # before the first import of ray, which reads its environment then
    from cluster.train import run

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
        transient=True,
    ) as bars:
        bar = bars.add_task(f"training {name}", total=None, told="starting workers")

        def tell(report: StepReport) -> None:
            metrics = " ".join(f"{k} {v:.4f}" for k, v in (report.metrics or {}).items() if k in ("ndcg@10", "auc"))
            told = f"epoch {report.epoch + 1}/{report.epochs} loss {report.loss:.4f} {report.examples_per_s:,.0f} examples/s {metrics}"
            done = report.epoch + (report.step / report.steps if report.steps else 0)
            bars.update(bar, total=report.epochs, completed=min(done, report.epochs), told=told)

        trained = run(examples, model, training, storage=storage, name=name, progress=tell)
    for notice in trained.notices:
        console.print(f"[yellow]{escape(notice)}[/]")
    shown = " ".join(f"{k} {v:.4f}" for k, v in trained.metrics.items())
    console.print(f"[bold]{name}[/] best epoch {trained.best_epoch + 1} of {len(trained.epochs)}: {shown}", highlight=False)
    return trained.folder


def train(config: Config, console: Console, *, parent_version: str | None = None) -> str:
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
    console.print(_table(report))
    version = _publish(config, steps, registry, report, console, parent_version=parent_version)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(known | {key_of_page: version}))
    _promote_first(registry, version, console)
    return version


def publish(config: Config, console: Console) -> str:
    """Publish what `train` has fitted for this configuration (fitting what is missing), without promoting it."""
    registry = open_registry(config.place("registry"))
    steps, _ = recipe(config, console)
    return _publish(config, steps, registry, _judge(config, steps, console), console, parent_version=None)


def _publish(config: Config, steps: Recipe, registry: Registry, report: Report, console: Console, *, parent_version: str | None) -> str:
    final = steps.final()
    rows = {row.model: row.metrics() for row in report.rows}
    shown = rows.get("funnel", rows.get("coarse", {}))
    metrics = {k: v for k, v in shown.items() if np.isfinite(v)} | {"protocol": report.protocol, "users": report.users}
    with console.status("writing the bundle"):
        version: str = registry.publish(
            lambda folder: packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker),
            metrics=metrics,
            parent_version=parent_version,
        )
    console.print(f"published [bold]{version}[/] to {config.place('registry')}")
    return version


def _promote_first(registry: Registry, version: str, console: Console) -> None:
    if registry.promote_first(version):
        console.print(f"[bold]{version}[/] is production (there was none)")


# ---- judging ----------------------------------------------------------------------------------------------------------


def evaluate(
    config: Config,
    console: Console,
    *,
    protocol: Protocol | None = None,
    models: Sequence[str] | None = None,
    json: Path | None = None,
    html: Path | None = None,
) -> dict[str, Any]:
    """Fit what is missing, judge every channel, stage and the funnel, print the table; returns what --json writes."""
    from json import dumps

    wanted, _ = _split_of(config, protocol)
    if wanted == "ctr":
        document = _judge_ctr(config, console, models)
    else:
        steps, _ = recipe(config, console, protocol=wanted)
        report = _judge(config, steps, console, protocol=wanted)
        report.keep(models)
        console.print(_table(report))
        document = report.as_json()
    if json is not None:
        json.write_text(dumps(document, indent=1))
    if html is not None:
        from recsys.report_page import page

        html.write_text(page(config.name, document), "utf-8")
        console.print(f"report: {html}")
    return document


def _judge(config: Config, steps: Recipe, console: Console, *, protocol: Protocol | None = None) -> Report:
    wanted, _ = _split_of(config, protocol)
    funnel, held_out = steps.judged(), steps.held_out()
    counts = np.bincount(steps.prepared.log.item, minlength=steps.prepared.log.n_items)
    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task(f"judging on {len(held_out):,} users", total=len(held_out))
        return evaluate_funnel(funnel, held_out, counts, protocol=wanted, ks=config.evaluate.ks, progress=lambda n: bars.advance(bar, n))


def _judge_ctr(config: Config, console: Console, models: Sequence[str] | None) -> dict[str, Any]:
    prepared, data_key = prepare(config, console, protocol="ctr")
    document = config.document()
    key = state_key(data_key, document.get("fine_rank"), document.get("seed"))
    train = partial(train_on_ray, console, str(state(config, "runs", key)))
    found = judge_ctr(config, prepared, state(config, "examples", key) / "ctr", train, models=models)
    names = list(found["rows"][0]["metrics"])
    table = Table("model", *names, "fit s", title=f"ctr: {found['test_rows']:,} test rows", title_justify="left", header_style="bold")
    for row in found["rows"]:
        table.add_row(row["model"], *(f"{row['metrics'][m]:.4f}" for m in names), f"{row['seconds']['fit']:.0f}")
    console.print(table)
    return found


def _table(report: Report) -> Table:
    document = report.as_json()
    names = [n for row in document["rows"][:1] for n in row["metrics"] if n in ("ndcg@10", "recall@10", "mrr@10", "coverage@10")]
    table = Table("model", header_style="bold", title_justify="left", caption_justify="left")
    table.title = (
        f"{report.protocol}: {report.users:,} users, {int(report.warm.sum()):,} with a history; all {report.n_items:,} items, seen filtered"
    )
    for name in (*names[:1], "± 95 %", *names[1:], "ms/user"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["rows"]:
        low, high = row["interval"]["ndcg@10"]
        shown = [f"{row['metrics'][n]:.4f}" for n in names]
        table.add_row(
            row["model"],
            *shown[:1],
            f"{(high - low) / 2:.4f}",
            *shown[1:],
            f"{1000 * row['seconds']['predict'] / max(report.users, 1):.2f}",
        )
    losses = ", ".join(f"{name} {share:.3f}" for name, share in report.stage_recall.items())
    table.caption = f"of what users took next, still there after: {losses}; coarse-fine Spearman {report.spearman:.3f}"
    return table


# ---- search -----------------------------------------------------------------------------------------------------------


def tune(config: Config, space: Path, console: Console, *, trials: int | None = None, write: Path | None = None) -> dict[str, Any]:
    """Search the space with Ray Tune, print the trials, write the best as an overlay; returns the best values."""
    from cluster.search import search_config

    return search_config(config, space, console, trials=trials, write=write)


# ---- answers without a service ----------------------------------------------------------------------------------------


def recommend(config: Config, users: Sequence[str], console: Console, *, k: int = 10, version: str = "production") -> None:
    """Print the page of each user from a published version, through the pure funnel."""
    folder = open_registry(config.place("registry")).local_copy(version)
    funnel = Funnel.load(folder)
    if faults := packing.differences(funnel, folder):
        raise BundleError(
            f"{read_manifest(folder).version} does not answer as it did when it was published: {faults[0]}. Promote another version."
        )
    queries = funnel.queries([FunnelRequest(user_id=canonical_id(u), k=k, at=time.time()) for u in users])
    for user, items in zip(users, funnel.page(queries, funnel.recommend(queries)), strict=True):
        table = Table(
            "", "item", "title", "score", "recalled by", title=f"user {user} · {funnel.version}", title_justify="left", header_style="bold"
        )
        for n, item in enumerate(items, 1):
            table.add_row(str(n), item.item_id, item.title or "", f"{item.score:.4f}", ", ".join(item.sources))
        console.print(table)
