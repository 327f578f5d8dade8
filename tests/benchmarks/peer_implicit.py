"""One model of the library `implicit`, timed: what tests/benchmarks/recall.py runs with .venv-peers/bin/python.

    peer_implicit.py MODEL FOLDER [name=number]...

FOLDER/log.npz holds the (users, items) csr. Prints one line of JSON; factors go to FOLDER/implicit.npz. Imports nothing of this project.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import CosineRecommender, TFIDFRecommender
from scipy import sparse


def main() -> None:
    """Fit and tell."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    given = {name: float(value) for name, value in (pair.split("=") for pair in sys.argv[3:])}
    with np.load(folder / "log.npz") as parts:
        log = sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=tuple(parts["shape"]))
    threads = int(given["threads"])
    # The matrix itself is in memory before the clock starts, as for everybody.
    start, cpu = time.perf_counter(), time.process_time()
    if model in ("cosine", "tf_idf"):
        kind = CosineRecommender if model == "cosine" else TFIDFRecommender
        fitted = kind(K=int(given["neighbors"]) + 1, num_threads=threads)  # an item is its own first neighbour here
        fitted.fit(log, show_progress=False)
        found = {"similarity_sum": float(fitted.similarity.sum() - fitted.similarity.diagonal().sum())}
    else:
        if model == "ials":
            fitted = AlternatingLeastSquares(
                factors=int(given["dim"]),
                regularization=given["l2"],
                alpha=given["confidence"],
                iterations=int(given["rounds"]),
                num_threads=threads,
                use_gpu=False,
                random_state=1,
            )
        else:
            fitted = BayesianPersonalizedRanking(
                factors=int(given["dim"]), iterations=int(given["rounds"]), num_threads=threads, use_gpu=False, random_state=1
            )
        fitted.fit(log, show_progress=False)
        found = {"rounds": int(given["rounds"])}
    found |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if model in ("ials", "bpr"):
        np.savez(folder / "implicit.npz", users=fitted.user_factors, items=fitted.item_factors)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
