"""The ladder of new users: who stands on which rung, what the rung's channel does to the order, and what its weight is learnt from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys import cold_weights
from recsys.blending import Questions
from recsys.config import read
from recsys.core import UNKNOWN, Candidates, Queries
from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from recsys.metrics import Relevant
from recsys.recall.cold_start import RUNGS, ColdStartConfig, led, rung_of
from recsys.recall.popular_segment import SegmentPopular
from recsys.recipe import Recipe
from tests.contracts import candidates_of
from tests.small import config_of, recipe_of, write_data

AT = 1_700_100_000.0
CHANNELS = (
    "recall.channels={two_tower: {}, popular: {}, content: {interests: {device: colour}}, "
    "popular_segment: {by: country, minimum_events: 1}}"
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Even users (nl) take even items (red), odd ones (fr) odd items (blue); `cold` is red and has no event."""
    folder: Path = tmp_path_factory.mktemp("ladder")
    write_data(folder)
    return recipe_of(config_of(folder, CHANNELS))


@pytest.fixture(scope="module")
def trained(steps: Recipe) -> Funnel:
    return steps.judged()


@pytest.fixture
def funnel(trained: Funnel) -> Funnel:
    return replace(trained)


def having(funnel: Funnel, **changes: Any) -> Funnel:
    """The funnel with another ladder."""
    funnel.config = funnel.config.model_copy(update={"cold_start": ColdStartConfig(**changes)})
    return funnel


def rung(funnel: Funnel, user: str = "nobody", **more: Any) -> str | None:
    queries = funnel.queries([FunnelRequest(user, 5, AT, **more)])
    return rung_of(funnel.recommend(queries), 0)


def page(funnel: Funnel, user: str = "nobody", k: int = 5, **more: Any) -> list[str]:
    queries = funnel.queries([FunnelRequest(user, k, AT, **more)])
    return [item.item_id for item in funnel.page(queries, funnel.recommend(queries))[0]]


# ---- who stands where -------------------------------------------------------------------------------------------------


CLICK = StoredEvent("i4", "click", int(1000 * (AT - 60)), None, "e")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "popular"),
        ({"profile": {"colour": "red"}}, "interests"),
        ({"profile": {"colour": ["blue", "red"]}}, "interests"),
        ({"context": {"colour": "blue"}}, "interests"),
        ({"context": {"device": "blue"}}, "interests"),
        ({"context": {"device": "phone"}}, "popular"),
        ({"profile": {"colour": "no such colour"}}, "popular"),
        ({"profile": {"colour": None}}, "popular"),
        ({"profile": {"country": "nl"}}, "segment"),
        ({"profile": {"country": "nowhere"}}, "popular"),
        ({"profile": {"country": "nl", "colour": "blue"}}, "interests"),
        ({"events": [CLICK]}, None),
        ({"events": [CLICK], "profile": {"colour": "blue"}}, None),
    ],
)
def test_a_new_user_stands_on_the_first_rung_that_knows_something_of_him(funnel, asked, expected):
    assert rung(funnel, **asked) == expected


def test_a_user_of_the_training_log_is_not_new_and_one_of_the_user_table_alone_has_his_segment(funnel):
    assert rung(funnel, "u3") is None
    queries = funnel.queries([FunnelRequest("u3", 5, AT)])
    assert rung_of(funnel.recall(cold_weights.strangers(funnel, queries)), 0) == "segment"


def test_with_few_events_a_user_is_new_for_longer_and_content_knows_them(funnel):
    having(funnel, below=2)
    assert rung(funnel, events=[CLICK]) == "content"
    assert rung(funnel, events=[CLICK], profile={"country": "nl"}) == "segment"
    assert rung(funnel, events=[CLICK, StoredEvent("i6", "click", CLICK.time_ms + 1, None, "f")]) is None
    assert rung(having(funnel, below=2, ladder=("content", "segment", "popular")), events=[CLICK], profile={"country": "nl"}) == "content"
    assert rung(having(funnel, below=0)) is None


def test_rungs_without_their_channel_or_without_an_item_under_the_filter_are_passed_over(funnel):
    without = replace(funnel, channels={n: c for n, c in funnel.channels.items() if n != "popular_segment"})
    asked = funnel.queries([FunnelRequest("nobody", 5, AT, profile={"country": "nl"})])
    assert rung_of(without.recall(asked), 0) == "popular"

    class Broken(SegmentPopular):
        def segments(self, queries: Queries) -> np.ndarray:
            raise ValueError("broken")

    broken = Broken.__new__(Broken)
    vars(broken).update(vars(funnel.channels["popular_segment"]))
    left = replace(funnel, channels={**funnel.channels, "popular_segment": broken}).recall(asked)
    assert (rung_of(left, 0), left.lost) == ("popular", ("popular_segment",))
    nothing = funnel.filters.parse({"colour": "gold"})
    assert rung(funnel, profile={"country": "nl"}, filter=nothing) == "popular"
    assert page(funnel, profile={"country": "nl"}, filter=nothing) == []


def test_a_batch_keeps_each_users_rung_through_every_stage(funnel):
    requests = [FunnelRequest("u3", 5, AT), FunnelRequest("a", 5, AT), FunnelRequest("b", 5, AT, profile={"colour": "red"})]
    queries = funnel.queries(requests)
    together = funnel.recommend(queries)
    assert [rung_of(together, b) for b in range(3)] == [None, "popular", "interests"]
    assert [rung_of(together.take([2, 0]), b) for b in range(2)] == ["interests", None]
    for b, request in enumerate(requests):
        alone = funnel.page(one := funnel.queries([request]), funnel.recommend(one))[0]
        assert [i.item_id for i in alone] == [i.item_id for i in funnel.page(queries, together)[b]]


def test_a_page_from_the_last_rung_of_all_names_no_rung_of_its_user(funnel):
    assert rung_of(funnel.popular(funnel.queries([FunnelRequest("nobody", 5, AT)])), 0) is None
    assert rung_of(None, 0) is None


# ---- the order --------------------------------------------------------------------------------------------------------


def ranked(cold: list[tuple[int, int]]) -> Candidates:
    """Items 7, 8, 9 with the models' scores .8, .4, 0; channel 0 gave 9 a score of 3 and 8 one of 1.5, and does not know 7."""
    out = candidates_of([[7, 8, 9]] * len(cold), [[0.8, 0.4, 0.0]] * len(cold))
    ranks, scores = np.zeros((len(cold), 3, 1), np.int16), np.full((len(cold), 3, 1), np.nan, np.float32)
    ranks[:, :, 0], scores[:, :, 0] = [0, 2, 1], [np.nan, 1.5, 3.0]
    return replace(out, channels=("c",), channel_ranks=ranks, channel_scores=scores, cold=np.array(cold, np.int16))


def test_models_and_the_leading_channel_are_mixed_by_the_weight_of_the_rung():
    found = ranked([(2, 0), (0, UNKNOWN), (4, 0), (4, UNKNOWN)])
    by = led(found, found.scores, ColdStartConfig(weights={"segment": 0.75, "popular": 0.25}))
    assert by is not None
    np.testing.assert_allclose(by[0], [0.25 * 1, 0.25 * 0.5 + 0.75 * 0.5, 0.75 * 1])
    np.testing.assert_allclose(by[1], [0.8, 0.4, 0.0]), "a known user"
    np.testing.assert_allclose(by[2], [0.75 * 1, 0.75 * 0.5 + 0.25 * 0.5, 0.25 * 1])
    np.testing.assert_allclose(by[3], [0.8, 0.4, 0.0]), "nobody leads"
    kept = found.ranked(found.scores, 2, stage="fine_rank", by=by)
    assert kept.items[0].tolist() == [9, 8]
    np.testing.assert_allclose(kept.scores[0], [0.0, 0.4]), "scores stay the ranker's"
    assert led(found, found.scores, ColdStartConfig(weights={})) is None
    assert led(ranked([(0, UNKNOWN)]), found.scores[:1], ColdStartConfig()) is None


def test_a_rung_of_weight_1_gives_its_channels_own_order_and_0_the_models(funnel):
    funnel.config = funnel.config.model_copy(update={"rerank": funnel.config.rerank.model_copy(update={"lambda_": 1.0})})
    funnel.reranker = funnel.config.rerank.build(vectors=funnel.vectors, columns=funnel.item_columns)
    asked = {"profile": {"country": "fr"}}
    own = funnel.channels["popular_segment"].recall(funnel.queries([FunnelRequest("nobody", 5, AT, **asked)]), 5)[0][0]
    models = page(having(funnel, weights={}), **asked)
    assert page(having(funnel, weights={"segment": 1.0}), **asked) == funnel.items.outside(own)
    assert page(having(funnel, weights={"segment": 0.0}), **asked) == models
    assert page(having(funnel, below=0, weights={"segment": 1.0}), **asked) == models
    known = page(having(funnel, weights={}), "u3")
    assert page(having(funnel, weights=dict.fromkeys(RUNGS, 1.0)), "u3") == known


@pytest.mark.parametrize(("colour", "parity"), [("red", 0), ("blue", 1)])
@pytest.mark.parametrize("where", ["profile", "context"])
def test_declared_interests_lead_the_page_by_default(funnel, colour, parity, where):
    first = page(having(funnel), k=5, **{where: {"colour": colour}})
    assert [int(i[1:]) % 2 if i != "cold" else 0 for i in first] == [parity] * 5


def test_new_users_may_be_explored_more_than_others(funnel):
    rules = funnel.config.rules
    funnel.config = funnel.config.model_copy(
        update={"rules": rules.model_copy(update={"explore": rules.explore.model_copy(update={"new_users": 1.0, "first_place": 2})})}
    )
    queries = funnel.queries([FunnelRequest("u3", 5, AT, explain=True), FunnelRequest("nobody", 5, AT, explain=True)])
    known, new = funnel.page(queries, funnel.recommend(queries))
    assert [i.explain["rule"] for i in new[1:]] == ["explored: drawn at random"] * 4
    assert {i.propensity for i in known} == {1.0}
    assert new[0].propensity == 1.0
    assert all(0 < i.propensity < 1 for i in new[1:])
    assert not any("explored" in i.explain["rule"] for i in known)


def test_what_a_profile_may_hold_are_user_columns_and_interests(funnel):
    assert set(funnel.profile_columns) == {"country", "colour", "device"}
    bare = replace(funnel)
    bare.config = funnel.config.model_copy(
        update={"recall": funnel.config.recall.model_copy(update={"channels": {"popular": funnel.config.recall.channels["popular"]}})}
    )
    assert set(bare.profile_columns) == {"country"}


def test_interests_live_through_a_bundle(funnel, tmp_path):
    channel = funnel.channels["content"]
    channel.save(tmp_path)
    loaded = funnel.config.recall.channels["content"].load(tmp_path)
    queries = funnel.queries(
        [
            FunnelRequest("n", 5, AT, profile={"colour": "red"}),
            FunnelRequest("n", 5, AT),
            FunnelRequest("n", 5, AT, context={"device": "blue"}),
        ]
    )
    assert loaded.declares(queries).tolist() == channel.declares(queries).tolist() == [True, False, True]
    np.testing.assert_array_equal(loaded.recall(queries, 5)[0], channel.recall(queries, 5)[0])


def test_a_ladder_that_makes_no_sense_is_refused_at_its_line(tmp_path):
    write_data(tmp_path)
    config_of(tmp_path)
    (tmp_path / "ladder.yaml").write_text("cold_start: {below: -1, ladder: [intrests], weights: {segment: 2}}\n")
    told = "\n".join(str(f) for f in read([tmp_path / "small.yaml", tmp_path / "ladder.yaml"]).faults)
    for name in ("cold_start.below", "cold_start.ladder.0", "cold_start.weights.segment"):
        assert name in told


# ---- the weights, learnt ----------------------------------------------------------------------------------------------


def test_weights_are_learnt_by_time_alone_and_from_validation(tmp_path, monkeypatch):
    write_data(tmp_path)
    seen = []

    def learn(funnel: Funnel, asked: Questions, given: ColdStartConfig, *, seed: int) -> list[Any]:
        seen.append((funnel.channels["popular"].counts.sum(), asked.ask(np.arange(len(asked.groups))).at.min()))
        return [cold_weights.Learnt("popular", 60, {0.0: 0.1, 0.75: 0.2}, 0.75, 0.1, 0.05, True)]

    monkeypatch.setattr(cold_weights, "learn", learn)
    by_time = recipe_of(config_of(tmp_path, "split={by: time}", "recall.channels={two_tower: {}, popular: {half_life_h: null}}"))
    assert by_time.judged().config.cold_start.weights == {"interests": 0.5, "popular": 0.75}
    log, split = by_time.prepared.log, by_time.prepared.split
    [(known, first)] = seen
    assert known == (split.train & log.positive).sum()
    assert first >= log.time[split.valid].min()
    for settings in (
        ["split={by: leave_one_out}"],
        ["split={by: time}", "cold_start.learn=false"],
        ["split={by: time}", "cold_start.below=0"],
    ):
        other = recipe_of(config_of(tmp_path, *settings))
        assert other.cold_start is other.config.cold_start
    assert len(seen) == 1


def asking(funnel: Funnel, steps: Recipe, parity: int) -> Questions:
    """All 60 users as if they were new; sought are the ten items of the parity of their own, or of the other, that few events have."""
    log = steps.prepared.log
    sought = [[funnel.items.row(f"i{i}") for i in range(int(u[1:]) % 2 ^ parity, 40, 2)][-10:] for u in log.users.outside(np.arange(60))]

    def ask(at: np.ndarray):
        queries = funnel.queries([FunnelRequest(name, 10, AT) for name in log.users.outside(at)])
        queries.exclude = np.empty((len(at), 0), np.int32)
        return queries

    return Questions(ask, Relevant.of(sought), np.arange(60, dtype=np.int32))


def test_a_weight_is_taken_where_it_is_clearly_better_on_users_that_it_was_not_chosen_on(funnel, steps):
    given = ColdStartConfig(weights={})
    blind = replace(funnel)  # a ranker that knows nothing: the segment must win
    order = np.random.default_rng(0).permutation(len(funnel.items)).astype(np.float32)
    blind_scores = order / order.max()

    class Blind:
        pair_fields = ()

        def score(self, fields: Any, items: np.ndarray, *_: Any) -> np.ndarray:
            return blind_scores[items]

    blind.ranker = Blind()  # type: ignore[assignment]
    [one] = cold_weights.learn(blind, asking(funnel, steps, 0), given)
    assert (one.rung, one.users, one.taken) == ("segment", 60, True)
    assert one.weight > 0
    assert one.by_weight[one.weight] > one.by_weight[0.0] + 0.05
    assert cold_weights.taken([one], given).weights == {"segment": one.weight}
    assert f"{one.weight:g} is taken" in one.told()
    [same] = cold_weights.learn(blind, asking(funnel, steps, 0), ColdStartConfig(weights={"segment": one.weight}))
    assert not same.taken, "nothing is better than what was configured"


def test_a_rung_on_which_too_few_stand_keeps_what_was_configured(funnel, steps):
    few = asking(funnel, steps, 0)
    few = Questions(few.ask, Relevant.of([few.relevant.items[:5].tolist()] * 20), few.groups[:20])
    assert cold_weights.learn(funnel, few, ColdStartConfig()) == []
