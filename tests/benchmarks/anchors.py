"""The simple models beside figures measured elsewhere: ML-100k, protocol top_n, means over seeds.

    python -m tests.benchmarks.anchors [--json] [--quick] [--seeds 10] [--models Pop,EASE] [--threads 1]

Every rating is a positive; each user's events go 8:1:1 to train, validation and test at random. Fitted on train, asked with all of
train, validation masked; Recall, MRR and NDCG at 10, means over users with test items. One split differs from the next by .004
to .006 of NDCG, so compare means of ten seeds. `anchor` are figures of plain numpy code, and of RecBole's documents for BPR.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from cluster.fetch import fetch
from recsys.config import ChannelConfig, load
from recsys.core import UNKNOWN, Queries, Query
from recsys.data.interactions import Interactions, group
from recsys.data.split import SplitConfig
from recsys.metrics import Relevant, at_k, mean_of_users
from recsys.prepared import prepare
from recsys.recall.bpr import BPRConfig
from recsys.recall.ease import EASEConfig
from recsys.recall.ials import IALSConfig
from recsys.recall.markov import MarkovConfig
from recsys.recall.neighbors import ItemCFConfig
from recsys.recall.popular import PopularConfig
from recsys.recall.user_cf import UserCFConfig

CONFIG = Path(__file__).parents[2] / "configs" / "movielens.yaml"
METRICS = ("recall@10", "mrr@10", "ndcg@10")
ANCHORS = {
    "Pop": (0.1217, 0.2635, 0.1396),
    "ItemKNN100": (0.2369, 0.4624, 0.2794),
    "iALS64": (0.2741, 0.5062, 0.3127),
    "EASE": (0.2713, 0.5269, 0.3241),
    "EASE λ=200": (0.2741, 0.5174, 0.3212),
    "BPR": (0.2523, 0.4855, 0.2920),
}
TOLERANCE = 0.005
"""An anchor is met where NDCG@10 is at most so much below it."""


def models(seed: int) -> dict[str, ChannelConfig]:
    """Name -> configuration. All history counts alike here: the split is at random."""
    return {
        "Pop": PopularConfig(half_life_h=None),
        "ItemKNN100": ItemCFConfig(neighbors=100, keep="candidate", weighting="none", decay=1),
        "ItemCF TF-IDF": ItemCFConfig(decay=1),
        "UserCF": UserCFConfig(),
        "iALS64": IALSConfig(dim=64, seed=seed),
        "BPR": BPRConfig(seed=seed),
        "EASE": EASEConfig(l2=500, links=None, decay=1),
        "EASE λ=200": EASEConfig(l2=200, links=None, decay=1),
        "Markov": MarkovConfig(),
    }


def movielens() -> Interactions:
    """ML-100k, cleaned as the shipped configuration says."""
    with tempfile.TemporaryDirectory(prefix="rayfunnel-anchors-") as place:
        config = load([CONFIG], [f"workdir={place}"])
        assert config.fetch is not None
        assert config.fetched is not None
        fetch(config.fetch, config.fetched)
        return prepare(config).log


def states(log: Interactions, seed: int) -> tuple[Interactions, Queries, Relevant]:
    """What is fitted, what is asked and what is sought, of one split: (train, queries of users with test items, their test items)."""
    split = SplitConfig(by="random", per_user=True, seed=seed).split(log)
    train, known, test = (log.where(mask & log.positive) for mask in (split.train, split.train | split.valid, split.test))
    had, seen, sought = (_by_user(part) for part in (train, known, test))
    asked = [u for u in range(log.n_users) if len(sought[u])]
    batch = [Query(user_id=str(u), user=u, at=float(log.time[-1]), items=had[u][0], times=had[u][1], exclude=seen[u][0]) for u in asked]
    return train, Queries.of(batch, history_length=len(log)), Relevant.of([sought[u][0] for u in asked])


def _by_user(log: Interactions) -> list[Any]:
    indptr, order = group(log.user, log.n_users)
    return [(log.item[order[a:b]], log.time[order[a:b]]) for a, b in pairwise(indptr)]


def judge(config: ChannelConfig, train: Interactions, queries: Queries, sought: Relevant) -> dict[str, float]:
    """Metrics of one model on one split, and the seconds of its fit and of all its answers."""
    start = time.perf_counter()
    channel: Any = config.build()
    channel.fit(train)
    fitted = time.perf_counter()
    items, _ = channel.recall(queries, 10)
    answered = time.perf_counter()
    ranked = np.full((len(queries), 10), UNKNOWN, np.int32)
    ranked[:, : items.shape[1]] = items
    values = at_k(ranked, sought, (10,))
    return {name: mean_of_users(values[name]) for name in METRICS} | {"fit_s": fitted - start, "predict_s": answered - fitted}


def run(seeds: int, wanted: list[str] | None, console: Console) -> list[dict[str, Any]]:
    """A row per model: mean and standard deviation over seeds, and how NDCG@10 stands to the anchor."""
    log = movielens()
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(1, seeds + 1):
        train, queries, sought = states(log, seed)
        for name, config in models(seed).items():
            if wanted is None or name in wanted:
                with console.status(f"seed {seed} of {seeds}: {name}"):
                    for metric, value in judge(config, train, queries, sought).items():
                        values[name][metric].append(value)
    rows = []
    for name, of in values.items():
        anchor = ANCHORS.get(name)
        mean = {metric: float(np.mean(v)) for metric, v in of.items()}
        rows.append(
            {
                "model": name,
                "metrics": {m: round(mean[m], 4) for m in METRICS},
                "sd": {m: round(float(np.std(of[m], ddof=1)), 4) if seeds > 1 else None for m in METRICS},
                "anchor_ndcg@10": anchor[2] if anchor else None,
                "over_anchor": round(mean["ndcg@10"] - anchor[2], 4) if anchor else None,
                "seconds": {"fit": round(mean["fit_s"], 3), "predict": round(mean["predict_s"], 3)},
            }
        )
    return rows


def show(rows: list[dict[str, Any]], seeds: int) -> Table:
    """The table for people."""
    table = Table(
        "model", *METRICS, "anchor NDCG", "", "fit s", "predict s", title=f"ML-100k top_n, mean of {seeds} seed{'s' * (seeds > 1)}"
    )
    for row in rows:
        found = [f"{row['metrics'][m]:.4f}" + (f" ± {row['sd'][m]:.4f}" if row["sd"][m] is not None else "") for m in METRICS]
        over = row["over_anchor"]
        verdict = "" if over is None else f"[{'green' if over >= -TOLERANCE else 'red'}]{over:+.4f}"
        anchor = f"{row['anchor_ndcg@10']:.4f}" if over is not None else ""
        table.add_row(row["model"], *found, anchor, verdict, f"{row['seconds']['fit']:.2f}", f"{row['seconds']['predict']:.2f}")
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", help=f"some of {', '.join(models(1))}")
    parser.add_argument("--threads", type=int, default=1, help="of BLAS")
    given = parser.parse_args()
    wanted = given.models.split(",") if given.models else None
    if wanted and (absent := [name for name in wanted if name not in models(1)]):
        parser.error(f"there is no model '{absent[0]}'; there are {', '.join(models(1))}")
    seeds = 1 if given.quick else given.seeds
    console = Console(stderr=given.json)
    with threadpool_limits(given.threads):
        rows = run(seeds, wanted, console)
    console.print(show(rows, seeds))
    if given.json:
        print(json.dumps({"protocol": "top_n", "seeds": seeds, "rows": rows}))


if __name__ == "__main__":
    main()
