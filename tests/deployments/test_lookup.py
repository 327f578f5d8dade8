"""GET of one item or user: what is held, by whom it is known, and a sentence where nothing is."""

from __future__ import annotations

from typing import Any

import pytest

from recsys.errors import StoreUnavailableError
from recsys.rerank.rules import MatchConfig, RulesConfig
from tests.deployments.test_live_items import Talk
from tests.small import Small


@pytest.fixture
def talk(small: Small) -> Talk:
    return Talk(small, rules=RulesConfig(blocks=(MatchConfig(column="item_id", values=("i4",)),)))


def test_an_item_is_shown_as_it_is_now(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        version = talk.rollout.current
        same = {"known": "production", "model_version": version, "deleted": False, "blocked": False, "changed_ms": None, "shown": None}
        before = await ask("GET", "/v1/items/i2")
        assert before.json == same | {"item_id": "i2", "title": "Item 2", "columns": {"colour": "red", "price": 3.0}}
        assert (await ask("GET", "/v1/items/i4")).json["blocked"] is True
        rows = [
            {"item_id": "i2", "columns": {"price": 9, "colour": None}},
            {"item_id": "a/b", "columns": {"colour": "green"}, "title": "Ä"},
        ]
        await ask("PUT", "/v1/items", rows)
        await ask("DELETE", "/v1/items", ["i6"])
        talk.follower.poll()
        after = (await ask("GET", "/v1/items/i2")).json
        assert (after["columns"], after["title"], after["known"]) == ({"colour": None, "price": 9.0}, "Item 2", "production")
        assert after["changed_ms"] > 1_600_000_000_000
        new = (await ask("GET", "/v1/items/a/b")).json
        assert (new["known"], new["columns"], new["title"]) == ("live", {"colour": "green", "price": None}, "Ä")
        gone = (await ask("GET", "/v1/items/i6")).json
        assert (gone["deleted"], gone["blocked"], gone["columns"], gone["title"]) == (True, False, {}, None)
        await ask("PUT", "/v1/items", {"item_id": "i6", "columns": {"price": 9}})
        talk.follower.poll()
        anew = (await ask("GET", "/v1/items/i6")).json
        assert (anew["known"], anew["columns"], anew["title"]) == ("production", {"colour": None, "price": 9.0}, None)

    talk.run(script)


def test_a_user_is_shown_with_what_training_and_the_store_know(talk: Talk) -> None:
    async def script(ask: Any) -> None:
        trained = (await ask("GET", "/v1/users/u1")).json
        assert (trained["known"], trained["trained_events"], trained["live_events"]) == ("production", 10, 0)
        assert (trained["profile"], trained["newest_event_ms"], trained["has_counters"]) == ({}, None, False)
        await ask("PUT", "/v1/users", {"user_id": "new", "columns": {"country": "be"}})
        events = [{"user_id": "new", "item_id": f"i{n}", "event": "click", "time": 1_700_000_000_000 + n} for n in (2, 3)]
        await ask("POST", "/v1/events", events)
        assert (await ask("GET", "/v1/users/new")).json == {
            "user_id": "new",
            "known": "live",
            "model_version": talk.rollout.current,
            "profile": {"country": "be"},
            "trained_events": 0,
            "live_events": 2,
            "newest_event_ms": 1_700_000_000_003,
            "has_counters": False,
        }

    talk.run(script)


def test_where_nothing_is_held_a_sentence_says_so(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(ask: Any) -> None:
        for path, code, words in (
            ("/v1/items/nothing", "unknown_item", "nobody told of it since (PUT /v1/items)."),
            ("/v1/users/nobody", "unknown_user", "has done nothing since and has no profile (PUT /v1/users)."),
        ):
            heard = await ask("GET", path)
            assert (heard.status, heard.json["error"]["code"]) == (404, code)
            assert heard.json["error"]["message"].endswith(words)
        assert (await ask("GET", "/v1/items/" + "x" * 300)).json["error"]["code"] == "id_too_long"
        assert (await ask("GET", "/v1/items/i2/similar")).json["items"], "the longer path is still another question"

        async def away(*_: Any, **__: Any) -> Any:
            raise StoreUnavailableError("connection refused at redis://secret")

        monkeypatch.setattr(talk.store, "read", away)
        heard = await ask("GET", "/v1/users/u1")
        assert (heard.status, heard.json["error"]["code"]) == (503, "store_unavailable")
        assert "secret" not in heard.json["error"]["message"]

    talk.run(script)
