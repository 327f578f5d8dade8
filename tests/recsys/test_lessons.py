"""Lessons: an exposure and its answer are one, at the exposure, where the split allows to know both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recsys.data.interactions import POSITIVE, SHOWN, Interactions
from recsys.data.synthetic import named
from recsys.lessons import lessons

HOUR = 3600.0


def told(*rows: tuple[int, int, float, int, int]) -> Interactions:
    """Rows of (user, item, hour, positive, shown), in the order of their times."""
    user, item, hour, positive, shown = map(np.array, zip(*rows, strict=True))
    log = Interactions.of(user, item, hour * HOUR, users=named("u", 3), items=named("i", 3), labels={POSITIVE: positive}, impressions=True)
    return replace(log, labels={**log.labels, SHOWN: shown.astype(np.float32)})


LOG = told(
    (0, 0, 0.0, 0, 1),  # 0 shown, answered by 2
    (0, 1, 0.0, 0, 1),  # 1 shown and passed over
    (0, 0, 0.1, 1, 0),  # 2 answers 0
    (1, 0, 0.2, 1, 0),  # 3 answers nothing: another user's
    (0, 0, 1.0, 0, 1),  # 4 shown again, answered twice
    (0, 0, 1.1, 1, 0),  # 5 answers 4, the newest
    (0, 0, 1.2, 1, 0),  # 6 answers 4 too
    (2, 2, 2.0, 0, 1),  # 7 shown
    (2, 2, 30.0, 1, 0),  # 8 more than a day later: an answer to nothing
    (2, 1, 30.0, 1, 1),  # 9 a row of the files, shown and taken in one
)


def test_an_exposure_is_taken_by_its_answer_which_is_no_lesson_of_its_own():
    got = lessons(LOG, np.ones(len(LOG), int), exposed=True, window_s=24 * HOUR)
    assert np.flatnonzero(got.rows).tolist() == [0, 1, 3, 4, 7, 8, 9]
    assert np.flatnonzero(got.taken & got.rows).tolist() == [0, 3, 4, 8, 9]


def test_the_window_ends_where_it_says():
    day = lessons(LOG, np.ones(len(LOG), int), exposed=True, window_s=28 * HOUR)
    assert not day.rows[8]
    assert day.taken[7]


@pytest.mark.parametrize(("early_s", "one"), [(0.001, True), (300.0, True), (301.0, False)])
def test_an_answer_whose_clock_is_slow_answers_the_exposure_that_follows(early_s, one):
    log = told((0, 0, 1.0 - early_s / HOUR, 1, 0), (0, 0, 1.0, 0, 1), (1, 0, 1.1, 0, 1))
    got = lessons(log, np.ones(3, int), exposed=True, window_s=HOUR)
    assert got.rows.tolist() == [not one, True, True]
    assert got.taken.tolist() == [True, one, False]


def test_an_answer_in_another_part_of_the_split_teaches_by_itself():
    parts = np.where(np.arange(len(LOG)) < 5, 1, 2)
    got = lessons(LOG, parts, exposed=True, window_s=24 * HOUR)
    assert not got.taken[4], "in the exposure's part nobody knows of it"
    assert got.rows[5]
    assert got.rows[6]
    assert got.taken[0]


@pytest.mark.parametrize("change", ["no exposures wanted", "no log of impressions"])
def test_where_exposures_are_no_lessons_the_positives_are(change):
    log = LOG if change == "no exposures wanted" else replace(LOG, impressions=False)
    got = lessons(log, np.ones(len(log), int), exposed=change != "no exposures wanted", window_s=HOUR)
    assert np.flatnonzero(got.rows).tolist() == np.flatnonzero(got.taken).tolist() == [2, 3, 5, 6, 8, 9]


def test_a_log_of_files_alone_is_learnt_from_row_by_row():
    log = replace(LOG, labels={POSITIVE: LOG.labels[POSITIVE]})
    got = lessons(log, np.ones(len(log), int), exposed=True, window_s=HOUR)
    assert got.rows.all()
    assert (got.taken == log.positive).all()
