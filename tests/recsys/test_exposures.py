"""Logged pages as lessons of the fine ranker: who was shown what and took which of it, worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys.evidence import EVIDENCE, unvouched
from recsys.exposures import Pages, beside, page_examples
from recsys.impressions import EXAMPLES
from tests.small import config_of, recipe_of, write_data

LATER = 1_700_100_000.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A funnel of the base part, and users' states along the log."""
    folder = tmp_path_factory.mktemp("exposures")
    write_data(folder)
    steps = recipe_of(config_of(folder))
    return steps.prepared, steps.moments, steps.funnel(steps.cut.base_mask, steps.base_tower, None)


def labelled(*rows: tuple[str, str, str, float, int]) -> pa.Table:
    """(request, user, item, seconds after LATER, label) as `impressions.joined` gives them."""
    values = [
        (r, u, i, "click" if y else "impression", round(1000 * (LATER + t)), y, 1, 1.0, "v1", "default", None, '{"device": "web"}')
        for r, u, i, t, y in rows
    ]
    return pa.table([pa.array(list(c), f.type) for c, f in zip(zip(*values, strict=True), EXAMPLES, strict=True)], schema=EXAMPLES)


def test_pages_are_requests_in_rows_of_the_log(base):
    prepared, _, _ = base
    log = prepared.log
    table = labelled(
        ("r1", "u0", "i0", 0, 1),
        ("r1", "u0", "i2", 0, 0),
        ("r2", "u1", "i3", 60, 0),
        ("r3", "nobody", "i3", 60, 1),
        ("r1", "u0", "gone", 0, 0),
        ("r4", "u2", "i4", 99, 0),
    )
    pages = Pages.of(table, log, without={("r4", "u2", "i4")})
    assert pages.users.tolist() == log.users.rows(["u0", "u1"]).tolist()
    assert pages.items.tolist() == [log.items.rows(["i0", "i2"]).tolist(), [*log.items.rows(["i3"]).tolist(), -1]]
    assert pages.labels.tolist() == [[1, 0], [0, 0]]
    assert pages.contexts == [{"device": "web"}] * 2
    assert pages.between(LATER, LATER + 60, most=9, seed=0).times.tolist() == [LATER]
    assert len(pages.between(LATER, LATER + 61, most=1, seed=0)) == 1
    assert len(Pages.of(table.slice(0, 0), log)) == 0


def test_what_was_passed_over_is_a_negative_and_a_positive_counts_where_recall_finds_it(base):
    """u0 takes even items: of its page it took i-even that recall finds, passed another over and one of the other half, which is not found."""
    prepared, moments, funnel = base
    log = prepared.log
    at = np.array([np.flatnonzero(log.user == log.users.row("u0"))[-1]])
    queries = moments.states(log.user[at], np.array([len(log)]), np.array([LATER]), [{"device": "web"}])
    found = funnel.coarse_rank(queries, funnel.recall(queries))
    known = [i for i in found.items[0].tolist() if i >= 0]
    absent = next(i for i in range(log.n_items) if i not in known)
    first, second, other = log.items.outside(np.array([known[0], known[1], absent]))
    page = Pages.of(
        labelled(("r1", "u0", first, 0, 1), ("r1", "u0", second, 0, 0), ("r1", "u0", other, 0, 0), ("r2", "u0", other, 5, 1)), log
    )
    told = page_examples(funnel, moments, page, first=7)
    assert told["item"].tolist() == [known[0], known[1], absent], "the second page's positive was not found, so it is no lesson"
    assert told["label"].tolist() == [1, 0, 0]
    assert told["moment"].tolist() == [7, 7, 7]
    blind = unvouched(told[EVIDENCE].shape[1])
    np.testing.assert_array_equal(told[EVIDENCE][2], blind)
    assert (told[EVIDENCE][0] != blind).any()
    assert set(told) >= {f.name for f in prepared.space.fields}
    both = beside(told, told)
    assert len(both["label"]) == 6
    assert beside(told, {}) is told
