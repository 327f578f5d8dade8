"""Rules of a page: worked out by hand, one after another, and never a place empty that could be filled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.allowed import Condition
from recsys.config import read
from recsys.core import UNKNOWN, Candidates, Queries, Wishes
from recsys.features.live_items import ItemChange, MemoryItemLog
from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from recsys.rerank.diversity import CapConfig, MMRConfig
from recsys.rerank.rules import (
    REASONS,
    RULES,
    BoostConfig,
    ExploreConfig,
    Known,
    MatchConfig,
    NewItemsConfig,
    NoveltyConfig,
    PinConfig,
    Rules,
    RulesConfig,
)
from tests.contracts import RerankerContract, candidates_of, queries_of
from tests.small import Small, config_of, write_data

VECTORS = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
COLOUR = {"red": {0, 1, 2, 3}, "blue": {4, 5, 6, 7}}
KEEP = MMRConfig(lambda_=1.0)


def known(*, barred: set[int] = frozenset(), shown: dict[int, int] | None = None) -> Known:  # type: ignore[assignment]
    def passes(_: Queries, condition: Condition, items: np.ndarray) -> np.ndarray:
        held = set().union(*(COLOUR.get(v, {int(v)} if v.isdigit() else set()) for v in condition.any or ()))
        return np.isin(items, list(held))

    def often(items: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda i: float((shown or {}).get(int(i), np.nan)), otypes=[float])(items)

    return Known(passes, lambda item: int(item) if item.isdigit() else UNKNOWN, often, lambda _, rows: ~np.isin(rows, list(barred)))


def rules(config: RulesConfig | None = None, mmr: MMRConfig = KEEP, vectors=None, **of) -> Rules:
    return Rules(config or RulesConfig(), mmr.build(vectors, {}), known(**of), vectors)


def page(made: Rules, items: list[int], scores: list[float] | None = None, *, k: int = 10, wish: Wishes | None = None, **of):
    """[(item, rule)] of one query's page."""
    queries = replace(queries_of(of.pop("history", [])), explain=True, wishes=(wish,) if wish else None, **of)
    out = made.rerank(queries, candidates_of([items], [scores] if scores else None), k)
    codes, _ = out.trail[RULES]
    return [(int(i), REASONS[c]) for i, c in zip(out.items[0], codes[0], strict=True) if i != UNKNOWN]


class TestRules(RerankerContract):
    def make(self):
        config = RulesConfig(
            boosts=(BoostConfig(column="colour", values=("red",), factor=2),), novelty=NoveltyConfig(weight=0.5), explore=ExploreConfig()
        )
        return rules(config, MMRConfig(lambda_=0.5), VECTORS)


class TestNoRules(RerankerContract):
    def make(self):
        return rules(mmr=MMRConfig(lambda_=0.5), vectors=VECTORS)


# ---- worth ------------------------------------------------------------------------------------------------------------


def test_a_boost_multiplies_and_scores_stay():
    made = rules(RulesConfig(boosts=(BoostConfig(column="colour", values=("red",), factor=3),)))
    out = made.rerank(queries_of([]), candidates_of([[4, 5, 1]], [[0.9, 0.5, 0.2]]), 3)
    assert out.items[0].tolist() == [4, 1, 5], ".9, 3 x .2 = .6, .5"
    np.testing.assert_allclose(out.scores[0], [0.9, 0.2, 0.5])
    assert page(made, [4, 5, 1], [0.9, 0.5, 0.2])[1] == (1, "moved up by a boost")


def test_boosts_multiply_with_each_other_and_with_those_of_the_request():
    made = rules(RulesConfig(boosts=(BoostConfig(column="colour", values=("red",), factor=2),)))
    wish = Wishes(boosts=((Condition("colour", ("blue",)), 5.0), (Condition("item_id", ("1",)), 3.0)))
    assert [i for i, _ in page(made, [9, 4, 1], [0.9, 0.15, 0.13], wish=wish)] == [9, 1, 4], ".9; .13 x 2 x 3 = .78; .15 x 5 = .75"


def test_a_boost_of_one_request_is_not_that_of_another():
    queries = replace(queries_of([], []), wishes=(Wishes(boosts=((Condition("colour", ("red",)), 9.0),)), None))
    out = rules().rerank(queries, candidates_of([[4, 1], [4, 1]], [[0.9, 0.2], [0.9, 0.2]]), 2)
    assert out.items.tolist() == [[1, 4], [4, 1]]


def test_a_score_below_zero_is_lifted_by_a_boost_too():
    made = rules(RulesConfig(boosts=(BoostConfig(column="colour", values=("red",), factor=4),)))
    assert [i for i, _ in page(made, [4, 1], [-0.2, -0.4])] == [1, 4], "-.4 / 4 = -.1"


def test_what_was_had_lately_stands_lower_until_it_is_forgotten():
    made = rules(RulesConfig(novelty=NoveltyConfig(weight=0.8, half_life_h=720)))

    def at(hours: float):
        return {"history": [4], "at": np.array([1e9]), "history_times": np.array([[1e9 - 3600 * hours]])}

    assert page(made, [4, 1], [0.9, 0.5], **at(0)) == [(1, ""), (4, "moved down: seen lately")], ".9 x .2"
    assert [i for i, _ in page(made, [4, 1], [0.9, 0.5], **at(720))] == [4, 1], ".9 x (1 - .8 / 2) = .54"
    assert [i for i, _ in page(made, [4, 1], [0.9, 0.55], **at(720))] == [1, 4]
    assert [i for i, _ in page(made, [4, 1], [0.9, 0.8], **at(72_000))] == [4, 1]


def test_what_is_like_something_unwanted_stands_lower():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    made = rules(RulesConfig(unwanted=0.5), vectors=vectors)
    wish = Wishes(unwanted=(0,))
    assert page(made, [1, 2], [0.9, 0.5], wish=wish) == [(2, ""), (1, "moved down: like something not wanted")], ".9 x .5 = .45"
    assert page(rules(RulesConfig(unwanted=0.4), vectors=vectors), [1, 2], [0.9, 0.5], wish=wish)[0][0] == 1


def test_a_new_item_has_a_start_that_ends_with_being_shown():
    config = RulesConfig(new_items=NewItemsConfig(factor=3, exposures=10))
    assert page(rules(config, shown={7: 0}), [1, 7], [0.5, 0.2]) == [(7, "moved up: new"), (1, "")], ".2 x 3"
    assert page(rules(config, shown={7: 10}), [1, 7], [0.5, 0.2])[0][0] == 1, ".2 x (1 + 2 / 2) = .4"
    assert page(rules(config), [1, 7], [0.5, 0.2])[0][0] == 1, "it is not new"


# ---- diversity --------------------------------------------------------------------------------------------------------


def test_the_knob_of_a_request_goes_from_relevance_to_difference():
    twins = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    made = rules(mmr=MMRConfig(lambda_=0.5), vectors=twins)

    def order(diversity: float | None):
        wish = None if diversity is None else Wishes(diversity=diversity)
        return [i for i, _ in page(made, [0, 1, 2], [1.0, 0.9, 0.0], wish=wish)]

    assert order(None) == order(0.5) == order(0.0) == [0, 1, 2]
    assert order(0.7) == order(1.0) == [0, 2, 1], "lambda .3: .27 - .7 is below 0 - .35"
    queries = replace(queries_of([], []), wishes=(Wishes(diversity=1.0), Wishes(diversity=0.0)))
    out = made.rerank(queries, candidates_of([[0, 1, 2]] * 2, [[1.0, 0.9, 0.0]] * 2), 3)
    assert out.items.tolist() == [[0, 2, 1], [0, 1, 2]]


def test_caps_of_a_request_stand_in_place_of_those_of_their_column():
    """Columns a: items 0-2 are of one value; b: 0 and 1 are of one, 2 and 3 of another. At most one of each on the page of two."""
    columns = {"a": np.array([1, 1, 1, 2]), "b": np.array([1, 1, 2, 2])}
    mmr = MMRConfig(lambda_=1.0, caps=(CapConfig(column="a", at_most=1),)).build(None, columns)
    made = Rules(RulesConfig(), mmr, known(), None)

    def order(*caps):
        return page(made, [0, 1, 2, 3], k=2, wish=Wishes(caps=caps))

    assert page(made, [0, 1, 2, 3], k=2) == [(0, ""), (3, "moved up for diversity")], "1 and 2 share a's value with 0"
    assert order(("a", 2, 10)) == [(0, ""), (1, "")]
    assert order(("b", 1, 10)) == [(0, ""), (3, "moved up for diversity")], "a's stays"
    assert order(("a", 3, 10), ("b", 1, 10)) == [(0, ""), (2, "moved up for diversity")]
    whole = page(made, [0, 1, 2, 3], wish=Wishes(caps=(("a", 1, 2),)))
    assert whole == [(0, ""), (3, "moved up for diversity"), (1, "moved down: a cap"), (2, "a cap gave way to fill the page")]
    assert order(("gone", 1, 10)) == [(0, ""), (3, "moved up for diversity")], "a version may lack a column: nothing is capped by it"


def test_caps_of_one_request_are_not_those_of_another_and_none_keeps_the_order():
    columns = {"a": np.array([1, 1, 2])}
    for mmr in (MMRConfig(type="none", caps=(CapConfig(column="a", at_most=1),)), MMRConfig(lambda_=1.0)):
        made = Rules(RulesConfig(), mmr.build(VECTORS, columns), known(), None)
        queries = replace(queries_of([], [], []), wishes=(Wishes(caps=(("a", 1, 2),)), None, Wishes(diversity=0.0)))
        out = made.rerank(queries, candidates_of([[0, 1, 2]] * 3), 3)
        assert out.items.tolist() == [[0, 2, 1], [0, 1, 2], [0, 1, 2]]


def test_novelty_of_a_request_stands_in_place_of_the_configured():
    made = rules(RulesConfig(novelty=NoveltyConfig(weight=0.8, half_life_h=720)))
    of = {"history": [4], "at": np.array([1e9]), "history_times": np.array([[1e9 - 3600 * 24]])}
    assert [i for i, _ in page(made, [4, 1], [0.9, 0.5], wish=Wishes(novelty=(0.0, 1.0)), **of)] == [4, 1]
    assert [i for i, _ in page(made, [4, 1], [0.9, 0.5], wish=Wishes(novelty=(1.0, 24.0)), **of)] == [1, 4], ".9 x (1 - 1 / 2) = .45"
    assert [i for i, _ in page(rules(), [4, 1], [0.9, 0.5], wish=Wishes(novelty=(1.0, 24.0)), **of)] == [1, 4], "none configured"


# ---- pins -------------------------------------------------------------------------------------------------------------


def test_pins_stand_at_their_places_and_the_rest_closes_up():
    made = rules(RulesConfig(pins=(PinConfig(item_id="3", place=2),)))
    assert page(made, [0, 1, 2, 3, 4], k=4) == [(0, ""), (3, "pinned"), (1, ""), (2, "")]


def test_a_pin_does_not_count_towards_a_cap():
    """0 to 3 share a value, at most two on a page: 0, 1, 4 without the pin of 3."""
    values = np.array([1, 1, 1, 1, 2] + [3] * 15, np.int32)
    mmr = MMRConfig(lambda_=1.0, caps=(CapConfig(column="a", at_most=2),)).build(None, {"a": values})
    made = Rules(RulesConfig(pins=(PinConfig(item_id="3", place=2),)), mmr, known(), None)
    assert [i for i, _ in page(made, [0, 1, 2, 3, 4], k=3)] == [0, 3, 1]


def test_a_pin_of_the_request_comes_before_the_configurations():
    made = rules(RulesConfig(pins=(PinConfig(item_id="3", place=1), PinConfig(item_id="4", place=2))))
    assert [i for i, _ in page(made, [0, 1, 2, 3, 4], k=3, wish=Wishes(pins=((2, 1),)))] == [2, 4, 0]


def test_an_item_that_nothing_recalled_can_be_pinned_with_a_score_of_0():
    made = rules(RulesConfig(pins=(PinConfig(item_id="15", place=1),)))
    out = made.rerank(queries_of([]), candidates_of([[0, 1]], [[0.9, 0.8]]), 3)
    assert out.items[0].tolist() == [15, 0, 1]
    np.testing.assert_allclose(out.scores[0], [0.0, 0.9, 0.8])
    assert out.sources(0, 0) == []


def test_a_pin_that_may_not_be_shown_leaves_its_place():
    config = RulesConfig(pins=(PinConfig(item_id="3", place=1), PinConfig(item_id="nobody", place=2)))
    assert [i for i, _ in page(rules(config, barred={3}), [0, 1])] == [0, 1]
    out = rules(config).rerank(replace(queries_of([]), exclude=np.array([[3]], np.int32)), candidates_of([[0, 1]]), 2)
    assert out.items[0].tolist() == [0, 1]


def test_a_pin_behind_the_end_of_a_short_page_stands_at_its_end():
    made = rules(RulesConfig(pins=(PinConfig(item_id="3", place=8),)))
    assert [i for i, _ in page(made, [0, 1], k=10)] == [0, 1, 3]
    assert [i for i, _ in page(made, [0, 1, 2, 4], k=3)] == [0, 1, 2], "the page has no place 8"


# ---- exploration ------------------------------------------------------------------------------------------------------


def test_exploration_gives_places_away_and_says_with_what_probability():
    made = rules(RulesConfig(explore=ExploreConfig(share=0.5, first_place=2)))
    drawn, times = np.zeros(6), 2_000
    first = [made.rerank(replace(queries_of([]), at=np.array([float(t)])), candidates_of([[0, 1, 2, 3, 4, 5]]), 2) for t in range(times)]
    for out in first:
        codes, chance = out.trail[RULES]
        assert out.items[0, 0] == 0, "the first place is not explored"
        item = int(out.items[0, 1])
        drawn[item] += 1
        assert chance[0].tolist() == pytest.approx([1, 0.5 if item == 1 else 0.5 / 4])
        assert REASONS[codes[0, 1]] == ("" if item == 1 else "explored: drawn at random")
    np.testing.assert_allclose(drawn / times, [0, 0.5, *[0.125] * 4], atol=0.04)


def test_the_logged_probability_is_how_often_an_item_stands_at_a_place_beside_pins_and_where_candidates_run_out():
    """8 candidates, a page of 6: places 2 to 6 are explored but the pinned 4, and 3 candidates are left for 4 places."""
    made = rules(RulesConfig(explore=ExploreConfig(share=0.8, first_place=2), pins=(PinConfig(item_id="15", place=4),)))
    times, k = 6_000, 6
    stood, told = np.zeros((20, k)), np.full((20, k), np.nan)
    for a in range(0, times, 500):
        queries = replace(queries_of(*[[]] * 500), at=np.arange(a, a + 500, dtype=float))
        out = made.rerank(queries, candidates_of([list(range(8))] * 500), k)
        for items, chances in zip(out.items.tolist(), out.trail[RULES][1].tolist(), strict=True):
            for place, (item, chance) in enumerate(zip(items, chances, strict=True)):
                stood[item, place] += 1
                assert np.isnan(told[item, place]) or told[item, place] == chance, "one probability for an item at a place"
                told[item, place] = chance
    assert told[0, 0] == told[15, 3] == 1, "the first place and the pin's"
    assert told[1, 1] == pytest.approx(0.2)
    assert told[5, 1] == pytest.approx(0.8 / 3)
    # At the fourth explored place a candidate is left unless all of the three before were drawn: .8 x (1 - .8 ** 3).
    assert told[5, 5] == pytest.approx(0.8 * (1 - 0.8**3) / 3)
    assert told[4, 5] == pytest.approx(1 - 0.8 * (1 - 0.8**3))
    np.testing.assert_allclose(stood / times, np.nan_to_num(told), atol=0.025)  # four standard deviations


def test_the_draw_is_the_same_in_every_process_and_batch():
    made = rules(RulesConfig(explore=ExploreConfig(share=0.5, first_place=1)))
    queries = queries_of([], [], [])
    together = made.rerank(queries, candidates_of([[0, 1, 2, 3, 4, 5]] * 3), 3)
    for b in range(3):
        alone = made.rerank(queries.take([b]), candidates_of([[0, 1, 2, 3, 4, 5]]), 3)
        assert alone.items[0].tolist() == together.items[b].tolist()


@pytest.mark.parametrize("caps", [(), (CapConfig(column="c", at_most=1, window=2),)])
def test_a_page_is_explored_as_by_itself_where_others_of_its_batch_are_deeper(caps):
    """Two places of 6 candidates leave 4 to draw from, though whoever asks for 6 leaves none: .5 / 4 at the first place."""
    made = Rules(
        RulesConfig(explore=ExploreConfig(share=0.5, first_place=1)),
        MMRConfig(lambda_=1.0, caps=caps).build(None, {"c": np.arange(1, 21)}),
        known(),
        None,
    )
    explored = 0
    for t in range(40):
        queries = replace(queries_of([], []), k=np.array([2, 6], np.int32), at=np.array([float(t)] * 2))
        alone = made.rerank(queries.take([0]), candidates_of([[0, 1, 2, 3, 4, 5]]), 2)
        together = made.rerank(queries, candidates_of([[0, 1, 2, 3, 4, 5]] * 2), 6)
        assert together.items[0, :2].tolist() == alone.items[0].tolist()
        assert sorted(together.items[0].tolist()) == [0, 1, 2, 3, 4, 5], "no item twice, and none lost"
        chance, deep = together.trail[RULES][1]
        assert chance[:2].tolist() == alone.trail[RULES][1][0].tolist()
        assert chance[0] == pytest.approx(0.5 if together.items[0, 0] == 0 else 0.5 / 4)
        assert deep.tolist() == [1.0] * 6
        explored += int(together.items[0, 0] != 0)
    assert 8 < explored < 32, "half of the time; four standard deviations"


# ---- all together -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_a_page_is_as_long_as_it_can_be_and_has_no_item_twice(data):
    n, k = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    items = data.draw(st.permutations(range(10)))[:n]
    scores = sorted(data.draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n)), reverse=True)
    pins = data.draw(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 12)), max_size=4))
    barred = data.draw(st.sets(st.integers(10, 15), max_size=3))
    config = RulesConfig(
        boosts=(BoostConfig(column="colour", values=("red",), factor=data.draw(st.sampled_from([0.1, 1, 9]))),),
        explore=ExploreConfig(share=data.draw(st.sampled_from([0.0, 0.7])), first_place=1),
        novelty=NoveltyConfig(weight=data.draw(st.sampled_from([0.0, 1.0]))),
    )
    mmr = MMRConfig(lambda_=0.5, caps=(CapConfig(column="c", at_most=1, window=5),)).build(VECTORS, {"c": np.ones(20, np.int32)})
    made = Rules(config, mmr, known(barred=barred), VECTORS)
    queries = replace(queries_of([3, 5]), wishes=(Wishes(pins=tuple(pins)),), explain=True)
    out = made.rerank(queries, candidates_of([items], [scores]) if n else Candidates.empty(1, ("a",)), k)
    found = [i for i in out.items[0].tolist() if i != UNKNOWN]
    strangers = {row for row, place in pins if row not in items and row not in barred and place <= k}
    assert len(found) == len(set(found))
    assert set(found) <= set(items) | strangers
    assert len(found) >= min(k, n)
    assert not any(i in barred for i in found)
    codes, chance = out.trail[RULES]
    assert codes.shape == chance.shape == out.items.shape


# ---- the funnel -------------------------------------------------------------------------------------------------------


AT = 1_700_100_000.0


@pytest.fixture
def funnel(small: Small) -> Funnel:
    return Funnel.load(small.folder)


def ruled(funnel: Funnel, **settings_) -> Funnel:
    funnel.config = funnel.config.model_copy(update={"rules": RulesConfig(**settings_)})
    return funnel


def shown(funnel: Funnel, user: str = "u0", k: int = 5, **more):
    queries = funnel.queries([FunnelRequest(user_id=user, k=k, at=AT, explain=True, **more)])
    return funnel.page(queries, funnel.recommend(queries))[0]


def names(items) -> list[str]:
    return [item.item_id for item in items]


def test_a_block_holds_in_recall_and_on_the_last_rung_and_costs_no_place(funnel: Funnel) -> None:
    ruled(funnel, blocks=(MatchConfig(column="colour", values=("red",)),))
    page_ = shown(funnel, k=5)
    assert len(page_) == 5
    assert all(int(i[1:]) % 2 for i in names(page_)), "even ones are red"
    queries = funnel.queries([FunnelRequest("nobody", 5, AT)])
    assert all(int(i[1:]) % 2 for i in names(funnel.page(queries, funnel.popular(queries))[0]))


def test_neighbours_are_the_nearest_that_are_not_blocked_however_many_are(funnel: Funnel) -> None:
    """Of i1's the 15 nearest are blocked: two others are asked for and given, in their order."""
    near = [item for item, _ in funnel.similar("i1", 18)]
    assert len(near) == 18
    ruled(funnel, blocks=(MatchConfig(column="item_id", values=tuple(near[:15])),))
    assert [item for item, _ in funnel.similar("i1", 2)] == near[15:17]


def test_each_item_says_what_moved_it_and_how_probable_it_was(funnel: Funnel) -> None:
    last = names(shown(funnel, k=20))[-1]
    page_ = shown(funnel, k=5, pins=[(last, 1)], boosts=[(c, 100.0) for c in funnel.filters.parse({"item_id": "i33"}) or ()])
    assert page_[0].item_id == last
    assert page_[0].explain is not None
    assert (page_[0].explain["rule"], page_[0].explain["propensity"]) == ("pinned", 1.0)
    assert all(set(i.explain or {}) == {"channels", "stages", "rule", "propensity"} for i in page_)


def test_rules_hold_for_new_and_changed_items(funnel: Funnel) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"colour": "gold"}, "New"), ItemChange("i8", {"colour": "gold"})])
    funnel.follow(log.since(0).records)
    gold = [(c, 1_000.0) for c in funnel.filters.parse({"colour": "gold"}) or ()]
    some = funnel.filters.parse({"item_id": ["new", "i8", *(f"i{n}" for n in range(1, 30, 2))]})
    assert set(names(shown(funnel, "u1", 2, boosts=gold, filter=some))) == {"new", "i8"}
    ruled(funnel, pins=(PinConfig(item_id="new", place=1),))
    assert names(shown(funnel, "u1", 3))[0] == "new"
    log.change([ItemChange("new", None)])
    funnel.follow(log.since(0).records)
    assert "new" not in names(shown(funnel, "u1", 3))


def test_a_new_items_boost_fades_with_its_exposures(funnel: Funnel) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"colour": "red", "price": 9})])
    funnel.follow(log.since(0).records)
    ruled(funnel, new_items=NewItemsConfig(factor=1_000, exposures=1))
    only = funnel.filters.parse({"item_id": ["new", *(f"i{n}" for n in range(0, 40, 2))]})
    assert names(shown(funnel, "u0", 3, filter=only))[0] == "new"
    funnel.exposures = {funnel.items.row("new"): 1_000}
    assert names(shown(funnel, "u0", 3, filter=only))[0] != "new"


def test_a_new_items_boost_takes_it_past_every_cut_and_into_the_order_of_the_rerank_alone(funnel: Funnel) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"colour": "red", "price": 1})])
    funnel.follow(log.since(0).records)
    row = funnel.items.row("new")
    cuts = {name: getattr(funnel.config, name).model_copy(update={"keep": keep}) for name, keep in (("coarse_rank", 6), ("fine_rank", 4))}
    funnel.config = funnel.config.model_copy(update=cuts)

    def fine(user: str):
        queries = funnel.queries([FunnelRequest(user, 3, AT)])
        return funnel.fine_rank(queries, funnel.coarse_rank(queries, funnel.recall(queries)))

    ruled(funnel)
    before = fine("u0")
    assert row not in before.items[0], "what recall found of it did not survive"
    ruled(funnel, new_items=NewItemsConfig(factor=1e9, exposures=1))
    found = fine("u0")
    assert row in found.items[0]
    assert found.items[0, :3].tolist() == before.items[0, :3].tolist(), "it takes the last place, and the others' order stays"
    assert (np.diff(found.scores[0]) <= 0).all(), "the order is the ranker's"
    page_ = shown(funnel, "u0", 3)
    assert (page_[0].item_id, (page_[0].explain or {})["rule"]) == ("new", "moved up: new")
    funnel.exposures = {row: 1_000}
    assert row not in fine("u0").items[0]


def test_what_a_user_does_not_want_goes_and_its_like_stands_lower(funnel: Funnel) -> None:
    before = names(shown(funnel, k=10))
    hide = StoredEvent(before[0], "hide", int(AT * 1000) - 1000, None, "h")
    queries = funnel.queries([FunnelRequest("u0", 10, AT, events=[hide])])
    assert queries.wishes is not None
    assert queries.history.tolist() == funnel.queries([FunnelRequest("u0", 10, AT)]).history.tolist(), "it is no history"
    assert before[0] not in names(shown(funnel, k=10, events=[hide]))
    taken = StoredEvent(before[0], "click", int(AT * 1000) - 2000, None, "c")
    queries = funnel.queries([FunnelRequest("u0", 10, AT, events=[taken, hide])])
    assert funnel.items.row(before[0]) not in queries.history, "what was taken and then refused triggers nothing"
    funnel.config = funnel.config.model_copy(update={"recall": funnel.config.recall.model_copy(update={"exclude_seen": False})})
    assert before[0] not in names(shown(funnel, k=10, events=[hide])), "also where seen items come again"


def test_what_happened_seconds_ago_triggers_neighbours_now(funnel: Funnel) -> None:
    """A stranger who takes one even item gets its neighbours by the channel of the newest events."""
    assert not any("realtime" in i.sources for i in shown(funnel, "stranger"))
    click = StoredEvent("i4", "click", int(AT * 1000) - 2000, None, "c")
    page_ = [i for i in shown(funnel, "stranger", k=10, events=[click]) if "realtime" in i.sources]
    assert page_
    assert all(int(i.item_id[1:]) % 2 == 0 for i in page_)


def test_rules_that_name_nothing_known_are_refused_at_their_line(tmp_path) -> None:
    write_data(tmp_path)
    config_of(tmp_path)
    (tmp_path / "rules.yaml").write_text(
        "rules: {boosts: [{column: color, values: [red], factor: 2}], blocks: [{column: price, values: [cheap]}]}\n"
    )
    told = [str(f) for f in read([tmp_path / "small.yaml", tmp_path / "rules.yaml"]).faults]
    assert any(
        "rules.boosts.0.column" in t and "names 'color', which no item column declares; known: item_id, colour, price" in t for t in told
    )
    assert any("rules.blocks.0.values" in t and "are not all numbers, as 'price' holds" in t for t in told)
