"""The offline report: fit who takes part, judge everybody on the same users, print, write JSON and HTML.

Fits and judging are tasks on Ray where that pays: one task a channel, then one a chunk of users over one copy of the fitted
judge in the object store. A small log on one machine is done in this process, which takes less time than Ray takes to start.
Both roads give the same report.
"""

from __future__ import annotations

import json as json_format
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster import report_table
from cluster.runtime import inside_job, start_ray
from cluster.steps import prepare, recipe
from cluster.trainers import trainer
from cluster.workdir import state, state_key
from recsys import contenders as who_is
from recsys.config import ChannelConfig, Config, Protocol
from recsys.contenders import Contenders, Fits, assemble, contenders
from recsys.ctr_protocol import judge_ctr
from recsys.data.interactions import Interactions
from recsys.data.negatives import read_negatives
from recsys.data.paths import resolver
from recsys.data.split import SplitConfig
from recsys.evaluate import DEPTH, judge_here, report, users_of_items
from recsys.held_out import HeldOut, against_given
from recsys.judging import Judge, Judged, tasks
from recsys.prepared import Prepared
from recsys.recipe import Recipe
from recsys.report import Report, mean_over_seeds
from recsys.report_page import page

log = logging.getLogger(__name__)
LARGE = 2_000_000
"""Events from which fits and judging go to Ray on one machine: below, its start (5 to 10 s) costs more than it saves."""
OWN: dict[str, Protocol] = {"leave_one_out": "next_item", "time": "time", "random": "top_n"}
"""The protocol that a split is made for."""


# ---- protocol and split -----------------------------------------------------------------------------------------------


def split_for(config: Config, protocol: Protocol | None) -> SplitConfig:
    """The split that a protocol asks for: the configuration's own wherever that fits. A log in parts keeps its parts."""
    wanted = protocol or config.evaluate.protocol
    in_parts = config.data.interactions.in_parts and config.split.valid_from is None
    if wanted is None or wanted == "ctr" or in_parts or OWN.get(config.split.by) == wanted:
        return config.split
    if wanted == "top_n":
        return SplitConfig(by="random", ratio=(8, 1, 1), seed=config.split.seed, per_user=True)
    if wanted == "time":
        return SplitConfig(by="time", seed=config.split.seed)
    return config.split if config.split.by == "leave_one_out" else SplitConfig(by="leave_one_out", seed=config.split.seed)


def protocol_for(config: Config, prepared: Prepared, protocol: Protocol | None) -> Protocol:
    """The protocol in force. Of a log in parts: time where the parts follow each other, else next_item or top_n."""
    wanted = protocol or config.evaluate.protocol
    if wanted is not None:
        return wanted
    if prepared.split.by != "parts":
        return OWN[prepared.split.by]
    time, split = prepared.log.time, prepared.split
    known = split.train | split.valid
    if time[known].max(initial=-np.inf) < time[split.test].min(initial=np.inf):
        return "time"
    found = _of_parts(prepared)
    log.info("protocol %s: the parts of the log do not follow each other in time", found)
    return found


def _of_parts(prepared: Prepared) -> Literal["next_item", "top_n"]:
    """next_item where each user's one test positive comes after all else of theirs."""
    users, split = prepared.log.user, prepared.split
    test = np.flatnonzero(split.test & prepared.log.positive)
    last = np.zeros(prepared.log.n_users, np.int64)
    np.maximum.at(last, users[split.train | split.valid], np.flatnonzero(split.train | split.valid))
    single = len(np.unique(users[test])) == len(test)
    return "next_item" if single and bool((test > last[users[test]]).all()) else "top_n"


def held_out_of(config: Config, steps: Recipe, protocol: Protocol) -> HeldOut:
    """The users to judge by, as the protocol asks."""
    found = steps.held_out(protocol)
    if protocol != "ncf":
        return found
    given, vocabulary = config.evaluate.given, steps.prepared.log
    negatives = read_negatives(given, resolver(config.base), vocabulary.users, vocabulary.items) if given is not None else None
    return against_given(found, steps.prepared.log, negatives=config.evaluate.negatives, given=negatives, seed=config.seed)


# ---- the command ------------------------------------------------------------------------------------------------------


def evaluate(
    config: Config,
    console: Console,
    *,
    protocol: Protocol | None = None,
    models: Sequence[str] | None = None,
    json: Path | None = None,
    html: Path | None = None,
) -> dict[str, Any]:
    """Fit what is missing, judge every row, print the tables; returns what --json writes."""
    if (protocol or config.evaluate.protocol) == "ctr":
        document = _ctr(config, console, models)
    else:
        found = _reports(config, console, protocol, models)
        document = found.as_json()
    for table in report_table.tables(document):
        console.print(table)
    document |= {"name": config.name, "config": config.document()}
    if json is not None:
        json.write_text(json_format.dumps(document, indent=1))
    if html is not None:
        html.write_text(page(config.name, document), "utf-8")
        console.print(f"report: {html}")
    return document


def _reports(config: Config, console: Console, protocol: Protocol | None, models: Sequence[str] | None) -> Report:
    """The report; of several splits at random, their mean."""
    first = split_for(config, protocol)
    n = config.evaluate.seeds if first.by == "random" else 1
    reports, users = [], []
    for seed in range(first.seed, first.seed + n):
        if n > 1:
            console.print(f"[dim]split {seed - first.seed + 1} of {n}, seed {seed}[/]", highlight=False)
        split = first.model_copy(update={"seed": seed})
        steps, _ = recipe(config, console, split=split, in_process=lambda p: not on_ray(config, p)[0])
        wanted = protocol_for(config, steps.prepared, protocol)
        held_out = held_out_of(config, steps, wanted)
        reports.append(judge(config, steps, held_out, console, protocol=wanted, models=models))
        users.append(held_out.users)
    return mean_over_seeds(reports, users)


def judge(
    config: Config, steps: Recipe, held_out: HeldOut, console: Console, *, protocol: Protocol, models: Sequence[str] | None = None
) -> Report:
    """Everybody who takes part, on these users."""
    who = contenders(config, models, steps.prepared.log.n_items)
    far, reason = on_ray(config, steps.prepared)
    log.info("evaluation %s: %s", "on Ray" if far else "in this process", reason)
    if far:
        start_ray()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as bars:
        judge_, rows = _fitted(steps, who, held_out, max(*config.evaluate.ks, DEPTH), far=far, bars=bars)
        bar = bars.add_task(f"judging {len(held_out):,} users", total=len(held_out))
        judged = (judge_on_ray if far else judge_here)(judge_, held_out, lambda n: bars.advance(bar, n))
    known = steps.prepared.log.where(steps.cut.judged_mask)
    counts = np.bincount(known.positives().item, minlength=known.n_items)
    found = report(judged, held_out, counts, protocol=protocol, ks=config.evaluate.ks, rows=rows, item_users=users_of_items(known))
    split = steps.prepared.split
    sizes = [(f"{name} (by {split.by})", int(getattr(split, name).sum())) for name in ("train", "valid", "test")]
    found.account = [*steps.prepared.account, *sizes]
    return found


def _fitted(steps: Recipe, who: Contenders, held_out: HeldOut, width: int, *, far: bool, bars: Progress) -> tuple[Judge, Any]:
    bar = bars.add_task("fitting channels", total=None)

    def fit_all(configs: Mapping[str, ChannelConfig], known: Interactions) -> Fits:
        bars.update(bar, total=len(configs))
        if far:
            return fit_on_ray(configs, known, lambda _: bars.advance(bar))
        return who_is.fit_here(configs, known, lambda _: bars.advance(bar))

    out = assemble(steps, who, held_out, width=width, fit_all=fit_all)
    bars.remove_task(bar)
    return out


def _ctr(config: Config, console: Console, models: Sequence[str] | None) -> dict[str, Any]:
    prepared, data_key = prepare(config, console)
    far = on_ray(config, prepared)[0]
    document = config.document()
    key = state_key(data_key, document.get("fine_rank"), document.get("seed"))
    runs = state(config, "runs", key)
    train = trainer(console, str(runs), in_process=not far)
    return judge_ctr(config, prepared, state(config, "examples", key) / "ctr", train, models=models)


# ---- here or on Ray ---------------------------------------------------------------------------------------------------


def on_ray(config: Config, prepared: Prepared) -> tuple[bool, str]:
    """Whether training, fits and judging are tasks on Ray, and why."""
    if config.evaluate.on_ray is not None:
        return config.evaluate.on_ray, f"evaluate.on_ray is {str(config.evaluate.on_ray).lower()}"
    if os.environ.get("RAY_ADDRESS") or inside_job():
        return True, "a cluster is given"
    workers = max(config.two_tower.training.workers, config.fine_rank.training.workers)
    if workers > 1:
        return True, f"training asks for {workers} workers"
    n = len(prepared.log)
    return n >= LARGE, f"{n:,} events; from {LARGE:,} on Ray is worth its start"


def fit_on_ray(configs: Mapping[str, ChannelConfig], known: Interactions, progress: Callable[[str], None]) -> Fits:
    """`recsys.contenders.fit_here`, one task a channel."""
    import ray

    fit = ray.remote(num_cpus=1)(_fit_task)
    log_ref = ray.put(known)
    pending = {fit.remote(config, log_ref): name for name, config in configs.items()}
    found: Fits = {}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        name = pending.pop(done)
        found[name] = ray.get(done)
        progress(name)
    return {name: found[name] for name in configs}


def _fit_task(config: ChannelConfig, known: Interactions) -> Any:
    return who_is.fit_here({"it": config}, known)["it"]


def judge_on_ray(judge: Judge, held_out: HeldOut, progress: Callable[[int], None]) -> Judged:
    """`recsys.evaluate.judge_here`, one task a chunk of users; a few more chunks than processors are under way at a time."""
    import ray

    ask = ray.remote(num_cpus=1)(_judge_task)
    judge_ref = ray.put(judge)
    most = int(ray.cluster_resources().get("CPU", 1)) + 2
    chunks = tasks(held_out, judge.n_items)
    parts: dict[int, Judged] = {}
    pending: dict[Any, tuple[int, int]] = {}

    def collect() -> None:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        n, users = pending.pop(done)
        parts[n] = ray.get(done)
        progress(users)

    for n, make in enumerate(chunks):
        while len(pending) >= most:
            collect()
        task = make()
        pending[ask.remote(judge_ref, task)] = (n, len(task.relevant))
    while pending:
        collect()
    return Judged.joined([parts[n] for n in range(len(chunks))])


def _judge_task(judge: Judge, task: Any) -> Judged:
    return judge(task)
