"""Click models: DeepFM (Guo et al., 2017, arXiv:1703.04247) and logistic regression, on the same fields.

DeepFM: y = w·x + FM(e_1..e_F) + MLP([e_1..e_F, dense]), first order, FM and MLP on one set of embeddings. Dense fields
enter the first-order part and the MLP. Fields whose width is not the model's `dim` are projected to it for the FM part.
Logistic regression is the first-order part alone: an embedding of width one is a weight per one-hot column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field as Bound
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from recsys.batches import Batch
from recsys.core import FrozenConfig
from recsys.errors import ConfigError
from recsys.evidence import EVIDENCE
from recsys.features.schema import Field
from recsys.models.layers import Embedded, EmbeddingFactory, mean_pool, mlp, plain_tables, tables_of
from recsys.workers import Workers


class Scores(NamedTuple):
    """logit (B,) and the rows looked up, for regularisation and for naming what went wrong."""

    logit: Tensor
    embedded: Embedded


class CTRModel(nn.Module):
    """What LR and DeepFM share: the label, the loss, the first-order part.

    Weights of a field ride at the end of its row; `first_order` picks them out with one matrix-vector product.
    """

    task = "ranker"
    mask: Tensor

    def __init__(
        self, fields: Sequence[Field], config: CTRConfig, *, embed: bool, std: float, seed: int, factory: EmbeddingFactory
    ) -> None:
        super().__init__()
        self.fields, self.label, self.l2 = tuple(fields), config.label, config.l2
        self.tables = {t.name: t for t in tables_of(self.fields, embed=embed, linear=True)}
        self.embeddings = factory(self.fields, tuple(self.tables.values()), std, seed)
        torch.manual_seed(seed)
        self.looked_up = tuple(f for f in self.fields if f.shape != "dense")
        self.n_dense = sum(f.width for f in self.fields if f.shape == "dense")
        self.bias = nn.Parameter(torch.zeros(1))
        self.dense_weight = nn.Parameter(first_weights(self.fields, config.coarse_start)) if self.n_dense else None
        columns = []
        for f in self.looked_up:
            column = torch.zeros(self.tables[f.table].width)
            column[self.tables[f.table].dim + self.tables[f.table].linear.index(f.name)] = 1.0
            columns.append(column)
        self.register_buffer("mask", torch.cat([*columns, torch.empty(0)]), persistent=False)  # (ΣW,)

    def rows(self, embedded: Embedded) -> Tensor:
        """(B, ΣW) rows of all fields; a field that a sequence model would attend to is mean pooled here."""
        if not embedded.sequence:
            return embedded.values
        return torch.cat([self.field_rows(embedded, f) for f in self.looked_up], dim=1)

    def field_rows(self, embedded: Embedded, f: Field) -> Tensor:
        """(B, W) rows of one field, pooled."""
        if f.name in embedded.sequence:
            return mean_pool(embedded.sequence[f.name], embedded.mask[f.name])
        return embedded.pooled[f.name]

    def dense_logit(self, dense: Tensor) -> Tensor:
        """(B, C) dense values -> (B,) or (1,): bias + w·dense."""
        return self.bias if self.dense_weight is None else dense @ self.dense_weight + self.bias

    def loss(self, scores: Scores, batch: Batch, workers: Workers) -> Tensor:  # noqa: ARG002 - every model's loss has this shape
        """Mean binary cross-entropy, plus l2/2 times the mean squared norm of the rows looked up."""
        loss = nn.functional.binary_cross_entropy_with_logits(scores.logit, batch.columns[self.label])
        if self.l2:
            rows = self.rows(scores.embedded)
            loss = loss + 0.5 * self.l2 * rows.square().sum() / len(rows)
        return loss


def first_weights(fields: Sequence[Field], coarse_start: float) -> Tensor:
    """(C,) first-order weights of the dense columns before training: 0, but for the coarse score, the last column of `evidence`."""
    parts = [torch.zeros(f.width) for f in fields if f.shape == "dense"]
    for f, weights in zip((f for f in fields if f.shape == "dense"), parts, strict=True):
        if f.name == EVIDENCE:
            weights[-1] = coarse_start
    return torch.cat(parts)


class CTRConfig(FrozenConfig):
    """What the configurations of all rankers share."""

    type: str
    label: str = "label"
    """The label column it learns."""
    l2: NonNegativeFloat = 0.0
    """Penalty on the embeddings and first-order weights that a batch looks up. Small logs want 1e-5 to 1e-3."""
    coarse_start: NonNegativeFloat = 4.0
    """First-order weight of the coarse score (in the feature `evidence`) before training: the ranker begins at the coarse order and
    learns what to change. 0: from nothing, which small logs do not make good."""


class LogisticRegressionConfig(CTRConfig):
    type: Literal["lr"] = "lr"

    def build(self, fields: Sequence[Field], *, seed: int = 0, factory: EmbeddingFactory = plain_tables) -> LogisticRegression:
        """An untrained model over these fields."""
        return LogisticRegression(self, fields, seed=seed, factory=factory)


class LogisticRegression(CTRModel):
    """logit = bias + Σ w[field, id] + w·dense."""

    def __init__(self, config: LogisticRegressionConfig, fields: Sequence[Field], *, seed: int, factory: EmbeddingFactory) -> None:
        super().__init__(fields, config, embed=False, std=0.0, seed=seed, factory=factory)
        self.config = config

    def forward(self, batch: Batch) -> Scores:
        """(B,) logits."""
        embedded = self.embeddings(batch.ids, len(batch))
        return Scores(self.rows(embedded) @ self.mask + self.dense_logit(batch.dense), embedded)


class DeepFMConfig(CTRConfig):
    type: Literal["deepfm"] = "deepfm"
    dim: PositiveInt = 16
    """Width of the FM part. Fields of another width are projected to it, without bias."""
    hidden: tuple[PositiveInt, ...] = (128, 64)
    """Widths of the perceptron's hidden layers."""
    dropout: float = Bound(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training. Any value above 0 makes runs with different numbers of workers differ."""
    init_std: NonNegativeFloat = 1e-4
    """Standard deviation of the embeddings before training."""

    def build(self, fields: Sequence[Field], *, seed: int = 0, factory: EmbeddingFactory = plain_tables) -> DeepFM:
        """An untrained model over these fields."""
        return DeepFM(self, fields, seed=seed, factory=factory)


class DeepFM(CTRModel):
    """First order + FM + MLP on shared embeddings."""

    def __init__(self, config: DeepFMConfig, fields: Sequence[Field], *, seed: int, factory: EmbeddingFactory) -> None:
        super().__init__(fields, config, embed=True, std=config.init_std, seed=seed, factory=factory)
        self.config = config
        self.dims = [f.dim for f in self.looked_up]
        self.widths = [self.tables[f.table].width for f in self.looked_up]
        shared = any(len(t.linear) > 1 for t in self.tables.values())
        self.uniform = bool(self.dims) and not shared and set(self.dims) == {config.dim}
        self.project = nn.ModuleDict(
            {f"field_{f.name}": nn.Linear(f.dim, config.dim, bias=False) for f in self.looked_up if f.dim != config.dim}
        )
        if not self.dims and not self.n_dense:
            raise ConfigError("A ranker needs at least one field; its feature list is empty.")
        self.mlp = mlp(sum(self.dims) + self.n_dense, config.hidden, 1, dropout=config.dropout)

    def forward(self, batch: Batch) -> Scores:
        """(B,) logits."""
        embedded = self.embeddings(batch.ids, len(batch))
        rows = self.rows(embedded)
        if self.uniform:
            inputs, wide = _Interact.apply(rows, batch.dense, self.config.dim, self.widths[0])
        else:
            inputs, wide = self._interact(rows, batch.dense)
        return Scores(wide + self.dense_logit(batch.dense) + self.mlp(inputs).squeeze(1), embedded)

    def _interact(self, rows: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """((B, Σdim + C) perceptron inputs, (B,) first-order + FM) for fields of any width."""
        parts = [row[:, :d] for row, d in zip(rows.split(self.widths, dim=1), self.dims, strict=True)]
        fm = rows.new_zeros(len(rows))
        if parts:
            common = [
                self.project[f"field_{f.name}"](e) if f.dim != self.config.dim else e for f, e in zip(self.looked_up, parts, strict=True)
            ]
            e = torch.stack(common, dim=1)  # (B, F, dim)
            fm = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1)
        return torch.cat([*parts, dense], dim=1), rows @ self.mask + fm


class _Interact(torch.autograd.Function):
    """`DeepFM._interact` for fields of one width d, stored W wide: ((B, F·d + C), (B,)).

    Autograd would keep and write six temporaries of the size of all embeddings; by hand it is two. The gradient of the
    FM part in e_f is Σe - e_f.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dense: Tensor, d: int, W: int) -> tuple[Tensor, Tensor]:
        B, F = rows.shape[0], rows.shape[1] // W
        stored = rows.view(B, F, W)
        inputs = rows.new_empty(B, F * d + dense.shape[1])
        e = inputs[:, : F * d].unflatten(1, (F, d))
        e.copy_(stored[:, :, :d])
        inputs[:, F * d :] = dense
        total = e.sum(1)  # (B, d)
        fm = 0.5 * (total.square().sum(1) - torch.linalg.vector_norm(inputs[:, : F * d], dim=1).square())
        ctx.save_for_backward(inputs, total)
        ctx.shape = (F, d, W)
        return inputs, fm + stored[:, :, d].sum(1)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, total = ctx.saved_tensors  # type: ignore[attr-defined]
        F, d, W = ctx.shape  # type: ignore[attr-defined]
        of_inputs, of_wide = grads
        scale = of_wide[:, None, None]  # (B, 1, 1)
        out = inputs.new_empty(len(inputs), F, W)
        e = inputs[:, : F * d].unflatten(1, (F, d))
        torch.addcmul(of_inputs[:, : F * d].unflatten(1, (F, d)), scale, total[:, None] - e, out=out[:, :, :d])
        out[:, :, d] = of_wide[:, None]
        out[:, :, d + 1 :] = 0.0
        return out.view(len(inputs), F * W), None, None, None
