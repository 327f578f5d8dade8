"""Our side of tests/benchmarks/recall.py: one model or index a process, so that its memory is its own.

    python -m tests.benchmarks.recall_runs MODEL FOLDER [name=number]...

Prints one line of JSON. Factors go to FOLDER/ours.npz.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from recsys.core import Queries, Query
from recsys.data.synthetic import zipf
from recsys.recall import bpr, ials
from recsys.recall.bpr import BPRConfig
from recsys.recall.exact import exact_search
from recsys.recall.ials import IALSConfig, Side
from recsys.recall.links import ItemLinks
from recsys.recall.neighbors import ItemCFConfig, nearest
from recsys.recall.similarity import Weighting, weigh
from recsys.recall.vector import VectorConfig
from tests.benchmarks.training import BENCH

Figures = dict[str, Any]
DEEP = 100
"""Neighbours that a search is asked for."""


def read(folder: Path) -> sparse.csr_matrix:
    """The (users, items) csr of FOLDER/log.npz."""
    with np.load(folder / "log.npz") as parts:
        return sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=tuple(parts["shape"]))


def neighbours(weighting: Weighting, log: sparse.csr_matrix, given: dict[str, float]) -> Figures:
    """ItemCF from the matrix of the log to the links that serve."""
    rows = weigh(log, weighting).T.tocsr()
    near, similarity = nearest(rows, int(given["neighbors"]), threads=int(given["threads"]))
    ItemLinks.of(near, similarity).reversed(ItemCFConfig().reach)
    return {"similarity_sum": float(similarity.sum(dtype=np.float64))}


def least_squares(log: sparse.csr_matrix, given: dict[str, float], folder: Path) -> Figures:
    """iALS on implicit's own loss: weight `confidence` on what was taken, 1 on all else, l2 not scaled by frequency."""
    config = IALSConfig(
        dim=int(given["dim"]), alpha0=1, l2=given["l2"], nu=0, sweeps=int(given["rounds"]), init_std=1.0, threads=int(given["threads"])
    )

    def side(events: sparse.csr_matrix) -> Side:
        root = np.full(events.nnz, np.sqrt(given["confidence"] - 1), np.float32)
        return Side.of(events, config)._replace(root=root, target=given["confidence"] / root)

    users, items = ials.factorize(side(log), side(log.T.tocsr()), config)
    np.savez(folder / "ours.npz", users=users, items=items)
    return {"rounds": config.sweeps}


def pairs(log: sparse.csr_matrix, given: dict[str, float], folder: Path) -> Figures:
    """BPR with its default rate, for some epochs."""
    users, items = bpr.factorize(log, BPRConfig(dim=int(given["dim"]), epochs=int(given["rounds"])))
    np.savez(folder / "ours.npz", users=np.column_stack([users, np.ones(len(users), np.float32)]), items=items)
    return {"rounds": int(given["rounds"])}


def vectors(n: int, queries: int, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Items and queries of the bench folder's vectors.py."""
    spec = importlib.util.spec_from_file_location("vectors", BENCH / "vectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: tuple[np.ndarray, np.ndarray] = module.make(n, dim, queries)
    return made


def search(given: dict[str, float]) -> Figures:
    """An index on one thread, one query at a time, against exact search one at a time and in batches, and against bare Faiss."""
    n, asked = int(given["items"]), int(given["queries"])
    items, queries = vectors(n, 256 + asked)
    tuning, queries = queries[:256], queries[256:]
    kind: Literal["hnsw", "auto"] = "auto" if given.get("auto") else "hnsw"
    start = time.perf_counter()
    index = VectorConfig(kind=kind, threads=1).build().fit(items, tuning)
    built = time.perf_counter() - start
    none = np.empty((1, 0), np.int32)
    few = queries[: max(20, asked // 20)]
    faiss.omp_set_num_threads(1)
    with threadpool_limits(1):
        flat = faiss.IndexFlatIP(items.shape[1])
        flat.add(items)
        truth = exact_search(items, queries, DEEP)[0]
        found = np.concatenate([index.recall_vectors(q[None], none, DEEP)[0] for q in queries])
        params = None if index.kind == "flat" else faiss.SearchParametersHNSW(efSearch=max(index.effort, DEEP))
        ms = {
            "ours": _ms(lambda q: index.recall_vectors(q, none, DEEP), queries),
            "bare_faiss": _ms(lambda q: index.index.search(q, DEEP, params=params), queries),
            "exact": _ms(lambda q: exact_search(items, q, DEEP), few),
            "exact_faiss": _ms(lambda q: flat.search(q, DEEP), few),
            "exact_batched": _ms(lambda q: exact_search(items, q, DEEP), queries, batch=256),
            "exact_faiss_batched": _ms(lambda q: flat.search(q, DEEP), queries, batch=256),
        }
    hit = float(np.mean([len(np.intersect1d(a, b)) / DEEP for a, b in zip(found, truth, strict=True)]))
    return {
        "kind": index.kind,
        "effort": index.effort,
        "build_s": built,
        "recall_at_100": hit,
        "ms": {k: round(v, 4) for k, v in ms.items()},
    }


def _ms(call: Callable[[np.ndarray], Any], queries: np.ndarray, batch: int = 1) -> float:
    """Milliseconds per query, the better of two rounds: a disturbed one is only slower."""
    call(queries[:batch])
    rounds = []
    for _ in range(2):
        start = time.perf_counter()
        for at in range(0, len(queries), batch):
            call(queries[at : at + batch])
        rounds.append(1000 * (time.perf_counter() - start) / len(queries))
    return min(rounds)


def grown(given: dict[str, float]) -> Figures:
    """ItemCF on a catalogue of so many items, ten events an item: its fit, and one query of 50 events for 500 items."""
    n = int(given["items"])
    log = zipf(2 * n, n, 10 * n, max_per_user=500)
    start = time.perf_counter()
    channel = ItemCFConfig(threads=int(given["threads"])).build().fit(log)
    fit = time.perf_counter() - start
    rng = np.random.default_rng(0)
    asked = [Query(str(b), items=log.item[rng.integers(0, len(log), 50)], times=np.zeros(50)) for b in range(50)]
    batches = [Queries.of([q], history_length=50) for q in asked]
    channel.recall(batches[0], 500)
    start = time.perf_counter()
    for one in batches:
        channel.recall(one, 500)
    return {"fit_s": fit, "ms_per_query": 1000 * (time.perf_counter() - start) / len(batches), "links": len(channel.links.items)}


def main() -> None:
    """Run and tell."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    given = {name: float(value) for name, value in (pair.split("=") for pair in sys.argv[3:])}
    on_log: dict[str, Callable[[sparse.csr_matrix], Figures]] = {
        "cosine": lambda log: neighbours("none", log, given),
        "tf_idf": lambda log: neighbours("tf_idf", log, given),
        "ials": lambda log: least_squares(log, given, folder),
        "bpr": lambda log: pairs(log, given, folder),
    }
    if model in on_log:
        log = read(folder)
        # Threads start before the clock, as everybody's do.
        list(ThreadPoolExecutor(os.cpu_count()).map(abs, range(8)))
        start, cpu = time.perf_counter(), time.process_time()
        with threadpool_limits(1):
            found = on_log[model](log)
        found |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    else:
        found = {"search": search, "grown": grown}[model](given)
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))


if __name__ == "__main__":
    main()
