"""Reading encoded examples: Parquet granules in a seeded order, decoded ahead of the model into the layout it wants.

A granule is a row group. A global batch is m consecutive granules of the epoch's permutation; worker r of W takes
granules r::W of it, so any number of workers sees the same global batches. Decoding runs in one thread beside the
model; `one` fields land in a single (F, B) block, which is what a KeyedJaggedTensor holds.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from recsys.errors import TrainingError
from recsys.features.schema import Field
from recsys.models.layers import FieldIds

PREFETCHED = 4
"""Batches decoded ahead. More only helps where reading stalls."""

START = "start.safetensors"

Part = Literal["train", "valid"]


@dataclass
class Batch:
    """B rows of encoded fields.

    dense (B, C) float32 holds the dense fields side by side in schema order; `columns` the plain columns that were asked
    for (labels, user, item, log_q), each (B,). The last `negatives` rows are drawn items without a user. Rows from
    `real` on repeat the last one (all workers need equally many) and do not count in a metric.
    """

    ids: FieldIds
    dense: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    negatives: int = 0
    real: int = -1

    def __post_init__(self) -> None:
        if self.real < 0:
            self.real = len(self)

    def __len__(self) -> int:
        return int(self.dense.shape[0])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; itself where it is there already."""
        if self.dense.device == device:
            return self
        ids = FieldIds({k: v.to(device) for k, v in self.ids.items()})
        return Batch(ids, self.dense.to(device), {k: v.to(device) for k, v in self.columns.items()}, self.negatives, self.real)

    @classmethod
    def of(cls, fields: Sequence[Field], arrays: Mapping[str, np.ndarray]) -> Self:
        """A batch of the `fields` present in `arrays` (encoded; dense as (B,) or (B, W))."""
        n = len(next(iter(arrays.values())))
        ids, dense = FieldIds(), [torch.empty(n, 0)]
        for f in fields:
            if f.name not in arrays:
                continue
            # A memory-mapped column is read-only, which torch does not take: copy those.
            column = torch.from_numpy(np.require(arrays[f.name], requirements=["C", "W"]))
            if f.shape == "dense":
                dense.append(column.float().reshape(n, -1))
            else:
                ids[f.name] = column
        return cls(ids, torch.cat(dense, dim=1))


class Examples:
    """An examples folder: its schema, and batches of its parts.

    Raises TrainingError where schema.json is missing or a Parquet file lacks a field.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "schema.json"
        if not path.exists():
            raise TrainingError(f"'{self.folder}' holds no schema.json, so it is no examples folder. Run `prepare` first.")
        schema: dict[str, Any] = json.loads(path.read_text())
        self.fields = tuple(Field(**f) for f in schema["fields"])
        self.labels: tuple[str, ...] = tuple(schema["labels"])
        self.task: str = schema["task"]
        self.granule: int = schema["granule"]
        self.rows: dict[str, int] = schema["rows"]
        for part in ("train", "valid"):
            if self.rows[part]:
                have = set(pq.read_schema(self.folder / f"{part}.parquet").names)
                if lacking := [f.name for f in self.fields if f.name not in have]:
                    raise TrainingError(
                        f"{self.folder / part}.parquet lacks the columns {lacking} that its schema.json declares. Run `prepare` again."
                    )

    @property
    def start(self) -> Path | None:
        """The weights that training goes on from (see `save_start`); None: it begins anew."""
        path = self.folder / START
        return path if path.exists() else None

    @cached_property
    def items(self) -> dict[str, np.ndarray]:
        """Encoded item columns by field, (n_items, …), memory-mapped; only two-tower folders have them."""
        return {p.stem: np.load(p, mmap_mode="r") for p in sorted((self.folder / "items").glob("*.npy"))}

    @cached_property
    def item_share(self) -> np.ndarray:
        """(n_items,) probability of each item among training positives, from the log_q column; 0 where it never is one."""
        table = pq.read_table(self.folder / "train.parquet", columns=["item", "log_q"])
        share = np.zeros(len(next(iter(self.items.values()))), np.float64)
        share[table.column("item").to_numpy()] = np.exp(table.column("log_q").to_numpy())
        return share

    def plain_columns(self, part: Part) -> tuple[str, ...]:
        """The columns of a part that are not fields."""
        names = {f.name for f in self.fields}
        return tuple(n for n in pq.read_schema(self.folder / f"{part}.parquet").names if n not in names)

    def check(self, batch_size: int, workers: int) -> None:
        """Raise TrainingError unless `batch_size` rows can be dealt evenly to `workers`."""
        granules = batch_size // self.granule
        if batch_size % self.granule or granules % workers:
            fitting = self.granule * workers * max(1, round(granules / workers))
            raise TrainingError(
                f"A batch of {batch_size} rows is {batch_size / self.granule:g} granules of {self.granule}, which {workers} workers cannot "
                f"share evenly. Set batch_size to a multiple of {self.granule * workers}, say {fitting}, or prepare with a smaller granule."
            )

    def steps(self, batch_size: int) -> int:
        """Training steps of one epoch; an incomplete last batch is dropped unless it is the only one."""
        return max(1, self.rows["train"] // self.granule // (batch_size // self.granule)) if self.rows["train"] else 0

    def train_batches(
        self, batch_size: int, *, epoch: int, start: int = 0, seed: int = 0, rank: int = 0, size: int = 1, negatives: int = 0
    ) -> Iterator[Batch]:
        """This worker's share of each global batch of an epoch, from step `start` on, decoded ahead.

        negatives: items drawn uniformly per global batch and appended to it, equal for every number of workers.
        """
        self.check(batch_size, size)
        if negatives % size:
            raise TrainingError(
                f"uniform_negatives is {negatives}, which {size} workers cannot share evenly. Make it a multiple of {size}."
            )
        full, m = self.rows["train"] // self.granule, batch_size // self.granule
        order = np.random.default_rng([seed, epoch]).permutation(full)
        return prefetch(self._train_batches(order, m, epoch=epoch, start=start, seed=seed, rank=rank, size=size, negatives=negatives))

    def _train_batches(
        self, order: np.ndarray, m: int, *, epoch: int, start: int, seed: int, rank: int, size: int, negatives: int
    ) -> Iterator[Batch]:
        file = _File(self, "train", tuple(c for c in self.plain_columns("train") if c in {*self.labels, "item", "log_q"}))
        if len(order) < m:  # less than one batch: everything there is, dealt by rows
            whole = file.rows(0, self.rows["train"])
            yield self._with_negatives(_share(whole, rank, size), [seed, epoch, 0], negatives, rank, size)
            return
        for step in range(start, len(order) // m):
            batch = file.granules(order[step * m + rank : (step + 1) * m : size])
            yield self._with_negatives(batch, [seed, epoch, step], negatives, rank, size)

    def _with_negatives(self, batch: Batch, seed: list[int], negatives: int, rank: int, size: int) -> Batch:
        """The batch with this worker's part of the step's drawn items below it, and log_q of the mixture of both draws."""
        if not negatives:
            return batch
        drawn = np.random.default_rng(seed).integers(0, len(self.item_share), negatives)[rank::size]
        ids = FieldIds()
        for name, column in batch.ids.items():
            new = torch.from_numpy(self.items[name][drawn]) if name in self.items else column.new_zeros(len(drawn), *column.shape[1:])
            ids[name] = torch.cat([column, new.to(column.dtype)])
        dense, at = batch.dense.new_zeros(len(drawn), batch.dense.shape[1]), 0
        for f in self.fields:
            if f.shape == "dense":
                if f.name in self.items:
                    dense[:, at : at + f.width] = torch.from_numpy(self.items[f.name][drawn].reshape(len(drawn), -1))
                at += f.width
        item = torch.cat([batch.columns["item"], torch.from_numpy(drawn.astype(np.int32))])
        from_batch = len(batch) * size / (len(batch) * size + negatives)
        rate = from_batch * self.item_share[item.numpy()] + (1 - from_batch) / len(self.item_share)
        columns = {"item": item, "log_q": torch.from_numpy(np.log(rate).astype(np.float32))}
        return Batch(ids, torch.cat([batch.dense, dense]), columns, negatives=len(drawn))

    def valid_batches(self, rows: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """This worker's contiguous share of the validation rows in batches of at most `rows`, as many on every worker."""
        total = self.rows["valid"]
        return prefetch(self._valid_batches(rows, rank * share_of(total, size), share_of(total, size), total)) if total else iter(())

    def _valid_batches(self, rows: int, first: int, share: int, total: int) -> Iterator[Batch]:
        file = _File(self, "valid", self.plain_columns("valid"))
        for start in range(first, first + share, rows):
            stop = min(start + rows, first + share)
            batch = file.rows(min(start, total - 1), min(max(stop, 1), total))
            yield _padded(batch, stop - start, max(0, min(stop, total) - start))


def save_start(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Put the weights that training goes on from, by the names of a saved model, beside the examples."""
    unfinished = folder / f".{START}"
    save_file({name: w.detach().contiguous() for name, w in weights.items()}, unfinished)
    unfinished.replace(folder / START)


def share_of(rows: int, workers: int) -> int:
    """Rows of a contiguous share, the last share padded."""
    return -(-rows // workers)


def _share(batch: Batch, rank: int, size: int) -> Batch:
    even = len(batch) - len(batch) % size
    ids = FieldIds({k: v[:even][rank::size] for k, v in batch.ids.items()})
    return Batch(ids, batch.dense[:even][rank::size], {k: v[:even][rank::size] for k, v in batch.columns.items()})


def _padded(batch: Batch, length: int, real: int) -> Batch:
    """The batch with its last row repeated up to `length` rows, of which `real` count."""
    if len(batch) < length:
        rows = torch.arange(length).clamp_max(len(batch) - 1)
        batch = Batch(
            FieldIds({k: v[rows] for k, v in batch.ids.items()}), batch.dense[rows], {k: v[rows] for k, v in batch.columns.items()}
        )
    batch.real = real
    return batch


class _File:
    """One open Parquet file; decodes row groups into batches."""

    def __init__(self, examples: Examples, part: Part, plain: tuple[str, ...]) -> None:
        self.file = pq.ParquetFile(examples.folder / f"{part}.parquet", memory_map=True, pre_buffer=False)
        self.granule, self.part, self.plain = examples.granule, part, plain
        self.one = [f for f in examples.fields if f.shape == "one"]
        self.wide = [f for f in examples.fields if f.shape in ("bag", "sequence")]
        self.dense = [f for f in examples.fields if f.shape == "dense"]
        self.names = [f.name for f in examples.fields] + list(plain)

    def granules(self, at: np.ndarray) -> Batch:
        """The rows of these row groups."""
        return self._batch([int(g) for g in at], 0, None)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop)."""
        first, last = start // self.granule, -(-stop // self.granule)
        return self._batch(list(range(first, last)), start - first * self.granule, stop - start)

    def _batch(self, groups: list[int], skip: int, length: int | None) -> Batch:
        table = self.file.read_row_groups(groups, columns=self.names, use_threads=False)
        table = table.slice(skip, length)
        n = len(table)
        stacked = np.empty((len(self.one), n), np.int32)
        for row, f in zip(stacked, self.one, strict=True):
            _copy(table.column(f.name), row)
            self._check_ids(f, row)
        ids = FieldIds({f.name: torch.from_numpy(row) for f, row in zip(self.one, stacked, strict=True)})
        ids.stacked, ids.stacked_names = torch.from_numpy(stacked), tuple(f.name for f in self.one)
        for f in self.wide:
            values = _flat(table.column(f.name)).reshape(n, f.width)
            self._check_ids(f, values)
            ids[f.name] = torch.from_numpy(values)
        columns = {name: torch.from_numpy(_flat(table.column(name))) for name in self.plain}
        return Batch(ids, self._dense(table, n), columns)

    def _dense(self, table: Any, n: int) -> Tensor:
        block, at = np.empty((n, sum(f.width for f in self.dense)), np.float32), 0
        for f in self.dense:
            block[:, at : at + f.width] = _flat(table.column(f.name)).reshape(n, f.width)
            at += f.width
        if not np.isfinite(block.sum()):  # one pass over the block; the guilty field is sought only then
            at = 0
            for f in self.dense:
                bad = int((~np.isfinite(block[:, at : at + f.width])).any(1).sum())
                if bad:
                    raise TrainingError(
                        f"Field '{f.name}' of {self.part}.parquet is NaN or infinite in {bad} of {n} rows. Fill it before training."
                    )
                at += f.width
        return torch.from_numpy(block)

    def _check_ids(self, f: Field, ids: np.ndarray) -> None:
        # FBGEMM reads whatever an id points at
        if ids.size and (ids.max() >= f.size or ids.min() < 0):
            raise TrainingError(
                f"Field '{f.name}' of {self.part}.parquet has ids {ids.min()}..{ids.max()}, its table '{f.table}' has {f.size} rows. Prepare again."
            )


def _copy(column: Any, out: np.ndarray) -> None:
    at = 0
    for chunk in column.chunks:
        out[at : at + len(chunk)] = chunk.to_numpy()
        at += len(chunk)


def _flat(column: Any) -> np.ndarray:
    """All numbers of a column, (n * width,), in a writable array of their own."""
    parts = [(chunk.flatten() if hasattr(chunk, "flatten") and chunk.type.num_fields else chunk).to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


_END = object()


def prefetch(batches: Iterator[Batch], depth: int = PREFETCHED) -> Iterator[Batch]:
    """The same batches, made by a thread `depth` ahead; an error there is raised here. Closing the iterator ends the thread."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(x: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(x, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
        except Exception as error:  # noqa: BLE001 - it is raised again by the reader of the queue
            put(error)
            return
        put(_END)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (got := ready.get()) is not _END:
            if isinstance(got, Exception):
                raise got
            yield got
    finally:
        stopped.set()
        thread.join()
