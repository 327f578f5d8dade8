"""`rayfunnel tune`: a search over the configuration, in which a trial is one model trained in one process and judged on validation.

The metric says which model: ndcg@10 or recall@10 the two-tower (on the window), auc, gauc, moment_auc or logloss the fine
ranker (on the validation part). Everything before that model is made once and shared by the trials.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.runtime import start_ray
from cluster.steps import fetch, prepare
from cluster.workdir import NOT_LEARNT_FROM, state, state_key
from recsys.batches import Examples
from recsys.config import Config
from recsys.errors import ConfigError
from recsys.export import save_model
from recsys.prepared import Prepared
from recsys.recipe import Recipe
from recsys.training import ModelConfig, Report, TrainingConfig, describe, train_locally

METRICS = {"two_tower": ("ndcg@10", "recall@10"), "fine_rank": ("auc", "gauc", "moment_auc", "logloss")}
TRIED_APART = ("model", "training")
"""Sections of the searched model that change nothing in its examples."""


def search_config(
    config: Config, space_file: Path, console: Console, *, trials: int | None = None, write: Path | None = None
) -> dict[str, Any]:
    """Search, print every trial, write the best as an overlay (default: best.yaml in the workdir); returns the best values.

    Raises ConfigError for a space whose paths or metric the configuration does not know.
    """
    start_ray()
    from cluster.tune import Trial, load_space, search, write_overlay

    space = load_space(space_file)
    space = space if trials is None else space.model_copy(update={"trials": trials})
    model = _model_of(space.metric)
    fetch(config, console)
    document, base = config.document() | {"workdir": config.root}, config.base
    now = {path: _value_at(config, path) for path in space.parameters}
    for path, value in now.items():
        with_values(document, base, {path: value})  # a path that does not exist is a fault here, not in every trial
    prepared, _ = prepare(config, console)
    sizes = f"{len(prepared.log):,} events"

    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task(f"searching {len(now)} values on {sizes}", total=None)

        def tell(trial: Trial) -> None:
            bars.update(
                bar,
                description=f"{space.metric} {trial.metrics.get(space.metric, float('nan')):.4f} after {trial.epochs} epochs: {_shown(trial.values)}",
            )

        key = state_key(space.model_dump(mode="json"), document)
        found = search(
            space,
            lambda values, report: _trial(document, base, model, values, report),
            storage=f"{config.root}/runs",
            name=f"tune-{key}",
            first=now,
            progress=tell,
        )
    table = Table(
        space.metric,
        "epochs",
        *(p.removeprefix(f"{model}.") for p in now),
        header_style="bold",
        title=f"{len(found.trials)} trials",
        title_justify="left",
    )
    for trial in found.trials:
        mark = " (as configured)" if trial.values == now else ""
        table.add_row(
            f"{trial.metrics.get(space.metric, float('nan')):.4f}{mark}",
            str(trial.epochs),
            *(escape(str(_rounded(trial.values[p]))) for p in now),
        )
    console.print(table)
    target = write or Path(config.root) / "best.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_overlay(target, found)
    before = next((t.metrics.get(space.metric) for t in found.trials if t.values == now), None)
    gain = f", {before:.4f} as configured" if before is not None else ""
    console.print(f"best {space.metric} {found.best.metrics[space.metric]:.4f}{gain}. Written to {target}; use it as: --config {target}")
    return found.best.values


def _model_of(metric: str) -> str:
    for model, names in METRICS.items():
        if metric in names:
            return model
    known = "; ".join(f"{', '.join(names)} for {model}" for model, names in METRICS.items())
    raise ConfigError(f"The search space asks for metric '{metric}', which no model reports. Known: {known}.")


def with_values(document: Mapping[str, Any], base: Path, values: Mapping[str, Any]) -> Config:
    """The configuration of a document with other values at dotted paths. ConfigError names a path or value that does not fit."""
    from pydantic import ValidationError

    changed = json.loads(json.dumps(document))
    for path, value in values.items():
        *parents, last = path.split(".")
        at = changed
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    try:
        config = Config.model_validate(changed)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        raise ConfigError(
            f"The search space's {'.'.join(map(str, first['loc']))}: {first['msg']}. Paths are those of configs/base.yaml."
        ) from fault
    config._base = base
    return config


def _value_at(config: Config, path: str) -> Any:
    at: Any = config
    for part in path.split("."):
        at = at.get(part) if isinstance(at, Mapping) else getattr(at, part, None)
    return list(at) if isinstance(at, tuple) else at


def _trial(
    document: Mapping[str, Any], base: Path, model: str, values: dict[str, Any], report: Callable[[Mapping[str, float]], None]
) -> None:
    """One trial, in a process of its own."""
    torch.set_num_threads(1)
    config = with_values(document, base, values)
    prepared, data_key = _prepared(config)
    shared = {k: v for k, v in config.document().items() if k not in NOT_LEARNT_FROM}
    shared[model] = {k: v for k, v in shared.get(model, {}).items() if k not in TRIED_APART}
    granule = getattr(config, model).training.granule
    folder = state(config, "examples", state_key("trial", data_key, shared, granule))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")  # trials share what comes before the model; the first one makes it

    def train(examples: Path, model_config: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
        out = folder / "models" / name
        searched = name == model
        if searched:
            lock.release()
        elif (out / "model.json").exists():
            return out
        opened = Examples(examples)
        trained, fitted = train_locally(opened, model_config, training, progress=_reporting(report) if searched else None)
        if not searched:
            save_model(out, trained.state_dict(), describe(model_config, opened, fitted))
        return out

    with lock:
        steps = Recipe(config, prepared, folder, train)
        _ = steps.base_tower if model == "two_tower" else steps.ranker


def _prepared(config: Config) -> tuple[Prepared, str]:
    quiet = Console(quiet=True)
    lock = Path(config.root) / "data" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        return prepare(config, quiet)


def _reporting(report: Callable[[Mapping[str, float]], None]) -> Callable[[Report], None]:
    def tell(step: Report) -> None:
        if step.metrics is not None:
            report({k: v for k, v in step.metrics.items() if isinstance(v, float)})

    return tell


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path.rsplit('.', 1)[-1]} {_rounded(value)}" for path, value in values.items())
