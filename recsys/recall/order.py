"""Sorting by one packed 64-bit key, because numpy sorts plain integers ten times faster than it argsorts.

The position rides in the low bits, so every order is stable: ties go to who stood first, in any batch.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import sparse

LOW = np.uint64(0xFFFF_FFFF)
GROUP = 8
"""Columns of which only the largest score is looked at first."""
EMPTY = np.uint64(2**64 - 1)
"""A key that sorts after every other; its low half is -1."""


def descending(scores: np.ndarray) -> np.ndarray:
    """Float32 scores without NaN -> uint64 keys that sort highest score first; the low 32 bits are free for a position."""
    bits = (np.float32(0) - scores.astype(np.float32, copy=False)).view(np.int32)  # 0 - x: makes -0 and 0 one value
    # A float's bits compare like an integer once negatives are flipped and the sign bit is turned round.
    flip = bits >> 31
    flip |= np.int32(-(2**31))
    bits ^= flip
    keys = bits.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    return keys


def scores_of(keys: np.ndarray) -> np.ndarray:
    """The scores that `descending` made these keys of."""
    turned = (keys >> np.uint64(32)).astype(np.uint32).view(np.int32)
    bits = turned ^ (~(turned >> 31) | np.int32(-(2**31)))
    scores: np.ndarray = np.float32(0) - bits.view(np.float32)
    return scores


def best_first(scores: np.ndarray, keep: int) -> np.ndarray:
    """(B, N) float32 scores without NaN -> (B, min(keep, N)) int64 columns, highest score first, ties to the smaller column."""
    if 0 < keep < scores.shape[1] // (4 * GROUP):
        return _among_the_best(scores, keep)
    keys = descending(scores)
    keys |= np.arange(scores.shape[1], dtype=np.uint64)
    if keep < scores.shape[1] // 4:
        keys = np.partition(keys, keep, axis=1)[:, :keep]  # keys are distinct, so which ones are kept is certain
    keys.sort(axis=1)
    columns: np.ndarray = (keys[:, :keep] & LOW).astype(np.int64)
    return columns


def _among_the_best(scores: np.ndarray, keep: int) -> np.ndarray:
    """`best_first` of rows much longer than `keep`: only what can be among the best is sorted.

    Of the largest scores of N / GROUP groups, the keep-th is reached by `keep` columns at least, so nothing below it is asked for.
    """
    B, N = scores.shape
    m = N // GROUP
    largest = scores[:, : m * GROUP].reshape(B, GROUP, m).max(1)  # (B, m)
    floor = np.partition(largest, m - keep, axis=1)[:, m - keep, None]
    row, column = np.divmod(np.flatnonzero(scores >= floor), N)
    keys = descending(scores[row, column]) | column.astype(np.uint64)
    ends = np.cumsum(np.bincount(row, minlength=B))
    out = np.empty((B, keep), np.int64)
    for b, (low, high) in enumerate(pairwise([0, *ends.tolist()])):
        mine = keys[low:high]
        mine.sort()
        out[b] = (mine[:keep] & LOW).astype(np.int64)
    return out


def best_of_rows(product: sparse.csr_matrix, k: int) -> np.ndarray:
    """The k largest entries of each row of a (B, N) csr: (B, k) uint64 keys of `descending` and column, unsorted, EMPTY at the end.

    Which ones are kept is certain: ties go to the smaller column.
    """
    keys = descending(product.data)
    keys |= product.indices.view(np.uint32) if product.indices.dtype == np.int32 else product.indices.astype(np.uint64)
    best = np.full((product.shape[0], k), EMPTY)
    for r, (low, high) in enumerate(pairwise(product.indptr.tolist())):
        mine = keys[low:high]
        if high - low > k:
            mine.partition(k - 1)
            mine = mine[:k]
        best[r, : len(mine)] = mine
    return best


def by_key(keys: np.ndarray, bound: int) -> np.ndarray:
    """(n,) int64 keys in [0, bound) -> (n,) int64 positions that sort them, equal keys in the order they came in."""
    bits = max(len(keys) - 1, 1).bit_length()
    if bound.bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    packed = (keys << bits) | np.arange(len(keys), dtype=np.int64)
    packed.sort()
    positions: np.ndarray = packed & ((1 << bits) - 1)
    return positions


def among(items: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(B, N) item rows, (B, E) item rows with -1 in empty slots -> (B, N) bool: whether an item stands in its row of `others`."""
    here = others >= 0
    if not here.any() or not items.size:
        return np.zeros(items.shape, bool)
    span = max(int(others.max()), int(items.max())) + 2
    rows = np.arange(len(items), dtype=np.int64)[:, None] * span
    listed = np.sort((rows + others)[here])
    keys = rows + items
    at = np.minimum(np.searchsorted(listed, keys), len(listed) - 1)
    found: np.ndarray = (listed[at] == keys) & (items >= 0)
    return found
