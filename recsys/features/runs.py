"""Arithmetic over runs [lo, hi) of a sorted line of events: sums that decay, extremes, sessions, newest values, distinct ones."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

EXACT = 2.0**53
"""Whole numbers up to here are floats without rounding."""


class Line(Protocol):
    """Events by key and time: starts (K + 1,) of each key's run, times (m,)."""

    @property
    def starts(self) -> np.ndarray: ...
    @property
    def times(self) -> np.ndarray: ...
    @property
    def cache(self) -> dict[Any, Any]: ...


def decayed(amounts: np.ndarray, times: np.ndarray, starts: np.ndarray, half_life_s: float) -> np.ndarray:
    """(m,) the decayed sum of each event and all before it in its run, at its own time.

    Doubling (Hillis and Steele, 1986): after step d every slot holds the merge of the 2d events up to it, so log2 of the
    longest run passes do, and nothing is ever subtracted.
    """
    out = amounts.astype(np.float64).copy()
    within = np.arange(len(out)) - np.repeat(starts[:-1], np.diff(starts))
    d = 1
    while d <= within.max(initial=0):
        at = np.flatnonzero(within >= d)
        out[at] += out[at - d] * 2.0 ** ((times[at - d] - times[at]) / half_life_s)
        d *= 2
    return out


def summed(amounts: np.ndarray, tree: list[np.ndarray], lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """(n,) the sum of each run, 0 where it is empty. `tree` is kept between calls.

    Level k of the tree holds the sums of blocks of 2**k, and a run is at most two blocks a level: what lies outside of it is in none of
    them. A difference of prefix sums would lose 5 beside 1e20 of another key before it. Whole numbers below 2**53 in all lose
    nothing, so counts have their prefix sums, as the only level.
    """
    if not len(amounts):
        return np.zeros(len(lo))
    if not tree:
        exact = bool((amounts == np.floor(amounts)).all()) and float(np.abs(amounts).sum()) < EXACT
        tree.append(np.concatenate([[0.0], np.cumsum(amounts)]) if exact else amounts)
        while not exact and len(level := tree[-1]) > 1:
            tree.append(np.append(level, np.zeros(len(level) % 2)).reshape(-1, 2).sum(1))
    if len(tree[0]) > len(amounts):
        return np.asarray(tree[0][hi] - tree[0][lo])
    out, first, last = np.zeros(len(lo)), lo.copy(), np.maximum(lo, hi)
    for level in tree:  # a block that is no left, or no right, half of one inside the run is taken by itself
        at = np.flatnonzero((first < last) & (first % 2 == 1))
        out[at] += level[first[at]]
        first[at] += 1
        at = np.flatnonzero((first < last) & (last % 2 == 1))
        last[at] -= 1
        out[at] += level[last[at]]
        first, last = first // 2, last // 2
    return out


def before_session(line: Line, hi: np.ndarray, times: np.ndarray, start: np.ndarray, gap_s: float) -> np.ndarray:
    """(n,) hi, moved before the session that the instant belongs to; every run [start, hi) has an event."""
    if gap_s not in line.cache:
        begins = np.ones(len(line.times), bool)
        begins[1:] = np.diff(line.times) > gap_s
        begins[line.starts[:-1][line.starts[:-1] < len(begins)]] = True
        line.cache[gap_s] = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
    newest = np.maximum(hi, 1) - 1
    return np.where((hi > start) & (times - line.times[newest] <= gap_s), line.cache[gap_s][newest], hi)


def extreme(amounts: np.ndarray, levels: list[np.ndarray], lo: np.ndarray, hi: np.ndarray, op: str) -> np.ndarray:
    """(n,) least or greatest of each run, NaN where it is empty. `levels` keeps the sparse table between calls."""
    best = np.minimum if op == "min" else np.maximum
    if not len(amounts):
        return np.full(len(lo), np.nan)
    if not levels:
        levels.append(amounts)
        while (d := 1 << (len(levels) - 1)) * 2 <= len(amounts):
            levels.append(best(levels[-1][:-d], levels[-1][d:]))
    length = hi - lo
    level = np.frexp(np.maximum(length, 1).astype(np.float64))[1] - 1
    out = np.full(len(lo), np.nan)
    for k, table in enumerate(levels):
        at = np.flatnonzero((level == k) & (length > 0))
        out[at] = best(table[lo[at]], table[hi[at] - (1 << k)])
    return out


def ends(values: np.ndarray, lo: np.ndarray, hi: np.ndarray, n: int, *, newest: bool) -> np.ndarray:
    """(q, n) the newest or oldest n values of each run, ascending, NaN on the left where there are fewer."""
    first = hi[:, None] - n if newest else np.minimum(lo + n, hi)[:, None] - n
    slots = first + np.arange(n)
    inside = (slots >= lo[:, None]) & (slots < hi[:, None])
    return np.where(inside, values[np.where(inside, slots, 0)] if len(values) else np.nan, np.nan)


def pooled(amounts: np.ndarray, op: str) -> np.ndarray:
    """(n, W) amounts of several keys -> (n,) of all of them together."""
    if amounts.shape[1] == 1:
        return amounts[:, 0]
    if op == "add":
        return np.asarray(amounts.sum(1))
    empty = np.isnan(amounts)
    filled = np.where(empty, np.inf if op == "min" else -np.inf, amounts)
    best = filled.min(1) if op == "min" else filled.max(1)
    return np.where(empty.all(1), np.nan, best)


def distinct(keys: np.ndarray, values: np.ndarray, cache: dict[Any, Any], lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """(n,) how many different values each run holds: its events whose value last came before the run.

    With p the place where an event's value came last (-1: never), those are the places i < hi with p_i < lo, less the lo
    places before the run, of which all have p < lo. The first count is a walk down a wavelet matrix of p.
    """
    m = len(values)
    if not m:
        return np.zeros(len(lo))
    if "wavelet" not in cache:
        order = np.lexsort((np.arange(m), values, keys))
        same = (values[order][1:] == values[order][:-1]) & (keys[order][1:] == keys[order][:-1])
        previous = np.zeros(m, np.int64)  # one more than the place: 0 is never
        previous[order[1:][same]] = order[:-1][same] + 1
        cache["wavelet"] = _wavelet(previous, m.bit_length())
    below = _below(cache["wavelet"], hi, lo + 1, m.bit_length())  # p + 1 < lo + 1
    return np.where(hi > lo, below - lo, 0).astype(np.float64)


def _wavelet(values: np.ndarray, bits: int) -> list[np.ndarray]:
    """Per bit, highest first, the (m + 1,) number of zero bits before each place; places are stably parted by each bit."""
    levels = []
    for bit in range(bits - 1, -1, -1):
        ones = (values >> bit & 1).astype(bool)
        levels.append(np.concatenate([[0], np.cumsum(~ones)]))
        values = np.concatenate([values[~ones], values[ones]])
    return levels


def _below(levels: list[np.ndarray], end: np.ndarray, limit: np.ndarray, bits: int) -> np.ndarray:
    """(n,) how many of the first `end` values are less than `limit` (at most 2**bits - 1)."""
    first, last, count = np.zeros(len(end), np.int64), end.astype(np.int64), np.zeros(len(end), np.int64)
    for zeros, bit in zip(levels, range(bits - 1, -1, -1), strict=True):
        a, b, total = zeros[first], zeros[last], zeros[-1]
        one = (limit >> bit & 1).astype(bool)
        count += np.where(one, b - a, 0)
        first, last = np.where(one, total + first - a, a), np.where(one, total + last - b, b)
    return count
