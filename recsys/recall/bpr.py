"""BPR: matrix factorization that learns to rank what was taken above what was not (Rendle et al., UAI 2009, arXiv:1205.2618).

    maximise the sum over drawn (u, i taken, j not taken) of log sigmoid(x_ui - x_uj) - l2 |theta|^2,  x_ui = w_u h_i + b_i

Minibatches with Adagrad: gradients of a batch are summed per row, so equal seeds give equal models.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from scipy import sparse

from recsys.core import FrozenConfig, Queries
from recsys.data.interactions import Interactions
from recsys.errors import NotFittedError
from recsys.recall.factors import FactorScale, ItemFactors, SearchedBy, newest_of_each
from recsys.recall.links import Decay, Newest, recency
from recsys.recall.neighbors import EventsPerUser, UsePast, incidence
from recsys.recall.vector import RecallGoal

log = logging.getLogger(__name__)


class BPRConfig(FrozenConfig):
    type: Literal["bpr"] = "bpr"
    """Matrix factorization that ranks pairs: what was taken above what was not."""
    dim: PositiveInt = 64
    """Factors of a user or an item."""
    learning_rate: PositiveFloat = 0.05
    """Adagrad's first step."""
    l2: NonNegativeFloat = 0.01
    """Regularization of the factors and biases in a drawn triple."""
    epochs: PositiveInt = 60
    """Each draws as many triples as there are positives."""
    batch_size: PositiveInt = 4_096
    """Triples whose gradients are summed into one step."""
    init_std: FactorScale = 0.1
    max_events_per_user: EventsPerUser = 1_000
    use_past: UsePast = True
    newest: Newest = None
    decay: Decay = 1.0
    index: SearchedBy = "auto"
    recall_goal: RecallGoal = 0.98
    seed: int = 1
    """Of the first factors and of the triples."""

    def build(self) -> BPR:
        """The channel, not yet fitted."""
        return BPR(self)

    def load(self, folder: Path, _funnel: object = None) -> BPR:
        """The channel that was saved in `folder`."""
        return BPR.load(folder, self)


class BPR:
    """score(user, item) = w h_item + b_item.

    The paper has a w for users of the log alone. Any other history gets w = M mean(h of its items, by recency), where M is the
    matrix that best maps those means to the learnt factors over the users of the log (ridge regression). A user of the log
    whose history has m items that the fit did not know, beside the n it did, gets (n w_u + m w(new items)) / (n + m).
    """

    name = "bpr"

    def __init__(self, config: BPRConfig) -> None:
        self.config = config
        self._items: ItemFactors | None = None
        self._users = np.empty((0, 0), np.float32)
        self._map = np.empty((0, 0), np.float32)
        self._indptr = np.zeros(1, np.int64)
        self._taken = np.empty(0, np.int32)

    @property
    def items(self) -> ItemFactors:
        """The item factors, their biases as the last coordinate."""
        if self._items is None:
            raise NotFittedError("BPR has no factors yet. Call fit(interactions) first.")
        return self._items

    def fit(self, interactions: Interactions) -> Self:
        """Draw triples and step, epoch after epoch."""
        c = self.config
        events = incidence(interactions, values="binary", most_per_user=c.max_events_per_user, use_past=c.use_past)
        self._users, factors = factorize(events, c)
        H = factors[:, :-1]
        known = np.flatnonzero(np.diff(events.indptr))
        means = (events[known] @ H) / np.diff(events.indptr)[known][:, None]  # (n, d)
        gram = means.T.astype(np.float64) @ means
        ridge = 1e-3 * max(float(np.trace(gram)), 1e-12) / c.dim
        self._map = np.linalg.solve(gram + ridge * np.eye(c.dim), means.T @ self._users[known]).astype(np.float32)
        self._indptr, self._taken = events.indptr.astype(np.int64), events.indices
        some = np.sort(np.random.default_rng(c.seed).permutation(known)[:256])
        self._items = ItemFactors.of(factors, c.index, c.recall_goal, _with_one(self._users[some]))
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the highest scores; nothing for a user outside of the log without an item that is known."""
        return self.items.recall(_with_one(self.user_vectors(queries)), queries, k)

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, d) float32 factors of the queries, NaN where nothing is known. One by one, so a batch changes nothing."""
        items = self.items
        out = np.full((len(queries), self.config.dim), np.nan, np.float32)
        weights = recency(queries, newest=self.config.newest, decay=self.config.decay)
        for b, history in enumerate(queries.history):
            user = int(queries.users[b])
            known = self._taken[self._indptr[user] : self._indptr[user + 1]] if 0 <= user < len(self._users) else self._taken[:0]
            taken, weight = newest_of_each(history, weights[b], len(items))
            new = ~np.isin(taken, known)
            n, m = len(known), int(new.sum())
            if m:
                mean = (weight[new] / weight[new].sum()) @ items.rows(taken[new])[:, :-1]
                out[b] = (n * self._users[user] + m * (mean @ self._map)) / (n + m) if n else mean @ self._map
            elif n:
                out[b] = self._users[user]
        return out

    def save(self, folder: Path) -> None:
        """Write `items/`, users.npy, map.npy and what each user had in the fit (indptr.npy, taken.npy)."""
        self.items.save(folder / "items")
        for name in ("users", "map", "indptr", "taken"):
            np.save(folder / f"{name}.npy", getattr(self, f"_{name}"))

    @classmethod
    def load(cls, folder: Path, config: BPRConfig) -> Self:
        """Read what `save` wrote; users stay memory-mapped."""
        self = cls(config)
        self._items = ItemFactors.load(folder / "items", config.index, config.recall_goal)
        # asarray: a plain view of the map, whose indexing does not pay for the memmap subclass.
        for name in ("users", "map", "indptr", "taken"):
            setattr(self, f"_{name}", np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")))
        return self


def _with_one(users: np.ndarray) -> np.ndarray:
    """(B, d) -> (B, d + 1): an item's bias is its last coordinate, a user's there is 1."""
    return np.column_stack([users, np.ones(len(users), np.float32)])


def factorize(events: sparse.csr_matrix, config: BPRConfig) -> tuple[np.ndarray, np.ndarray]:
    """(U, I) csr -> ((U, d) user factors, (I, d + 1) item factors with their biases), float32."""
    c, rng = config, np.random.default_rng(config.seed)
    (U, n), std = events.shape, config.init_std / np.sqrt(config.dim)
    W, H = rng.normal(0, std, (U, c.dim)).astype(np.float32), np.zeros((n, c.dim + 1), np.float32)
    H[:, :-1] = rng.normal(0, std, (n, c.dim))
    H[np.bincount(events.indices, minlength=n) == 0] = 0  # never a positive, so nothing says where it should lie
    squares_W, squares_H = np.full(W.shape, 1e-8, np.float32), np.full(H.shape, 1e-8, np.float32)
    user, item = np.repeat(np.arange(U), np.diff(events.indptr)), events.indices.astype(np.int64)
    pairs = np.sort(user * n + item)
    for epoch in range(c.epochs):
        order = rng.permutation(len(user))
        for at in range(0, len(order), c.batch_size):
            drawn = order[at : at + c.batch_size]
            u, i = user[drawn], item[drawn]
            j = rng.integers(0, n, len(u))
            fair = ~_among(pairs, u * n + j)  # a drawn item that the user had says nothing
            u, i, j = u[fair], i[fair], j[fair]
            w, more = W[u], H[i] - H[j]  # (b, d), (b, d + 1)
            margin = np.einsum("bd,bd->b", w, more[:, :-1]) + more[:, -1]
            pull = (1 / (1 + np.exp(np.clip(margin, -30, 30)))).astype(np.float32)[:, None]
            toward = pull * _with_one(w)  # of h_i, and against h_j
            _step(W, squares_W, u, pull * more[:, :-1], c)
            _step(H, squares_H, np.concatenate([i, j]), np.concatenate([toward, -toward]), c)
        log.debug("bpr epoch %d of %d", epoch + 1, c.epochs)
    return W, H


def _step(table: np.ndarray, squares: np.ndarray, rows: np.ndarray, gradients: np.ndarray, config: BPRConfig) -> None:
    """One Adagrad step upwards on the rows that occur, each by the sum of its gradients less l2 per occurrence."""
    touched, place, count = np.unique(rows, return_inverse=True, return_counts=True)
    # A sparse product sums rows ten times faster than np.add.at.
    summing = sparse.csc_matrix((np.ones(len(rows), np.float32), place, np.arange(len(rows) + 1)), shape=(len(touched), len(rows)))
    gradient = summing @ gradients - config.l2 * count[:, None].astype(np.float32) * table[touched]
    squares[touched] += gradient**2
    table[touched] += config.learning_rate * gradient / np.sqrt(squares[touched])


def _among(ascending: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each key occurs in a sorted array."""
    at = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    found: np.ndarray = ascending[at] == keys
    return found
