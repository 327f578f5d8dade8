"""Training examples: what was known at the instant of each logged event, and what happened then.

Three kinds, one road. `two_tower_examples` are positives with the user's state just before. `ranker_examples` are what the
fine stage will meet in service: for moments in a window that the recall channels were not fitted on, the funnel's own
candidates, with what each channel said of them. (Fitted on the window, ItemCF orders its own training pairs far better than
new ones, and the ranker would learn to believe it.) `impression_examples` are a log's rows as they are, for the ctr protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import ExamplesConfig
from recsys.core import UNKNOWN, Candidates, Queries, top_k
from recsys.evidence import EVIDENCE, evidence, unvouched
from recsys.features.ahead import counted
from recsys.features.schema import Field
from recsys.funnel import Funnel
from recsys.moments import Moments
from recsys.prepared import Prepared

CHUNK = 512
FEW = 3
"""Events that a stranger has at most."""


Columns = dict[str, np.ndarray]
Counted = Callable[[int], None]
"""Told how many more are done."""


def uncounted(_: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Dice:
    """Which moments of training are a stranger's, so that models meet the users they will know least (Volkovs et al., 2017).

    A stranger has none to `FEW` events of history, an id nobody has seen, and the user table. What he had stays excluded:
    an item that was taken earlier is no negative.
    """

    share: float
    rng: np.random.Generator

    def forget(self, queries: Queries) -> np.ndarray:
        """Make strangers of some of B queries, in place but for their ids; -> (B,) bool, who they are."""
        B, L = queries.history.shape
        new: np.ndarray = self.rng.random((B,)) < self.share
        kept = self.rng.integers(0, FEW + 1, (B,))
        forgotten = new[:, None] & (np.arange(L)[None, :] < L - kept[:, None])
        queries.history = np.where(forgotten, UNKNOWN, queries.history).astype(queries.history.dtype)
        queries.history_times = np.where(forgotten, np.nan, queries.history_times)
        return new


class _Draw(NamedTuple):
    """How negatives come: the configuration, how often each item (I,) is a positive, and the dice."""

    config: ExamplesConfig
    popularity: np.ndarray
    rng: np.random.Generator
    exposed: bool
    """Whether an item that was shown and passed over is a lesson."""


def two_tower_examples(
    prepared: Prepared,
    moments: Moments,
    at: np.ndarray,
    popularity: np.ndarray,
    *,
    dice: Dice | None = None,
    progress: Counted = uncounted,
) -> Columns:
    """Positives at log positions `at` (n,): user-side fields just before, item-side fields, item row and log sampling probability.

    popularity (I,) counts how often each item is a positive in the training examples: in-batch negatives come at that rate.
    With `dice` some of the users are strangers (see `Dice`). `progress` is told of every lot of positions that is done.
    """
    out, items = _rows(prepared, moments, at, dice, progress), moments.log.item[at]
    share = np.maximum(popularity, 1) / max(float(popularity.sum()), 1.0)
    return out | {"user": moments.log.user[at], "item": items, "log_q": np.log(share[items]).astype(np.float32)}


def impression_examples(prepared: Prepared, moments: Moments, at: np.ndarray, label: str) -> Columns:
    """The log's rows at positions `at` (n,), each with what was known just before and its 0/1 `label`."""
    out = _rows(prepared, moments, at)
    if (live := prepared.live) is not None:

        def lots() -> Iterator[tuple[Queries, np.ndarray]]:
            for chunk in np.split(at, range(CHUNK, len(at), CHUNK)):
                yield moments.bare(chunk), moments.log.item[chunk][:, None]

        out |= gathered(own | {n: x[:, 0] for n, x in pairs.items()} for own, pairs in counted(live, lots))
    return out | {"user": moments.log.user[at], "item": moments.log.item[at], "label": moments.log.labels[label][at].astype(np.float32)}


def _rows(prepared: Prepared, moments: Moments, at: np.ndarray, dice: Dice | None = None, progress: Counted = uncounted) -> Columns:
    """User, context and item fields of the log's rows at positions `at`: what the two kinds without candidates share."""

    def fields(queries: Queries) -> Columns:
        new = dice.forget(queries) if dice else None
        out = prepared.space.encode_queries(queries, prepared.user_columns)
        progress(len(queries))
        return out if new is None else prepared.space.estranged(out, queries, new)

    out = gathered(fields(q) for q in moments.chunks(at, CHUNK))
    return out | {name: np.asarray(column)[moments.log.item[at]] for name, column in prepared.item_columns.items()}


def ranker_examples(
    funnel: Funnel,
    moments: Moments,
    at: np.ndarray,
    config: ExamplesConfig,
    *,
    seed: int,
    taken: np.ndarray | None = None,
    dice: Dice | None = None,
    progress: Counted = uncounted,
) -> Columns:
    """Pairs (moment, candidate) at log positions `at` (n,) with everything the fine stage sees, and a 0/1 `label`.

    `taken` (E,) bool says of which rows of the log the item was taken (default: the positives; see `recsys.lessons`).

    A positive that recall did not find is left out: the fine stage never meets it. `moment` numbers the group of a row.
    With `dice` some of the users are strangers (see `Dice`), to every stage alike. `progress` is told of every lot that is done.
    """
    popularity = np.bincount(moments.log.item[moments.log.positive], minlength=len(funnel.items)).astype(np.float64)
    draw = _Draw(config, popularity, np.random.default_rng(seed), moments.log.impressions and config.exposed)
    positive = moments.log.positive if taken is None else taken
    parts: list[Columns] = []
    lots: list[tuple[Queries, np.ndarray]] = []
    for start in range(0, len(at), CHUNK):
        chunk = at[start : start + CHUNK]
        asked = queries = moments.queries(chunk)
        if dice:
            new = dice.forget(queries)
            queries.memo["fields"] = funnel.space.estranged(funnel.user_fields(queries), queries, new)
            asked = replace(queries, users=np.where(new, UNKNOWN, queries.users).astype(np.int32), memo={})  # nothing was counted of them
        items, says, labels = _pairs(funnel, queries, moments.log.item[chunk], positive[chunk], draw)
        parts.append(_known_columns(funnel, queries, (items, says, labels), start))
        if funnel.live is not None:
            lots.append((asked.bare(), items))
        progress(len(chunk))
    if funnel.live is not None:
        for part, (_, items), (own, of_pairs) in zip(parts, lots, counted(funnel.live, lambda: lots), strict=True):
            part.update(_of_slots(items, own, of_pairs))
    return gathered(parts)


def pair_columns(funnel: Funnel, queries: Queries, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], first: int) -> Columns:
    """What the fine stage sees of ((B, M) items or -1, (B, M, w) evidence, (B, M) labels), a row a pair; `moment` counts from `first`."""
    out = _known_columns(funnel, queries, pairs, first)
    if funnel.live is not None:
        out |= _of_slots(pairs[0], funnel.live.query_fields(queries), funnel.live.pair_fields(queries, pairs[0]))
    return out


def _known_columns(funnel: Funnel, queries: Queries, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], first: int) -> Columns:
    """`pair_columns` without the aggregates."""
    items, says, labels = pairs
    b, n = np.nonzero(items != UNKNOWN)
    fields = {name: column[b] for name, column in funnel.user_fields(queries).items()}
    rows = items[b, n]
    fields |= {name: np.asarray(column)[rows] for name, column in funnel.item_columns.items()}
    pair = {EVIDENCE: says[b, n], "user": queries.users[b], "item": rows, "label": labels[b, n], "moment": (first + b).astype(np.int32)}
    return fields | pair


def _of_slots(items: np.ndarray, own: Columns, pairs: Columns) -> Columns:
    """Query fields (B, …) and pair fields (B, M, W) of the slots that have an item, a row a slot."""
    b, n = np.nonzero(items != UNKNOWN)
    return {name: column[b] for name, column in own.items()} | {name: column[b, n] for name, column in pairs.items()}


def _pairs(
    funnel: Funnel, queries: Queries, logged: np.ndarray, positive: np.ndarray, draw: _Draw
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((B, M) items or -1, (B, M, w) evidence, (B, M) labels): the `logged` (B,) item first, `positive` (B,) or not, then drawn negatives."""
    candidates = funnel.coarse_rank(queries, funnel.recall(queries))
    if not candidates.width:  # nobody in this batch has anything left to be shown: one empty slot each
        B, C = len(logged), len(candidates.channels)
        nothing = np.full((B, 1), -np.inf, np.float32)
        candidates = Candidates(
            np.full((B, 1), UNKNOWN, np.int32),
            nothing,
            candidates.channels,
            np.full((B, 1, C), np.nan, np.float32),
            np.zeros((B, 1, C), np.int16),
            merged=nothing,
        )
    says = evidence(candidates)
    target = logged[:, None]
    hit = (candidates.items == target) & (candidates.items != UNKNOWN)  # (B, N)
    found, slot = hit.any(1), hit.argmax(1)
    rows = np.arange(len(logged))
    first_says = np.where(found[:, None], says[rows, slot], unvouched(says.shape[2]))[:, None, :]
    # Shown and passed over is a lesson even when recall would not have found it; a positive is one only if it was found.
    keep_first = np.where(positive, found, draw.exposed)
    first = np.where(keep_first[:, None], target, UNKNOWN)
    dice = np.where(hit | (candidates.items == UNKNOWN) | ~(positive & found)[:, None], -np.inf, draw.rng.random(candidates.items.shape))
    chosen, _ = top_k(dice.astype(np.float32), draw.config.recalled)
    at_slot = np.maximum(chosen, 0)
    drawn = np.where(chosen == UNKNOWN, UNKNOWN, np.take_along_axis(candidates.items, at_slot, 1))
    blind = _blind_negatives(queries, target, positive & found, draw)
    blind_says = np.broadcast_to(unvouched(says.shape[2]), (*blind.shape, says.shape[2]))
    items = np.concatenate([first, drawn, blind], axis=1).astype(np.int32)
    all_says = np.concatenate([first_says, says[rows[:, None], at_slot], blind_says], axis=1)
    labels = np.zeros(items.shape, np.float32)
    labels[:, 0] = positive
    return items, all_says.astype(np.float32), labels


def _blind_negatives(queries: Queries, target: np.ndarray, wanted: np.ndarray, draw: _Draw) -> np.ndarray:
    """(B, uniform + popularity) item rows drawn without looking at the candidates; -1 where one was had or is the target."""
    config, popularity, rng = draw.config, draw.popularity, draw.rng
    B, n_items = len(queries), len(popularity)
    uniform = rng.integers(0, n_items, (B, config.uniform))
    weights = popularity / max(popularity.sum(), 1.0)
    popular = (
        rng.choice(n_items, (B, config.popularity), p=weights) if config.popularity and popularity.sum() else np.empty((B, 0), np.int64)
    )
    items = np.concatenate([uniform, popular], axis=1)
    had = (items[:, :, None] == queries.exclude[:, None, :]).any(2) if queries.exclude.shape[1] else np.zeros(items.shape, bool)
    return np.where(had | (items == target) | ~wanted[:, None], UNKNOWN, items)


def gathered(parts: Iterator[Columns] | Sequence[Columns]) -> Columns:
    """Chunks of rows as one."""
    listed = list(parts)
    return {name: np.concatenate([p[name] for p in listed]) for name in listed[0]} if listed else {}


def are_written(folder: Path) -> bool:
    """Whether an examples folder is there and whole."""
    return (folder / "schema.json").exists()


def write(
    folder: Path,
    *,
    task: str,
    fields: Sequence[Field],
    labels: Sequence[str],
    train: Columns,
    valid: Columns,
    granule: int,
    seed: int,
    items: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write an examples folder: schema.json, train.parquet (shuffled by `seed`, row groups of `granule`), valid.parquet, items/."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = [f.name for f in fields] + [c for c in ("user", "item", "log_q", "moment", *labels) if c in train]
    order = np.random.default_rng(seed).permutation(len(train["user"]))
    for part, columns, rows in (("train", train, order), ("valid", valid, np.arange(len(valid["user"])))):
        arrays = {name: _arrow(columns[name][rows]) for name in keep}
        # Plain, uncompressed pages: the reader decodes them faster than it could decompress them.
        pq.write_table(pa.table(arrays), folder / f"{part}.parquet", row_group_size=granule, compression="none", use_dictionary=False)
    for name, column in (items or {}).items():
        (folder / "items").mkdir(exist_ok=True)
        np.save(folder / "items" / f"{name}.npy", column)
    # schema.json comes last: a folder that has it is whole.
    schema: dict[str, Any] = {
        "task": task,
        "fields": [asdict(f) for f in fields],
        "labels": list(labels),
        "rows": {"train": len(order), "valid": len(valid["user"])},
        "granule": granule,
        "seed": seed,
    }
    (folder / "schema.json").write_text(json.dumps(schema, indent=1))


def _arrow(column: np.ndarray) -> pa.Array:
    if column.ndim == 1:
        return pa.array(column)
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
