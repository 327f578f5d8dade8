"""Items and users over HTTP: checked, kept, answered; and followed by every version that a process holds."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.edge import Edge
from deployments.live_items import ItemsFollower
from deployments.rollout import Rollout, loader
from deployments.service import Service
from recsys.errors import StoreError, StoreUnavailableError
from recsys.features.live_items import Changes, ItemChange, MemoryItemLog
from recsys.features.store import MemoryStore
from recsys.funnel import STAGES, Funnel, FunnelRequest
from recsys.rerank.diversity import CapConfig
from recsys.rerank.rules import MatchConfig, RulesConfig
from recsys.serve_config import LimitsConfig, ServeConfig
from tests.deployments.test_edge import Heard, speak
from tests.small import Small

PATIENT: dict[str, Any] = {"deadline_ms": 20_000}


class DownLog(MemoryItemLog):
    """A log whose server may be gone."""

    down = False

    def since(self, position: int) -> Changes:
        if self.down:
            raise StoreUnavailableError("connection refused")
        return super().since(position)

    def change(self, changes: Any) -> int:
        if self.down:
            raise StoreUnavailableError("connection refused")
        return super().change(changes)

    def rule(self, document: bytes) -> int:
        if self.down:
            raise StoreUnavailableError("connection refused")
        return super().rule(document)


class Talk:
    """A gateway over the small bundle, its store and its log."""

    def __init__(self, small: Small, *, rules: RulesConfig | None = None, **limits: Any) -> None:
        self.items, self.store = DownLog(), MemoryStore()
        self.follower = ItemsFollower(self.items, poll_s=0.01)
        self.rollout = Rollout(small.registry, self.follower.loading(Funnel.load, rules), poll_s=3600)
        self.rollout.start()
        self.config = ServeConfig(**PATIENT, limits=LimitsConfig(**limits))

    def run(self, script: Any) -> Any:
        async def whole() -> Any:
            self.service = Service(self.config, self.rollout, self.store, items=self.items, follower=self.follower)
            edge = Edge(self.service)

            async def ask(method: str, path: str, body: Any = b"") -> Heard:
                return await speak(edge, method, path, body if isinstance(body, bytes) else json.dumps(body).encode())

            try:
                return await script(ask)
            finally:
                await self.service.close()

        return asyncio.run(whole())


@pytest.fixture
def talk(small: Small) -> Talk:
    return Talk(small)


def shown(heard: Heard) -> list[str]:
    assert heard.status == 200, heard.json
    return [item["item_id"] for item in heard.json["items"]]


def test_an_item_that_was_put_can_be_recommended_and_a_deleted_one_no_more(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        only = {"user_id": "u0", "filter": {"item_id": ["new", "i2"]}}
        told = await ask("PUT", "/v1/items", {"item_id": "new", "columns": {"colour": "red", "price": 5}, "title": "Brand new"})
        assert (told.status, told.json) == (200, {"accepted": 1, "rejected": [], "position": 1})
        talk.follower.poll()
        page = await ask("POST", "/v1/recommend", only)
        assert "new" in shown(page)
        assert {i["item_id"]: i.get("title") for i in page.json["items"]}["new"] == "Brand new"
        assert (await ask("DELETE", "/v1/items", ["new", "i2"])).json["accepted"] == 2
        talk.follower.poll()
        assert shown(await ask("POST", "/v1/recommend", only)) == []
        assert "i2" not in shown(await ask("POST", "/v1/recommend", {"user_id": "u0", "k": 50}))
        assert shown(await ask("POST", "/v1/rank", {"user_id": "u0", "item_ids": ["i2", "i4", "new"]})) == ["i4"]
        assert (await ask("GET", "/v1/items/i2/similar")).status == 404
        assert "i2" not in shown(await ask("GET", "/v1/items/i4/similar"))
        version = (await ask("GET", "/v1/version")).json["items"]
        assert {k: version[k] for k in ("changed", "deleted", "position")} == {"changed": 0, "deleted": 2, "position": 3}
        assert 0 <= version["staleness_s"] < 60

    talk.run(script)


def test_a_batch_is_taken_in_part_and_a_single_fault_is_refused(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        rows = [{"item_id": "a"}, {"item_id": ""}, {"item_id": "b", "columns": {"prise": 1}}, {"item_id": 7, "columns": {"price": "4"}}]
        told = (await ask("PUT", "/v1/items", rows)).json
        assert told["accepted"] == 2
        assert [(r["index"], r["code"]) for r in told["rejected"]] == [(1, "empty_id"), (2, "unknown_field")]
        assert "Did you mean 'price'?" in told["rejected"][1]["message"]
        assert [r.item_id for r in talk.items.since(0).records] == ["a", "7"]
        one = await ask("PUT", "/v1/items", {"item_id": "b", "columns": {"price": "dear"}})
        assert (one.status, one.json["error"]["code"], one.json["error"]["field"]) == (422, "wrong_type", "columns.price")
        assert (await ask("PUT", "/v1/items", b"{")).status == 400
        assert (await ask("PUT", "/v1/items", [])).json["error"]["code"] == "empty_list"
        assert (await ask("PUT", "/v1/items", [{"columns": {}}])).json["rejected"][0]["code"] == "missing_field"
        assert (await ask("DELETE", "/v1/items", [None])).json["rejected"][0]["code"] == "wrong_type"
        assert (await ask("DELETE", "/v1/items/a/b")).json["accepted"] == 1
        assert talk.items.since(0).records[-1].item_id == "a/b"

    talk.run(script)


def test_too_many_or_too_long_are_refused_with_a_sentence(small: Small) -> None:
    async def script(ask: Any) -> None:
        told = await ask("PUT", "/v1/items", [{"item_id": n} for n in range(4)])
        assert told.json["error"]["message"] == "4 came; at most 3 are taken in one call. Send them in parts."
        told = await ask("PUT", "/v1/users", {"user_id": "u" * 300})
        assert told.json["error"]["code"] == "id_too_long"

    Talk(small, items_per_call=3).run(script)


def test_a_user_that_was_put_counts_from_the_next_request_on(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        assert (await ask("PUT", "/v1/users", [{"user_id": "u1", "columns": {"country": "fr"}}, {"user_id": "x"}])).json["accepted"] == 2
        (state,) = await talk.store.read(["u1"], timeout_s=1)
        assert state.profile == {"country": "fr"}
        seen: list[Any] = []
        held = talk.rollout.funnel()
        talk.rollout._held = {held.version: Spy(held, seen)}  # type: ignore[dict-item]
        await ask("POST", "/v1/recommend", {"user_id": "u1"})
        assert seen[-1] == {"country": "fr"}
        await ask("PUT", "/v1/users", {"user_id": "u1", "columns": {"country": None}})
        await ask("POST", "/v1/recommend", {"user_id": "u1"})
        assert seen[-1] == {}
        await ask("PUT", "/v1/users", {"user_id": "u1", "columns": {"country": "nl"}})
        assert (await ask("DELETE", "/v1/users", "u1")).json["accepted"] == 1
        assert (await talk.store.read(["u1"], timeout_s=1))[0].profile == {}
        told = await ask("PUT", "/v1/users", {"user_id": "u1", "columns": {"town": "x"}})
        assert "is no declared user column" in told.json["error"]["message"]

    talk.run(script)


class Spy:
    """A funnel that tells which profiles it was asked with."""

    def __init__(self, funnel: Funnel, seen: list[Any]) -> None:
        self._funnel, self._seen = funnel, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._funnel, name)

    def queries(self, requests: Any) -> Any:
        self._seen += [dict(r.profile) for r in requests]
        return self._funnel.queries(requests)


def test_while_the_store_is_away_changes_are_refused_and_pages_go_on(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        talk.items.down = True
        told = await ask("PUT", "/v1/items", {"item_id": "a"})
        assert (told.status, told.json["error"]["code"]) == (503, "store_unavailable")
        assert "repeating is harmless" in told.json["error"]["message"]
        with pytest.raises(StoreUnavailableError):
            talk.follower.poll()
        assert len(shown(await ask("POST", "/v1/recommend", {"user_id": "u0", "k": 5}))) == 5

    talk.run(script)


def test_the_routes_are_documented(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        paths = (await ask("GET", "/openapi.json")).json["paths"]
        assert {"put", "delete"} <= paths["/v1/items"].keys()
        assert {"put", "delete"} <= paths["/v1/users"].keys()

    talk.run(script)


# ---- following --------------------------------------------------------------------------------------------------------


def test_a_version_that_is_loaded_later_knows_what_was_told_before(small: Small) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"price": 1}), ItemChange("i2", None)])
    follower = ItemsFollower(log, poll_s=3600)
    follower.poll()
    funnel = follower.loading(Funnel.load)(small.folder)
    assert funnel.shows(funnel.items.row("new"))
    assert not funnel.shows(funnel.items.row("i2"))


def test_the_thread_brings_changes_and_outlives_a_store_that_is_away(small: Small) -> None:
    log = DownLog()
    log.down = True
    follower = ItemsFollower(log, poll_s=0.01)
    funnel = follower.loading(Funnel.load)(small.folder)
    follower.start(patience_s=0.0)
    assert follower.state()["staleness_s"] is None
    log.down = False
    log.change([ItemChange("new", {"price": 1})])
    until = time.monotonic() + 30
    while not funnel.shows(funnel.items.row("new")):
        assert time.monotonic() < until
        time.sleep(0.01)
    follower.stop()


def test_a_log_that_began_anew_is_read_anew(small: Small) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("i2", None), ItemChange("i4", None)])
    follower = ItemsFollower(log, poll_s=3600)
    funnel = follower.loading(Funnel.load)(small.folder)
    follower.poll()
    follower._log = MemoryItemLog()
    follower._log.change([ItemChange("i6", None)])
    follower.poll()
    assert [funnel.shows(funnel.items.row(i)) for i in ("i2", "i4", "i6")] == [True, True, False]
    assert follower.state()["deleted"] == 1


def test_rules_are_those_of_the_configuration_that_serves(small: Small) -> None:
    rules = RulesConfig(blocks=(MatchConfig(column="colour", values=("red",)),))
    funnel = ItemsFollower(MemoryItemLog(), poll_s=3600).loading(Funnel.load, rules)(small.folder)
    queries = funnel.queries([FunnelRequest("u0", 5, 1_700_100_000.0)])
    assert all(int(item.item_id[1:]) % 2 for item in funnel.page(queries, funnel.recommend(queries))[0]), "even ones are red"


def test_the_rerank_is_that_of_the_configuration_that_serves(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """At most one of each colour among two places is red, blue, red, … and stays so when the catalogue changes; what is asked of a column
    that the version lacks is told, not obeyed, and refuses nothing."""
    capped = small.config.rerank.model_copy(
        update={"lambda_": 1.0, "caps": (CapConfig(column="colour", at_most=1, window=2), CapConfig(column="brand", at_most=1))}
    )
    log = MemoryItemLog()
    follower = ItemsFollower(log, poll_s=3600)
    funnel = follower.loading(loader(*STAGES), small.config.rules, capped)(small.folder)

    def colours(k: int = 8) -> list[int]:
        queries = funnel.queries([FunnelRequest("u0", k, 1_700_100_000.0)])
        return [int(i.item_id[1:]) % 2 for i in funnel.page(queries, funnel.recommend(queries))[0]]

    assert colours() in ([0, 1] * 4, [1, 0] * 4)
    log.change([ItemChange("i2", None), ItemChange("i5", {"price": 3})])
    follower.poll()
    assert colours() in ([0, 1] * 4, [1, 0] * 4)
    assert funnel.config.rerank.lambda_ == 1.0
    said = [r.getMessage() for r in caplog.records if r.name == "deployments.live_items"]
    assert said == [f"rerank.caps: version {funnel.version} has no column 'brand', so nothing is capped by it. Retrain."]


def test_a_stage_without_a_rerank_has_none_after_the_configuration_either(small: Small) -> None:
    capped = small.config.rerank.model_copy(update={"caps": (CapConfig(column="colour", at_most=1),)})
    funnel = ItemsFollower(MemoryItemLog(), poll_s=3600).loading(loader("recall"), RulesConfig(), capped)(small.folder)
    assert funnel.reranker is None


def test_a_block_on_a_column_that_a_version_lacks_leaves_its_pages_and_says_so_once(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    """Rules are younger than the version that serves: the column was declared yesterday, the version was trained last week."""
    rules = RulesConfig(blocks=(MatchConfig(column="brand", values=("acme",)),))
    plain, funnel = Funnel.load(small.folder), ItemsFollower(MemoryItemLog(), poll_s=3600).loading(Funnel.load, rules)(small.folder)

    def pages(of: Funnel) -> list[list[str]]:
        queries = of.queries([FunnelRequest("u1", 10, time.time()), FunnelRequest("", 10, time.time())])
        found = [of.page(queries, answer) for answer in (of.recommend(queries), of.popular(queries))]
        return [[item.item_id for item in page] for both in found for page in both]

    assert pages(funnel) == pages(plain)
    assert all(pages(plain))
    said = [r.getMessage() for r in caplog.records if r.name == "deployments.live_items"]
    assert said == [f"rules.blocks: version {funnel.version} has no column 'brand', so nothing is blocked by it. Retrain."]


def test_what_was_shown_anywhere_is_known_everywhere(small: Small) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"price": 1}), ItemChange("i2", {"price": 1})])
    one, other = (ItemsFollower(log, poll_s=3600) for _ in range(2))
    funnel = other.loading(Funnel.load)(small.folder)
    one.poll()
    other.poll()
    one.note(["new", "i4", "i2", "new"])
    other.note(["new"])
    for follower in (one, other):
        follower._counted_at -= 10
        follower.poll()
    assert log.shown() == {"new": 3, "i2": 1}
    assert funnel.exposures == {funnel.items.row("new"): 3}, "i2 is not new"


def test_what_was_shown_while_the_store_is_away_is_told_when_it_is_back(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryItemLog()
    log.change([ItemChange("new", {"price": 1})])
    follower = ItemsFollower(log, poll_s=3600)
    follower.poll()

    def away(_: object) -> None:
        raise StoreError("away")

    for shown in (["new"], ["new", "new"]):
        follower.note(shown)
        follower._counted_at -= 10
        with monkeypatch.context() as store, pytest.raises(StoreError, match="away"):
            store.setattr(log, "show", away)
            follower.poll()
    follower.poll()
    assert log.shown() == {"new": 3}


def test_versions_that_were_let_go_of_are_forgotten(small: Small) -> None:
    follower = ItemsFollower(MemoryItemLog(), poll_s=3600)

    def load(folder: Path) -> Funnel:
        return Funnel.load(folder)

    follower.loading(load)(small.folder)
    gc.collect()
    assert not list(follower._funnels)
