"""Models on disk, and the engine that scores a request's candidates as fast as algebra allows.

A model folder is model.json (config, fields, metrics) and model.safetensors. `RankerEngine` scores exactly what the
model's forward does, but computes each part where it belongs. With u, i, c the query's, the item's and the pair's
inputs, the first layer is W u + W i + W c + b, and FM(u, i) = FM(u) + FM(i) + Σu·Σi: so everything of an item is one
precomputed row, everything of a query is computed once, and a pair costs a gather, an addition and the upper layers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field as Bound
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.batches import Batch
from recsys.errors import BundleError
from recsys.features.schema import Field
from recsys.models.ctr import DeepFM, LogisticRegression
from recsys.training import ModelConfig

log = logging.getLogger(__name__)
_CONFIG: TypeAdapter[Any] = TypeAdapter(Annotated[ModelConfig, Bound(discriminator="type")])
ITEM_CHUNK = 65_536
PAIR_CHUNK = 4_096
"""Pairs scored at a time: their rows stay in the cache from the gather to the last layer."""


def save_model(folder: Path | str, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json (see training.describe)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(description, indent=1, allow_nan=True))


def load_model(folder: Path | str) -> Any:
    """The saved model of any type, in evaluation mode. Raises BundleError where a file is absent or does not fit."""
    folder = Path(folder)
    if not (folder / "model.json").exists() or not (folder / "model.safetensors").exists():
        raise BundleError(f"'{folder}' lacks model.json or model.safetensors, so it holds no model. Train it, or publish the bundle again.")
    saved = json.loads((folder / "model.json").read_text())
    config: Any = _CONFIG.validate_python(saved["model"])
    model = config.build([Field(**f) for f in saved["fields"]])
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise BundleError(
            f"The weights in '{folder}' do not fit the model of its model.json: {error}. Publish the bundle again."
        ) from error
    return model.eval()


class RankerEngine:
    """A trained LR or DeepFM over a catalogue. Holds per item one row of h + dim + 1 float32 (`item_bytes` in all)."""

    def __init__(self, model: DeepFM | LogisticRegression, item_columns: Mapping[str, np.ndarray]) -> None:
        self.model = model.eval()
        self.query_fields = tuple(f for f in model.fields if f.side in ("user", "context"))
        self.item_fields = tuple(f for f in model.fields if f.side == "item")
        self.pair_fields = tuple(f for f in model.fields if f.side == "candidate")
        linears = [m for m in getattr(model, "mlp", []) if isinstance(m, nn.Linear)]
        self.h = linears[0].out_features if linears else 0
        self.first: nn.Linear | None = linears[0] if linears else None
        self.upper = linears[1:]
        self.dim = model.config.dim if isinstance(model, DeepFM) else 0
        self._slices()
        with torch.inference_mode():
            self.items = self._item_rows(item_columns)  # (n_items, h + dim + 1)
        log.info("ranker engine: %s items x %d floats, %.1f MB", f"{len(self.items):,}", self.items.shape[1], self.item_bytes / 1e6)

    @classmethod
    def load(cls, folder: Path | str, item_columns: Mapping[str, np.ndarray]) -> Self:
        """From a model folder and the encoded item columns, field -> (n_items, …)."""
        model = load_model(folder)
        if model.task != "ranker":
            raise BundleError(f"'{folder}' holds a {model.config.type} model, which ranks no pairs; lr or deepfm was expected.")
        if not isinstance(model, DeepFM | LogisticRegression):
            raise BundleError(
                f"'{folder}' holds a {model.config.type} model, whose algebra the engine does not know (lr and deepfm it does). "
                "Teach it to recsys.export.RankerEngine, or it would be scored as another model."
            )
        return cls(model, item_columns)

    @property
    def item_bytes(self) -> int:
        """Memory of the precomputed item rows."""
        return self.items.numel() * self.items.element_size()

    def _slices(self) -> None:
        """Where each field stands in the first layer's inputs and in the dense weights."""
        self.at: dict[str, slice] = {}
        at = 0
        for f in self.model.looked_up:
            self.at[f.name] = slice(at, at + f.dim)
            at += f.dim
        self.dense_at: dict[str, slice] = {}
        start = 0
        for f in self.model.fields:
            if f.shape == "dense":
                self.dense_at[f.name] = slice(start, start + f.width)
                self.at[f.name] = slice(at + start, at + start + f.width)
                start += f.width

    @torch.inference_mode()
    def score(
        self,
        user_fields: Mapping[str, np.ndarray],
        items: np.ndarray,
        candidate: Mapping[str, np.ndarray],
        later: Tensor | None = None,
    ) -> np.ndarray:
        """Logits (B, N) float32 of B queries' N candidates.

        user_fields: encoded user, context and history fields, (B, …); items (B, N) item rows, -1 in empty slots (whose
        logits mean nothing); candidate: the pairs' dense fields, (B, N, W); later: what `rows_of` made of further items, whose
        rows begin behind the catalogue's.
        """
        B, N = items.shape
        out = np.empty((B, N), np.float32)
        if not out.size:
            return out
        query = self._side(self.query_fields, user_fields, B)  # (B, h + dim + 1)
        rows = torch.from_numpy(np.maximum(items, 0).astype(np.int64))
        pairs = [torch.from_numpy(np.ascontiguousarray(candidate[f.name], np.float32)).reshape(B, N, -1) for f in self.pair_fields]
        dense = torch.cat(pairs, dim=2) if pairs else None  # (B, N, C)
        step = max(1, PAIR_CHUNK // N)
        result = torch.from_numpy(out)
        for b in range(0, B, step):
            part = slice(b, b + step)
            result[part] = self._pairs(query[part], rows[part], None if dense is None else dense[part], later)
        return out

    @torch.inference_mode()
    def rows_of(self, columns: Mapping[str, np.ndarray]) -> Tensor:
        """(n, h + dim + 1) rows of further items, from their encoded columns (n, …)."""
        n = len(next(iter(columns.values())))
        return self._side(self.item_fields, {f.name: columns[f.name] for f in self.item_fields}, n, bias=True)

    def _pairs(self, query: Tensor, rows: Tensor, dense: Tensor | None, later: Tensor | None) -> Tensor:
        """(b, h + dim + 1) queries, (b, N) item rows, (b, N, C) dense -> (b, N)."""
        b, N = rows.shape
        h, d = self.h, self.dim
        flat_rows = rows.reshape(-1)
        if later is None:
            found = torch.index_select(self.items, 0, flat_rows).view(b, N, -1)
        else:
            n = len(self.items)
            found = torch.index_select(self.items, 0, flat_rows.clamp(max=n - 1))
            behind = torch.nonzero(flat_rows >= n).squeeze(1)
            found[behind] = later[flat_rows[behind] - n]
            found = found.view(b, N, -1)
        score = found[:, :, -1] + query[:, -1:]
        if d:
            score += torch.matmul(found[:, :, h : h + d], query[:, h : h + d, None]).squeeze(2)
        flat = dense.reshape(b * N, -1) if dense is not None else None
        if flat is not None and self.pair_weight is not None:
            score += (flat @ self.pair_weight).view(b, N)
        if self.first is None:
            return score
        hidden = (found[:, :, :h] + query[:, None, :h]).view(b * N, h)
        if flat is not None and self.pair_first is not None:
            hidden.addmm_(flat, self.pair_first)
        for layer in self.upper:
            hidden = torch.addmm(layer.bias, hidden.relu_(), layer.weight.T)
        return score + hidden.view(b, N)

    def _item_rows(self, columns: Mapping[str, np.ndarray]) -> Tensor:
        model = self.model
        weight = model.dense_weight
        names = [f.name for f in self.pair_fields]
        self.pair_weight = torch.cat([weight[self.dense_at[n]] for n in names]) if names and weight is not None else None
        self.pair_first = (
            torch.cat([self.first.weight[:, self.at[n]] for n in names], dim=1).T.contiguous() if names and self.first else None
        )
        if not columns:
            raise BundleError("The ranker engine got no item columns; it needs those of the catalogue it ranks.")
        n = len(next(iter(columns.values())))
        parts = []
        for start in range(0, n, ITEM_CHUNK):
            stop = min(start + ITEM_CHUNK, n)
            parts.append(
                self._side(self.item_fields, {f.name: columns[f.name][start:stop] for f in self.item_fields}, stop - start, bias=True)
            )
        return torch.cat(parts) if parts else torch.empty(0, self.h + self.dim + 1)

    def _side(self, fields: Sequence[Field], arrays: Mapping[str, np.ndarray], n: int, *, bias: bool = False) -> Tensor:
        """One side's part of every sum, (n, h + dim + 1): first layer, Σe, and first order + FM inside the side."""
        out = torch.zeros(n, self.h + self.dim + 1)
        if bias:  # the model's biases ride with the items
            out[:, -1] += self.model.bias
            if self.first:
                out[:, : self.h] += self.first.bias
        if not fields:
            return out
        batch = Batch.of(fields, {f.name: arrays[f.name] for f in fields})
        dense_fields = [f for f in fields if f.shape == "dense"]
        if dense_fields and self.model.dense_weight is not None:
            out[:, -1] += batch.dense @ torch.cat([self.model.dense_weight[self.dense_at[f.name]] for f in dense_fields])
        inputs, columns = self._looked_up(fields, batch, out)
        if self.first:
            inputs += [batch.dense] if dense_fields else []
            columns += [self.first.weight[:, self.at[f.name]] for f in dense_fields]
            out[:, : self.h] += torch.cat(inputs, dim=1) @ torch.cat(columns, dim=1).T
        return out

    def _looked_up(self, fields: Sequence[Field], batch: Batch, out: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Adds first order and FM of the looked-up fields to `out`; their embeddings and first-layer columns."""
        model, h, d = self.model, self.h, self.dim
        looked_up = [f for f in fields if f.shape != "dense"]
        if not looked_up:
            return [], []
        embedded = model.embeddings(batch.ids, len(batch))
        inputs, square = [], torch.zeros(len(out))
        for f in looked_up:
            rows = model.field_rows(embedded, f)
            table = model.tables[f.table]
            out[:, -1] += rows[:, table.dim + table.linear.index(f.name)]
            if isinstance(model, DeepFM):
                e = rows[:, : f.dim]
                common = model.project[f"field_{f.name}"](e) if f.dim != d else e
                out[:, h : h + d] += common
                square += common.square().sum(1)
                inputs.append(e)
        if d:
            out[:, -1] += 0.5 * (out[:, h : h + d].square().sum(1) - square)
        return inputs, [self.first.weight[:, self.at[f.name]] for f in looked_up] if self.first else []
