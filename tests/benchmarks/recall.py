"""How fast recall is built and searched, beside `implicit` and bare Faiss, one after another on this machine.

    python -m tests.benchmarks.recall [--json] [--quick] [--only item_cf,ials,bpr,hnsw,growth] [--threads 2]

item_cf, ials, bpr: a log of 10 M events, 200 k users, 100 k items, Zipf, at most 500 events a user (--quick: a hundredth), each
model in a process of its own, from the same matrix in memory; implicit in .venv-peers (`make peers`), left out where absent.
iALS optimises implicit's own loss, and both are judged by it. hnsw and growth take the vectors of vectors.py in the folder that
RAYFUNNEL_BENCH_DIR names (default ../shared/bench): 1 M x 64, one thread, one query at a time, batches beside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from recsys.data.synthetic import zipf
from tests.benchmarks.recall_runs import read
from tests.benchmarks.training import BENCH, PEERS, _last_json

SWEEPS = 3
OUR_ROUNDS, THEIR_ROUNDS = 6, 100
"""Of BPR: as many of ours as rank at least as many pairs right as implicit's default."""
PARTS = ("item_cf", "ials", "bpr", "hnsw", "growth")
NEIGHBORS, DIM, L2, CONFIDENCE = 100, 64, 0.1, 10.0
Figures = dict[str, Any]


def make_log(folder: Path, scale: float) -> None:
    """FOLDER/log.npz."""
    log = zipf(int(200_000 * scale), int(100_000 * scale), int(10_000_000 * scale), clusters=50).matrix()
    np.savez(folder / "log.npz", data=log.data, indices=log.indices, indptr=log.indptr, shape=log.shape)


def ours(model: str, folder: Path, **given: float) -> Figures:
    """One run of recall_runs.py."""
    return _last_json([sys.executable, "-m", "tests.benchmarks.recall_runs", model, str(folder), *_pairs(given)])


def peer(model: str, folder: Path, **given: float) -> Figures | None:
    """One run of implicit; None where it is not installed."""
    if not PEERS.exists() or subprocess.run([PEERS, "-c", "import implicit"], capture_output=True, check=False).returncode:
        return None
    return _last_json([str(PEERS), str(Path(__file__).with_name("peer_implicit.py")), model, str(folder), *_pairs(given)])


def _pairs(given: dict[str, float]) -> list[str]:
    return [f"{name}={value}" for name, value in given.items()]


def beside(
    model: str, folder: Path, of_ours: Mapping[str, float] | None = None, of_theirs: Mapping[str, float] | None = None, /, **given: float
) -> Figures:
    """Ours and implicit's run of one model, and the ratio of their seconds; each may have settings of its own."""
    mine, theirs = ours(model, folder, **given, **(of_ours or {})), peer(model, folder, **given, **(of_theirs or {}))
    return {
        "ours": mine,
        "implicit": theirs,
        "over_implicit": round(mine["seconds"] / theirs["seconds"], 3) if theirs else None,
        "cpu_over_implicit": round(mine["cpu_s"] / theirs["cpu_s"], 3) if theirs else None,
    }


def item_cf(folder: Path, threads: int) -> Figures:
    """Cosine and TF-IDF neighbours; equal sums of similarities say that both found neighbours as near."""
    return {model: beside(model, folder, neighbors=NEIGHBORS, threads=threads) for model in ("cosine", "tf_idf")}


def least_squares(folder: Path, threads: int) -> Figures:
    """Seconds of three sweeps with the loss that they came to, and of as many of ours as come to implicit's loss at least.

    The library steps towards each row's solution, ours solves it: a sweep of ours does more.
    """
    found = beside("ials", folder, dim=DIM, l2=L2, confidence=CONFIDENCE, rounds=SWEEPS, threads=threads)
    for name in ("ours", "implicit"):
        if found[name]:
            found[name]["loss"] = _loss(folder, name)
    if found["implicit"]:
        for sweeps in range(1, SWEEPS + 1):
            mine = ours("ials", folder, dim=DIM, l2=L2, confidence=CONFIDENCE, rounds=sweeps, threads=threads)
            if _loss(folder, "ours") <= found["implicit"]["loss"]:
                ratio = round(mine["seconds"] / found["implicit"]["seconds"], 3)
                found["equal_loss"] = {"sweeps": sweeps, "seconds": mine["seconds"], "over_implicit": ratio}
                break
    return found


def _loss(folder: Path, name: str) -> float:
    """Per user: confidence (1 - s)^2 over what was taken, s^2 over all else, l2 |theta|^2."""
    log, (W, H) = read(folder), _factors(folder, name)
    total = float(((W.T @ W) * (H.T @ H)).sum()) + L2 * float((W**2).sum() + (H**2).sum())
    user = np.repeat(np.arange(log.shape[0]), np.diff(log.indptr))
    for at in range(0, log.nnz, 1_000_000):
        s = np.einsum("ed,ed->e", W[user[at : at + 1_000_000]], H[log.indices[at : at + 1_000_000]])
        total += float((CONFIDENCE * (1 - s) ** 2 - s**2).sum())
    return total / log.shape[0]


def _factors(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / f"{name}.npz") as saved:
        return saved["users"].astype(np.float64), saved["items"].astype(np.float64)


def ranked_pairs(folder: Path, threads: int) -> Figures:
    """How often a taken item stands above a drawn one: after as many rounds as either library would be given.

    A round is as many drawn triples as there are events. implicit steps by plain SGD on each triple and needs a hundred of them
    (its default); ours by Adagrad on sums over batches, where a round costs far more and a few are enough.
    """
    found = beside("bpr", folder, {"rounds": OUR_ROUNDS}, {"rounds": THEIR_ROUNDS}, dim=DIM, threads=threads)
    for name in ("ours", "implicit"):
        if found[name]:
            log, (W, H), rng = read(folder), _factors(folder, name), np.random.default_rng(0)
            at = rng.integers(0, log.nnz, 200_000)
            user = np.repeat(np.arange(log.shape[0]), np.diff(log.indptr))[at]
            margin = np.einsum("ed,ed->e", W[user], H[log.indices[at]] - H[rng.integers(0, log.shape[1], len(at))])
            found[name]["pairs_right"] = float((margin > 0).mean())
            found[name]["seconds_a_round"] = found[name]["seconds"] / found[name]["rounds"]
    return found


def growth(folder: Path, threads: int, sizes: tuple[int, ...]) -> list[Figures]:
    """The cost of ItemCF and of an automatic index as the catalogue grows."""
    rows = []
    for n in sizes:
        cf, index = ours("grown", folder, items=n, threads=threads), ours("search", folder, items=n, queries=200, auto=1)
        rows.append({"items": n, "item_cf": cf, "index": index})
    return rows


def show(found: Figures, console: Console) -> None:
    """Tables for people."""
    table = Table("", "ours s", "implicit s", "time", "CPU time", "ours GiB", "implicit GiB", "the same?", header_style="bold")
    rows = {f"ItemCF {kind}": pair for kind, pair in found.get("item_cf", {}).items()}
    rows |= {name: found[part] for name, part in (("iALS", "ials"), ("BPR", "bpr")) if part in found}
    for name, pair in rows.items():
        mine, theirs = pair["ours"], pair["implicit"] or {}
        alike = [f"{k} {mine[k]:,.3f}, {theirs.get(k, float('nan')):,.3f}" for k in ("similarity_sum", "loss", "pairs_right") if k in mine]
        ratios = [f"{pair[k]:.2f}x" if pair[k] else "" for k in ("over_implicit", "cpu_over_implicit")]
        memory = [f"{mine['peak_gib']:.2f}", f"{theirs['peak_gib']:.2f}" if theirs else ""]
        console_cells = [f"{mine['seconds']:.1f}", f"{theirs['seconds']:.1f}" if theirs else "not installed"]
        table.add_row(name, *console_cells, *ratios, *memory, *alike)
    if rows:
        console.print(table)
    if "hnsw" in found:
        one = found["hnsw"]
        table = Table("search, ms a query", *one["ms"], title=f"{one['kind']}, recall@100 {one['recall_at_100']:.4f}", header_style="bold")
        table.add_row("", *(f"{v:.3f}" for v in one["ms"].values()))
        console.print(table)
    if "growth" in found:
        table = Table("items", "ItemCF fit s", "ItemCF GiB", "ms a query", "index", "build s", "ms a query", "recall@100", "exact ms")
        for row in found["growth"]:
            cf, index = row["item_cf"], row["index"]
            cells = [f"{cf['fit_s']:.1f}", f"{cf['peak_gib']:.2f}", _bar(cf["ms_per_query"]), index["kind"], f"{index['build_s']:.1f}"]
            table.add_row(
                f"{row['items']:,}", *cells, _bar(index["ms"]["ours"]), f"{index['recall_at_100']:.4f}", _bar(index["ms"]["exact"])
            )
        console.print(table)


def _bar(ms: float) -> str:
    """A figure and a bar: a block for each doubling above 0.05 ms."""
    return f"{ms:.2f} " + "█" * max(1, round(np.log2(max(ms, 0.05) / 0.05)))


def summary(found: Figures) -> Figures:
    """The figures that are promised (null where a part was left out), and all behind them."""
    cf, index = found.get("item_cf"), found.get("hnsw")
    return {
        "itemcf_fit_over_implicit": max((p["over_implicit"] for p in cf.values() if p["over_implicit"]), default=None) if cf else None,
        "peak_gib": round(max(p["ours"]["peak_gib"] for p in cf.values()), 3) if cf else None,
        "ials_sweep_over_implicit": found["ials"]["over_implicit"] if "ials" in found else None,
        "ials_equal_loss_over_implicit": found["ials"].get("equal_loss", {}).get("over_implicit") if "ials" in found else None,
        "bpr_equal_quality_over_implicit": found["bpr"]["over_implicit"] if "bpr" in found else None,
        "hnsw_recall_at_100": round(index["recall_at_100"], 4) if index else None,
        "hnsw_qps_over_exact": round(min(index["ms"]["exact"], index["ms"]["exact_faiss"]) / index["ms"]["ours"], 2) if index else None,
        "hnsw_over_bare_faiss_ms": round(index["ms"]["ours"] - index["ms"]["bare_faiss"], 4) if index else None,
        "sharded_p99_ms": None,
        **found,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the log, a fiftieth of the vectors")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--scale", type=float, help="of the log; 1 is 10 M events")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    wanted = given.only.split(",")
    if absent := [name for name in wanted if name not in PARTS]:
        parser.error(f"there is no part '{absent[0]}'; there are {', '.join(PARTS)}")
    console = Console(stderr=given.json)
    if not (BENCH / "vectors.py").exists() and {"hnsw", "growth"} & set(wanted):
        console.print(f"hnsw and growth are left out: '{BENCH}' holds no vectors.py. Name its folder in RAYFUNNEL_BENCH_DIR.")
        wanted = [name for name in wanted if name not in ("hnsw", "growth")]
    found: Figures = {}
    with tempfile.TemporaryDirectory(prefix="rayfunnel-recall-") as place:
        folder = Path(place)
        if {"item_cf", "ials", "bpr"} & set(wanted):
            make_log(folder, given.scale or (0.01 if given.quick else 1.0))
        sizes = (1_000, 20_000) if given.quick else (10_000, 100_000, 1_000_000)
        queries = 200 if given.quick else 1_000
        parts: dict[str, Callable[[], Any]] = {
            "item_cf": lambda: item_cf(folder, given.threads),
            "ials": lambda: least_squares(folder, given.threads),
            "bpr": lambda: ranked_pairs(folder, given.threads),
            "hnsw": lambda: ours("search", folder, items=sizes[-1], queries=queries),
            "growth": lambda: growth(folder, given.threads, sizes),
        }
        for name in wanted:
            with console.status(name):
                found[name] = parts[name]()
    show(found, console)
    if given.json:
        print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
