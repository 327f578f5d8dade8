"""Cold start: `python -m tests.benchmarks.cold [--json] [--quick] [--channels] [--sets movielens,kuairand]`.

A tenth of the users and a tenth of the items are held out entirely: no event of theirs is in training, nor in what features
are fitted on. NDCG@10 over the full catalogue, by how much is known:

    user 0      a new user, no event; the user table alone. Sought: all that he took
    user 1      the same with one event, his first. Sought: the rest
    item        users of training; ranked are the new items alone, by a filter. Sought: those that they took
    new share   of the pages of users of training, over the full catalogue, the share that are new items

Channels are fitted on all that is left, the towers and the fine ranker as for production.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from cluster.fetch import fetch, find_kuairand
from recsys import prepared as prepared_module
from recsys.allowed import Allowed, Mask
from recsys.batches import Examples
from recsys.config import load
from recsys.core import Queries, Query, Vocabulary
from recsys.data import events
from recsys.data.interactions import Interactions
from recsys.errors import DataError
from recsys.export import save_model
from recsys.funnel import Funnel
from recsys.metrics import Relevant, at_k, interval
from recsys.prepared import prepare
from recsys.recall.popular import first_of
from recsys.recipe import Recipe
from recsys.training import ModelConfig, TrainingConfig, describe, train_locally

CONFIGS = Path(__file__).parents[2] / "configs"
SEGMENT = {"movielens": "occupation", "kuairand": "user_active_degree"}
SHARE, LEAST, K, CHUNK = 0.1, 5, 10, 256
"""Held out; events that a held-out user or item has at least; length of a page; queries at once."""
Rank = Callable[[Queries], np.ndarray]


def held_out(log: Interactions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(new users (U,) bool, new items (I,) bool), drawn among those with enough positives to be judged by."""
    rng, positives = np.random.default_rng(seed), log.positives()
    out = []
    for rows, n in ((positives.user, log.n_users), (positives.item, log.n_items)):
        eligible = np.flatnonzero(np.bincount(rows, minlength=n) >= LEAST)
        new = np.zeros(n, bool)
        new[rng.choice(eligible, int(SHARE * len(eligible)), replace=False)] = True
        out.append(new)
    return out[0], out[1]


class Cold:
    """One data set without its new users and items, a funnel trained on the rest, and the questions."""

    def __init__(self, name: str, seed: int, settings: list[str], folder: Path, *, trained: bool = True) -> None:
        content = ["recall.channels.content.type=content", "recall.channels.popular_segment.type=popular_segment"]
        by = [f"recall.channels.popular_segment.by={SEGMENT[name]}"]
        self.config = load([CONFIGS / f"{name}.yaml"], [f"seed={seed}", f"workdir={folder}", *content, *by, *settings])
        if self.config.fetch is not None and self.config.fetched is not None:
            fetch(self.config.fetch, self.config.fetched)
        data = events.load(self.config.data, self.config.base, keep=self.config.split.keep)
        self.new_users, new = held_out(data.interactions, seed)
        # Rows are numbered by first events: without a shuffle, ties among the new items would tell who was there early.
        rows = np.concatenate([np.flatnonzero(~new), np.random.default_rng(seed).permutation(np.flatnonzero(new))])
        place = np.argsort(rows).astype(np.int32)
        self.all = replace(
            data.interactions,
            items=Vocabulary(data.interactions.items.ids.take(pa.array(rows))),
            item=place[data.interactions.item],
            past=None,
        )
        data = replace(data, items=data.items.iloc[rows].reset_index(drop=True))
        self.new_items = new[rows]
        kept = ~self.new_users[self.all.user] & ~self.new_items[self.all.item]
        left = self.all.where(kept)
        with mock.patch.object(prepared_module, "load", return_value=replace(data, interactions=left)):
            prepared = prepare(self.config)
        steps = Recipe(self.config, prepared, folder, _trainer(folder))
        self.funnel: Funnel = steps.final() if trained else steps.funnel(np.ones(len(prepared.log), bool), None, None)
        self.left = left

    def rows(self) -> dict[str, dict[str, list[float]]]:
        """Model -> question -> [value, low, high] of a 95 % interval."""
        found: dict[str, dict[str, list[float]]] = {}
        for question, queries, relevant, allowed in self._questions():
            for name, rank in self._models().items():
                top = np.concatenate(
                    [rank(_with(queries.take(np.arange(a, min(a + CHUNK, len(queries)))), allowed)) for a in range(0, len(queries), CHUNK)]
                )
                values = at_k(top, relevant, (K,))[f"ndcg@{K}"]
                found.setdefault(name, {})[question] = [float(np.nanmean(values)), *map(float, interval(values))]
                if question == "item":
                    pages = np.concatenate(
                        [rank(queries.take(np.arange(a, min(a + CHUNK, len(queries))))) for a in range(0, len(queries), CHUNK)]
                    )
                    here = pages >= 0
                    share = float(self.new_items[pages[here]].mean()) if here.any() else 0.0
                    found[name]["new share"] = [share, share, share]
        return found

    def _models(self) -> dict[str, Rank]:
        models: dict[str, Rank] = {name: _channel(channel) for name, channel in self.funnel.channels.items()}
        order = np.random.default_rng(0).permutation(len(self.new_items)).astype(np.int32)

        def chance(queries: Queries) -> np.ndarray:
            return _wide(first_of(order, queries, K))

        models |= {"merged": lambda q: _wide(self.funnel.recall(q).items), "chance": chance}
        if self.funnel.ranker is not None:
            models["funnel"] = lambda q: _wide(self.funnel.recommend(q).items)
        return models

    def _questions(self) -> list[tuple[str, Queries, Relevant, Mask | None]]:
        positives = self.all.positives()
        indptr, order = positives.by_user()
        at = float(self.left.time[-1])
        asked: dict[str, tuple[list[Query], list[set[int]]]] = {"user 0": ([], []), "user 1": ([], []), "item": ([], [])}

        def ask(question: str, user: int, history: np.ndarray, sought: np.ndarray) -> None:
            rows = set(sought.tolist()) - set(positives.item[history].tolist())
            if rows:
                names, items = self.all.users.outside([user]), positives.item[history]
                times = positives.time[history] if self.all.has_time else np.full(len(history), np.nan)
                asked[question][0].append(Query(names[0], user, k=K, at=at, items=items, times=times, exclude=np.unique(items)))
                asked[question][1].append(rows)

        none = np.empty(0, np.int64)
        for user in range(self.all.n_users):
            mine = order[indptr[user] : indptr[user + 1]]
            old = ~self.new_items[positives.item[mine]]
            if self.new_users[user]:
                mine = mine[old]
                if len(mine) > 1:
                    ask("user 0", user, none, positives.item[mine])
                    ask("user 1", user, mine[:1], positives.item[mine[1:]])
            elif old.any():
                ask("item", user, mine[old], positives.item[mine[~old]])
        length, new = self.config.history.length, Mask(self.new_items)
        return [
            (question, Queries.of(batch, history_length=length), Relevant.of(sought), new if question == "item" else None)
            for question, (batch, sought) in asked.items()
        ]


def _with(queries: Queries, mask: Mask | None) -> Queries:
    return queries if mask is None else replace(queries, allowed=Allowed((mask,), np.zeros(len(queries), np.int32)), memo={})


def _channel(channel: Any) -> Rank:
    return lambda queries: _wide(channel.recall(queries, K)[0])


def _wide(items: np.ndarray) -> np.ndarray:
    out = np.full((len(items), K), -1, np.int32)
    out[:, : min(K, items.shape[1])] = items[:, :K]
    return out


def _trainer(folder: Path) -> Any:
    def train(examples: Path, model: ModelConfig, training: TrainingConfig, *, name: str) -> Path:
        opened = Examples(examples)
        trained, fitted = train_locally(opened, model, training)
        out = folder / "models" / name
        save_model(out, trained.state_dict(), describe(model, opened, fitted))
        return out

    return train


def main() -> None:
    """Run, print a table a set, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one epoch of each model")
    parser.add_argument("--channels", action="store_true", help="channels alone: no model is trained")
    parser.add_argument("--sets", default="movielens,kuairand")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="dotted.path=value over the configurations")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    console, found = Console(width=120), {}
    settings = args.set + (["two_tower.training.epochs=1", "fine_rank.training.epochs=1"] if args.quick else [])
    scratch = Path(tempfile.mkdtemp(prefix="rayfunnel-cold-"))
    try:
        for name in args.sets.split(","):
            try:
                if name == "kuairand":
                    find_kuairand()
            except DataError as absent:
                console.print(f"{name} is left out: {absent}")
                continue
            found[name] = Cold(name, args.seed, settings, scratch / name, trained=not args.channels).rows()
            console.print(_table(name, found[name]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.json:
        print(json.dumps(found))


def _table(name: str, rows: dict[str, dict[str, list[float]]]) -> Table:
    columns = list(next(iter(rows.values())))
    table = Table("model", *columns, title=f"{name}: cold start, NDCG@{K}", title_justify="left")
    for model, values in rows.items():
        table.add_row(
            model,
            *(
                f"{values[c][0]:.4f}" if c == "new share" else f"{values[c][0]:.4f} [{values[c][1]:.4f}, {values[c][2]:.4f}]"
                for c in columns
            ),
        )
    return table


if __name__ == "__main__":
    main()
