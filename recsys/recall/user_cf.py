"""User-based collaborative filtering: what the most similar users took (Resnick et al., 1994; Herlocker et al., 1999).

Nothing between users is computed ahead: the fit keeps each item's users, and a query's neighbours are found through the
items of its history as it is now. So a click counts at once, a user the log never saw has neighbours too, and a
user x user matrix never exists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from scipy import sparse

from recsys.core import UNKNOWN, FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import NotFittedError
from recsys.recall.links import Decay, Newest, recency
from recsys.recall.neighbors import BLOCK, EventsPerUser, MinimumSimilarity, UsePast, incidence
from recsys.recall.order import EMPTY, best_of_rows, scores_of
from recsys.recall.similarity import Sizes, Terms, Weighting, kind_of, similarities, weigh


class UserCFConfig(FrozenConfig):
    type: Literal["user_cf"] = "user_cf"
    """What the most similar users took."""
    neighbors: PositiveInt = 100
    """Users who are asked. More reaches further into the long tail and comes closer to what is popular."""
    similarity: Literal["cosine", "pearson"] = "cosine"
    """`cosine` of the two users' items. `pearson`: their correlation over the whole catalogue; only positive ones count."""
    reach: PositiveInt | None = 10_000
    """Users that one item of the history may bring in, those active last; null: all. It bounds the work of a query."""
    shrink: NonNegativeFloat = 0.0
    """Pulls the similarity of users with little in common towards zero."""
    minimum: MinimumSimilarity = 0.0
    weighting: Weighting = "tf_idf"
    """`none`: as they are. `iuf` lets popular items count less: 1 / log(1 + their users). `tf_idf` and `bm25` weigh as in text
    search, an item being a term and a user a document; `bm25` then takes the dot product instead of the cosine."""
    values: Literal["binary", "count"] = "binary"
    """Whether an item had three times counts once or three times."""
    max_events_per_user: EventsPerUser = 1_000
    use_past: UsePast = True
    newest: Newest = None
    decay: Decay = 1.0

    @model_validator(mode="after")
    def _sound(self) -> Self:
        kind_of(self.similarity, self.weighting)
        return self

    def build(self) -> UserCF:
        """The channel, not yet fitted."""
        return UserCF(self)

    def load(self, folder: Path, _funnel: object = None) -> UserCF:
        """The channel that was saved in `folder`."""
        return UserCF.load(folder, self)


class UserCF:
    """score(user, item) = sum of similarity(user, neighbour) over the neighbours who took it, times how often with values: count.

    A user is compared by the query's history, weighed as the log was; what the log says of a known user serves only to keep
    that user from being a neighbour to himself. With decay 1 and a history equal to the user's row of the log, the neighbours
    are those that `nearest` finds between rows.
    """

    name = "user_cf"

    def __init__(self, config: UserCFConfig) -> None:
        self.config = config
        self._taken: sparse.csr_matrix | None = None
        self._index: sparse.csr_matrix | None = None
        self._sizes: Sizes | None = None
        self._terms: Terms | None = None

    @property
    def taken(self) -> sparse.csr_matrix:
        """(U, I) float32 csr of what each user took."""
        if self._taken is None:
            raise NotFittedError("UserCF has no users yet. Call fit(interactions) first.")
        return self._taken

    def fit(self, interactions: Interactions) -> Self:
        """Keep what each user took, and each item's users with their weights."""
        c = self.config
        self._taken = incidence(interactions, values=c.values, most_per_user=c.max_events_per_user, use_past=c.use_past)
        by_item = self._taken.T.tocsr()  # (I, U)
        self._terms = Terms.of(by_item)
        index = weigh(by_item, c.weighting)
        self._sizes = Sizes.of(index.T.tocsr(), kind_of(c.similarity, c.weighting))
        self._index = index if c.reach is None else _newest(index, interactions, c.reach)
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items that the neighbours took most, weighed by how near they are."""
        taken = self.taken
        B, n = len(queries), taken.shape[1]
        items, scores = np.full((B, min(k, n)), UNKNOWN, np.int32), np.full((B, min(k, n)), -np.inf, np.float32)
        if not min(k, n):
            return items, scores
        profiles = self._profiles(queries)
        for rows in self._parts(profiles):
            users, nearness = self._nearest(profiles[rows], queries.users[rows], self.config.neighbors)
            asked = users != UNKNOWN
            indptr = np.concatenate([[0], np.cumsum(asked.sum(1))])
            votes = sparse.csr_matrix((nearness[asked], users[asked], indptr), shape=(len(users), taken.shape[0])) @ taken
            keys = best_of_rows(_permitted(votes, queries.take(rows)), items.shape[1])
            items[rows], scores[rows] = _ranked(keys)
        return items, scores

    def similar_users(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """((B, k') user rows, (B, k') similarities) nearest to each query's history, best first, -1 / -inf at the end.

        k' = min(k, users). A user is not among his own; one without a history has none.
        """
        k = min(k, self.taken.shape[0])
        users, nearness = np.full((len(queries), k), UNKNOWN, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        profiles = self._profiles(queries)
        for rows in self._parts(profiles) if k else ():
            users[rows], nearness[rows] = self._nearest(profiles[rows], queries.users[rows], k)
        return users, nearness

    def _profiles(self, queries: Queries) -> sparse.csr_matrix:
        """(B, I) csr of the histories, weighed as the log was."""
        c, shape = self.config, (len(queries), self.taken.shape[1])
        weights = recency(queries, newest=c.newest, decay=c.decay)
        query, slot = np.nonzero((queries.history >= 0) & (queries.history < shape[1]) & (weights > 0))
        item, value = queries.history[query, slot], weights[query, slot]
        if c.values == "binary":  # of an item that was had twice, the newer event counts
            last = len(item) - 1 - np.unique((query * np.int64(shape[1]) + item)[::-1], return_index=True)[1]
            query, item, value = query[last], item[last], value[last]
        counts = sparse.coo_matrix((value, (item, query)), shape=shape[::-1]).tocsr()
        counts.sum_duplicates()
        return weigh(counts, c.weighting, self._terms).T.tocsr()

    def _parts(self, profiles: sparse.csr_matrix) -> list[np.ndarray]:
        """Queries, grouped so that one product of a group with the index has at most BLOCK entries, or is of one query."""
        assert self._index is not None  # noqa: S101 - every caller has asked for `taken`
        size = np.diff(self._index.indptr)
        entries = np.concatenate([[0], np.cumsum(size[profiles.indices])])[profiles.indptr]
        # A query's votes come after its neighbours: at most so many of a user's items each.
        cost = np.diff(entries) + min(self.config.neighbors * self.config.max_events_per_user, self.taken.shape[1])
        group = np.cumsum(cost) // BLOCK
        return [np.flatnonzero(group == g) for g in np.unique(group)]

    def _nearest(self, profiles: sparse.csr_matrix, users: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, I) profiles of (b,) user rows -> ((b, k) nearest other users, (b, k) similarities above the minimum)."""
        c = self.config
        assert self._index is not None  # noqa: S101
        assert self._sizes is not None  # noqa: S101
        product = profiles @ self._index  # (b, U)
        product.data = similarities(product, Sizes.of(profiles, kind_of(c.similarity, c.weighting)), self._sizes, c.shrink)
        near, value = _ranked(best_of_rows(product, k + 1))  # one more, because a known user is his own nearest
        out = (near == users[:, None]) | (value <= c.minimum)
        order = np.argsort(out, axis=1, kind="stable")[:, :k]
        gone = np.take_along_axis(out, order, 1)
        near, value = np.take_along_axis(near, order, 1), np.take_along_axis(value, order, 1)
        return np.where(gone, UNKNOWN, near).astype(np.int32), np.where(gone, -np.inf, value).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `taken/` and `index/` (csr as three .npy), the sizes of users and what the weighting knows."""
        _save(folder / "taken", self.taken)
        assert self._index is not None  # noqa: S101
        assert self._sizes is not None  # noqa: S101
        assert self._terms is not None  # noqa: S101
        _save(folder / "index", self._index)
        np.save(folder / "length.npy", self._sizes.length)
        if self._sizes.share is not None:
            np.save(folder / "share.npy", self._sizes.share)
        np.save(folder / "term_size.npy", self._terms.size)
        (folder / "terms.json").write_text(json.dumps({"documents": self._terms.documents, "mean_length": self._terms.mean_length}))

    @classmethod
    def load(cls, folder: Path, config: UserCFConfig) -> Self:
        """Read what `save` wrote, memory-mapped."""
        self = cls(config)
        length = np.load(folder / "length.npy")
        share = np.load(folder / "share.npy") if (folder / "share.npy").exists() else None
        size = np.load(folder / "term_size.npy")
        self._sizes, self._terms = Sizes(length, share), Terms(size, **json.loads((folder / "terms.json").read_text()))
        self._taken = _load(folder / "taken", (len(length), len(size)))
        self._index = _load(folder / "index", (len(size), len(length)))
        return self


def _newest(index: sparse.csr_matrix, interactions: Interactions, reach: int) -> sparse.csr_matrix:
    """Of each row of an (I, U) csr, the `reach` users whose last positive is the newest, in ascending rows."""
    if np.diff(index.indptr).max(initial=0) <= reach:
        return index
    last = np.full(index.shape[1], -1, np.int64)
    positives = interactions.positives()
    np.maximum.at(last, positives.user, np.arange(len(positives)))
    row = np.repeat(np.arange(index.shape[0]), np.diff(index.indptr))
    order = np.lexsort((-last[index.indices], row))
    place = np.arange(len(order)) - index.indptr[row]
    kept = np.sort(order[place < reach])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(index.indptr), reach))])
    return sparse.csr_matrix((index.data[kept], index.indices[kept], indptr), shape=index.shape)


def _permitted(votes: sparse.csr_matrix, queries: Queries) -> sparse.csr_matrix:
    """(B, I) votes without the items that a query must not see."""
    n = votes.shape[1]
    row = np.repeat(np.arange(votes.shape[0]), np.diff(votes.indptr))
    query, slot = np.nonzero((queries.exclude >= 0) & (queries.exclude < n))
    kept = ~np.isin(row * np.int64(n) + votes.indices, query * np.int64(n) + queries.exclude[query, slot])
    if queries.allowed is not None:
        kept &= queries.allowed.admits(row, votes.indices)
    indptr = np.concatenate([[0], np.cumsum(kept)])[votes.indptr]
    return sparse.csr_matrix((votes.data[kept], votes.indices[kept], indptr), shape=votes.shape)


def _ranked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, k) unsorted keys -> ((B, k) int32 columns, (B, k) float32 scores), best first, -1 / -inf at the end."""
    keys.sort(axis=1)
    return keys.astype(np.uint32).view(np.int32), np.where(keys == EMPTY, np.float32(-np.inf), scores_of(keys))


def _save(folder: Path, matrix: sparse.csr_matrix) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("indptr", "indices", "data"):
        np.save(folder / f"{name}.npy", getattr(matrix, name))


def _load(folder: Path, shape: tuple[int, int]) -> sparse.csr_matrix:
    # asarray: a plain view of the map, whose indexing does not pay for the memmap subclass.
    data, indices, indptr = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("data", "indices", "indptr"))
    return sparse.csr_matrix((data, indices, indptr), shape=shape, copy=False)
