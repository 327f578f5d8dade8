"""Two-tower retrieval: a vector per user and per item whose inner product ranks (Yi et al., 2019, RecSys: sampled softmax with logQ).

Each tower: embeddings and dense fields side by side -> perceptron -> L2 norm. The user tower sees user, context and pooled
history fields; history and item_id share one table. Loss: softmax over the items of the global batch, logit
s/temperature - log q(item), because popular items are over-sampled as in-batch negatives; another row with the same
item is no negative. `uniform_negatives` adds items drawn from the whole catalogue (Yang et al., 2020: mixed negatives).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field as Bound
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys.batches import Batch
from recsys.core import FrozenConfig
from recsys.errors import BundleError, ConfigError
from recsys.features.schema import Field
from recsys.models.layers import Embedded, EmbeddingFactory, mean_pool, mlp, plain_tables, tables_of
from recsys.workers import Workers


class Vectors(NamedTuple):
    """user (B, d) and item (B + negatives, d), unit length, and the rows looked up."""

    user: Tensor
    item: Tensor
    embedded: Embedded


class TwoTowerConfig(FrozenConfig):
    type: Literal["two_tower"] = "two_tower"
    dim: PositiveInt = 64
    """Width of the vectors: what the index holds and what a dot product costs."""
    user_hidden: tuple[PositiveInt, ...] = (128,)
    """Hidden widths of the user tower; () is one linear layer, often best below a million events."""
    item_hidden: tuple[PositiveInt, ...] = (128,)
    """Hidden widths of the item tower."""
    temperature: PositiveFloat = 0.1
    """Divides the cosine: lower sharpens the softmax. Usual values are 0.05 to 0.2."""
    logq: bool = True
    """Correct for items being drawn in proportion to their popularity."""
    dropout: float = Bound(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training. Any value above 0 makes runs with different numbers of workers differ."""
    input_dropout: float = Bound(default=0.0, ge=0, lt=1)
    """Share of a tower's inputs dropped in training: on small logs it stops the towers from memorising ids."""
    l2: NonNegativeFloat = 0.0
    """Penalty on the embeddings that a batch looks up."""
    uniform_negatives: NonNegativeInt = 0
    """Items per global batch drawn uniformly as further negatives, so that rare items are pushed down too."""
    init_std: NonNegativeFloat = 0.05
    """Standard deviation of the embeddings before training."""

    def build(self, fields: Sequence[Field], *, seed: int = 0, factory: EmbeddingFactory = plain_tables) -> TwoTower:
        """An untrained model over these fields; ConfigError for candidate fields, which no tower can see."""
        return TwoTower(self, fields, seed=seed, factory=factory)


class Tower(nn.Module):
    """One side: its fields' embeddings and dense columns -> unit vectors (B, d)."""

    def __init__(self, fields: Sequence[Field], dense_at: Mapping[str, slice], hidden: Sequence[int], config: TwoTowerConfig) -> None:
        super().__init__()
        self.looked_up = tuple(f for f in fields if f.shape != "dense")
        self.dense_at = [dense_at[f.name] for f in fields if f.shape == "dense"]
        inputs = sum(f.dim for f in self.looked_up) + sum(at.stop - at.start for at in self.dense_at)
        self.drop = nn.Dropout(config.input_dropout)
        self.mlp = mlp(inputs, hidden, config.dim, dropout=config.dropout)

    def forward(self, embedded: Embedded, dense: Tensor, rows: slice) -> Tensor:
        """The tower on these rows of the batch."""
        parts = [
            mean_pool(embedded.sequence[f.name], embedded.mask[f.name])[rows, : f.dim]
            if f.name in embedded.sequence
            else embedded.pooled[f.name][rows, : f.dim]
            for f in self.looked_up
        ]
        parts += [dense[rows, at] for at in self.dense_at]
        return nn.functional.normalize(self.mlp(self.drop(torch.cat(parts, dim=1))), dim=1)


class TwoTower(nn.Module):
    """The model. `user_vectors` and `item_vectors` are its serving side, on plain numpy arrays."""

    task = "two_tower"

    def __init__(self, config: TwoTowerConfig, fields: Sequence[Field], *, seed: int, factory: EmbeddingFactory) -> None:
        super().__init__()
        self.config, self.fields = config, tuple(fields)
        if of_pairs := [f.name for f in fields if f.side == "candidate"]:
            raise ConfigError(
                f"A two-tower sees user and item apart; it cannot use the candidate fields {of_pairs}. Give them to fine_rank."
            )
        self.embeddings = factory(self.fields, tables_of(self.fields), config.init_std, seed)
        torch.manual_seed(seed)
        at, dense_at = 0, {}
        for f in self.fields:
            if f.shape == "dense":
                dense_at[f.name] = slice(at, at + f.width)
                at += f.width
        self.user_fields = tuple(f for f in self.fields if f.side != "item")
        self.item_fields = tuple(f for f in self.fields if f.side == "item")
        if not self.user_fields or not self.item_fields:
            raise ConfigError(f"A two-tower needs fields on both sides; it got {[f'{f.name} ({f.side})' for f in self.fields]}.")
        self.user_tower = Tower(self.user_fields, dense_at, config.user_hidden, config)
        self.item_tower = Tower(self.item_fields, dense_at, config.item_hidden, config)

    def forward(self, batch: Batch) -> Vectors:
        """User vectors of the batch's rows and item vectors of its rows and drawn negatives."""
        embedded = self.embeddings(batch.ids, len(batch))
        people = slice(0, len(batch) - batch.negatives)
        return Vectors(self.user_tower(embedded, batch.dense, people), self.item_tower(embedded, batch.dense, slice(None)), embedded)

    def loss(self, vectors: Vectors, batch: Batch, workers: Workers) -> Tensor:
        """Mean over this worker's users of -log softmax(own item | the items of all workers' batches and draws)."""
        B, here = len(vectors.user), len(vectors.item)
        items = workers.gather_rows(vectors.item)  # (N, d), N = workers * (B + negatives)
        item_rows, log_q = workers.gather_rows(batch.columns["item"]), workers.gather_rows(batch.columns["log_q"])
        logits = vectors.user @ items.T / self.config.temperature  # (B, N)
        if self.config.logq:
            logits = logits - log_q
        own = torch.arange(B, device=logits.device) + workers.rank * here
        same = batch.columns["item"][:B, None] == item_rows
        same[torch.arange(B), own] = False
        loss = nn.functional.cross_entropy(logits.masked_fill(same, -torch.inf), own)
        if self.config.l2:
            loss = loss + 0.5 * self.config.l2 * vectors.embedded.values.square().sum() / B
        return loss

    # Serving: numpy in, numpy out, no gradients.

    @torch.inference_mode()
    def user_vectors(self, user_fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """Encoded user-side and context fields (B, …) -> (B, d) float32 unit vectors."""
        return self._side(self.user_tower, self.user_fields, user_fields)

    @torch.inference_mode()
    def item_vectors(self, item_columns: Mapping[str, np.ndarray], chunk: int = 65_536) -> np.ndarray:
        """Encoded item columns (n_items, …) -> (n_items, d) float32 unit vectors, computed `chunk` rows at a time."""
        n = len(next(iter(item_columns.values())))
        parts = [
            self._side(self.item_tower, self.item_fields, {f.name: item_columns[f.name][at : at + chunk] for f in self.item_fields})
            for at in range(0, n, chunk)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.config.dim), np.float32)

    def _side(self, tower: Tower, fields: Sequence[Field], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        batch = side_batch(self.fields, fields, arrays)
        vectors: np.ndarray = tower(self.embeddings(batch.ids, len(batch)), batch.dense, slice(None)).numpy()
        return vectors

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read model.json and model.safetensors. Raises BundleError where they hold another model."""
        folder = Path(folder)
        saved = json.loads((folder / "model.json").read_text())
        if saved["model"].get("type") != "two_tower":
            raise BundleError(f"'{folder}' holds a {saved['model'].get('type')!r} model, a two_tower was expected.")
        model = cls(TwoTowerConfig(**saved["model"]), [Field(**f) for f in saved["fields"]], seed=0, factory=plain_tables)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


def side_batch(all_fields: Sequence[Field], fields: Sequence[Field], arrays: Mapping[str, np.ndarray]) -> Batch:
    """A batch of one side's fields, the dense columns of the other side zero."""
    n = len(arrays[fields[0].name])
    wanted = {f.name for f in fields}
    full = {
        f.name: arrays[f.name] if f.name in wanted else np.zeros((n, f.width), np.float32)
        for f in all_fields
        if f.name in wanted or f.shape == "dense"
    }
    return Batch.of(all_fields, full)
