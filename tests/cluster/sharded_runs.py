"""Training runs in processes of their own, joined by gloo without Ray: what the sharding tests compare.

One group runs many cases, because starting a process costs more than training in it. Results are JSON files.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys.training import Report


def run_group(size: int, work: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    """`work(folder)` on `size` processes in one gloo group; what rank 0's returns, by way of JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = folder / f"result-{work.__name__}.json"
    processes = [
        context.Process(target=_member, args=(r, size, port), kwargs={"work": work, "folder": folder, "out": out}) for r in range(size)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(300)
    assert [p.exitcode for p in processes] == [0] * size
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _member(rank: int, size: int, port: int, *, work: Callable[[Path], Any], folder: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    result = work(folder)
    if rank == 0:
        out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class Curve:
    """Collects the loss of every step and the metrics of every epoch from progress reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def __call__(self, report: Report) -> None:
        """Takes one report; runs report every step."""
        if report.metrics is None:
            self.losses.append(report.loss)
        else:
            self.metrics.append(report.metrics)
