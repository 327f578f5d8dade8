"""What goes into a bundle: a fitted funnel as files that can be memory-mapped, and golden requests with their answers.

config.json users.* items.*          what it was made with; outside ids of rows
features/ user_columns/ item_columns/ encoders, and every user and item encoded
catalogue/                           the values of item columns, for filters
item_meta.arrow past/ popular.npy    titles; what users did; the last rung
two_tower/ vectors.npy recall/<channel>/ fine_rank/
golden.json                          requests and the answers that this funnel gave when it was published
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys import channels
from recsys.core import Vocabulary, save_arrow
from recsys.features.inputs import Live, LogSource
from recsys.features.states import StateSource, replayed, save_states
from recsys.funnel import Funnel, FunnelRequest
from recsys.prepared import save_columns
from recsys.recall.vector import VectorIndex

GOLDEN = "golden.json"
GOLDEN_USERS = 16
TOLERANCE = 1e-4
"""Largest difference of a score from its golden answer: other processors sum in another order."""


def pack(funnel: Funnel, folder: Path, *, tower: Path, ranker: Path) -> dict[str, Any]:
    """Write the funnel into an empty folder; returns the manifest's fields that are known here.

    tower and ranker are the folders of the trained models.
    """
    document = funnel.config.document()
    for local in ("workdir", "registry", "redis_url"):
        document.pop(local, None)  # where a bundle was made says nothing of what it is
    document["data"]["interactions"].pop("live", None)
    (folder / "config.json").write_text(json.dumps(document, indent=1))  # unsorted: channels are columns of the evidence
    funnel.users.save(folder, "users")
    funnel.items.save(folder, "items")
    funnel.space.save(folder / "features")
    if funnel.live is not None:
        _pack_states(funnel.live, folder / "aggregates", funnel.users)
    save_columns(folder / "user_columns", funnel.user_columns)
    save_columns(folder / "item_columns", funnel.item_columns)
    funnel.catalogue.save(folder / "catalogue")
    titles = funnel.titles if funnel.titles is not None else pa.nulls(len(funnel.items), pa.string())
    save_arrow(folder / "item_meta.arrow", pa.table({"title": titles}))
    funnel.past.save(folder / "past")
    np.save(folder / "popular.npy", funnel.popular_items)
    if funnel.vectors is not None:
        np.save(folder / "vectors.npy", funnel.vectors)
    channels.save(funnel.channels, folder / "recall")
    for source, name in ((tower, "two_tower"), (ranker, "fine_rank")):
        (folder / name).mkdir()
        for file in ("model.json", "model.safetensors"):
            shutil.copyfile(source / file, folder / name / file)
    (folder / GOLDEN).write_text(json.dumps(_golden(folder), indent=1))
    indexes = [index for c in funnel.channels.values() if isinstance(index := getattr(c, "index", None), VectorIndex)]
    return {
        "schema_hash": funnel.space.schema_hash,
        "config": document,
        "index_recall": min((float(i.measured_recall) for i in indexes), default=None),
        "bytes_per_item": _bytes_per_item(folder, len(funnel.items)),
    }


def _pack_states(live: Live, folder: Path, users: Vocabulary) -> None:
    """The aggregates' inputs and their states when the log ends: a fresh service goes on from there."""
    live.inputs.save(folder)
    if isinstance(live.source, LogSource):
        asof = live.source.asof
        save_states(replayed(live.inputs, asof.log, asof.told, users), folder)
    elif isinstance(live.source, StateSource):
        save_states(live.source.stream, folder)


def _golden(folder: Path) -> dict[str, Any]:
    """Requests of known and unknown users, answered by the bundle as it stands on disk."""
    loaded = Funnel.load(folder)
    known = np.linspace(0, max(len(loaded.users) - 1, 0), min(GOLDEN_USERS, len(loaded.users))).astype(int)
    requests = [{"user_id": u, "k": 10} for u in (*loaded.users.outside(np.unique(known)), "\N{WHITE QUESTION MARK ORNAMENT} nobody")]
    at = float(np.nanmax(loaded.past.times)) if np.isfinite(loaded.past.times).any() else 0.0
    return {"at": at, "requests": requests, "answers": answers(loaded, requests, at)}


def answers(funnel: Funnel, requests: list[dict[str, Any]], at: float) -> list[dict[str, Any]]:
    """What the funnel says to golden requests: items and scores of each."""
    queries = funnel.queries([FunnelRequest(user_id=r["user_id"], k=r["k"], at=at) for r in requests])
    pages = funnel.page(queries, funnel.recommend(queries))
    return [{"items": [i.item_id for i in page], "scores": [i.score for i in page]} for page in pages]


def differences(funnel: Funnel, folder: Path) -> list[str]:
    """Sentences on golden requests that this loaded funnel answers otherwise than when it was published; [] is sound."""
    golden = json.loads((folder / GOLDEN).read_text())
    found = []
    for request, then, now in zip(golden["requests"], golden["answers"], answers(funnel, golden["requests"], golden["at"]), strict=True):
        if len(then["scores"]) != len(now["scores"]):
            found.append(f"user '{request['user_id']}': {len(now['scores'])} items, {len(then['scores'])} when published")
        elif then["scores"] and not np.allclose(np.sort(then["scores"]), np.sort(now["scores"]), atol=TOLERANCE):
            worst = float(np.abs(np.sort(then["scores"]) - np.sort(now["scores"])).max())
            found.append(f"user '{request['user_id']}': scores differ by up to {worst:.2g} from those when published")
    return found


def _bytes_per_item(folder: Path, n_items: int) -> float:
    per_item = [*(folder / "item_columns").rglob("*"), *(folder / "recall").rglob("*"), folder / "vectors.npy", *folder.glob("items.*")]
    return round(sum(p.stat().st_size for p in per_item if p.is_file()) / max(n_items, 1), 1)
