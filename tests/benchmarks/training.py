"""How fast DeepFM trains: from Parquet under Ray Train with one worker, against a bare TorchRec loop and two well-known libraries.

    python -m tests.benchmarks.training [--json] [--quick]

All run one after another on this machine, twice unless --quick; the better run of each counts, since a disturbed one is only
slower. Ours: Adagrad at 0.01 as in the bare loop, nothing tuned on the held-out rows; 100 steps after 10 of warm-up, decoding
included, writing the Parquet file not. The bare loop and the peers are
the scripts in the folder that RAYFUNNEL_BENCH_DIR names (default ../shared/bench), run as they are; the peers in .venv-peers
(`make peers`), left out where that is absent. Ray is shut down while the others run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from recsys.features.schema import Field
from recsys.models.ctr import DeepFMConfig
from recsys.training import Report, TrainingConfig

BATCH, WARM_UP, STEPS, DIM = 4096, 10, 100, 16
ROOT = Path(__file__).parents[2]
BENCH = Path(os.environ.get("RAYFUNNEL_BENCH_DIR", ROOT.parent / "shared" / "bench"))
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SCRIPTS = {"bare TorchRec loop": "bare_loop.py", "deepctr-torch": "peer_deepctr.py", "torch-rechub": "peer_rechub.py"}
Figures = dict[str, Any]


def data(folder: Path) -> Path:
    """The Criteo-shaped data of the bench folder as DATA.npz, and the same rows as an examples folder."""
    spec = importlib.util.spec_from_file_location("ctr_data", BENCH / "ctr_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, np.ndarray] = module.make(500_000)
    np.savez(folder / "data.npz", **made)
    _write_examples(folder / "examples", made)
    return folder / "data.npz"


def _write_examples(folder: Path, made: dict[str, np.ndarray]) -> None:
    """Training rows as the others see them: the first ten batches for warm-up, then all hundred, those ten again among them."""
    folder.mkdir()
    train = STEPS * BATCH
    parts = {"train": np.r_[0 : WARM_UP * BATCH, 0:train], "valid": np.arange(train, len(made["y"]))}
    sizes = made["vocab"].tolist()
    fields = [Field(f"s{i}", "context", "one", f"s{i}", size, DIM) for i, size in enumerate(sizes)]
    fields.append(Field("dense", "context", "dense", "", 0, 0, made["D"].shape[1]))
    for part, rows in parts.items():
        columns = {f"s{i}": pa.array(made["X"][rows, i].astype(np.int32)) for i in range(len(sizes))}
        columns["dense"] = pa.FixedSizeListArray.from_arrays(pa.array(made["D"][rows].reshape(-1)), made["D"].shape[1])
        columns["label"] = pa.array(made["y"][rows])
        pq.write_table(pa.table(columns), folder / f"{part}.parquet", row_group_size=BATCH, compression="none", use_dictionary=False)
    schema = {
        "fields": [asdict(f) for f in fields],
        "labels": ["label"],
        "task": "ranker",
        "rows": {part: len(rows) for part, rows in parts.items()},
        "granule": BATCH,
        "seed": 0,
    }
    (folder / "schema.json").write_text(json.dumps(schema))


def ours(folder: Path, attempt: int) -> Figures:
    """One run under Ray Train, in a process of its own so that Ray is gone when the others run."""
    command = [sys.executable, "-m", "tests.benchmarks.training", "--ours", str(folder), "--attempt", str(attempt)]
    return _last_json(command)


def train_here(folder: Path, attempt: int) -> Figures:
    """Start Ray, train, and read the pace off the progress reports."""
    from cluster.runtime import start_ray

    start_ray(num_cpus=2)
    from cluster.train import run

    reports: list[Report] = []
    training = TrainingConfig(
        epochs=1,
        batch_size=BATCH,
        granule=BATCH,
        learning_rate=0.01,
        embedding_learning_rate=0.01,
        workers=1,
        cpus_per_worker=2,
        report_every_steps=WARM_UP,
        patience=0,
    )
    model = DeepFMConfig(dim=DIM, hidden=(256, 128))
    trained = run(folder / "examples", model, training, storage=str(folder / "runs"), name=f"attempt-{attempt}", progress=reports.append)
    at = {r.step: r.seconds for r in reports if r.metrics is None}
    return {"examples_per_s": STEPS * BATCH / (at[WARM_UP + STEPS] - at[WARM_UP]), "auc": trained.metrics["auc"]}


def other(script: str, npz: Path) -> Figures | None:
    """One run of a script of the bench folder; None where its environment is absent."""
    python = sys.executable if script == "bare_loop.py" else str(PEERS)
    return _last_json([python, str(BENCH / script), str(npz)]) if Path(python).exists() else None


def _last_json(command: list[str]) -> Figures:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found: Figures = json.loads(line)
            return found
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode} and no figures:\n{done.stderr[-2000:]}")


def best(runs: list[Figures | None]) -> Figures | None:
    """The fastest of a contestant's runs."""
    return max((r for r in runs if r), key=lambda r: float(r["examples_per_s"]), default=None)


def measure(rounds: int, console: Console) -> dict[str, list[Figures | None]]:
    """Every contestant once per round, interleaved."""
    runs: dict[str, list[Figures | None]] = {name: [] for name in ("rayfunnel", *SCRIPTS)}
    with tempfile.TemporaryDirectory(prefix="rayfunnel-bench-") as place:
        folder = Path(place)
        with console.status("making 500,000 examples"):
            npz = data(folder)
        for attempt in range(rounds):
            for name, so_far in runs.items():
                with console.status(f"round {attempt + 1} of {rounds}: {name}"):
                    so_far.append(ours(folder, attempt) if name == "rayfunnel" else other(SCRIPTS[name], npz))
    return runs


def summary(runs: dict[str, list[Figures | None]]) -> dict[str, Any]:
    """The figures that are promised, and every run behind them."""
    mine, bare = best(runs["rayfunnel"]), best(runs["bare TorchRec loop"])
    peers = [p for p in (best(runs["deepctr-torch"]), best(runs["torch-rechub"])) if p]
    assert mine is not None and bare is not None
    return {
        "over_bare_loop": round(mine["examples_per_s"] / bare["examples_per_s"], 3),
        "over_best_peer": round(mine["examples_per_s"] / max(p["examples_per_s"] for p in peers), 3) if peers else None,
        "auc": round(mine["auc"], 4),
        "auc_bare_loop": round(bare["auc"], 4),
        "auc_best_peer": round(max(p["auc"] for p in peers), 4) if peers else None,
        "examples_per_s": round(mine["examples_per_s"]),
        "runs": runs,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The table for people."""
    table = Table(
        "",
        "examples/s",
        "held-out AUC",
        "all runs",
        title=f"DeepFM, 26 fields of {DIM}, batch {BATCH}, {os.cpu_count()} cores",
        header_style="bold",
    )
    for name, runs in found["runs"].items():
        top = best(runs)
        paces = ", ".join(f"{r['examples_per_s']:,.0f}" for r in runs if r)
        table.add_row(name, f"{top['examples_per_s']:,.0f}" if top else "not installed", f"{top['auc']:.4f}" if top else "", paces)
    console.print(table)
    peer = f", {found['over_best_peer']:.1f} of the better peer" if found["over_best_peer"] else ""
    console.print(f"{found['over_bare_loop']:.2f} of the bare loop{peer}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="one round instead of two")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attempt", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ours is not None:
        print(json.dumps(train_here(given.ours, given.attempt)))
        return
    console = Console(stderr=given.json)
    if not (BENCH / "ctr_data.py").exists():
        console.print(f"'{BENCH}' holds no bench scripts. Name their folder in RAYFUNNEL_BENCH_DIR.")
        sys.exit(1)
    found = summary(measure(1 if given.quick else 2, console))
    show(found, console)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
