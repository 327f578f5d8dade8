"""Rules that requests send, as somebody would who wants to break them: a 422 that names the field, or a page that obeys them.

Spoken to the whole service in this process, with a trained funnel whose configuration has caps, blocks, pins and exploration.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.edge import Edge
from deployments.rollout import Rollout
from deployments.service import Service
from recsys.features.live_items import ItemChange, MemoryItemLog
from recsys.features.store import MemoryStore
from recsys.funnel import Funnel
from recsys.rerank.diversity import CapConfig
from recsys.rerank.rules import ExploreConfig, MatchConfig, PinConfig, RulesConfig
from recsys.serve_config import ServeConfig, TimeoutsConfig
from tests.deployments.standin import StandInRegistry
from tests.deployments.test_edge import Heard, speak
from tests.small import Small

V = "v000001-aaaaaaaa"
INTERNALS = ("Traceback", "File ", ".py", "numpy", "object at", "<class")
PATIENT = ServeConfig(
    deadline_ms=60_000, timeouts_ms=TimeoutsConfig(user_state=20_000, recall=20_000, coarse_rank=20_000, fine_rank=20_000, rerank=20_000)
)
"""A busy test host must not degrade what is looked at."""
BLOCKED, DELETED, LATER = "i6", "i8", "later"


class Attacked:
    """A service of its own and the funnel behind it."""

    def __init__(self, small: Small, rules: RulesConfig, caps: tuple[CapConfig, ...] = ()) -> None:
        self.funnel = Funnel.load(small.folder)
        rerank = self.funnel.config.rerank.model_copy(update={"caps": caps})
        self.funnel.config = self.funnel.config.model_copy(update={"rules": rules, "rerank": rerank})
        self.funnel.reranker = rerank.build(vectors=self.funnel.vectors, columns=self.funnel.item_columns)
        self.funnel.version = V
        log = MemoryItemLog()
        log.change([ItemChange(DELETED, None), ItemChange(LATER, {"colour": "red", "price": 4}, "Later")])
        self.funnel.follow(log.since(0).records)
        registry = StandInRegistry(**{V: self.funnel})  # type: ignore[arg-type]
        registry.named = {"production": V}
        self.rollout = Rollout(registry, registry.load(), poll_s=3600)  # type: ignore[arg-type]
        self.rollout.start()

    def ask(self, body: Any, path: str = "/v1/recommend") -> Heard:
        """One request to a fresh edge over the same funnel."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)

        async def once() -> Heard:
            return await speak(Edge(Service(PATIENT, self.rollout, MemoryStore())), "POST", path, raw)

        return asyncio.run(once())

    def page(self, **more: Any) -> list[dict[str, Any]]:
        """The items of an answer, which must be whole."""
        heard = self.ask({"user_id": "u0", "k": 5, "explain": True, **more})
        assert (heard.status, heard.json.get("degraded")) == (200, []), heard.json
        items: list[dict[str, Any]] = heard.json["items"]
        return items


@pytest.fixture(scope="module")
def attacked(small: Small) -> Iterator[Attacked]:
    rules = RulesConfig(
        blocks=(MatchConfig(column="item_id", values=(BLOCKED,)),),
        pins=(PinConfig(item_id="i10", place=3), PinConfig(item_id=BLOCKED, place=1), PinConfig(item_id="gone", place=2)),
    )
    found = Attacked(small, rules)
    yield found
    found.rollout.stop()


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["item_id"] for item in items]


# ---- refused, and told why --------------------------------------------------------------------------------------------

BOOST = {"filter": {"colour": "red"}, "factor": 2}

REFUSED: list[tuple[Any, str]] = [
    ({"rules": {"pins": []}}, "rules"),
    ({"caps": [{"column": "colour", "at_most": 0}]}, "caps.0.at_most"),
    ({"caps": [{"column": "colour", "at_most": 1.5}]}, "caps.0.at_most"),
    ({"caps": [{"column": "colour", "at_most": "2"}]}, "caps.0.at_most"),
    ({"caps": [{"column": "colour"}]}, "caps.0.at_most"),
    ({"caps": [{"column": "colour", "at_most": 1, "window": 0}]}, "caps.0.window"),
    ({"caps": [{"column": "colour", "at_most": 1}, {"column": "color", "at_most": 1}]}, "caps.1.column"),
    ({"caps": [{"column": "price", "at_most": 1}]}, "caps.0.column"),
    ({"caps": [{"column": "", "at_most": 1}]}, "caps.0.column"),
    ({"caps": [{"column": "colour", "at_most": 1, "per": "page"}]}, "caps.0.per"),
    ({"caps": [{"column": "colour", "at_most": 1}] * 9}, "caps"),
    ({"caps": {"colour": 2}}, "caps"),
    ({"novelty": {}}, "novelty.weight"),
    ({"novelty": {"weight": 1.1}}, "novelty.weight"),
    ({"novelty": {"weight": True}}, "novelty.weight"),
    ({"novelty": {"weight": 1, "half_life_h": 0}}, "novelty.half_life_h"),
    ({"novelty": {"weight": 1, "half_life_h": 1e7}}, "novelty.half_life_h"),
    ({"novelty": {"weight": 1, "half_life_s": 5}}, "novelty.half_life_s"),
    ({"blocks": ["i1"]}, "blocks"),
    ({"explore": {"share": 2}}, "explore"),
    ({"novelty": 1}, "novelty"),
    ({"diversity": -0.1}, "diversity"),
    ({"diversity": 1.1}, "diversity"),
    ({"diversity": 1e400}, "diversity"),
    ({"diversity": "high"}, "diversity"),
    ({"diversity": [0.5]}, "diversity"),
    ({"boosts": {}}, "boosts"),
    ({"boosts": [{}]}, "boosts.0.filter"),
    ({"boosts": [{"filter": {"colour": "red"}}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"factor": 0}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"factor": -3}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"factor": 1e9}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"factor": None}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"factor": "twice"}]}, "boosts.0.factor"),
    ({"boosts": [BOOST | {"weight": 1}]}, "boosts.0.weight"),
    ({"boosts": [BOOST | {"filter": {}}]}, "boosts.0.filter"),
    ({"boosts": [BOOST | {"filter": {"colour": "red", "price": 1}}]}, "boosts.0.filter"),
    ({"boosts": [BOOST, BOOST | {"filter": {"color": "red"}}]}, "boosts.1.filter.color"),
    ({"boosts": [BOOST | {"filter": {"price": {"min": "cheap"}}}]}, "boosts.0.filter.price.min"),
    ({"boosts": [BOOST | {"filter": {"price": {"min": 9, "max": 1}}}]}, "boosts.0.filter.price"),
    ({"boosts": [BOOST | {"filter": {"colour": {"any": [["red"]]}}}]}, "boosts.0.filter.colour.any"),
    ({"boosts": [BOOST] * 17}, "boosts"),
    ({"pins": "i1"}, "pins"),
    ({"pins": ["i1"]}, "pins.0"),
    ({"pins": [{"item_id": "i1"}]}, "pins.0.place"),
    ({"pins": [{"place": 1}]}, "pins.0.item_id"),
    ({"pins": [{"item_id": "i1", "place": 0}]}, "pins.0.place"),
    ({"pins": [{"item_id": "i1", "place": -1}]}, "pins.0.place"),
    ({"pins": [{"item_id": "i1", "place": 1.5}]}, "pins.0.place"),
    ({"pins": [{"item_id": "i1", "place": "1"}]}, "pins.0.place"),
    ({"pins": [{"item_id": "", "place": 1}]}, "pins.0.item_id"),
    ({"pins": [{"item_id": {"a": 1}, "place": 1}]}, "pins.0.item_id"),
    ({"pins": [{"item_id": "i1", "place": 1}, {"item_id": "x" * 10_000, "place": 2}]}, "pins.1.item_id"),
    ({"pins": [{"item_id": "i1", "place": 1, "until": 3}]}, "pins.0.until"),
    ({"pins": [{"item_id": f"i{n}", "place": n + 1} for n in range(51)]}, "pins"),
]


@pytest.mark.parametrize(("rules", "field"), REFUSED, ids=lambda v: str(v)[:60])
def test_a_rule_that_makes_no_sense_is_refused_by_the_name_of_its_field(attacked: Attacked, rules: Any, field: str) -> None:
    heard = attacked.ask(
        b'{"user_id": "u0", "k": 5, ' + orjson.dumps(rules)[1:].replace(b"null}", b"1e400}" if "diversity" in rules else b"null}")
    )
    error = heard.json["error"]
    assert (heard.status, error.get("field")) == (422, field), error
    assert error["message"].endswith(".")
    assert f"'{field.split('.', 1)[0]}" in error["message"]
    assert not any(word in error["message"] for word in INTERNALS)


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize(
    ("rules", "field"),
    [
        (b'"diversity": %s', "diversity"),
        (b'"novelty": {"weight": %s}', "novelty.weight"),
        (b'"novelty": {"weight": 1, "half_life_h": %s}', "novelty.half_life_h"),
        (b'"caps": [{"column": "colour", "at_most": %s}]', "caps.0.at_most"),
        (b'"boosts": [{"filter": {"colour": "red"}, "factor": %s}]', "boosts.0.factor"),
        (b'"pins": [{"item_id": "i1", "place": %s}]', "pins.0.place"),
        (b'"boosts": [{"filter": {"price": {"min": %s}}, "factor": 2}]', "boosts.0.filter.price.min"),
    ],
)
def test_numbers_that_are_none_are_refused(attacked: Attacked, rules: bytes, field: str, value: bytes) -> None:
    heard = attacked.ask(b'{"user_id": "u0", ' + rules % value + b"}")
    assert heard.status in {400, 422}, heard.json
    assert heard.json["error"].get("field") == (field if heard.status == 422 else None), heard.json


# ---- obeyed -----------------------------------------------------------------------------------------------------------


def test_what_is_blocked_deleted_excluded_filtered_out_or_unknown_cannot_be_pinned(attacked: Attacked) -> None:
    pins = [{"item_id": one, "place": n + 1} for n, one in enumerate([BLOCKED, DELETED, "nobody", "i12", "i1", "i14"])]
    found = attacked.page(pins=pins, exclude=["i12"], filter={"colour": "red"}, k=8)
    assert not {BLOCKED, DELETED, "nobody", "i12", "i1"} & set(ids(found))
    assert ids(found)[5] == "i14"
    assert found[5]["explain"]["rule"] == "pinned"
    assert ids(found)[2] == "i10", "the configuration's"
    assert len(set(ids(found))) == 8


def test_a_pin_that_the_page_does_not_have_is_named_with_the_reason(attacked: Attacked) -> None:
    pins = [{"item_id": one, "place": n + 1} for n, one in enumerate([BLOCKED, DELETED, "nobody", "i12", "i1", "i14", "i16"])]
    body = {"user_id": "new", "k": 6, "pins": [*pins, {"item_id": "i18", "place": 6}, {"item_id": "i14", "place": 5}]}
    heard = attacked.ask(body | {"exclude": ["i12"], "filter": {"colour": "red"}, "explain": True})
    found = [(pin["item_id"], pin["place"], pin["reason"]) for pin in heard.json["pins_left_out"]]
    assert found == [
        (BLOCKED, 1, "the item was deleted or is blocked"),
        (DELETED, 2, "the item was deleted or is blocked"),
        ("nobody", 3, "no such item is known"),
        ("i12", 4, "the request excludes it, or the user has had it"),
        ("i1", 5, "the request's filter does not let it pass"),
        ("i16", 7, "the page has 6 places"),
        ("i18", 6, "a pin before it has its place"),
        ("i14", 5, "a pin before it has the item"),
        (BLOCKED, 1, "the item was deleted or is blocked"),
        ("gone", 2, "no such item is known"),
    ]
    assert "pins_left_out" not in attacked.ask(body).json


def test_the_last_rung_keeps_its_pins(attacked: Attacked) -> None:
    pins = [{"item_id": "i21", "place": 1}, {"item_id": LATER, "place": 4}, {"item_id": BLOCKED, "place": 2}]
    body = {"user_id": "new", "k": 5, "timeout_ms": 1e-6, "pins": pins, "explain": True}
    heard = attacked.ask(body)
    assert heard.json["degraded"][-1]["rung"] == "popular"
    found = heard.json["items"]
    assert (ids(found)[0], ids(found)[2], ids(found)[3]) == ("i21", "i10", LATER)
    assert [i["explain"]["rule"] for i in found] == ["pinned", "", "pinned", "pinned", ""]
    assert len(set(ids(found))) == 5
    assert [pin["item_id"] for pin in heard.json["pins_left_out"]] == [BLOCKED, BLOCKED, "gone"]


def test_an_item_that_came_later_can_be_pinned(attacked: Attacked) -> None:
    assert ids(attacked.page(pins=[{"item_id": LATER, "place": 1}]))[0] == LATER


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_page_shorter_than_its_pins_has_those_of_its_places(attacked: Attacked, k: int) -> None:
    pins = [{"item_id": f"i{20 + n}", "place": n + 1} for n in range(10)]
    assert ids(attacked.page(user_id="nobody", k=k, pins=pins)) == [f"i{20 + n}" for n in range(k)]


def test_of_two_pins_for_a_place_or_of_an_item_the_first_counts(attacked: Attacked) -> None:
    both = attacked.page(
        user_id="nobody", pins=[{"item_id": "i20", "place": 1}, {"item_id": "i22", "place": 1}, {"item_id": "i20", "place": 2}]
    )
    assert ids(both)[0] == "i20"
    assert ids(both).count("i20") == 1


def test_a_place_beyond_any_page_and_numbers_for_ids_are_data(attacked: Attacked) -> None:
    far = attacked.page(pins=[{"item_id": "i20", "place": 10**18}, {"item_id": 242, "place": 1}])
    assert len(far) == 5
    assert {i["explain"]["rule"] for i in far if i["item_id"] != "i10"} <= {"", "moved up for diversity", "moved down for diversity"}


def test_boosts_against_each_other_multiply_and_the_page_stays_whole(attacked: Attacked) -> None:
    plain = attacked.page(k=20)
    against = [{"filter": {"colour": "red"}, "factor": f} for f in (1_000, 0.001)]
    assert ids(attacked.page(k=20, boosts=against)) == ids(plain)
    extreme = attacked.page(k=20, boosts=[{"filter": {"colour": "blue"}, "factor": 1e-300}] * 16, diversity=0)
    assert len(extreme) == 20
    assert extreme[0]["item_id"].startswith(("i", LATER))


def test_the_knob_takes_both_its_ends(attacked: Attacked) -> None:
    for diversity in (0, 1, 0.0, 1.0, None):
        assert len(attacked.page(diversity=diversity)) == 5


def test_odd_values_of_features_and_contexts_cost_no_page(attacked: Attacked) -> None:
    for odd in ([], [None], ["a", 1, None, True], "", " ", 1e308, -1, True, None, "x" * 5_000, ["\0"], [[]]):
        heard = attacked.ask({"user_id": "nobody", "k": 3, "features": {"country": odd}, "context": {"device": odd, "colour": odd}})
        assert heard.status == (422 if odd == [[]] else 200), heard.json
        if heard.status == 200:
            assert (len(heard.json["items"]), heard.json["degraded"], heard.json["cold_start"]) == (3, [], "popular")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_the_rules_a_page_obeys_them(attacked: Attacked, data: st.DataObject) -> None:
    item = st.one_of(st.integers(0, 41).map(lambda n: f"i{n}"), st.sampled_from([BLOCKED, DELETED, LATER, "nobody", "cold"]))
    pins = data.draw(st.lists(st.fixed_dictionaries({"item_id": item, "place": st.integers(1, 30)}), max_size=12))
    exclude = data.draw(st.lists(item, max_size=6))
    k = data.draw(st.integers(1, 25))
    boosts = [{"filter": {"colour": "blue"}, "factor": f} for f in data.draw(st.lists(st.floats(1e-6, 1_000), max_size=3))]
    found = attacked.page(k=k, pins=pins, exclude=exclude, boosts=boosts, diversity=data.draw(st.sampled_from([None, 0, 0.3, 1])))
    names = ids(found)
    barred = {BLOCKED, DELETED, "nobody", *exclude}
    assert len(set(names)) == len(names) == k
    assert not barred & set(names)
    first: dict[int, str] = {}
    for pin in pins:
        if pin["item_id"] not in barred and pin["place"] <= k and pin["place"] not in first and pin["item_id"] not in first.values():
            row = attacked.funnel.items.row(pin["item_id"])
            if row >= 0 and row not in attacked.funnel.past.seen(0):
                first[pin["place"]] = pin["item_id"]
    for place, name in first.items():
        assert names[place - 1] == name
        assert found[place - 1]["explain"]["rule"] == "pinned"


# ---- caps -------------------------------------------------------------------------------------------------------------


def test_caps_that_contradict_each_other_give_way_and_the_page_is_full(small: Small) -> None:
    caps = (CapConfig(column="colour", at_most=1, window=100), CapConfig(column="price", at_most=1), CapConfig(column="item_id", at_most=1))
    made = Attacked(small, RulesConfig(), caps[::2])
    found = made.page(k=10)
    assert len(set(ids(found))) == 10
    assert Counter(i["explain"]["rule"] for i in found)["a cap gave way to fill the page"] == 8, "two colours have one place each"
    made.rollout.stop()


@pytest.mark.parametrize("window", [4, 100])
def test_what_is_explored_breaks_no_cap_that_held_before(small: Small, window: int) -> None:
    """At most two of a colour among 4 places: red, red, blue, blue, … Exploration may bring items of a colour where it has room only."""
    rules = RulesConfig(explore=ExploreConfig(share=0.7, first_place=1))
    made = Attacked(small, rules, (CapConfig(column="colour", at_most=2, window=window),))
    k, explored = (8 if window == 4 else 4), 0
    for user in range(0, 60, 2):
        found = made.page(user_id=f"u{user}", k=k)
        colours = ["red" if i["item_id"] in {"cold", LATER} or int(i["item_id"][1:]) % 2 == 0 else "blue" for i in found]
        explored += sum("explored" in i["explain"]["rule"] for i in found)
        assert not any("gave way" in i["explain"]["rule"] for i in found), "candidates of both colours are there"
        for a in range(len(colours)):
            assert max(Counter(colours[a : a + window]).values()) <= 2, (user, colours)
        assert all(0 < i["explain"]["propensity"] <= 1 for i in found)
    assert explored > 20
    made.rollout.stop()


def test_a_request_caps_its_own_page_and_nobody_elses(attacked: Attacked) -> None:
    """Red and blue are the colours: at most one of each among two places is red, blue, red, … (the pin of place 3 stays)."""
    cap = [{"column": "colour", "at_most": 1, "window": 2}]
    found = attacked.page(user_id="u0", k=8, caps=cap)
    red = [i["item_id"] in {"cold", LATER} or int(i["item_id"][1:]) % 2 == 0 for i in found]
    pin = ids(found).index("i10")
    assert pin == 2
    del red[pin]
    assert all(a != b for a, b in itertools.pairwise(red))
    assert "moved down: a cap" in {i["explain"]["rule"] for i in found}
    plain = attacked.page(user_id="u0", k=8)
    assert ids(plain) != ids(found)
    assert "moved down: a cap" not in {i["explain"]["rule"] for i in plain}


def test_caps_of_a_request_that_cannot_hold_give_way_and_say_so(attacked: Attacked) -> None:
    found = attacked.page(k=6, caps=[{"column": "colour", "at_most": 1, "window": 100}], filter={"colour": "blue"}, pins=[])
    assert [i["explain"]["rule"] for i in found].count("a cap gave way to fill the page") == 5, "one blue item is within the cap"


def test_novelty_of_a_request_lowers_what_the_user_had(small: Small) -> None:
    """Shown again is only what the configuration lets be shown again."""
    made = Attacked(small, RulesConfig())
    recall = made.funnel.config.recall.model_copy(update={"exclude_seen": False})
    made.funnel.config = made.funnel.config.model_copy(update={"recall": recall})
    had = {made.funnel.items.outside([r])[0] for r in made.funnel.past.seen(0).tolist()}
    plain, new = (made.page(k=30, diversity=0, **more) for more in ({}, {"novelty": {"weight": 1, "half_life_h": 1e6}}))
    assert had & set(ids(plain)[:10])
    seen = [n for n, i in enumerate(new) if i["item_id"] in had]
    assert all(i["item_id"] not in had for i in new[: len(new) - len(seen)]), "worth 0 stands last"
    lowered = [i for i in new if i["explain"]["rule"] == "moved down: seen lately"]
    assert lowered
    assert {i["item_id"] for i in lowered} <= had
    made.rollout.stop()
