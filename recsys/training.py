"""One fit for every model: steps over global batches, early stopping that restores the best epoch, and a guard against NaN.

It knows neither Ray nor sharding: the caller hands in how to run the model, its optimisers, the group of workers and
where snapshots go. Alone on one device `train_locally` fills all of that in.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import Field as Bound
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys.batches import Batch, Examples
from recsys.core import FrozenConfig
from recsys.errors import TrainingError
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.models.layers import sparse_tables
from recsys.models.two_tower import TwoTowerConfig
from recsys.validation import validate
from recsys.workers import Alone, Workers

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
EPSILON = 1e-8
"""Added to the root in Adagrad, in every implementation alike."""

ShardingKind = Literal["planner", "table_wise", "column_wise", "row_wise", "data_parallel"]
ModelConfig = TwoTowerConfig | DeepFMConfig | LogisticRegressionConfig


class TrainingConfig(FrozenConfig):
    """How a model is fitted. The same values give the same losses on any number of workers."""

    epochs: PositiveInt = 10
    """At most so many passes over the examples."""
    batch_size: PositiveInt = 1024
    """Examples per step over all workers; a multiple of the examples' granule times the workers."""
    granule: PositiveInt = 256
    """Rows per Parquet row group of the examples: the unit in which they are shuffled and dealt to workers."""
    learning_rate: PositiveFloat = 0.01
    """Of the dense parameters."""
    embedding_learning_rate: PositiveFloat | None = None
    """Of the embedding tables. Default: learning_rate."""
    optimizer: Literal["adagrad", "adam"] = "adagrad"
    """Of the dense parameters."""
    embedding_optimizer: Literal["adagrad", "rowwise_adagrad", "sgd"] = "adagrad"
    """Of the tables, applied inside the backward pass. rowwise_adagrad keeps one number per row instead of one per weight."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on the dense parameters, in the optimiser. That of embeddings is the model's `l2`."""
    patience: NonNegativeInt = 2
    """Epochs without a better validation metric before the run stops. 0 never stops early; the best epoch is kept either way."""
    metric: str | None = None
    """The validation metric that decides. Default: ndcg@10 for a two-tower, auc for a ranker."""
    seed: int = 0
    """Of initial weights, the order of examples, drawn negatives and dropout."""
    workers: PositiveInt = 1
    """Processes that share each batch and hold the tables together."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs a worker reserves; its threads follow."""
    use_gpu: bool = False
    """One GPU per worker."""
    sharding: ShardingKind = "planner"
    """How tables are spread over workers."""
    sharding_by_table: dict[str, ShardingKind] = Bound(default_factory=dict)
    """Tables that differ from `sharding`, by table name."""
    checkpoint_every_steps: NonNegativeInt = 0
    """Steps between checkpoints inside an epoch; 0: at the end of each epoch alone."""
    max_failures: NonNegativeInt = 3
    """How often lost workers are replaced, going on from the last checkpoint."""
    report_every_steps: PositiveInt = 20
    """Steps between progress reports."""


@dataclass
class Progress:
    """Where a run stands: everything beside weights and optimiser state that a resumed run needs.

    `losses` are the steps of the running epoch, `epochs` one entry per finished epoch: {"epoch", "loss", metrics…}.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_metric: float = -math.inf

    def finished(self, config: TrainingConfig) -> bool:
        """Whether the epochs or the patience are spent; a run resumed with more of them goes on."""
        judged = bool(self.epochs) and len(self.epochs[-1]) > 2  # an entry without metrics has "epoch" and "loss" alone
        return self.epoch >= config.epochs or bool(config.patience and judged and self.epoch - self.best_epoch > config.patience)


@dataclass(frozen=True)
class Report:
    """One progress report: `loss` is the mean over the steps since the last one. At the end of an epoch `metrics` is filled and
    `loss` is the epoch's. `seconds` runs since the worker began to train."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    examples_per_s: float
    seconds: float
    metrics: dict[str, float] | None = None
    pid: int = 0


class Snapshots(Protocol):
    """Where a run keeps its state."""

    def resume(self) -> Progress | None:
        """Load the newest state into model and optimisers; None when there is none."""
        ...

    def save(self, progress: Progress, *, best: bool) -> None:
        """Keep the present state; `best`: it is the best epoch's so far."""
        ...

    def restore_best(self) -> None:
        """Load the best epoch's weights into the model."""
        ...


@dataclass
class Fitted:
    """What a run ends with: {"epoch", "loss", metrics} per epoch, and which of them the model now holds."""

    epochs: list[dict[str, float]]
    best_epoch: int
    metrics: dict[str, float]


def metric_of(config: TrainingConfig, task: str) -> tuple[str, float]:
    """(name, sign) of the metric that decides; sign -1 where lower is better."""
    name = config.metric or ("ndcg@10" if task == "two_tower" else "auc")
    return name, -1.0 if name == "logloss" else 1.0


def fit(
    model: Any,
    examples: Examples,
    config: TrainingConfig,
    *,
    forward: Callable[[Batch], Any],
    optimizers: Sequence[torch.optim.Optimizer],
    snapshots: Snapshots,
    workers: Workers | None = None,
    progress: Callable[[Report], None] | None = None,
    device: torch.device = CPU,
) -> Fitted:
    """Train until the epochs or the patience end; the model then holds the best epoch's weights.

    `forward` runs the model (wrapped, where it is sharded). Raises TrainingError on NaN, on an examples folder without
    training rows, and on a metric that validation does not yield.
    """
    if not examples.rows["train"]:
        raise TrainingError(f"'{examples.folder}' holds no training rows. Check the split and the labels, then run `prepare` again.")
    run = _Run(model, examples, config, forward, optimizers, snapshots, workers or Alone(), progress, device)
    state = snapshots.resume() or Progress()
    while not state.finished(config):
        run.epoch(state)
    if state.best_epoch >= 0:
        snapshots.restore_best()
    kept = state.epochs[state.best_epoch if state.best_epoch >= 0 else -1]
    return Fitted(state.epochs, int(kept["epoch"]), {k: v for k, v in kept.items() if k != "epoch"})


@dataclass
class _Run:
    model: Any
    examples: Examples
    config: TrainingConfig
    forward: Callable[[Batch], Any]
    optimizers: Sequence[torch.optim.Optimizer]
    snapshots: Snapshots
    workers: Workers
    progress: Callable[[Report], None] | None
    device: torch.device
    began: float = field(default_factory=time.perf_counter)

    def epoch(self, state: Progress) -> None:
        """From state.step to the end of the epoch, then validation, bookkeeping and a snapshot."""
        steps = self.examples.steps(self.config.batch_size)
        self._train(state, steps)
        state.losses = self._agreed(state.losses)
        loss = sum(state.losses) / len(state.losses)
        self.model.eval()
        found = validate(lambda batch: self.forward(batch.to(self.device)), self.model, self.examples, self.workers)
        state.epochs.append({"epoch": float(state.epoch), "loss": loss, **found})
        best = self._judge(state, found)
        self._report(state, steps, loss, 0.0, found)
        state.epoch, state.step, state.losses = state.epoch + 1, 0, []
        self.snapshots.save(state, best=best)

    def _train(self, state: Progress, steps: int) -> None:
        c = self.config
        self.model.train()
        rows = min(c.batch_size, self.examples.rows["train"])
        negatives = getattr(self.model.config, "uniform_negatives", 0)
        batches = self.examples.train_batches(
            c.batch_size,
            epoch=state.epoch,
            start=state.step,
            seed=c.seed,
            rank=self.workers.rank,
            size=self.workers.size,
            negatives=negatives,
        )
        reported, at = time.perf_counter(), state.step
        for batch in batches:
            torch.manual_seed(hash((c.seed, state.epoch, state.step, self.workers.rank)) & 0x7FFFFFFF)  # dropout, also after a resume
            state.losses.append(self._step(batch.to(self.device), state))
            state.step += 1
            if state.step % c.report_every_steps == 0 or state.step == steps:
                now = time.perf_counter()
                recent = self._agreed(state.losses[at - state.step :])
                self._report(state, steps, sum(recent) / len(recent), (state.step - at) * rows / (now - reported), None)
                reported, at = now, state.step
            if c.checkpoint_every_steps and state.step % c.checkpoint_every_steps == 0 and state.step < steps:
                state.losses = self._agreed(state.losses)
                self.snapshots.save(state, best=False)

    def _agreed(self, losses: list[float]) -> list[float]:
        """Each step's loss over the whole global batch: the mean of the workers' means."""
        every: list[float] = (self.workers.sum(torch.tensor(losses, dtype=torch.float64)) / self.workers.size).tolist()
        return every

    def _step(self, batch: Batch, state: Progress) -> float:
        out = self.forward(batch)
        loss: Tensor = self.model.loss(out, batch, self.workers)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(_culprit(self.model, batch, out.embedded, f"epoch {state.epoch}, step {state.step}"))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return value

    def _judge(self, state: Progress, found: dict[str, float]) -> bool:
        """Whether this epoch is the best so far, noted in the state. Without validation rows the last epoch is."""
        if not found:
            state.best_epoch = state.epoch
            return True
        name, sign = metric_of(self.config, self.model.task)
        if name not in found:
            raise TrainingError(f"training.metric is '{name}', which validation does not yield. It yields: {', '.join(sorted(found))}.")
        value = sign * found[name]
        if math.isnan(value):
            log.warning(
                "%s of epoch %d is undefined (one class in the validation rows); the epoch counts as not better.", name, state.epoch
            )
        if value > state.best_metric or state.best_epoch < 0:
            state.best_epoch, state.best_metric = state.epoch, -math.inf if math.isnan(value) else value
            return True
        return False

    def _report(self, state: Progress, steps: int, loss: float, rate: float, found: dict[str, float] | None) -> None:
        if self.progress is not None:
            seconds = time.perf_counter() - self.began
            self.progress(Report(state.epoch, self.config.epochs, state.step, steps, loss, rate, seconds, found))


def _culprit(model: Any, batch: Batch, embedded: Any, where: str) -> str:
    """The sentence that names what made the loss NaN or infinite."""
    at = 0
    for f in model.fields:
        if f.shape == "dense":
            if not torch.isfinite(batch.dense[:, at : at + f.width]).all():
                return f"The loss is not finite at {where}: field '{f.name}' of the examples holds NaN or infinity. Clean it and prepare again."
            at += f.width
    for name, rows in (embedded.pooled | embedded.sequence).items():
        if not torch.isfinite(rows).all():
            return (
                f"The loss is not finite at {where}: the embeddings of field '{name}' are no longer finite. Lower embedding_learning_rate."
            )
    for name, column in batch.columns.items():
        if column.is_floating_point() and not torch.isfinite(column).all():
            return f"The loss is not finite at {where}: column '{name}' of the examples holds NaN or infinity. Prepare again."
    return f"The loss is not finite at {where}, though every field is: the dense part diverged. Lower learning_rate."


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one sum per row: the mean of its squared gradients. For sparse or dense gradients of (rows, width) tables."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, eps: float = EPSILON) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every row that has a gradient."""
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.setdefault(p, {})
                total = state.setdefault("sum", torch.zeros(len(p)))
                g = p.grad.coalesce() if p.grad.is_sparse else p.grad
                rows, values = (g.indices()[0], g.values()) if g.is_sparse else (torch.arange(len(p)), g)
                total[rows] += values.square().mean(1)
                p[rows] -= group["lr"] * values / (total[rows].sqrt() + group["eps"])[:, None]


def dense_optimizer(params: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of the dense parameters."""
    if config.optimizer == "adam":
        return torch.optim.Adam(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.Adagrad(params, lr=config.learning_rate, eps=EPSILON, weight_decay=config.weight_decay)


def table_optimizer(params: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of plain tables: the same update as the fused ones of the sharded tables."""
    lr = config.embedding_learning_rate or config.learning_rate
    if config.embedding_optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr)
    if config.embedding_optimizer == "rowwise_adagrad":
        return RowWiseAdagrad(params, lr)
    return torch.optim.Adagrad(params, lr=lr, eps=EPSILON)


class MemorySnapshots:
    """Keeps the best epoch's weights in memory; a run in this process cannot be resumed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.best: dict[str, Tensor] = {}

    def resume(self) -> Progress | None:
        """Nothing is ever kept from an earlier run."""
        return None

    def save(self, progress: Progress, *, best: bool) -> None:  # noqa: ARG002 - the protocol's shape
        """Copy the weights if they are the best."""
        if best:
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def restore_best(self) -> None:
        """Put the copied weights back."""
        self.model.load_state_dict(self.best)


def train_locally(
    examples: Examples, model_config: ModelConfig, config: TrainingConfig, *, progress: Callable[[Report], None] | None = None
) -> tuple[Any, Fitted]:
    """Fit one model in this process on plain tables: (model holding the best epoch, what happened). The reference of every sharded run."""
    model = model_config.build(examples.fields, seed=config.seed, factory=sparse_tables)
    if examples.start is not None:
        model.load_state_dict(load_file(examples.start))
    tables = list(model.embeddings.parameters())
    dense = [p for name, p in model.named_parameters() if not name.startswith("embeddings.")]
    optimizers = [dense_optimizer(dense, config), *([table_optimizer(tables, config)] if tables else [])]
    fitted = fit(model, examples, config, forward=model, optimizers=optimizers, snapshots=MemorySnapshots(model), progress=progress)
    return model.eval(), fitted


def describe(config: ModelConfig, examples: Examples, fitted: Fitted) -> dict[str, Any]:
    """What model.json holds beside the weights."""
    return {
        "model": config.model_dump(mode="json"),
        "fields": [asdict(f) for f in examples.fields],
        "task": examples.task,
        "metrics": fitted.metrics,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
    }
