"""Weights of one version as the beginning of the next: tables grow by id, everything else is taken as it is.

Rows of a table are numbered anew with every fit, so they go by what they stand for. An id that the old version did not know
begins as what it was served as until now: the row of its hash bucket. Where more than ids differ (another model, another
feature, another width) nothing is taken over, and a sentence says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from recsys.core import UNKNOWN
from recsys.features.encoders import Table
from recsys.features.schema import Field
from recsys.training import ModelConfig

TABLES = "embeddings.tables."
"""Prefix of a table in a saved model, of every model."""
Tables = Mapping[str, Table]
State = dict[str, Tensor]


def difference(folder: Path, fields: Sequence[Field], model: ModelConfig) -> str | None:
    """Why the weights in a model folder cannot be the beginning of a model of these fields; None where they can."""
    saved = json.loads((folder / "model.json").read_text())
    if saved["model"] != model.model_dump(mode="json"):
        return f"the serving version's {saved['model'].get('type', 'model')} is configured otherwise than this {model.type}"
    old = [_shape(Field(**f)) for f in saved["fields"]]
    new = [_shape(f) for f in fields]
    if old != new:
        names = [{str(s[0]) for s in side} for side in (old, new)]
        if gone := sorted(names[0] ^ names[1]):
            return f"the features of its inputs differ: {', '.join(gone)}"
        changed = [str(a[0]) for a, b in zip(sorted(old, key=str), sorted(new, key=str), strict=True) if a != b]
        return f"its inputs have another width or order: {', '.join(changed) or 'order'}"
    return None


def _shape(f: Field) -> tuple[object, ...]:
    return (f.name, f.side, f.shape, f.table, f.dim, f.width, f.combiner)


def grown(folder: Path, old: Tables, new: Tables, fields: Sequence[Field]) -> State | str:
    """The weights of a model folder for `fields`, tables of `new` taking the rows of `old` by value; or why that cannot be."""
    out: State = {}
    sizes = {f.table: f.size for f in fields if f.table}
    for name, weight in load_file(folder / "model.safetensors").items():
        table = name.removeprefix(TABLES)
        if not name.startswith(TABLES):
            out[name] = weight
        elif table in old and table in new:
            if old[table].buckets != new[table].buckets:
                return f"table '{table}' has {new[table].buckets} hash buckets, the serving version's {old[table].buckets}"
            out[name] = weight[torch.from_numpy(rows_of(old[table], new[table]))]
        elif len(weight) == sizes.get(table, -1):
            out[name] = weight
        else:
            return f"table '{table}' has {sizes.get(table, 0)} rows, the serving version's {len(weight)}, and its rows have no ids"
    return out


def rows_of(old: Table, new: Table) -> np.ndarray:
    """(new.size,) int64: the old row that each new one begins as."""
    first = np.arange(1 + new.buckets)
    known = old.rows(new.known.outside(np.arange(len(new.known)))) if len(new.known) else np.empty(0, np.int32)
    return np.concatenate([first, known.astype(np.int64)])


def new_ids(old: Table, new: Table) -> int:
    """How many values of a table the old one did not know."""
    return int((old.known.rows(new.known.outside(np.arange(len(new.known)))) == UNKNOWN).sum()) if len(new.known) else 0
