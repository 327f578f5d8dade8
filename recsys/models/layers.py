"""What every model is built from: the embedding tables of a schema's fields, and the perceptron above them.

A model is written for one device and asks a `FieldEmbeddings` for its fields. The one here holds plain tables; training
hands in the one of `cluster/sharding.py`, which holds the same tables under the same names, spread over workers.
The trap: a stored row is wider than the embedding. First-order weights ride in the same row (one lookup and one
optimiser update serve both), and rows are padded to a multiple of 4 floats because FBGEMM wants that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.features.schema import Field

ROW_MULTIPLE = 4
INIT_BLOCK = 65_536
"""Rows initialised from one seed: a shard draws only the blocks it holds, and every sharding draws the same numbers."""


@dataclass(frozen=True)
class Table:
    """One embedding table: `size` rows of `width` floats = `dim` embedding, one first-order weight per field of `linear`, padding."""

    name: str
    size: int
    dim: int
    linear: tuple[str, ...]

    @property
    def width(self) -> int:
        """Floats per stored row."""
        return -(-(self.dim + len(self.linear)) // ROW_MULTIPLE) * ROW_MULTIPLE


def tables_of(fields: Sequence[Field], *, embed: bool = True, linear: bool = False) -> tuple[Table, ...]:
    """The tables behind `fields`, in the order of first use. Fields that share a table must agree on its size and dim."""
    users: dict[str, list[Field]] = {}
    for f in fields:
        if f.shape != "dense":
            users.setdefault(f.table, []).append(f)
    tables = []
    for name, sharing in users.items():
        if len({(f.size, f.dim) for f in sharing}) > 1:
            said = ", ".join(f"{f.name} ({f.size} x {f.dim})" for f in sharing)
            raise ConfigError(f"Fields share table '{name}' but disagree on its size or dim: {said}. Give them one.")
        tables.append(Table(name, sharing[0].size, sharing[0].dim if embed else 0, tuple(f.name for f in sharing) if linear else ()))
    return tuple(tables)


def init_rows(table: Table, start: int, stop: int, *, std: float, seed: int) -> Tensor:
    """Rows [start, stop) of a table before training, (stop-start, width) float32: N(0, std), padding 0.

    Equal for every sharding and number of workers: the numbers depend on (seed, table name, block of rows) alone.
    """
    blocks = []
    for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        key = hashlib.blake2b(f"{seed}/{table.name}/{block}".encode(), digest_size=7).digest()
        rows = min(INIT_BLOCK, table.size - block * INIT_BLOCK)
        drawn = torch.empty(rows, table.width).normal_(0.0, std, generator=torch.Generator().manual_seed(int.from_bytes(key, "little")))
        drawn[:, table.dim + len(table.linear) :] = 0.0
        blocks.append(drawn[max(0, start - block * INIT_BLOCK) : stop - block * INIT_BLOCK])
    return torch.cat(blocks) if blocks else torch.empty(0, table.width)


class FieldIds(dict[str, Tensor]):
    """Encoded fields of a batch by name: `one` -> (B,) and `bag`/`sequence` -> (B, W), integers.

    `stacked` holds the `one` fields once more as the (F, B) block whose rows they are: a KeyedJaggedTensor is exactly
    that block, so the hot path copies nothing.
    """

    stacked: Tensor | None = None
    stacked_names: tuple[str, ...] = ()


@dataclass
class Embedded:
    """Rows looked up for a batch. `values` (B, ΣW) holds the pooled fields side by side in the order of `widths`;
    `sequence` holds (B, L, W) for fields whose combiner is `none`, zeros where `mask` (B, L) is False (padding)."""

    values: Tensor
    widths: dict[str, int]
    sequence: dict[str, Tensor] = field(default_factory=dict)
    mask: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def pooled(self) -> dict[str, Tensor]:
        """Field -> (B, W) view of `values`."""
        return dict(zip(self.widths, self.values.split(list(self.widths.values()), dim=1), strict=True))


SPARSE_FROM = 65_536
"""Rows above which a plain table's gradient may be sparse: sorting a batch's ids costs more than a small table (2 of 4 s an epoch)."""


class FieldEmbeddings(nn.Module):
    """Plain tables on one device: the meaning that every other implementation must reproduce.

    `one`: its row. Bags and sequences: mean or sum of the rows that are not padding (row 0); an empty bag is a zero
    vector. `none`: the rows themselves. Fields missing from `ids` give zeros, so that one tower can be asked alone.
    """

    def __init__(self, fields: Sequence[Field], tables: Sequence[Table], *, std: float, seed: int, sparse: bool = False) -> None:
        super().__init__()
        self.fields = tuple(f for f in fields if f.shape != "dense")
        self.pooled_fields = tuple(f for f in self.fields if f.combiner != "none")
        self.width = {t.name: t.width for t in tables}
        self.sparse = sparse
        self.tables = nn.ParameterDict({t.name: nn.Parameter(init_rows(t, 0, t.size, std=std, seed=seed)) for t in tables})

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        rows = self.tables[table]
        return nn.functional.embedding(ids.long(), rows, sparse=self.sparse and len(rows) > SPARSE_FROM)

    def forward(self, ids: Mapping[str, Tensor], B: int) -> Embedded:
        """Look every field of `ids`, of B rows each, up. Raises IndexError for an id outside its table."""
        columns, sequence, mask = [], {}, {}
        for f in self.fields:
            width = self.width[f.table]
            if f.name not in ids:
                if f.combiner != "none":
                    columns.append(self.tables[f.table].new_zeros(B, width))
                continue
            given = ids[f.name]
            rows = self._rows(f.table, given)
            if f.shape == "one":
                columns.append(rows)
                continue
            real = given != 0
            rows = rows * real.unsqueeze(-1)  # (B, L, W)
            if f.combiner == "none":
                sequence[f.name], mask[f.name] = rows, real
            else:
                total = rows.sum(1)
                columns.append(total / real.sum(1, keepdim=True).clamp_min(1) if f.combiner == "mean" else total)
        values = torch.cat(columns, dim=1) if columns else torch.zeros(B, 0)
        return Embedded(values, {f.name: self.width[f.table] for f in self.pooled_fields}, sequence, mask)


EmbeddingFactory = Callable[[Sequence[Field], Sequence[Table], float, int], nn.Module]
"""(fields, tables, std, seed) -> a module with FieldEmbeddings' `forward`: (ids, rows of the batch) -> Embedded."""


def plain_tables(fields: Sequence[Field], tables: Sequence[Table], std: float, seed: int) -> nn.Module:
    """The factory of one-device training and serving."""
    return FieldEmbeddings(fields, tables, std=std, seed=seed)


def sparse_tables(fields: Sequence[Field], tables: Sequence[Table], std: float, seed: int) -> nn.Module:
    """Plain tables whose gradients are sparse where they are large: an update costs what the batch touched, not the whole table."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns until one says yes or no
    return FieldEmbeddings(fields, tables, std=std, seed=seed, sparse=True)


def mean_pool(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, L, W) rows with zeros in the padding and their (B, L) mask -> (B, W)."""
    return rows.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, *, dropout: float = 0.0) -> nn.Sequential:
    """Linear + ReLU (+ dropout) per hidden width, then a plain linear layer; no hidden widths: one linear layer."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
