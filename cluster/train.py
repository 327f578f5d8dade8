"""Training on Ray: `run` starts a worker group, `train_worker` is what each worker does, and the driver exports the best epoch.

Any number of workers, one included, sees the same global batches and ends with the same model. A run is found again by
(storage, name): after a lost worker Ray starts the group anew, after a lost driver one calls `run` again, and both go on
from the newest sound checkpoint.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from pydantic import Field as Bound
from pydantic import TypeAdapter
from ray.data import DataContext
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file

from cluster.checkpoint import Checkpoints, RunSnapshots, check_same_run, name_of
from cluster.sharding import ProcessGroupWorkers, Sharding
from recsys.batches import Examples
from recsys.errors import RayfunnelError, TrainingError
from recsys.export import save_model
from recsys.training import Fitted, ModelConfig, Report, TrainingConfig, describe, fit

log = logging.getLogger(__name__)
POLL_S = 0.25
WORKER_ENVIRONMENT = {
    # GNU OpenMP's threads spin while they wait. Beside the reading thread, or anybody else on the host, that costs more than
    # it gains: with 2 threads on a busy 2-core host a step took 710 ms spinning and 89 ms asleep.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Keep freed memory: else every step gives its activations back to the kernel and faults them in again (7 % of a step).
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
}
"""What a worker process must start with; libgomp and malloc read it before any Python runs."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished run: `folder` holds model.safetensors and model.json of the best epoch; `epochs` one entry per epoch;
    `notices` what a person should know (a damaged checkpoint that was passed over)."""

    folder: Path
    epochs: list[dict[str, float]]
    best_epoch: int
    metrics: dict[str, float]
    notices: list[str] = field(default_factory=list)


class Hub:
    """An actor between workers and driver: reports and notices on their way up, and the error that ends a run."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.notices: list[str] = []
        self.error: RayfunnelError | None = None

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def notice(self, sentence: str) -> None:
        self.notices.append(sentence)

    def fail(self, error: RayfunnelError) -> None:
        self.error = error

    def failed(self) -> RayfunnelError | None:
        return self.error

    def drain(self) -> tuple[list[Report], list[str]]:
        out, self.reports, self.notices = (self.reports, self.notices), [], []
        return out


def run(
    examples: Path | str,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    storage: str,
    name: str,
    progress: Callable[[Report], None] | None = None,
) -> TrainedModel:
    """Train on the present Ray cluster, or finish the run of this (storage, name).

    storage: an absolute path or URI that every node reaches. Raises TrainingError for NaN, an unusable examples folder,
    a name taken by another run, or more lost workers than `max_failures`.
    """
    opened = Examples(examples)
    opened.check(training.batch_size, training.workers)
    folder = f"{storage.rstrip('/')}/{name}"
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    identity = _identity(opened, model, training)
    notices: list[str] = []
    if not _is_finished(checkpoints, identity, training):
        _train(opened, model, training, storage=storage, name=name, identity=identity, progress=progress, notices=notices)
    return _export(checkpoints, folder, opened, model, training, notices=notices)


def _identity(examples: Examples, model: ModelConfig, training: TrainingConfig) -> dict[str, Any]:
    """What two runs of one name must have in common; how many workers, epochs and shards may differ."""
    schema = (examples.folder / "schema.json").read_bytes()
    kept = {"batch_size", "learning_rate", "embedding_learning_rate", "optimizer", "embedding_optimizer", "weight_decay", "seed"}
    return {
        "examples": hashlib.sha256(schema).hexdigest(),
        "model": model.model_dump(mode="json"),
        "training": training.model_dump(mode="json", include=kept),
    }


def _is_finished(checkpoints: Checkpoints, identity: dict[str, Any], training: TrainingConfig) -> bool:
    for name in checkpoints.names():
        if checkpoints.damage(name) is None:
            progress, was = checkpoints.progress(name)
            check_same_run(checkpoints.folder, was, identity)
            return progress.finished(training) and checkpoints.damage(name_of(progress.best_epoch + 1, 0)) is None
    return False


def _train(
    examples: Examples,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    storage: str,
    name: str,
    identity: dict[str, Any],
    progress: Callable[[Report], None] | None,
    notices: list[str],
) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the end of a run, or of a worker, is noticed by polling
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")  # importing torchrec on a busy small host takes a minute
    if not ray.is_initialized():
        ray.init()
    hub = ray.remote(Hub).options(num_cpus=0).remote()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "examples": str(examples.folder.resolve()),
            "model": model.model_dump(),
            "training": training.model_dump(),
            "checkpoints": f"{storage.rstrip('/')}/{name}/checkpoints",
            "identity": identity,
            "hub": hub,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if training.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if training.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DataContext.get_current()  # made once per process, and it warns of Ray Data's own settings
    listener = _Listener(hub, progress, notices)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(hub) or TrainingError(
            f"Run '{name}' lost its workers more than {training.max_failures} times, last with: {error}. Its checkpoints stand in '{storage}/{name}'; run again to go on."
        ) from error
    finally:
        listener.stop()
        cause = _cause(hub)
        ray.kill(hub)
    if cause is not None:
        raise cause


def _cause(hub: Any) -> RayfunnelError | None:
    error: RayfunnelError | None = ray.get(hub.failed.remote())
    return error


class _Listener:
    """A thread of the driver that hands reports on while `trainer.fit()` blocks."""

    def __init__(self, hub: Any, progress: Callable[[Report], None] | None, notices: list[str]) -> None:
        self.hub, self.progress, self.notices = hub, progress, notices
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="training-progress", daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while not self.ended.wait(POLL_S):
            self._pass_on()

    def _pass_on(self) -> None:
        reports, notices = ray.get(self.hub.drain.remote())
        for sentence in notices:
            log.warning(sentence)
            self.notices.append(sentence)
        if self.progress is not None:
            for report in reports:
                self.progress(report)

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()
        self._pass_on()


def train_worker(config: dict[str, Any]) -> None:
    """One worker of the group: build the model sharded, resume, fit, and leave nothing behind."""
    hub = config["hub"]
    if ray.get(hub.failed.remote()) is not None:
        return  # the group was started anew after an error that another attempt would meet again
    warnings.filterwarnings("ignore", category=FutureWarning)  # torchrec's own deprecations
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for chatty in ("torchrec", "fbgemm_gpu", "root", "torch", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _fit_here(config)
    except RayfunnelError as error:
        ray.get(hub.fail.remote(error))
        raise
    finally:
        gc.collect()  # a DMP model that outlives its process group keeps the worker from ending


def _fit_here(config: dict[str, Any]) -> None:
    hub, training = config["hub"], TrainingConfig(**config["training"])
    examples = Examples(config["examples"])
    device = ray.train.torch.get_device() if training.use_gpu else torch.device("cpu")
    model_config: Any = TypeAdapter(Annotated[ModelConfig, Bound(discriminator="type")]).validate_python(config["model"])
    sharding = Sharding(training, device=device)
    model = model_config.build(examples.fields, seed=training.seed, factory=sharding.tables)
    sharding.apply(model)
    if examples.start is not None:
        sharding.start_from(load_file(examples.start))
    rank = dist.get_rank()

    def on_report(report: Report) -> None:
        if rank == 0:
            hub.report.remote(replace(report, pid=os.getpid()))
        if report.metrics is not None:
            ray.train.report({"epoch": report.epoch, "loss": report.loss, **report.metrics})

    def on_notice(sentence: str) -> None:
        if rank == 0:
            hub.notice.remote(sentence)

    snapshots = RunSnapshots(Checkpoints(config["checkpoints"]), sharding.state, config["identity"], on_notice)
    fit(
        model,
        examples,
        training,
        forward=sharding.wrapped,
        optimizers=sharding.optimizers,
        snapshots=snapshots,
        workers=ProcessGroupWorkers(),
        progress=on_report,
        device=device,
    )


def _export(
    checkpoints: Checkpoints, folder: str, examples: Examples, config: ModelConfig, training: TrainingConfig, *, notices: list[str]
) -> TrainedModel:
    """Load the best epoch's checkpoint into a plain model and write it."""
    found = checkpoints.newest()
    if found is None:
        raise TrainingError(f"The run left no checkpoint in '{checkpoints.folder}'. See the workers' log.")
    progress, _ = checkpoints.progress(found[0])
    best = name_of(progress.best_epoch + 1, 0)
    if fault := checkpoints.damage(best):
        raise TrainingError(
            f"The best epoch's checkpoint '{checkpoints.folder}/{best}' is damaged: {fault}. Remove '{folder}' and train again."
        )
    state = config.build(examples.fields, seed=training.seed).state_dict()
    checkpoints.load(best, state)
    kept = progress.epochs[progress.best_epoch]
    fitted = Fitted(progress.epochs, progress.best_epoch, {k: v for k, v in kept.items() if k != "epoch"})
    out = (Path(checkpoints.root).parent if checkpoints.local else Path(tempfile.mkdtemp(prefix="rayfunnel-model-"))) / "model"
    save_model(out, state, describe(config, examples, fitted))
    return TrainedModel(out, fitted.epochs, fitted.best_epoch, fitted.metrics, notices)
