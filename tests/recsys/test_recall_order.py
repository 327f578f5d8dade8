"""The best of a row: the same columns by looking at groups first as by sorting everything, ties to the smaller column."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.recall.order import GROUP, best_first


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([2, 30, 10_000]), st.integers(0, 40))
def test_long_rows_give_what_a_stable_sort_gives(seed: int, keep: int, different: int, more: int) -> None:
    """`different` values make ties, also at the last place; rows of -inf alone are in order of their columns."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, different, (4, 4 * GROUP * (keep + 1) + more)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[3] = -np.inf
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    assert best_first(scores, keep).tolist() == wanted.tolist()


@pytest.mark.parametrize("keep", [0, 1, 7, 31, 32, 33, 100, 2_000])
def test_any_depth(keep: int) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 1_024)).astype(np.float32)
    assert best_first(scores, keep).tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :keep].tolist()
