"""Embedding tables spread over workers by TorchRec, behind the same `forward` as the plain tables of `recsys.models.layers`.

Every table that can goes through FBGEMM's fused kernel (lookup, backward and optimiser in one), a single worker included.
Facts that cost days: the CPU planner does not offer row-wise for bags, though it trains correctly there, hence the sharder
subclass; an EmbeddingCollection cannot be data-parallel on CPU and dense data-parallel bags are 8x slower and warn of
wrong gradients, hence replicated tables are plain modules under DDP; mean pooling is a sum divided here, because row-wise
shards can only sum; FBGEMM on CPU knows Adagrad, row-wise Adagrad and SGD, no Adam.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.features.schema import Field
from recsys.models.layers import Embedded, FieldEmbeddings, FieldIds, Table, init_rows
from recsys.training import EPSILON, TrainingConfig, dense_optimizer, table_optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they use what torch has deprecated
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward as optimise_in_backward
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.modules.embedding_configs import PoolingType
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

META = torch.device("meta")
TABLES = "embeddings.tables."
"""Prefix of a table's weight in a plain model's state."""


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted({*super().sharding_types(compute_device_type), "row_wise"})


class ShardedFieldEmbeddings(nn.Module):
    """The tables of some fields: `bags` pooled by FBGEMM, `sequences` for tables some model attends to, `replicated` under DDP."""

    def __init__(self, fields: Sequence[Field], tables: Sequence[Table], *, std: float, seed: int, replicate: set[str]) -> None:
        super().__init__()
        self.fields = tuple(f for f in fields if f.shape != "dense")
        self.pooled_fields = tuple(f for f in self.fields if f.combiner != "none")
        self.all_tables, self.std, self.seed = {t.name: t for t in tables}, std, seed
        attended = {f.table for f in self.fields if f.combiner == "none"}
        bags = [t for t in tables if t.name not in attended | replicate]
        sequences = [t for t in tables if t.name in attended - replicate]
        copies = [t for t in tables if t.name in replicate]
        users = {t.name: [f for f in self.fields if f.table == t.name] for t in tables}
        self.bag_fields = tuple(f for t in bags for f in users[t.name])
        self.sequence_fields = tuple(f for t in sequences for f in users[t.name])
        self.copied_fields = tuple(f for t in copies for f in users[t.name])
        self.bags = self.sequences = self.replicated = None
        if bags:
            self.bags = EmbeddingBagCollection(
                device=META, tables=[EmbeddingBagConfig(**_config(t, users[t.name]), pooling=PoolingType.SUM) for t in bags]
            )
        if sequences:
            self.sequences = EmbeddingCollection(device=META, tables=[EmbeddingConfig(**_config(t, users[t.name])) for t in sequences])
        if copies:
            self.replicated = FieldEmbeddings(self.copied_fields, copies, std=std, seed=seed)
        self.direct = self.bag_fields == self.pooled_fields == self.fields and all(f.shape == "one" for f in self.fields)
        self._ones: Tensor = torch.empty(0, dtype=torch.int32)

    def forward(self, ids: Mapping[str, Tensor], B: int) -> Embedded:
        """As FieldEmbeddings.forward; a collective call where tables are sharded."""
        widths = {f.name: self.all_tables[f.table].width for f in self.pooled_fields}
        if self.direct and isinstance(ids, FieldIds) and ids.stacked is not None and self.bags is not None:
            names = tuple(f.name for f in self.fields)
            if ids.stacked_names == names and len(ids.stacked[0]) == B:
                return Embedded(_now(self.bags(self._stacked(names, ids.stacked))).values(), widths)
        pooled: dict[str, Tensor] = {}
        sequence: dict[str, Tensor] = {}
        mask: dict[str, Tensor] = {}
        if self.bags is not None:
            pooled |= self._pooled(ids, B)
        if self.sequences is not None:
            self._attended(ids, B, pooled, sequence, mask)
        if self.replicated is not None:
            copied = self.replicated(ids, B)
            pooled, sequence, mask = pooled | copied.pooled, sequence | copied.sequence, mask | copied.mask
        values = torch.cat([pooled[n] for n in widths], dim=1) if widths else torch.zeros(B, 0)
        return Embedded(values, widths, sequence, mask)

    def _stacked(self, names: tuple[str, ...], block: Tensor) -> KeyedJaggedTensor:
        if len(self._ones) != block.numel():
            self._ones = torch.ones(block.numel(), dtype=torch.int32)
        return KeyedJaggedTensor(keys=list(names), values=block.view(-1), lengths=self._ones)

    def _pooled(self, ids: Mapping[str, Tensor], B: int) -> dict[str, Tensor]:
        jagged, lengths = _jagged(self.bag_fields, ids, B)
        found = _now(self.bags(jagged)).to_dict()  # type: ignore[misc]
        for f in self.bag_fields:
            if f.shape != "one" and f.combiner == "mean":
                found[f.name] = found[f.name] / lengths[f.name].clamp_min(1)[:, None]
        return {f.name: found[f.name] for f in self.bag_fields}

    def _attended(
        self, ids: Mapping[str, Tensor], B: int, pooled: dict[str, Tensor], sequence: dict[str, Tensor], mask: dict[str, Tensor]
    ) -> None:
        jagged, lengths = _jagged(self.sequence_fields, ids, B)
        found = _now(self.sequences(jagged))  # type: ignore[misc]
        for f in self.sequence_fields:
            rows = found[f.name].values()  # (real ids, W)
            if f.name not in ids:
                if f.combiner != "none":
                    pooled[f.name] = rows.new_zeros(B, rows.shape[1]) + 0 * rows.sum()
                continue
            if f.shape == "one":
                pooled[f.name] = rows
                continue
            real = ids[f.name] != 0
            full = rows.new_zeros(*real.shape, rows.shape[1]).index_put((real,), rows)  # (B, L, W)
            if f.combiner == "none":
                sequence[f.name], mask[f.name] = full, real
            else:
                total = full.sum(1)
                pooled[f.name] = total / lengths[f.name].clamp_min(1)[:, None] if f.combiner == "mean" else total


def _config(table: Table, users: Sequence[Field]) -> dict[str, Any]:
    return {
        "name": table.name,
        "embedding_dim": table.width,
        "num_embeddings": table.size,
        "feature_names": [f.name for f in users],
        "init_fn": nn.init.zeros_,  # `fill_tables` draws the numbers, equal for every sharding
    }


def _now(result: Any) -> Any:
    """A sharded module answers with a promise, an unsharded one with the answer."""
    return result.wait() if hasattr(result, "wait") else result


def _jagged(fields: Sequence[Field], ids: Mapping[str, Tensor], B: int) -> tuple[KeyedJaggedTensor, dict[str, Tensor]]:
    values, lengths = [], {}
    for f in fields:
        given = ids.get(f.name)
        if given is None:
            lengths[f.name] = torch.zeros(B, dtype=torch.int32)
        elif f.shape == "one":
            values.append(given.int())
            lengths[f.name] = torch.ones(B, dtype=torch.int32)
        else:
            real = given != 0
            values.append(given[real].int())
            lengths[f.name] = real.sum(1, dtype=torch.int32)
    joined = torch.cat(values) if values else torch.empty(0, dtype=torch.int32)
    return KeyedJaggedTensor(keys=[f.name for f in fields], values=joined, lengths=torch.cat(list(lengths.values()))), lengths


class ProcessGroupWorkers:
    """`recsys.workers.Workers` over torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All workers' rows in order of rank; the gradient of each returns to the worker that made it."""
        return rows if self.size == 1 else _GatherRows.apply(rows)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over workers."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


class Sharding:
    """A model whose tables are spread over the present process group, its optimisers, and its state under plain names.

    build -> `model` (bare, for losses), `wrapped` (what a step calls), `optimizers` (those that are stepped by hand).
    """

    def __init__(self, config: TrainingConfig, *, device: torch.device | None = None) -> None:
        self.config, self.device = config, device or torch.device("cpu")
        self.size = dist.get_world_size()

    def tables(self, fields: Sequence[Field], tables: Sequence[Table], std: float, seed: int) -> nn.Module:
        """The EmbeddingFactory."""
        unknown = sorted(set(self.config.sharding_by_table) - {t.name for t in tables})
        if unknown:
            raise ConfigError(
                f"training.sharding_by_table names {unknown}, which are no tables. Known: {', '.join(sorted(t.name for t in tables))}."
            )
        replicate = {t.name for t in tables if self._kind(t.name) == "data_parallel"}
        if self.config.embedding_optimizer == "rowwise_adagrad" and any(self._kind(t.name) == "column_wise" for t in tables):
            raise ConfigError(
                "column_wise tables cannot use rowwise_adagrad: each shard would keep its own moments. Use adagrad, or row_wise."
            )
        return ShardedFieldEmbeddings(fields, tables, std=std, seed=seed, replicate=replicate)

    def _kind(self, table: str) -> str:
        kind = self.config.sharding_by_table.get(table, self.config.sharding)
        return "table_wise" if self.size == 1 else kind  # one worker holds everything either way, and the fused kernel is faster

    def apply(self, model: Any) -> None:
        """Shard `model` (built with `tables`), wrap it, fill its tables, make its optimisers."""
        self.model, self.embeddings = model, model.embeddings
        fused = [p for part in (self.embeddings.bags, self.embeddings.sequences) if part is not None for p in part.parameters()]
        copied = list(self.embeddings.replicated.parameters()) if self.embeddings.replicated is not None else []
        taken = {id(p) for p in (*fused, *copied)}
        self.dense = {name: p for name, p in model.named_parameters() if id(p) not in taken}
        lr = self.config.embedding_learning_rate or self.config.learning_rate
        if fused:
            kinds: dict[str, tuple[Any, dict[str, float]]] = {
                "adagrad": (torch.optim.Adagrad, {"lr": lr, "eps": EPSILON}),
                "rowwise_adagrad": (RowWiseAdagrad, {"lr": lr, "eps": EPSILON}),
                "sgd": (torch.optim.SGD, {"lr": lr}),
            }
            optimizer, arguments = kinds[self.config.embedding_optimizer]
            optimise_in_backward(optimizer, fused, arguments)
        self.wrapped: Any = self._wrap(model)
        self.dense_optimizer = dense_optimizer(list(self.dense.values()), self.config)
        self.copied_optimizer = table_optimizer(copied, self.config) if copied else None
        self.optimizers = [o for o in (self.dense_optimizer, self.copied_optimizer) if o is not None]
        _fill_lazy_state(self.dense_optimizer)
        self._fill_tables()

    def _wrap(self, model: nn.Module) -> nn.Module:
        sharders: list[Any] = [_BagSharder(), EmbeddingCollectionSharder()]
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=self.size, local_world_size=self.size, compute_device=self.device.type),
            constraints={name: self._constraint(t) for name, t in self.embeddings.all_tables.items()},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchrec's own deprecations
            plan = planner.collective_plan(model, sharders, dist.group.WORLD)
            wrapped: nn.Module = DistributedModelParallel(
                model, device=self.device, plan=plan, sharders=sharders, init_data_parallel=self.size > 1
            )
            return wrapped

    def _constraint(self, table: Table) -> ParameterConstraints:
        kind = self._kind(table.name)
        if kind == "planner":
            return ParameterConstraints(sharding_types=["table_wise", "column_wise", "row_wise"])
        if kind == "column_wise":
            share = -(-table.width // (4 * self.size)) * 4  # FBGEMM wants every shard a multiple of 4 wide
            return ParameterConstraints(sharding_types=["column_wise"], min_partition=share)
        return ParameterConstraints(sharding_types=[kind] if kind != "data_parallel" else None)

    def _fill_tables(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights().items():
                table = self.embeddings.all_tables[name]
                for part, (row, column) in _local_parts(weight):
                    rows = init_rows(table, row, row + part.shape[0], std=self.embeddings.std, seed=self.embeddings.seed)
                    part.copy_(rows[:, column : column + part.shape[1]])

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a saved model of these fields; each worker copies the part that it holds."""
        with torch.no_grad():
            for name, weight in self._weights().items():
                for part, (row, column) in _local_parts(weight):
                    part.copy_(weights[f"{TABLES}{name}"][row : row + part.shape[0], column : column + part.shape[1]])
            if self.embeddings.replicated is not None:
                for name, p in self.embeddings.replicated.tables.items():
                    p.copy_(weights[f"{TABLES}{name}"])
            for name, p in self.dense.items():
                p.copy_(weights[name])

    def _weights(self) -> dict[str, Any]:
        """Fused tables by name."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = self.wrapped.state_dict()
        return {key.split(".")[-2]: value for key, value in state.items() if key.startswith(("embeddings.bags.", "embeddings.sequences."))}

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state under names that do not depend on the sharding; loading writes into these very tensors."""
        out: dict[str, Any] = {f"{TABLES}{name}": weight for name, weight in self._weights().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moments = self.wrapped.fused_optimizer.state_dict()["state"] if out else {}
        for of_table in moments.values():
            for key, value in of_table.items():
                name, _, kind = key.rpartition(".")
                if kind.startswith("momentum"):
                    out[f"optimizer.{TABLES}{name}.sum"] = value
        if self.copied_optimizer is not None:
            for name, p in self.embeddings.replicated.tables.items():
                out[f"{TABLES}{name}"] = p.data
                out |= {f"optimizer.{TABLES}{name}.{k}": v for k, v in self.copied_optimizer.state[p].items() if k == "sum"}
        for name, p in self.dense.items():
            out[name] = p.data
            out |= {f"optimizer.{name}.{k}": v for k, v in self.dense_optimizer.state[p].items() if torch.is_tensor(v)}
        return out


def _local_parts(weight: Any) -> list[tuple[Tensor, tuple[int, int]]]:
    """The parts of a table held here, each with the row and column where it begins."""
    if not hasattr(weight, "local_shards"):
        return [(weight, (0, 0))]
    return [(s.tensor, (s.metadata.shard_offsets[0], s.metadata.shard_offsets[1])) for s in weight.local_shards()]


def _fill_lazy_state(optimizer: torch.optim.Optimizer) -> None:
    """Adam makes its state in the first step; a checkpoint is loaded into existing tensors, so make it now."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
