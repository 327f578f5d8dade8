"""Rules told to a running service: refused whole or obeyed everywhere, shown with where they come from, and there after a restart."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deployments.edge import Edge
from deployments.live_items import ItemsFollower
from deployments.service import Service
from recsys.features.live_items import MemoryItemLog
from recsys.features.store import MemoryStore
from recsys.funnel import Funnel, FunnelRequest
from recsys.rerank.live_rules import LiveRules, from_json, in_force, origins, to_json
from recsys.rerank.rules import BoostConfig, MatchConfig, NoveltyConfig, PinConfig, RulesConfig
from tests.deployments.test_edge import speak
from tests.deployments.test_live_items import Talk, shown
from tests.small import Small

CONFIGURED = RulesConfig(
    blocks=(MatchConfig(column="item_id", values=("i4",)),),
    pins=(PinConfig(item_id="i10", place=3),),
    novelty=NoveltyConfig(weight=0.5, half_life_h=24),
)
BLOCK = {"blocks": [{"column": "item_id", "values": ["i2"]}]}


@pytest.fixture
def talk(small: Small) -> Talk:
    return Talk(small, rules=CONFIGURED)


# ---- a document over a configuration ----------------------------------------------------------------------------------


def test_lists_come_before_the_configurations_and_values_stand_in_their_place() -> None:
    live = LiveRules.model_validate({**BLOCK, "novelty": {"weight": 1}, "unwanted": 0, "pins": [{"item_id": 10, "place": 1}]})
    both = in_force(CONFIGURED, live)
    assert [b.values for b in both.blocks] == [("i2",), ("i4",)]
    assert [(p.item_id, p.place) for p in both.pins] == [("10", 1), ("i10", 3)]
    assert (both.novelty, both.unwanted) == (NoveltyConfig(weight=1, half_life_h=24), 0)
    assert both.explore == CONFIGURED.explore
    told = origins(CONFIGURED, live)
    assert {path for path, of in told.items() if of == "live"} == {"blocks.0", "pins.0", "novelty.weight", "unwanted"}
    assert told["blocks.1"] == told["pins.1"] == told["novelty.half_life_h"] == told["explore.share"] == "configuration"
    assert in_force(CONFIGURED, None) == CONFIGURED


def test_a_list_of_the_configuration_can_be_put_out_of_force() -> None:
    live = LiveRules.model_validate({**BLOCK, "instead": ["blocks", "pins"]})
    both = in_force(CONFIGURED, live)
    assert [b.values for b in both.blocks] == [("i2",)]
    assert both.pins == ()
    assert "pins.0" not in origins(CONFIGURED, live)
    assert "blocks.1" not in origins(CONFIGURED, live)


def test_a_document_comes_back_as_it_was_told() -> None:
    live = LiveRules.model_validate({**BLOCK, "boosts": [{"column": "colour", "values": ["Ä", 2, 1.5], "factor": 2}]})
    back = from_json(to_json(live))
    assert back.rules == live
    assert back.rules.model_fields_set == {"blocks", "boosts"}, "what was not named stays the configuration's"


# ---- over HTTP --------------------------------------------------------------------------------------------------------


def test_a_block_reaches_every_answer_and_ends_with_its_taking_back(talk: Talk) -> None:
    async def everywhere(ask: Any) -> set[str]:
        page = shown(await ask("POST", "/v1/recommend", {"user_id": "u0", "k": 50}))
        late = shown(await ask("POST", "/v1/recommend", {"user_id": "u0", "k": 50, "timeout_ms": 0.001}))
        new = shown(await ask("POST", "/v1/recommend", {"user_id": "nobody", "k": 50, "pins": [{"item_id": "i2", "place": 1}]}))
        rank = shown(await ask("POST", "/v1/rank", {"user_id": "u0", "item_ids": ["i2", "i4", "i6"]}))
        near = await ask("GET", "/v1/items/i6/similar")
        return {*page, *late, *new, *rank, *shown(near)}

    async def script(ask: Any) -> None:
        assert "i2" in await everywhere(ask)
        told = await ask("PUT", "/v1/rules", BLOCK)
        assert (told.status, told.json) == (200, {"number": 1, "live": BLOCK, "notes": []})
        talk.follower.poll()
        found = await everywhere(ask)
        assert not {"i2", "i4"} & found, "the configuration's block stays"
        assert len(found) > 20
        assert (await ask("GET", "/v1/items/i2/similar")).status == 404
        assert (await ask("GET", "/v1/version")).json["items"]["rules"] == 1
        assert (await ask("DELETE", "/v1/rules")).json == {"number": 2, "live": None, "notes": []}
        talk.follower.poll()
        found = await everywhere(ask)
        assert "i2" in found
        assert "i4" not in found

    talk.run(script)


def test_what_is_in_force_is_shown_with_where_it_comes_from(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        before = (await ask("GET", "/v1/rules")).json
        assert (before["number"], before["live"], before["since_ms"]) == (0, None, None)
        assert before["in_force"] == before["configuration"]
        assert set(before["origin"].values()) == {"configuration"}
        document = BLOCK | {"pins": [{"item_id": "nobody", "place": 1}], "unwanted": 0.25}
        put = (await ask("PUT", "/v1/rules", document)).json
        assert put["notes"] == ["'pins.0': item 'nobody' is not known yet."]
        talk.follower.poll()
        after = (await ask("GET", "/v1/rules")).json
        assert (after["number"], after["live"], after["not_in_force"]) == (1, document, [])
        assert after["since_ms"] > 1_600_000_000_000
        assert [b["values"] for b in after["in_force"]["blocks"]] == [["i2"], ["i4"]]
        assert {p for p, of in after["origin"].items() if of == "live"} == {"blocks.0", "pins.0", "unwanted"}
        assert 0 <= after["staleness_s"] < 60

    talk.run(script)


REFUSED: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "not valid JSON"),
    (b'{"unwanted": 1e999}', 400, None, "not valid JSON"),
    ([], 422, None, "expected an object"),
    ({"block": []}, 422, "block", "'block' is not a field"),
    ({"blocks": ["i2"]}, 422, "blocks.0", "expected an object"),
    ({"blocks": [{"column": "item_id", "values": []}]}, 422, "blocks.0.values", "at least 1"),
    ({"blocks": [{"column": "color", "values": ["x"]}]}, 422, "blocks.0.column", "known: item_id, colour, price"),
    ({"blocks": [{"column": "price", "values": ["dear"]}]}, 422, "blocks.0.values", "not all numbers"),
    ({"blocks": [{"column": "item_id", "values": ["x"] * 1_001}]}, 422, "blocks.0.values", "at most 1000"),
    ({"boosts": [{"column": "colour", "values": ["red"], "factor": 0}]}, 422, "boosts.0.factor", "greater than 0"),
    ({"boosts": [{"column": "colour", "values": ["red"], "factor": 1}] * 65}, 422, "boosts", "at most 64"),
    ({"pins": [{"item_id": {"a": 1}, "place": 1}]}, 422, "pins.0.item_id", "an id is a text"),
    ({"pins": [{"item_id": " ", "place": 1}]}, 422, "pins.0.item_id", "an id is a text"),
    ({"pins": [{"item_id": "x" * 300, "place": 1}]}, 422, "pins.0.item_id", "300 bytes"),
    ({"explore": {"share": 2}}, 422, "explore.share", "less than or equal to 1"),
    ({"instead": ["novelty"]}, 422, "instead.0", "'blocks'"),
]


@pytest.mark.parametrize(("body", "status", "field", "words"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_faulty_document_is_refused_whole(talk: Talk, body: Any, status: int, field: str | None, words: str) -> None:
    async def script(ask: Any) -> None:
        sent = body if isinstance(body, bytes) else {**body, "unwanted": 0.1} if isinstance(body, dict) else body
        error = (told := await ask("PUT", "/v1/rules", sent)).json["error"]
        assert (told.status, error.get("field")) == (status, field), error
        assert words in error["message"]
        assert error["message"].endswith(".")
        assert talk.items.since(0).rules == (0, b"")

    talk.run(script)


def test_every_fault_of_a_document_is_named_at_once(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        error = (await ask("PUT", "/v1/rules", {"unwanted": 3, "blocks": [{"column": "colour"}]})).json["error"]
        assert "'unwanted': input should be less than or equal to 1, got 3." in error["message"]
        assert "'blocks.0.values' is required." in error["message"]

    talk.run(script)


def test_while_the_store_is_away_rules_are_refused_and_those_in_force_stay(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        await ask("PUT", "/v1/rules", BLOCK)
        talk.follower.poll()
        talk.items.down = True
        for told in (await ask("PUT", "/v1/rules", {}), await ask("DELETE", "/v1/rules")):
            assert (told.status, told.json["error"]["code"]) == (503, "store_unavailable")
        assert "i2" not in shown(await ask("POST", "/v1/recommend", {"user_id": "u0", "k": 50}))
        assert (await ask("GET", "/v1/rules")).json["number"] == 1

    talk.run(script)


def test_a_service_that_follows_nothing_says_so(talk: Talk) -> None:
    async def whole() -> None:
        service = Service(talk.config, talk.rollout, MemoryStore())
        for method in ("GET", "PUT", "DELETE"):
            heard = await speak(Edge(service), method, "/v1/rules", b"{}")
            assert (heard.status, heard.json["error"]["code"]) == (404, "not_found")
        await service.close()

    asyncio.run(whole())


def test_the_routes_are_documented(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        paths = (await ask("GET", "/openapi.json")).json["paths"]
        assert paths["/v1/rules"].keys() == {"get", "put", "delete"}
        body = paths["/v1/rules"]["put"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"blocks", "boosts", "pins", "novelty", "instead"} <= body["properties"].keys()

    talk.run(script)


# ---- following --------------------------------------------------------------------------------------------------------


def page(funnel: Funnel, user: str = "nobody", k: int = 50) -> list[str]:
    queries = funnel.queries([FunnelRequest(user, k, 1_700_100_000.0)])
    return [item.item_id for item in funnel.page(queries, funnel.recommend(queries))[0]]


def test_another_process_and_one_that_starts_later_obey_too(small: Small) -> None:
    assert {"i2", "i4"} <= set(page(Funnel.load(small.folder)))
    log = MemoryItemLog()
    first = ItemsFollower(log, poll_s=3600)
    funnel = first.loading(Funnel.load, CONFIGURED)(small.folder)
    log.rule(to_json(LiveRules.model_validate(BLOCK)))
    first.poll()
    later = ItemsFollower(log, poll_s=3600)
    later.poll()
    for one in (funnel, later.loading(Funnel.load, CONFIGURED)(small.folder), first.loading(Funnel.load, CONFIGURED)(small.folder)):
        assert not {"i2", "i4"} & set(page(one))


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (b"garbage", "is no such document"),
        (b"[1]", "is of format None, this release reads 1"),
        (json.dumps({"format": 2, "time_ms": 1, "rules": {}}).encode(), "is of format 2, this release reads 1"),
        (json.dumps({"format": 1, "rules": {}}).encode(), "is no such document"),
        (json.dumps({"format": 1, "time_ms": 1, "rules": {"later": 1}}).encode(), "cannot be read by this release ('later'"),
    ],
)
def test_a_document_that_this_release_cannot_read_is_told_and_passed_over(
    small: Small, caplog: pytest.LogCaptureFixture, held: bytes, why: str
) -> None:
    log = MemoryItemLog()
    follower = ItemsFollower(log, poll_s=3600)
    funnel = follower.loading(Funnel.load, CONFIGURED)(small.folder)
    log.rule(to_json(LiveRules.model_validate(BLOCK)))
    follower.poll()
    log.rule(held)
    follower.poll()
    follower.poll()
    assert "i2" in (found := page(funnel))
    assert "i4" not in found
    said = [r.getMessage() for r in caplog.records if r.name == "deployments.live_items" and r.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("Live rules 2 are passed over, those of the configuration are in force: the store's document ")
    assert why in said[0]
    assert why in follower.rules(funnel)["not_in_force"][0]


def test_what_a_version_cannot_obey_is_told_and_breaks_no_page(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """A document that was checked against the columns of one version meets another: `price` holds numbers there, `brand` is no column."""
    live = LiveRules(
        blocks=(MatchConfig(column="price", values=("dear",)), MatchConfig(column="item_id", values=("i2",))),
        boosts=(BoostConfig(column="brand", values=("acme",), factor=2),),
    )
    log = MemoryItemLog()
    log.rule(to_json(live))
    follower = ItemsFollower(log, poll_s=3600)
    follower.poll()
    funnel = follower.loading(Funnel.load, RulesConfig())(small.folder)
    assert "i2" not in (found := page(funnel))
    assert "i4" in found
    version = funnel.version
    sentences = [
        f"rules.blocks: version {version} has no column 'price' of such values, so nothing is blocked by it. Retrain.",
        f"rules.boosts: version {version} has no column 'brand', so nothing is boosted by it. Retrain.",
    ]
    assert follower.rules(funnel)["not_in_force"] == sentences
    assert [r.getMessage() for r in caplog.records if r.name == "deployments.live_items" and r.levelname == "WARNING"] == sentences
