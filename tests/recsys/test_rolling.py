"""Two versions asked the same: states are those before the newest events, what a version does not know it misses, and the gate's rule."""

import numpy as np
import pytest

from recsys.data.split import SplitConfig
from recsys.features.declaration import HistoryConfig
from recsys.funnel import Funnel
from recsys.metrics import Relevant
from recsys.prepared import prepare
from recsys.retrain_config import GateConfig
from recsys.rolling import Newest, compared
from tests.small import Small


@pytest.fixture(scope="module")
def newest(small: Small) -> Newest:
    start = 1_700_000_000
    prepared = prepare(small.config, SplitConfig(by="time", valid_from=start + 6 * 3600, test_from=start + 8 * 3600))
    return Newest.of(prepared, among=np.ones(len(prepared.log), bool), history=HistoryConfig(length=10), k=10, again=False, most=40, seed=1)


def test_requests_hold_what_was_done_before_and_seek_what_came_then(newest):
    assert len(newest) == 40
    for b, request in enumerate(newest.requests):
        assert len(request.events) == 8  # two of ten are in the test
        assert all(e.time_ms < 1000 * request.at for e in request.events)
        sought = newest.items.outside(newest.wanted.items[newest.wanted.indptr[b] : newest.wanted.indptr[b + 1]])
        assert len(sought) == 2
        assert not {e.item_id for e in request.events} & set(sought)
        assert request.context["device"] in {"phone", "web"}


def test_a_funnel_answers_by_outside_ids(newest, small):
    funnel = Funnel.load(small.folder)
    answers = newest.asked(funnel)
    assert answers.shape == (40, 10)
    for b, request in enumerate(newest.requests):
        page = newest.items.outside(answers[b][answers[b] >= 0])
        assert not {e.item_id for e in request.events} & set(page)
        parity = int(request.user_id[1:]) % 2  # users like their own half
        assert np.mean([i != "cold" and int(i[1:]) % 2 == parity for i in page]) > 0.5


def test_the_gate_is_in_standard_errors_of_the_paired_difference(newest):
    found = newest.__class__(newest.requests[:4], Relevant.of([[1], [2], [3], [4]]), newest.items, newest.log, newest.told)
    serving = np.array([[1, 0], [2, 0], [0, 5], [0, 5]])
    new = np.array([[1, 0], [0, 5], [0, 5], [0, 5]])
    # hit@10 differences: 0, -1, 0, 0: mean -1/4, standard error 1/4
    gate = GateConfig(metric="hit@10", at_least=-1.0)
    verdict = compared(found, new, serving, gate)
    assert (verdict.new, verdict.serving, verdict.difference, verdict.error) == (0.25, 0.5, -0.25, 0.25)
    assert verdict.passed
    assert not compared(found, new, serving, gate.model_copy(update={"at_least": -0.9})).passed
    assert compared(found, serving, serving, GateConfig(at_least=0.0)).passed
    assert not compared(found, serving, new, GateConfig(metric="hit@10", at_least=1.1)).passed
