"""Checkpoints of a training run: torch.distributed.checkpoint folders that any number of workers can load again.

A checkpoint is a folder named by its position, written by all workers; it counts once `complete.json` stands in it, which
is written last and holds the progress and a checksum of every file. Loading takes the newest whose checksums hold and says
which it passed over. The last two and the best epoch's are kept. These folders never leave the training side: DCP's own
metadata is a pickle.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from recsys.errors import TrainingError
from recsys.training import Progress

log = logging.getLogger(__name__)
COMPLETE = "complete.json"
KEPT = 2
"""Newest checkpoints kept beside the best: one may turn out to be damaged."""


class Checkpoints:
    """The checkpoints under one folder or URI that all workers (and the driver) can reach."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.folder)
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple | list) else (self.fs.protocol,))

    def names(self) -> list[str]:
        """Complete checkpoints, newest first."""
        if not self.fs.exists(self.root):
            return []
        self.fs.invalidate_cache()
        found = [p.rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(self.root, detail=False)]
        return sorted((n for n in found if self.fs.exists(f"{self.root}/{n}/{COMPLETE}")), reverse=True)

    def damage(self, name: str, *, part: int = 0, of: int = 1) -> str | None:
        """What is wrong with this worker's part of the files of a checkpoint, or None."""
        try:
            files: dict[str, list[int]] = self._complete(name)["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"{COMPLETE} cannot be read ({error})"
        for file in sorted(files)[part::of]:
            try:
                if self._checksum(f"{self.root}/{name}/{file}") != files[file]:
                    return f"{file} is not what was written"
            except OSError as error:
                return f"{file} cannot be read ({error})"
        return None

    def progress(self, name: str) -> tuple[Progress, dict[str, Any]]:
        """The position a checkpoint was written at, and what the run was started with."""
        read = self._complete(name)
        return Progress(**read["progress"]), read["run"]

    def newest(self) -> tuple[str, list[str]] | None:
        """(the newest sound checkpoint, sentences about newer ones that are damaged); None where there is none. Collective."""
        group = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
        names: list[Any] = [self.names() if rank == 0 else None]
        if group:
            dist.broadcast_object_list(names)
        said: list[str] = []
        for name in names[0]:
            found: list[Any] = [self.damage(name, part=rank, of=size)]
            if group:
                every: list[Any] = [None] * size
                dist.all_gather_object(every, found[0])
                found = every
            fault = next((f for f in found if f), None)
            if fault is None:
                return name, said
            said.append(f"Checkpoint '{self.folder}/{name}' is damaged: {fault}. Going on from the one before it.")
        if said:
            raise TrainingError(
                f"Every checkpoint in '{self.folder}' is damaged: {' '.join(said)} Remove the folder to train from the start."
            )
        return None

    def load(self, name: str, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` in place; they may be sharded otherwise than when they were saved. Collective if there is a group."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP's word on ShardedTensor and on running alone
            load(state, storage_reader=self._reader(name), no_dist=not dist.is_initialized())

    def save(self, state: dict[str, Any], progress: Progress, run: dict[str, Any]) -> None:
        """Write a checkpoint; every worker calls it. Old ones go once the new one is complete."""
        name = name_of(progress.epoch, progress.step)
        rank, size = dist.get_rank(), dist.get_world_size()
        path = f"{self.root}/{name}"
        if rank == 0:
            if self.fs.exists(path):  # left by a worker that was lost while writing
                self.fs.rm(path, recursive=True)
            self.fs.makedirs(path, exist_ok=True)
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(state, storage_writer=self._writer(name))
        mine = [f for f in self._files(path) if f.startswith(f"__{rank}_") or (rank == 0 and not f.startswith("__"))]
        sums: list[Any] = [None] * size
        dist.all_gather_object(sums, {f: self._checksum(f"{path}/{f}") for f in mine})
        if rank == 0:
            complete = {"progress": asdict(progress), "run": run, "files": {k: v for part in sums for k, v in part.items()}}
            self._write_last(f"{path}/{COMPLETE}", json.dumps(complete))
            self._prune(name, name_of(progress.best_epoch + 1, 0))
        dist.barrier()

    def _prune(self, newest: str, best: str) -> None:
        for old in [n for n in self.names() if n != best][KEPT:]:
            if old != newest:
                self.fs.rm(f"{self.root}/{old}", recursive=True)

    def _complete(self, name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(self.fs.cat_file(f"{self.root}/{name}/{COMPLETE}"))
        return read

    def _files(self, path: str) -> list[str]:
        self.fs.invalidate_cache()
        return [p.rsplit("/", 1)[-1] for p in self.fs.ls(path, detail=False)]

    def _checksum(self, path: str) -> list[int]:
        """[size, crc32]: a flipped byte in a tensor is nothing that DCP would notice."""
        size = crc = 0
        with self.fs.open(path, "rb") as file:
            while block := file.read(1 << 22):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    def _write_last(self, path: str, text: str) -> None:
        if not self.local:
            self.fs.pipe_file(path, text.encode())  # object stores show an object whole or not at all
            return
        with open(f"{path}.part", "w") as file:  # noqa: PTH123 - the path is fsspec's, a str
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)  # noqa: PTH105

    def _writer(self, name: str) -> Any:
        if self.local:
            return FileSystemWriter(f"{self.root}/{name}")
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        return FsspecWriter(f"{self.folder}/{name}")

    def _reader(self, name: str) -> Any:
        if self.local:
            return FileSystemReader(f"{self.root}/{name}")
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        return FsspecReader(f"{self.folder}/{name}")


def name_of(epoch: int, step: int) -> str:
    """The folder of the state before this step of this epoch; names sort by age."""
    return f"{epoch:05d}.{step:08d}"


class RunSnapshots:
    """`recsys.training.Snapshots` over checkpoints: what the workers of one run resume from."""

    def __init__(
        self, checkpoints: Checkpoints, state: Callable[[], dict[str, Any]], run: dict[str, Any], notice: Callable[[str], None]
    ) -> None:
        self.checkpoints, self.state, self.run, self.notice = checkpoints, state, run, notice

    def resume(self) -> Progress | None:
        """Load the newest sound checkpoint. Raises TrainingError where the run was started with something else."""
        found = self.checkpoints.newest()
        if found is None:
            return None
        name, said = found
        for sentence in said:
            log.warning(sentence)
            self.notice(sentence)
        progress, run = self.checkpoints.progress(name)
        check_same_run(self.checkpoints.folder, run, self.run)
        self.checkpoints.load(name, self.state())
        log.info("resumed at epoch %d, step %d from %s", progress.epoch, progress.step, name)
        return progress

    def save(self, progress: Progress, *, best: bool) -> None:  # noqa: ARG002 - the best epoch is named by its position
        """Write a checkpoint."""
        self.checkpoints.save(self.state(), progress, self.run)

    def restore_best(self) -> None:
        """Nothing to do here: the driver exports from the best epoch's checkpoint."""


def check_same_run(folder: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise TrainingError naming what differs, unless a stored run was started with the same model, examples and seed."""
    if differ := sorted(k for k in now if was.get(k) != now[k]):
        raise TrainingError(
            f"The run in '{folder}' was started with another {', '.join(differ)}. Give this run another name, or remove that folder."
        )
