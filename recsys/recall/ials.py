"""iALS: matrix factorization of implicit feedback by alternating least squares (Hu et al., 2008), set up as in Rendle et al., 2021.

    sum over what was taken of c (1 - w_u h_i)^2 + alpha0 sum over all pairs of (w_u h_i)^2 + sum of lambda_u |w_u|^2 + lambda_i |h_i|^2
    lambda_u = l2 (items of u + alpha0 I)^nu, lambda_i = l2 (users of i + alpha0 U)^nu        (arXiv:2110.14037, 2110.14044)

A user's factor is the solution of one small linear system given the items', so the factor of a query is solved from its
history as it is now: live users, and users the log never saw, are folded in exactly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
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

CHUNK = 4_000_000
"""Most numbers of one gathered (rows, events, dim) block (16 MB a thread)."""
LONGEST = 4_096
"""Events of a row that are gathered at once; longer rows sum their Gram matrix in parts."""


class IALSConfig(FrozenConfig):
    type: Literal["ials"] = "ials"
    """Matrix factorization by alternating least squares: strong on dense data, quick to fit."""
    dim: PositiveInt = 64
    """Factors. More: sharper, and memory and time with it."""
    alpha0: PositiveFloat = 0.3
    """Weight of every pair's pull towards 0, where what was taken has weight 1. Larger: closer to what is popular."""
    l2: PositiveFloat = 0.01
    """Regularization, lambda, before it is scaled by frequency. Tune it with alpha0: both matter more than anything else here."""
    nu: NonNegativeFloat = 1.0
    """How regularization grows with how often a user or item occurs: 0 not at all (Hu et al.), 1 in proportion (Rendle et al.)."""
    sweeps: PositiveInt = 16
    """Times that all users and all items are solved."""
    init_std: FactorScale = 0.1
    values: Literal["binary", "count"] = "binary"
    """Whether an item had three times weighs once or three times."""
    max_events_per_user: EventsPerUser = 1_000
    use_past: UsePast = True
    newest: Newest = None
    decay: Decay = 1.0
    index: SearchedBy = "auto"
    recall_goal: RecallGoal = 0.98
    seed: int = 1
    """Of the first factors: equal seeds give equal models, with any number of threads."""
    threads: PositiveInt | None = None
    """Threads of the fit; null: one per core."""

    def build(self) -> IALS:
        """The channel, not yet fitted."""
        return IALS(self)

    def load(self, folder: Path, _funnel: object = None) -> IALS:
        """The channel that was saved in `folder`."""
        return IALS.load(folder, self)


class Side(NamedTuple):
    """What one half-sweep solves: the events of n rows, and their (n,) regularization.

    `root` (nnz,) is the square root of an event's weight and `target` (nnz,) its pull over that root; None: both are 1.
    """

    events: sparse.csr_matrix
    l2: np.ndarray
    root: np.ndarray | None = None
    target: np.ndarray | None = None

    @classmethod
    def of(cls, events: sparse.csr_matrix, config: IALSConfig) -> Self:
        """The rows of an (n, m) csr whose values are weights."""
        m = events.shape[1]
        l2 = config.l2 * (np.diff(events.indptr) + config.alpha0 * m) ** config.nu
        root = None if config.values == "binary" else np.sqrt(events.data)
        return cls(events, l2.astype(np.float32), root, root)


class IALS:
    """score(user, item) = w(history) h_item, with w solved from the history; recency weighs its events."""

    name = "ials"

    def __init__(self, config: IALSConfig) -> None:
        self.config = config
        self._items: ItemFactors | None = None
        self._basis = np.empty((0, 0))
        self._spread = np.empty(0)

    @property
    def items(self) -> ItemFactors:
        """The item factors."""
        if self._items is None:
            raise NotFittedError("IALS has no factors yet. Call fit(interactions) first.")
        return self._items

    def fit(self, interactions: Interactions) -> Self:
        """Alternate between solving all users and all items."""
        c = self.config
        events = incidence(interactions, values=c.values, most_per_user=c.max_events_per_user, use_past=c.use_past)
        users, factors = factorize(Side.of(events, c), Side.of(events.T.tocsr(), c), c)
        with_events = np.flatnonzero(np.diff(events.indptr))
        some = np.sort(np.random.default_rng(c.seed).permutation(with_events)[:256])
        self._items = ItemFactors.of(factors, c.index, c.recall_goal, users[some])
        self._spread, self._basis = np.linalg.eigh(factors.T.astype(np.float64) @ factors)
        return self

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items with the largest inner products; nothing for a history without an item that is known."""
        return self.items.recall(self.user_vectors(queries), queries, k)

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, d) float32: the solution for each history, NaN where it is empty. One solve each, so a batch changes nothing."""
        c, items = self.config, self.items
        out = np.full((len(queries), len(self._spread)), np.nan, np.float32)
        weights = recency(queries, newest=c.newest, decay=c.decay)
        for b, history in enumerate(queries.history):
            taken, weight = newest_of_each(history, weights[b], len(items))
            if len(taken):
                l2 = c.l2 * (len(taken) + c.alpha0 * len(items)) ** c.nu
                root = np.sqrt(weight.astype(np.float64))
                out[b] = self._basis @ _folded(root[:, None] * (items.rows(taken) @ self._basis), root, c.alpha0 * self._spread + l2)
        return out

    def save(self, folder: Path) -> None:
        """Write `items/`, basis.npy and spread.npy (the eigenvectors and eigenvalues of the items' Gram matrix)."""
        self.items.save(folder / "items")
        np.save(folder / "basis.npy", self._basis)
        np.save(folder / "spread.npy", self._spread)

    @classmethod
    def load(cls, folder: Path, config: IALSConfig) -> Self:
        """Read what `save` wrote."""
        self = cls(config)
        self._items = ItemFactors.load(folder / "items", config.index, config.recall_goal)
        self._basis, self._spread = np.load(folder / "basis.npy"), np.load(folder / "spread.npy")
        return self


def _folded(rows: np.ndarray, target: np.ndarray, base: np.ndarray) -> np.ndarray:
    """(diag(base) + rows' rows)^-1 rows' target, by the smaller of the two systems that give it: (L, d), (L,), (d,) -> (d,)."""
    L, d = rows.shape
    if d > L:
        scaled = rows / base
        return np.asarray(scaled.T @ np.linalg.solve(np.eye(L) + scaled @ rows.T, target))
    return np.asarray(np.linalg.solve(np.diag(base) + rows.T @ rows, rows.T @ target))


def factorize(users: Side, items: Side, config: IALSConfig) -> tuple[np.ndarray, np.ndarray]:
    """((U, d), (I, d)) float32 factors after the configured sweeps, users first; from random items."""
    std = config.init_std / np.sqrt(config.dim)
    n = items.events.shape[0]
    H = np.random.default_rng(config.seed).normal(0, std, (n, config.dim)).astype(np.float32)
    W = np.empty((users.events.shape[0], config.dim), np.float32)
    with _one_torch_thread(), ThreadPoolExecutor(config.threads or os.cpu_count()) as pool:
        for sweep in range(config.sweeps):
            W = solve(users, H, config.alpha0, pool)
            H = solve(items, W, config.alpha0, pool)
            log.debug("ials sweep %d of %d", sweep + 1, config.sweeps)
    return W, H


def solve(side: Side, others: np.ndarray, alpha0: float, pool: ThreadPoolExecutor) -> np.ndarray:
    """(n, d) float32: each row's exact solution given the (m, d) factors of the other side; 0 for a row without events.

    (alpha0 G + l2 + R'R) w = R't, with R the row's (L, d) factors times `root`, t its `target` and G = H'H. In the basis of G's
    eigenvectors alpha0 G + l2 is a diagonal D, and for L < d the same w is D^-1 R' (1 + R D^-1 R')^-1 t: an (L, L) system, which
    for most users is a fraction of the (d, d) one. Rows are solved in batches of like length; a factor of 0 pads the shorter.
    """
    n, d = side.events.shape[0], others.shape[1]
    spread, basis = np.linalg.eigh(others.T.astype(np.float64) @ others)
    rotation = torch.from_numpy(basis.astype(np.float32))
    turned = torch.cat([torch.from_numpy(others) @ rotation, torch.zeros(1, d)])  # its last row pads
    base = torch.from_numpy((alpha0 * np.maximum(spread, 0)).astype(np.float32))
    out = np.zeros((n, d), np.float32)

    def one_batch(rows: np.ndarray) -> None:
        out[rows] = (_solve_batch(side, rows, turned, base) @ rotation.T).numpy()

    list(pool.map(one_batch, _batches(np.diff(side.events.indptr), d)))
    return out


def _batches(length: np.ndarray, d: int) -> Iterator[np.ndarray]:
    """Rows with events in batches of like length, each at most CHUNK numbers when gathered."""
    order = np.argsort(length, kind="stable")
    order = order[np.searchsorted(length[order], 1) :]
    at = 0
    while at < len(order):
        first = int(length[order[at]])
        # At most a quarter of a batch is padding: as long as 4/3 of its first row, and as many as fit.
        stop = int(np.searchsorted(length[order], max(first * 4 // 3, first + 2), side="right"))
        stop = min(stop, at + max(1, CHUNK // (min(int(length[order[stop - 1]]), LONGEST) * d)))
        yield order[at:stop]
        at = stop


def _solve_batch(side: Side, rows: np.ndarray, turned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    indptr = side.events.indptr
    start, length = indptr[rows].astype(np.int64), np.diff(indptr)[rows]
    D = base + torch.from_numpy(side.l2[rows])[:, None]  # (b, d)
    L, d = int(length.max()), len(base)
    if d > L:
        R, t = _gathered(side, start, length, L, turned)
        scaled = R / D[:, None, :]
        K = torch.bmm(scaled, R.transpose(1, 2))  # (b, L, L)
        K.diagonal(dim1=1, dim2=2).add_(1)
        return torch.bmm(_cholesky_solve(K, t[:, :, None]).transpose(1, 2), scaled)[:, 0]
    A, right = torch.diag_embed(D), torch.zeros(len(rows), d)
    for skip in range(0, L, LONGEST):
        R, t = _gathered(side, start + skip, np.clip(length - skip, 0, LONGEST), min(L - skip, LONGEST), turned)
        A.baddbmm_(R.transpose(1, 2), R)
        right += torch.bmm(t[:, None, :], R)[:, 0]
    return _cholesky_solve(A, right[:, :, None])[:, :, 0]


def _gathered(side: Side, start: np.ndarray, length: np.ndarray, L: int, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """((b, L, d) factors of the events of each row times their roots, (b, L) targets), 0 beyond a row's length."""
    place = np.arange(L)
    real = place < length[:, None]  # (b, L)
    at = np.where(real, start[:, None] + place, 0)
    wanted = torch.from_numpy(np.where(real, side.events.indices[at], len(turned) - 1).astype(np.int64))
    R = torch.index_select(turned, 0, wanted.view(-1)).view(*wanted.shape, -1)  # four times as fast as turned[wanted]
    if side.root is not None:
        R *= torch.from_numpy(side.root[at])[:, :, None]
    target = real.astype(np.float32) if side.target is None else np.where(real, side.target[at], 0)
    return R, torch.from_numpy(target)


def _cholesky_solve(A: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    factor, _ = torch.linalg.cholesky_ex(A)
    return torch.cholesky_solve(right, factor)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The pool's threads do not start threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
