"""What trains one model, on Ray or in this process, with its live bar: a finished run is taken as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.runtime import start_ray
from recsys.batches import Examples
from recsys.export import save_model
from recsys.recipe import Trainer
from recsys.training import ModelConfig, Report, TrainingConfig, describe, train_locally


def trainer(console: Console, storage: str, *, in_process: bool) -> Trainer:
    """What trains the models of a recipe, on Ray or here; runs are kept under `storage`."""
    if in_process and "://" not in storage:
        return partial(train_here, console, Path(storage))
    return partial(train_on_ray, console, storage)


def say(console: Console, sentence: str) -> None:
    """A step's remark, in a quiet voice."""
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


def train_here(console: Console, storage: Path, examples: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
    """One model in this process, with a live bar; a finished run of this name, on Ray or here, is taken as it is."""
    finished, folder = storage / name / "model", storage / "in-process" / name
    for done in (finished, folder):
        if (done / "model.json").exists():
            return done
    opened = Examples(examples)
    with training_bar(console, name) as tell:
        trained, fitted = train_locally(opened, model, training, progress=tell)
    save_model(folder, trained.state_dict(), describe(model, opened, fitted))
    tell_trained(console, name, fitted.best_epoch, len(fitted.epochs), fitted.metrics)
    return folder


@contextmanager
def training_bar(console: Console, name: str) -> Iterator[Callable[[Report], None]]:
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

        def tell(report: Report) -> None:
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
