"""What the rows of a log teach a ranker: an exposure and the event that answers it are one lesson, learnt at the exposure.

In a log of impressions live events come one by one: an item was shown, and some seconds later it was clicked. Taken as two rows they
would say no and yes to the same question, and the yes would be asked when its own exposure has been counted already, as in service
it never is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recsys.data.interactions import SHOWN, Interactions
from recsys.impressions import EARLY_S


class Lessons(NamedTuple):
    """rows (E,) bool: those to learn from; taken (E,) bool: whether what such a row shows was taken."""

    rows: np.ndarray
    taken: np.ndarray


def lessons(log: Interactions, parts: np.ndarray, *, exposed: bool, window_s: float) -> Lessons:
    """The lessons of a log. `parts` (E,) numbers the parts of a split: an answer of another part than its exposure's is a lesson by
    itself, for in the exposure's part nobody could know it. `exposed`: whether what was shown and passed over is one.

    An answer is a positive row that is no exposure; it belongs to the newest exposure of its item to its user, at most `window_s`
    before it; where there is none, to the next one, if that is told of within `impressions.EARLY_S`: clocks differ.
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
    behind = np.searchsorted(place[exposures], place[answers])
    open_ = np.ones(len(answers), bool)
    for at, least_s, most_s in ((behind - 1, 0.0, window_s), (behind, -EARLY_S, 0.0)):
        some = np.flatnonzero(open_ & (at >= 0) & (at < len(exposures)))
        shown_at, answer = exposures[at[some]], answers[some]
        later_s = log.time[answer] - log.time[shown_at]
        one = (pair[shown_at] == pair[answer]) & (parts[shown_at] == parts[answer]) & (least_s <= later_s) & (later_s <= most_s)
        rows[answer[one]] = False
        taken[shown_at[one]] = True
        open_[some[one]] = False
    return Lessons(rows, taken)
