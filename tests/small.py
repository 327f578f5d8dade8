"""A small real recommender for tests: a CSV of 60 users and 40 items, a funnel trained in this process, a published bundle.

Users like the items of their own half (checkerboard), newest first matters little; item and user tables have features, and
one item, `cold`, has no event.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cluster.registry import Registry
from recsys import packing
from recsys.batches import Examples
from recsys.config import Config, load
from recsys.evaluate import evaluate_funnel
from recsys.export import save_model
from recsys.funnel import Funnel
from recsys.prepared import Prepared, prepare
from recsys.recipe import Recipe
from recsys.training import ModelConfig, TrainingConfig, describe, train_locally

YAML = """
extends: {base}
name: small
workdir: {workdir}
data:
  interactions: {{path: log.csv, format: csv, user: uid, item: sku, time: ts, context: {{device: category}}}}
  items: {{path: items.csv, id: sku, title: name, columns: {{colour: category, price: {{kind: number, scale: log}}}}}}
  users: {{path: users.csv, id: uid, columns: {{country: category}}}}
split: {{by: leave_one_out}}
features: {{dim: 8, history: {{length: 10, recent: 3}}}}
examples: {{window_events: 2, recalled: 5}}
recall: {{merge: {{limit: 40, quota: 20}}}}
coarse_rank: {{keep: 30}}
fine_rank: {{keep: 20, model: {{dim: 8, hidden: [16]}}, training: {{epochs: 3, batch_size: 64, granule: 32, learning_rate: 0.05}}}}
two_tower: {{model: {{dim: 8, user_hidden: [16], item_hidden: [16]}}, training: {{epochs: 3, batch_size: 64, granule: 32, learning_rate: 0.05}}}}
"""


class Small(NamedTuple):
    """The published small recommender: its configuration, registry and version."""

    config: Config
    registry: Registry
    version: str

    @property
    def folder(self) -> Path:
        """The bundle."""
        return self.registry.bundles / self.version


def write_data(folder: Path, *, users: int = 60, items: int = 40, events: int = 10, seed: int = 0) -> None:
    """log.csv, items.csv and users.csv: user u takes `events` distinct items of the parity of u."""
    rng = np.random.default_rng(seed)
    half = items // 2
    lines = []
    for u in range(users):
        for n, i in enumerate(rng.permutation(half)[:events] * 2 + u % 2):
            lines.append((1_700_000_000 + n * 3600 + u, f"u{u},i{i},{1_700_000_000 + n * 3600 + u},{('phone', 'web')[n % 2]}"))
    (folder / "log.csv").write_text("uid,sku,ts,device\n" + "\n".join(line for _, line in sorted(lines)) + "\n")
    rows = [f"i{i},Item {i},{('red', 'blue')[i % 2]},{1 + i}" for i in range(items)]
    (folder / "items.csv").write_text("sku,name,colour,price\n" + "\n".join([*rows, "cold,Item nobody had,red,5"]) + "\n")
    (folder / "users.csv").write_text("uid,country\n" + "\n".join(f"u{u},{('nl', 'fr')[u % 2]}" for u in range(users)) + "\n")


def config_of(folder: Path, *settings: str) -> Config:
    """The configuration of the data in `folder`; its workdir lies there too."""
    base = Path(__file__).parents[1] / "configs" / "base.yaml"
    (folder / "small.yaml").write_text(YAML.format(base=base, workdir=folder / "state"))
    return load([folder / "small.yaml"], settings)


def recipe_of(config: Config, prepared: Prepared | None = None) -> Recipe:
    """The recipe, training in this process."""

    def train(folder: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
        examples = Examples(folder)
        trained, fitted = train_locally(examples, model, training)
        out = Path(config.root) / "models" / name
        save_model(out, trained.state_dict(), describe(model, examples, fitted))
        return out

    return Recipe(config, prepared or prepare(config), Path(config.root), train)


def bundled(folder: Path, *settings: str) -> tuple[Recipe, Funnel, Path]:
    """Data, recipe, the funnel that it ends with, and the bundle that this was packed into; all in `folder`."""
    write_data(folder)
    steps = recipe_of(config_of(folder, *settings))
    final, bundle = steps.final(), folder / "bundle"
    bundle.mkdir()
    packing.pack(final, bundle, tower=steps.final_tower, ranker=steps.ranker)
    return steps, final, bundle


def publish(config: Config, registry: Registry) -> str:
    """Train, judge and publish a version, and promote it where nothing is in production."""
    steps = recipe_of(config)
    funnel = steps.judged()
    counts = np.bincount(steps.prepared.log.item, minlength=steps.prepared.log.n_items)
    report = evaluate_funnel(funnel, steps.held_out(), counts, protocol="next_item")
    metrics = next(row.metrics() for row in report.rows if row.model == "funnel")
    version: str = registry.publish(
        lambda folder: packing.pack(steps.final(), folder, tower=steps.final_tower, ranker=steps.ranker), metrics=metrics
    )
    registry.promote_first(version)
    return version
