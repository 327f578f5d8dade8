"""Item-based collaborative filtering: items liked by the same users (Sarwar et al., 2001; Deshpande & Karypis, 2004).

Similarities come from sparse products of a block of items with the whole matrix, so that memory is bounded by the
block; an item x item matrix never exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from scipy import sparse

from recsys.core import UNKNOWN, FrozenConfig, Queries
from recsys.data.interactions import Interactions, group
from recsys.errors import NotFittedError
from recsys.recall.links import Decay, HalfLife, ItemLinks, Newest, recency
from recsys.recall.order import EMPTY, LOW, best_of_rows, scores_of
from recsys.recall.similarity import Kind, Sizes, Weighting, kind_of, similarities, weigh

BLOCK = 2_000_000
"""Most similarities that one thread holds at once (about 60 MB)."""


EventsPerUser = Annotated[
    PositiveInt,
    Field(
        description="Only a user's newest items count in the fit: cost grows with them, in item_cf with their square, and a robot's 100,000 say little."
    ),
]
UsePast = Annotated[bool, Field(description="Whether what users did before the log (data.history) counts in the fit.")]
MinimumSimilarity = Annotated[NonNegativeFloat, Field(description="Similarities at or below this are dropped.")]


class ItemCFConfig(FrozenConfig):
    type: Literal["item_cf"] = "item_cf"
    """What goes with the history: items that the same users took."""
    neighbors: PositiveInt = 100
    """Neighbours kept per item. More recalls deeper and costs memory linearly."""
    similarity: Literal["cosine", "pearson"] = "cosine"
    """`cosine` of the two items' users. `pearson`: their correlation over all users, those with neither among them; it asks for more
    common users than chance would give two popular items, and only positive ones count."""
    keep: Literal["history", "candidate"] = "candidate"
    """Whose nearest neighbours are kept. `candidate`: an item is scored by those of its own nearest that the user has, as in the
    literature. `history`: each item of the history nominates its nearest: a third of the work, and less of the long tail."""
    reach: PositiveInt = 1_000
    """With keep: candidate, items that one item of the history may speak for, strongest first. A very popular item is among the
    nearest of a great many; this bounds the work of a query to history x reach."""
    shrink: NonNegativeFloat = 0.0
    """Pulls the similarity of rarely co-clicked pairs towards zero."""
    minimum: MinimumSimilarity = 0.0
    weighting: Weighting = "tf_idf"
    """`none`: as they are. `iuf` lets active users count less: 1 / log(1 + their items). `tf_idf` and `bm25` weigh as in text
    search, a user being a term and an item a document; `bm25` then takes the dot product instead of the cosine."""
    values: Literal["binary", "count"] = "binary"
    """Whether an item had three times counts once or three times when similarities are computed."""
    max_events_per_user: EventsPerUser = 1_000
    use_past: UsePast = True
    newest: Newest = None
    decay: Decay = 0.95
    half_life_h: HalfLife = None
    threads: PositiveInt | None = None
    """Threads of the fit; null: one per core."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        kind_of(self.similarity, self.weighting)
        return self

    def build(self) -> ItemCF:
        """The channel, not yet fitted."""
        return ItemCF(self)

    def load(self, folder: Path, _funnel: object = None) -> ItemCF:
        """The channel that was saved in `folder`."""
        return ItemCF.load(folder, self)


class ItemCF:
    """score(user, item) = sum over the history of similarity(item, history item) * recency."""

    name = "item_cf"

    def __init__(self, config: ItemCFConfig) -> None:
        self.config = config
        self._links: ItemLinks | None = None
        self._nearest: ItemLinks | None = None

    @property
    def links(self) -> ItemLinks:
        """From an item of the history to the items that it speaks for."""
        if self._links is None:
            raise NotFittedError("ItemCF has no neighbours yet. Call fit(interactions) first.")
        return self._links

    def fit(self, interactions: Interactions) -> Self:
        """Find each item's nearest among the positives of the log."""
        c = self.config
        events = incidence(interactions, values=c.values, most_per_user=c.max_events_per_user, use_past=c.use_past)
        rows = weigh(events, c.weighting).T.tocsr()  # (I, U)
        self._nearest = ItemLinks.of(
            *nearest(rows, c.neighbors, kind_of(c.similarity, c.weighting), shrink=c.shrink, minimum=c.minimum, threads=c.threads)
        )
        self._links = self._nearest if c.keep == "history" else self._nearest.reversed(c.reach)
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that the history speaks for most."""
        weights = recency(queries, newest=self.config.newest, decay=self.config.decay, half_life_h=self.config.half_life_h)
        return self.links.recall(queries.history, weights, queries.exclude, k, queries.allowed)

    def similar(self, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> ((B, k') nearest items, (B, k') similarities), best first; k' is at most `neighbors`."""
        if self._nearest is None:
            raise NotFittedError("ItemCF has no neighbours yet. Call fit(interactions) first.")
        return self._nearest.strongest(items, k)

    def save(self, folder: Path) -> None:
        """Write `links/` and, where they differ, `nearest/`."""
        self.links.save(folder / "links")
        if self.config.keep == "candidate" and self._nearest is not None:
            self._nearest.save(folder / "nearest")

    @classmethod
    def load(cls, folder: Path, config: ItemCFConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        self._links = ItemLinks.load(folder / "links")
        self._nearest = ItemLinks.load(folder / "nearest") if config.keep == "candidate" else self._links
        return self


def taken_by(interactions: Interactions, *, use_past: bool) -> tuple[np.ndarray, np.ndarray]:
    """(n,) user and (n,) item rows of the positives in order of the log; what came before the log stands before it."""
    positives = interactions.positives()
    user, item = positives.user, positives.item
    if use_past and interactions.past is not None:
        past = interactions.past
        user = np.concatenate([np.repeat(np.arange(interactions.n_users, dtype=np.int32), np.diff(past.indptr)), user])
        item = np.concatenate([past.items, item])
    return user, item


def incidence(
    interactions: Interactions, *, values: Literal["binary", "count"], most_per_user: int | None = None, use_past: bool = True
) -> sparse.csr_matrix:
    """(U, I) float32 csr of the positives: 1 (binary) or how often, over each user's newest `most_per_user` events."""
    user, item = taken_by(interactions, use_past=use_past)
    if most_per_user is not None:
        indptr, order = group(user, interactions.n_users)
        from_end = np.repeat(indptr[1:], np.diff(indptr)) - np.arange(len(order))  # 1 for a user's newest
        keep = order[from_end <= most_per_user]
        user, item = user[keep], item[keep]
    out = sparse.coo_matrix((np.ones(len(user), np.float32), (user, item)), shape=(interactions.n_users, interactions.n_items)).tocsr()
    out.sum_duplicates()
    if values == "binary":
        out.data[:] = 1
    return out


def nearest(
    rows: sparse.csr_matrix,
    k: int,
    kind: Kind = "cosine",
    *,
    shrink: float = 0.0,
    minimum: float = 0.0,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of each row of a (n, m) csr without negative values, with similarity above `minimum`.

    cosine: dot / (|a| |b| + shrink). pearson: the same of rows less their mean over all m columns, which is the dot product
    less m * mean(a) * mean(b): rows without a common column correlate negatively, so no neighbour is missed by looking at those
    with one. dot: the plain dot product.

    Gives ((n, k) int32 rows, -1 where fewer; (n, k) float32), best first, ties to the smaller row; the same for any number of
    threads. A row without entries is near nobody.
    """
    n = rows.shape[0]
    k = min(k, max(n - 1, 0))
    neighbors, similarity = np.full((n, k), UNKNOWN, np.int32), np.zeros((n, k), np.float32)
    if not k:
        return neighbors, similarity
    sizes = Sizes.of(rows, kind)
    direct = kind == "dot" or (kind == "cosine" and not shrink)
    if direct:  # unit rows give cosines directly
        length = sizes.length
        rows = sparse.diags_array(np.divide(1, length, out=np.zeros_like(length), where=length > 0)).dot(rows).tocsr()
    columns = rows.T.tocsr()  # (m, n)

    def one_block(block: tuple[int, int]) -> None:
        start, stop = block
        product = rows[start:stop] @ columns  # (block, n)
        if not direct:
            here = Sizes(sizes.length[start:stop], None if sizes.share is None else sizes.share[start:stop])
            product.data = similarities(product, here, sizes, shrink)
        # One more than k, because a row is its own nearest.
        neighbors[start:stop], similarity[start:stop] = _unpack(best_of_rows(product, k + 1), start, minimum)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(one_block, _blocks(rows, n)))  # list: so that an error of a thread is raised here
    return neighbors, similarity


def _unpack(best: np.ndarray, start: int, minimum: float) -> tuple[np.ndarray, np.ndarray]:
    """(block, k + 1) unsorted keys of rows from `start` on -> their k neighbours and similarities, without themselves."""
    items = (best & LOW).astype(np.uint32).view(np.int32)
    best[items == np.arange(start, start + len(best))[:, None]] = EMPTY
    best.sort(axis=1)
    best = best[:, :-1]
    similarity = np.where(best == EMPTY, 0, scores_of(best))
    return np.where(similarity > minimum, best & LOW, UNKNOWN).astype(np.int64).astype(np.int32), np.where(
        similarity > minimum, similarity, 0
    )


def _blocks(rows: sparse.csr_matrix, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose product with all rows has at most BLOCK entries, or one row."""
    size = np.bincount(rows.indices, minlength=rows.shape[1])  # rows in each column
    pairs = np.concatenate([[0], np.cumsum(size[rows.indices])])[rows.indptr]
    entries = np.concatenate([[0], np.cumsum(np.minimum(np.diff(pairs), n))])
    start = 0
    while start < n:
        stop = int(np.searchsorted(entries, entries[start] + BLOCK, side="right")) - 1
        stop = min(max(stop, start + 1), n)
        yield start, stop
        start = stop
