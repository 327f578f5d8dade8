"""What goes into a bundle: a fitted funnel as files that can be memory-mapped, and golden requests with their answers.

config.json users.* items.*          what it was made with; outside ids of rows
features/ user_columns/ item_columns/ encoders, and every user and item encoded
catalogue/                           the values of item columns, for filters
item_meta.arrow past/ popular.npy    titles; what users did; the last rung
two_tower/ vectors.npy recall/<channel>/ fine_rank/
golden.json                          requests and the answers that this funnel gave before anything of it was written
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys import channels
from recsys.core import Vocabulary, save_arrow
from recsys.errors import BundleError
from recsys.features.inputs import Live, LogSource
from recsys.features.states import StateSource, newest_of, replayed, save_states
from recsys.funnel import Funnel, FunnelRequest
from recsys.prepared import save_columns
from recsys.recall.vector import VectorIndex

log = logging.getLogger(__name__)

GOLDEN = "golden.json"
GOLDEN_USERS = 16
TOLERANCE = 1e-4
"""Largest difference of a score from its golden answer: other processors sum in another order."""


def pack(funnel: Funnel, folder: Path, *, tower: Path, ranker: Path) -> dict[str, Any]:
    """Write the funnel into an empty folder; returns the manifest's fields that are known here.

    tower and ranker are the folders of the trained models. Raises BundleError where the folder, loaded, answers otherwise than
    the funnel: what was lost or reordered on the way to the disk or back.
    """
    document = funnel.config.document()
    for local in ("workdir", "registry", "redis_url", "store", "ingest", "serve"):
        document.pop(local, None)  # where a bundle was made, and where it is served, says nothing of what it is
    document["data"]["interactions"].pop("live", None)
    (folder / "config.json").write_text(json.dumps(document, indent=1))  # unsorted: channels are columns of the evidence
    funnel.users.save(folder, "users")
    funnel.items.save(folder, "items")
    funnel.space.save(folder / "features")
    if funnel.live is not None:
        funnel = replace(funnel, live=_pack_states(funnel.live, folder / "aggregates", funnel.users))
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
    (folder / GOLDEN).write_text(json.dumps(_golden(funnel), indent=1))
    if faults := differences(Funnel.load(folder), folder):
        raise BundleError(
            f"The bundle does not answer as the trained funnel does ({faults[0]}). Nothing is published: what is saved or loaded "
            "of it is not what was trained."
        )
    indexes = [index for c in funnel.channels.values() if isinstance(index := getattr(c, "index", None), VectorIndex)]
    return {
        "schema_hash": funnel.space.schema_hash,
        "config": document,
        "index_recall": min((float(i.measured_recall) for i in indexes), default=None),
        "bytes_per_item": _bytes_per_item(folder, len(funnel.items)),
    }


def _pack_states(live: Live, folder: Path, users: Vocabulary) -> Live:
    """Write the aggregates' inputs and their states when the log ends: a fresh service goes on from there. Gives them as it will
    have them."""
    live.inputs.save(folder)
    if isinstance(live.source, LogSource):
        asof = live.source.asof
        stream = replayed(live.inputs, asof.log, asof.told, users)
        live = Live(live.inputs, StateSource(live.inputs, stream, newest_of(stream)), live.items)
    assert isinstance(live.source, StateSource)  # noqa: S101 - there are two
    save_states(live.source.stream, folder)
    return live


def _golden(funnel: Funnel) -> dict[str, Any]:
    """Requests of known and unknown users, answered by the funnel as it was trained: nothing of it has been to a disk yet."""
    known = np.linspace(0, max(len(funnel.users) - 1, 0), min(GOLDEN_USERS, len(funnel.users))).astype(int)
    requests = [{"user_id": u, "k": 10} for u in (*funnel.users.outside(np.unique(known)), "\N{WHITE QUESTION MARK ORNAMENT} nobody")]
    # A moment after the last event: what happened at an instant is not known at it.
    at = float(np.nanmax(funnel.past.times)) + 1.0 if np.isfinite(funnel.past.times).any() else 0.0
    return {"at": at, "requests": requests, "answers": answers(funnel, requests, at)}


def answers(funnel: Funnel, requests: list[dict[str, Any]], at: float) -> list[dict[str, Any]]:
    """What the funnel says to golden requests: items and scores of each."""
    queries = funnel.queries([FunnelRequest(user_id=r["user_id"], k=r["k"], at=at) for r in requests])
    pages = funnel.page(queries, funnel.recommend(queries))
    return [{"items": [i.item_id for i in page], "scores": [i.score for i in page]} for page in pages]


def differences(funnel: Funnel, folder: Path) -> list[str]:
    """Sentences on golden requests that this loaded funnel answers otherwise than the trained one did; [] is sound."""
    golden = json.loads((folder / GOLDEN).read_text())
    found = []
    try:
        given = answers(funnel, golden["requests"], golden["at"])
    except Exception as error:  # whatever it is, such a bundle answers nobody
        log.exception("Bundle '%s' cannot answer its golden requests.", folder)
        return [f"no request can be answered: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    for request, then, now in zip(golden["requests"], golden["answers"], given, strict=True):
        who = f"user '{request['user_id']}'"
        known = dict(zip(then["items"], then["scores"], strict=True))
        shared = [abs(known[i] - s) for i, s in zip(now["items"], now["scores"], strict=True) if i in known]
        if len(then["scores"]) != len(now["scores"]):
            found.append(f"{who}: {len(now['scores'])} items, {len(then['scores'])} when published")
        elif then["scores"] and not np.allclose(np.sort(then["scores"]), np.sort(now["scores"]), atol=TOLERANCE):
            worst = float(np.abs(np.sort(then["scores"]) - np.sort(now["scores"])).max())
            found.append(f"{who}: scores differ by up to {worst:.2g} from those when published")
        elif 2 * len(shared) < len(now["items"]):  # those that tie may change places, on another processor
            found.append(f"{who}: {len(now['items']) - len(shared)} of {len(now['items'])} items were not on the page when published")
        elif max(shared, default=0.0) > TOLERANCE:
            found.append(f"{who}: items have each other's scores, up to {max(shared):.2g} from those when published")
    return found


def _bytes_per_item(folder: Path, n_items: int) -> float:
    per_item = [*(folder / "item_columns").rglob("*"), *(folder / "recall").rglob("*"), folder / "vectors.npy", *folder.glob("items.*")]
    return round(sum(p.stat().st_size for p in per_item if p.is_file()) / max(n_items, 1), 1)
