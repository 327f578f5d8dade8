"""What the rows of a log teach a ranker: an exposure and the event that answers it are one lesson, learnt at the exposure.

In a log of impressions live events come one by one: an item was shown, and some seconds later it was clicked. Taken as two rows they
would say no and yes to the same question, and the yes would be asked when its own exposure has been counted already, as in service
it never is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recsys.data.interactions import SHOWN, Interactions


class Lessons(NamedTuple):
    """rows (E,) bool: those to learn from; taken (E,) bool: whether what such a row shows was taken."""

    rows: np.ndarray
    taken: np.ndarray


def lessons(log: Interactions, parts: np.ndarray, *, exposed: bool, window_s: float) -> Lessons:
    """The lessons of a log. `parts` (E,) numbers the parts of a split: an answer of another part than its exposure's is a lesson by
    itself, for in the exposure's part nobody could know it. `exposed`: whether what was shown and passed over is one.

    An answer is a positive row that is no exposure; it belongs to the newest exposure of its item to its user, at most `window_s`
    before it.
    """
    if not (log.impressions and exposed):
        return Lessons(log.positive, log.positive)
    rows, taken = np.ones(len(log), bool), log.positive.copy()
    if SHOWN not in log.labels:
        return Lessons(rows, taken)
    shown = log.labels[SHOWN] > 0
    _, pair = np.unique(log.user.astype(np.int64) * log.n_items + log.item, return_inverse=True)
    place = pair.astype(np.int64) * (len(log) + 1) + np.arange(len(log))  # by pair, then in log order
    exposures, answers = np.flatnonzero(shown), np.flatnonzero(~shown & log.positive)
    exposures = exposures[np.argsort(place[exposures])]
    before = np.searchsorted(place[exposures], place[answers]) - 1
    answers, before = answers[before >= 0], exposures[before[before >= 0]]
    one = (pair[before] == pair[answers]) & (parts[before] == parts[answers]) & (log.time[answers] - log.time[before] <= window_s)
    rows[answers[one]] = False
    taken[before[one]] = True
    return Lessons(rows, taken)
