"""The arrays of a log: sorted, grouped and multiplied."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.interactions import Interactions, group
from recsys.data.synthetic import named


def made(**more) -> Interactions:
    return Interactions.of([1, 0, 1, 1], [2, 0, 2, 1], [30, 20, 10, 20], users=named("u", 3), items=named("i", 4), **more)


def test_columns_are_sorted_by_time_then_position():
    log = made(labels={"click": [1, 2, 0, 0]}, context={"tab": ["a", "b", "c", "d"]}, value=[1, 2, 3, 4])
    assert log.user.tolist() == [1, 0, 1, 1]
    assert log.item.tolist() == [2, 0, 1, 2]
    assert log.time.tolist() == [10, 20, 20, 30]
    assert log.context["tab"].tolist() == ["c", "b", "d", "a"]
    assert log.value.tolist() == [3, 2, 4, 1]
    assert log.positive.tolist() == [False, True, False, True]


def test_the_matrix_counts_or_marks():
    assert made().matrix(binary=False).toarray().tolist() == [[1, 0, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert made().matrix().toarray().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_events_of_a_user_come_oldest_first():
    indptr, order = made().by_user()
    assert indptr.tolist() == [0, 1, 4, 4]
    assert order.tolist() == [1, 0, 2, 3]
    assert made().by_item()[0].tolist() == [0, 1, 2, 4, 4]


def test_a_part_keeps_the_vocabularies_and_all_columns():
    log = made(labels={"click": [1, 0, 0, 0]}, context={"tab": np.arange(4)})
    part = log.where(log.time > 10)
    assert (len(part), part.n_users, part.n_items) == (3, 3, 4)
    assert part.context["tab"].tolist() == [1, 3, 0]
    assert part.labels["click"].tolist() == [0, 0, 1]
    assert log.positives().time.tolist() == [30]


def test_without_labels_every_row_is_positive_and_nothing_is_copied():
    log = made()
    assert log.positives() is log


@given(st.lists(st.integers(0, 5), max_size=40))
def test_groups_are_stable(rows):
    indptr, order = group(np.array(rows, np.int32), 6)
    assert [order[indptr[g] : indptr[g + 1]].tolist() for g in range(6)] == [
        [i for i, row in enumerate(rows) if row == g] for g in range(6)
    ]
