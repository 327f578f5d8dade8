"""What a model is judged by after each epoch: AUC of a ranker, NDCG of a two-tower against the full catalogue.

Lookups are collective when tables are sharded, so every worker makes equally many forward calls on equally long
batches; each judges its share of the rows, and all end with the same numbers and so the same decision to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys import metrics
from recsys.batches import Batch, Examples, share_of
from recsys.models.layers import FieldIds
from recsys.workers import Workers

ROWS = 8192
"""Rows per forward call."""
SCORES = 1 << 24
"""Scores of users against all items held at a time (64 MB)."""

Forward = Callable[[Batch], Any]


@torch.no_grad()
def validate(forward: Forward, model: Any, examples: Examples, workers: Workers) -> dict[str, float]:
    """The validation metrics of a model of either task; {} where there are no validation rows."""
    if not examples.rows["valid"]:
        return {}
    return _two_tower(forward, model, examples, workers) if model.task == "two_tower" else _ranker(forward, model, examples, workers)


def _ranker(forward: Forward, model: Any, examples: Examples, workers: Workers) -> dict[str, float]:
    """auc, gauc (rows grouped by user), logloss, and moment_auc (rows grouped by moment) where the rows say their moment."""
    logits, columns = [], []
    for batch in examples.valid_batches(ROWS, rank=workers.rank, size=workers.size):
        logits.append(forward(batch).logit.cpu())
        columns.append(batch.columns)
    total = examples.rows["valid"]
    score = _gathered(logits, workers, total).astype(np.float64)
    label = _gathered([c[model.label] for c in columns], workers, total)
    found = {"auc": metrics.auc(label, score), "logloss": metrics.logloss(label, 1 / (1 + np.exp(-score)))}
    for name, group in (("gauc", "user"), ("moment_auc", "moment")):
        if group in columns[0]:
            found[name] = metrics.gauc(label, score, _gathered([c[group] for c in columns], workers, total))
    return found


def _gathered(parts: list[Tensor], workers: Workers, total: int) -> np.ndarray:
    """This and every other worker's share in the order of rows, without the padding at the end."""
    rows: np.ndarray = workers.gather_rows(torch.cat(parts)).cpu().numpy()[:total]
    return rows


def _two_tower(forward: Forward, model: Any, examples: Examples, workers: Workers) -> dict[str, float]:
    """ndcg@10 and recall@10 of each validation positive among all items but those of its row's history."""
    items = _catalogue(forward, examples, workers)  # (n_items, d)
    history = next(
        (f for f in model.user_fields if f.shape == "sequence" and "item_id" in examples.items and f.table == _table(examples)), None
    )
    id_rows = torch.from_numpy(np.array(examples.items["item_id"], np.int64)) if history is not None else torch.empty(0, dtype=torch.int64)
    step = max(1, SCORES // max(len(items), 1))
    ranks = []
    for batch in examples.valid_batches(ROWS, rank=workers.rank, size=workers.size):
        users, target = forward(batch).user.cpu(), batch.columns["item"].long()
        for at in range(0, len(users), step):
            part = slice(at, at + step)
            seen = None if history is None else _seen(batch.ids[history.name][part].long(), id_rows)
            ranks.append(_ranks(users[part], items, target[part], seen))
    rank = _gathered(ranks, workers, examples.rows["valid"])
    inside = rank < 10
    return {"ndcg@10": float(np.mean(inside / np.log2(rank + 2.0))), "recall@10": float(inside.mean())}


def _table(examples: Examples) -> str:
    return next((f.table for f in examples.fields if f.name == "item_id"), "")


def _seen(history: Tensor, id_rows: Tensor) -> Tensor:
    """(b, L) table rows of histories and (n_items,) table row of each item -> (b, n_items) whether a history holds the item."""
    had = torch.zeros(len(history), int(max(id_rows.max(), history.max())) + 1, dtype=torch.bool)
    had.scatter_(1, history, True)
    had[:, 0] = False  # padding
    return had[:, id_rows]


def _ranks(users: Tensor, items: Tensor, target: Tensor, seen: Tensor | None) -> Tensor:
    """(b, d) users -> (b,) 0-based rank of each target among the items not seen; a tie counts as lost to half of the tied."""
    scores = users @ items.T  # (b, n_items)
    rows = torch.arange(len(users))
    own = scores[rows, target][:, None]
    if seen is not None:
        scores.masked_fill_(seen, -torch.inf)
    scores[rows, target] = -torch.inf
    return (scores > own).sum(1) + (scores == own).sum(1) // 2


def _catalogue(forward: Forward, examples: Examples, workers: Workers) -> Tensor:
    """(n_items, d) vectors of all items, each worker computing its share."""
    n = len(next(iter(examples.items.values())))
    share, parts = share_of(n, workers.size), []
    for start in range(0, share, ROWS):
        rows = np.minimum(workers.rank * share + np.arange(start, min(start + ROWS, share)), n - 1)
        parts.append(forward(_item_batch(examples, rows)).item.cpu())
    return workers.gather_rows(torch.cat(parts))[:n]


def _item_batch(examples: Examples, rows: np.ndarray) -> Batch:
    """Catalogue rows as a batch whose user side is empty."""
    ids, dense = FieldIds(), torch.zeros(len(rows), sum(f.width for f in examples.fields if f.shape == "dense"))
    at = 0
    for f in examples.fields:
        column = torch.from_numpy(np.asarray(examples.items[f.name][rows])) if f.name in examples.items else None
        if f.shape != "dense":
            empty = (len(rows),) if f.shape == "one" else (len(rows), f.width)
            ids[f.name] = torch.zeros(empty, dtype=torch.int32) if column is None else column
        else:
            if column is not None:
                dense[:, at : at + f.width] = column.reshape(len(rows), -1)
            at += f.width
    return Batch(ids, dense)
