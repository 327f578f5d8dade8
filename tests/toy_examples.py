"""A toy examples folder for training tests: 60 users, 40 items, a taste by parity, and every shape of field.

Users like items of their own parity. `history` shares the table of `item_id`; `tags` is a bag; `price` and `evidence` are
dense; dims differ, so that every road through the models is walked.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.features.schema import Field

USERS, ITEMS, HISTORY, GRANULE = 60, 40, 6, 32
QUERY_FIELDS = (
    Field("user_id", "user", "one", "user_id", USERS + 2, 8),
    Field("history", "user", "sequence", "item_id", ITEMS + 2, 8, HISTORY),
    Field("hour", "context", "one", "hour", 25, 4),
)
ITEM_FIELDS = (
    Field("price", "item", "dense", "", 0, 0),
    Field("item_id", "item", "one", "item_id", ITEMS + 2, 8),
    Field("tags", "item", "bag", "tags", 11, 4, 3, "sum"),
)
PAIR_FIELDS = (Field("evidence", "candidate", "dense", "", 0, 0, 3),)
TOWER_FIELDS = QUERY_FIELDS + ITEM_FIELDS
RANKER_FIELDS = QUERY_FIELDS + ITEM_FIELDS + PAIR_FIELDS
Columns = dict[str, np.ndarray]


def item_columns(seed: int = 7) -> Columns:
    """Encoded item columns by row."""
    rng = np.random.default_rng(seed)
    return {
        "item_id": np.arange(2, ITEMS + 2, dtype=np.int32),
        "tags": rng.integers(0, 11, (ITEMS, 3)).astype(np.int32),
        "price": rng.normal(size=ITEMS).astype(np.float32),
    }


def moments(n: int, rng: np.random.Generator) -> tuple[Columns, np.ndarray, np.ndarray]:
    """(query-side columns, user rows, rows of items they like) of n moments."""
    user = rng.integers(0, USERS, n)
    liked = rng.integers(0, ITEMS // 2, n) * 2 + user % 2
    past = rng.integers(0, ITEMS // 2, (n, HISTORY)) * 2 + (user % 2)[:, None] + 2
    columns = {
        "user_id": (user + 2).astype(np.int32),
        "history": np.where(rng.random((n, HISTORY)) < 0.3, 0, past).astype(np.int32),
        "hour": rng.integers(0, 25, n).astype(np.int32),
    }
    return columns, user, liked


def tower_rows(n: int, seed: int) -> Columns:
    """Positives for a two-tower."""
    columns, user, item = moments(n, np.random.default_rng(seed))
    columns |= {name: c[item] for name, c in item_columns().items()}
    return columns | {"user": user.astype(np.int32), "item": item.astype(np.int32), "log_q": np.full(n, -np.log(ITEMS), np.float32)}


def ranker_rows(n: int, seed: int) -> Columns:
    """Liked items and, as often, their neighbours of the other parity; a tenth of the labels is turned."""
    rng = np.random.default_rng(seed)
    columns, user, liked = moments(n, rng)
    negative, turned = rng.random(n) < 0.5, rng.random(n) < 0.1
    item = np.where(negative, liked ^ 1, liked)
    columns |= {name: c[item] for name, c in item_columns().items()}
    columns |= {"evidence": rng.normal(size=(n, 3)).astype(np.float32), "user": user.astype(np.int32), "item": item.astype(np.int32)}
    return columns | {"label": (negative == turned).astype(np.float32)}


def write(folder: Path, task: str, *, train: int = 1024, valid: int = 300, granule: int = GRANULE, changed: Columns | None = None) -> Path:
    """An examples folder of either task; `changed` replaces columns of the training part."""
    rows, fields = (tower_rows, TOWER_FIELDS) if task == "two_tower" else (ranker_rows, RANKER_FIELDS)
    folder.mkdir(parents=True, exist_ok=True)
    for part, n, seed in (("train", train, 1), ("valid", valid, 2)):
        columns = rows(n, seed) | ((changed or {}) if part == "train" else {})
        table = pa.table({name: _arrow(c) for name, c in columns.items()})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=granule, compression="none", use_dictionary=False)
    if task == "two_tower":
        (folder / "items").mkdir(exist_ok=True)
        for name, c in item_columns().items():
            np.save(folder / "items" / f"{name}.npy", c)
    schema = {
        "fields": [asdict(f) for f in fields],
        "labels": [] if task == "two_tower" else ["label"],
        "task": task,
        "rows": {"train": train, "valid": valid},
        "granule": granule,
        "seed": 0,
    }
    (folder / "schema.json").write_text(json.dumps(schema))
    return folder


def _arrow(c: np.ndarray) -> pa.Array:
    return pa.array(c) if c.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(c.reshape(-1)), c.shape[1])
