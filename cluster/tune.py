"""Search over any values of the configuration: Ray Tune with ASHA, which gives up on weak trials early (Li et al., 2020).

A space is a YAML file of dotted configuration paths. The objective is any function of one trial's values that reports
metrics epoch by epoch; what it trains is its own affair. A search is found again by (storage, name): finished trials are
kept, unfinished ones run again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import ray
import yaml
from pydantic import PositiveFloat, PositiveInt, ValidationError, model_validator
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from recsys.core import FrozenConfig
from recsys.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)
BEST = "best_so_far"
Objective = Callable[[dict[str, Any], Callable[[Mapping[str, float]], None]], None]
"""(values by dotted path, report) -> None; it calls report(metrics) once per epoch."""


class ParameterConfig(FrozenConfig):
    """How one value is drawn; exactly one of these is given."""

    choice: tuple[Any, ...] | None = None
    """One of these, equally likely."""
    uniform: tuple[float, float] | None = None
    """A number between the two."""
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = None
    """A number between the two, equally likely in every factor: for learning rates and penalties."""
    randint: tuple[int, int] | None = None
    """A whole number from the first up to, not including, the second."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"give exactly one of choice, uniform, loguniform, randint; this has {', '.join(given) or 'none'}")
        values = next(iter(given.values()))
        if not values or ("choice" not in given and values[0] >= values[1]):
            raise ValueError(f"{next(iter(given))} {list(values)} is empty; put the smaller number first")
        return self

    def drawn(self, value: Any) -> Any:
        """The value that Tune's draw stands for."""
        return json.loads(value) if self.choice is not None else value

    def given(self, value: Any) -> Any:
        """What Tune must draw for this value."""
        return json.dumps(value) if self.choice is not None else value

    def domain(self) -> Any:
        """Ray Tune's own object for it."""
        if self.choice is not None:
            # As text: Tune takes a list apart, and then cannot set what it was.
            return tune.choice([json.dumps(value) for value in self.choice])
        if self.uniform is not None:
            return tune.uniform(*self.uniform)
        if self.loguniform is not None:
            return tune.loguniform(*self.loguniform)
        assert self.randint is not None  # noqa: S101 - the validator saw to it
        return tune.randint(*self.randint)


class TuneConfig(FrozenConfig):
    """A search space and how it is searched."""

    metric: str
    """What the objective reports and the search improves, for example ndcg@10 or auc."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    trials: PositiveInt = 20
    """Points of the space to try, the configuration as it stands included."""
    cpus_per_trial: PositiveFloat = 1
    """CPUs of one trial. As many trials run at a time as the cluster has room for."""
    parallel: PositiveInt | None = None
    """At most so many trials at a time. Default: what fits."""
    grace_epochs: PositiveInt = 2
    """Epochs that every trial may train before it can be given up."""
    max_epochs: PositiveInt = 100
    """Reports after which a trial ends in any case."""
    reduction_factor: int = 3
    """Of each rung's trials, one in so many goes on."""
    seed: int = 0
    """Of the points drawn."""
    parameters: dict[str, ParameterConfig]
    """Dotted configuration path -> how its value is drawn."""

    def drawn(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that Tune's draws stand for."""
        return {path: self.parameters[path].drawn(value) for path, value in values.items()}


@dataclass(frozen=True)
class Trial:
    """One point: its values, the metrics of its best report, how many reports it made, and what ended it badly, if anything did."""

    values: dict[str, Any]
    metrics: dict[str, float]
    epochs: int
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best first, failed ones last; `best` is the first."""

    metric: str
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The trial with the best metric."""
        return self.trials[0]


def load_space(path: Path) -> TuneConfig:
    """Read a search-space file. Raises ConfigError naming every fault and its place in the file."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The search space '{path}' cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"The search space '{path}' is not a mapping. It needs `metric` and `parameters`; see configs/tune.")
    try:
        return TuneConfig(**document)
    except ValidationError as error:
        raise ConfigError([f"{path}: {'.'.join(str(p) for p in f['loc'])}: {f['msg']}" for f in error.errors()]) from error


def search(
    space: TuneConfig,
    objective: Objective,
    *,
    storage: str,
    name: str,
    first: Mapping[str, Any] | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Run the search, or finish the one of this (storage, name), on the present Ray cluster.

    first: values of the configuration as it stands, tried before any drawn point, so that the best is never worse than it;
    progress is called in the driver after every report. Raises TrainingError where no trial reports the metric.
    """
    trainable = tune.with_resources(_trainable(space, objective), {"CPU": space.cpus_per_trial})
    path = f"{storage.rstrip('/')}/{name}"
    tuner = _restored(path, trainable) or tune.Tuner(
        trainable,
        param_space={"values": {key: p.domain() for key, p in space.parameters.items()}},
        tune_config=tune.TuneConfig(
            metric=BEST,
            mode=space.mode,
            num_samples=space.trials,
            max_concurrent_trials=_parallel(space),
            search_alg=BasicVariantGenerator(
                random_state=space.seed,
                points_to_evaluate=[{"values": {k: space.parameters[k].given(v) for k, v in first.items()}}] if first else None,
            ),
            scheduler=ASHAScheduler(
                grace_period=min(space.grace_epochs, space.max_epochs), max_t=space.max_epochs, reduction_factor=space.reduction_factor
            ),
        ),
        run_config=tune.RunConfig(name=name, storage_path=storage, verbose=0, callbacks=[_Progress(space, progress)] if progress else None),
    )
    trials = [_trial(space, result) for result in tuner.fit()]
    done = [t for t in trials if space.metric in t.metrics]
    if not done:
        reasons = "; ".join(sorted({t.error for t in trials if t.error})) or f"none reported '{space.metric}'"
        raise TrainingError(f"None of {len(trials)} trials gave a result: {reasons}")
    sign = -1 if space.mode == "max" else 1
    done.sort(key=lambda t: sign * t.metrics[space.metric])
    return SearchResult(space.metric, done + [t for t in trials if space.metric not in t.metrics])


def _restored(path: str, trainable: Any) -> tune.Tuner | None:
    if not tune.Tuner.can_restore(path):
        return None
    log.info("search %s goes on where it stopped", path)
    return tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)


def _parallel(space: TuneConfig) -> int:
    """Trials at a time: waiting ones would only time out."""
    room = max(1, int(ray.cluster_resources().get("CPU", 1) // space.cpus_per_trial)) if ray.is_initialized() else 1
    return min(room, space.parallel or room)


def _trainable(space: TuneConfig, objective: Objective) -> Callable[[dict[str, Any]], None]:
    """Ray Tune's view of the objective: each report also carries the best so far, which early stopping would restore."""
    better = max if space.mode == "max" else min

    def trial(config: dict[str, Any]) -> None:
        best = -math.inf if space.mode == "max" else math.inf
        kept: dict[str, float] = {}

        def report(metrics: Mapping[str, float]) -> None:
            nonlocal best, kept
            if space.metric not in metrics:
                raise TrainingError(f"The search wants '{space.metric}', the objective reports {', '.join(sorted(metrics))}.")
            value = float(metrics[space.metric])
            if better(best, value) == value and not math.isnan(value):
                best, kept = value, dict(metrics)
            tune.report({BEST: best, "kept": kept})

        objective(space.drawn(config["values"]), report)

    return trial


def _trial(space: TuneConfig, result: Any) -> Trial:
    metrics = result.metrics or {}
    # the trial's own exception stands at the end of Ray's text
    error = str(result.error).strip().splitlines()[-1] if result.error else None
    return Trial(space.drawn(result.config["values"]), dict(metrics.get("kept", {})), int(metrics.get("training_iteration", 0)), error)


class _Progress(tune.Callback):
    def __init__(self, space: TuneConfig, progress: Callable[[Trial], None]) -> None:
        self.space, self.progress = space, progress

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """After each report."""
        del iteration, trials, info
        self.progress(Trial(self.space.drawn(trial.config["values"]), dict(result.get("kept", {})), int(result["training_iteration"])))

    def __getstate__(self) -> dict[str, Any]:
        return {"space": self.space}  # Tune pickles its callbacks into the run folder; a console or a progress bar cannot go there

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.space, self.progress = state["space"], _silent


def _silent(trial: Trial) -> None:
    """What a restored search reports to until it is given something else."""


def overlay(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as the nested mapping of a configuration overlay."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        at = nested
        *parents, last = path.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return nested


def write_overlay(path: Path, result: SearchResult) -> None:
    """Write the best trial's values as a configuration overlay; its first line says how good it was."""
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result.best.metrics.items() if isinstance(v, float))
    head = f"# The best of {len(result.trials)} trials by {result.metric}: {shown}.\n"
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.write_text(head + yaml.safe_dump(overlay(result.best.values), sort_keys=False))
