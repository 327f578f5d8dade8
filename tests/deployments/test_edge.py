"""Every request gets an answer in the one shape, whatever it holds; spoken over ASGI, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
import pytest

from deployments.edge import Edge
from deployments.rollout import Rollout
from deployments.service import Service
from recsys.data.sources import DataConfig
from recsys.errors import BundleError, StoreUnavailableError, VersionAbsentError
from recsys.features.store import AppendResult, MemoryStore, NewEvent, UserState
from recsys.serve_config import ServeConfig
from tests.deployments.standin import StandIn, StandInRegistry

V1 = "v000001-aaaaaaaa"


class Heard:
    """An answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


async def speak(edge: Edge, method: str, path: str, body: bytes = b"", *, headers: dict[str, str] | None = None, query: str = "") -> Heard:
    """One request as a server would hand it on, its body in pieces of 64 KiB."""
    pieces = [body[a : a + 65536] for a in range(0, len(body), 65536)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    await edge(scope, receive, send)
    answered = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return Heard(sent[0]["status"], answered, b"".join(m.get("body", b"") for m in sent[1:]))


class DownStore(MemoryStore):
    """A store that is gone."""

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        raise StoreUnavailableError("connection refused by redis://:secret@host")

    async def read(self, user_ids: Sequence[str], *, timeout_s: float) -> list[UserState]:
        raise StoreUnavailableError("connection refused")


def talk(
    script: Callable[[Callable[..., Awaitable[Heard]]], Awaitable[Any]],
    *,
    funnel: StandIn | None = None,
    store: Any = None,
    **elsewhere: Any,
) -> Any:
    """Run a conversation with an edge of its own; `elsewhere` is what its service asks of stages outside."""

    async def run() -> Any:
        registry = StandInRegistry(**{V1: funnel or StandIn(V1)})
        registry.named = {"production": V1}
        rollout = Rollout(registry, registry.load(), poll_s=3600)  # type: ignore[arg-type]
        rollout.start()
        edge = Edge(Service(ServeConfig(), rollout, store or MemoryStore(), **elsewhere))
        try:
            return await script(lambda *a, **k: speak(edge, *a, **k))
        finally:
            rollout.stop()

    return asyncio.run(run())


def once(method: str, path: str, body: Any = b"", **given: Any) -> Heard:
    """One request to a fresh edge."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    aside = {k: given.pop(k) for k in ("funnel", "store") if k in given}
    heard: Heard = talk(lambda say: say(method, path, raw, **given), **aside)
    return heard


class TestRecommend:
    def test_the_answer_has_the_documented_shape(self) -> None:
        heard = once("POST", "/v1/recommend", {"user_id": "u1", "k": 2, "request_id": "r-1"})
        assert heard.status == 200
        assert heard.headers["content-type"] == "application/json"
        timings = heard.json["timings_ms"]
        assert set(timings) == {"user_state", "queries", "recall", "coarse_rank", "fine_rank", "rerank", "page", "total"}
        assert {k: v for k, v in heard.json.items() if k != "timings_ms"} == {
            "request_id": "r-1",
            "items": [{"item_id": "i40", "score": 40.0, "sources": ["one"]}, {"item_id": "i42", "score": 42.0, "sources": ["one"]}],
            "model_version": V1,
            "variant": "default",
            "degraded": [],
        }

    @pytest.mark.parametrize("path", ["/v1/recommend", "/v1/rank"])
    def test_an_undeclared_feature_is_refused_with_the_column_that_was_meant(self, path: str) -> None:
        body = {"user_id": "u1"} | ({"item_ids": ["i1"]} if path == "/v1/rank" else {})
        heard = once("POST", path, body | {"features": {"age": 3, "contry": "nl"}})
        assert (heard.status, heard.json["error"]["code"], heard.json["error"]["field"]) == (422, "unknown_field", "features.contry")
        assert (
            heard.json["error"]["message"] == "'features.contry' is no declared user column. Did you mean 'country'? Known: age, country."
        )
        assert once("POST", path, body | {"features": {"age": 3, "country": "nl"}}).status == 200

    @pytest.mark.parametrize("path", ["/v1/recommend", "/v1/rank"])
    def test_context_that_nothing_reads_is_taken_and_named_to_who_asks(self, path: str) -> None:
        body = {"user_id": "u1", "context": {"device": "web", "devise": "web"}} | ({"item_ids": ["i1"]} if path == "/v1/rank" else {})
        assert "ignored" not in once("POST", path, body).json
        assert once("POST", path, body | {"explain": True}).json["ignored"] == ["devise"]

    def test_196_and_its_text_are_one_user(self) -> None:
        seen = []

        class Noting(StandIn):
            def queries(self, requests: Any) -> Any:
                seen.extend(r.user_id for r in requests)
                return super().queries(requests)

        async def script(say: Any) -> None:
            await say("POST", "/v1/recommend", b'{"user_id": 196}')
            await say("POST", "/v1/recommend", b'{"user_id": " 196 "}')

        talk(script, funnel=Noting(V1))
        assert seen == ["196", "196"]

    def test_exclude_and_explain_work(self) -> None:
        heard = once("POST", "/v1/recommend", {"user_id": "u1", "k": 1, "exclude": ["i40", "nothing"], "explain": True})
        assert heard.json["items"] == [{"item_id": "i42", "score": 42.0, "sources": ["one"], "explain": {"of": V1}}]

    def test_a_filter_holds_on_every_rung_of_the_ladder(self) -> None:
        body = {"user_id": "u1", "k": 3, "filter": {"parity": "odd", "item_id": {"none": ["i1"]}}}
        assert [i["item_id"] for i in once("POST", "/v1/recommend", body).json["items"]] == ["i3", "i5", "i7"]
        for stage in ("recall", "coarse_rank", "fine_rank", "rerank"):
            items = once("POST", "/v1/recommend", body, funnel=StandIn(V1, break_at=stage)).json["items"]
            assert [int(i["item_id"][1:]) % 2 for i in items] == [1, 1, 1], stage
        assert once("POST", "/v1/recommend", body | {"filter": {"parity": "prime"}}).json["items"] == []

    def test_an_unknown_user_gets_a_page(self) -> None:
        heard = once("POST", "/v1/recommend", {"user_id": "nobody ever saw – пользователь/1"})
        assert heard.status == 200
        assert len(heard.json["items"]) == 10

    def test_the_request_id_of_the_header_is_echoed(self) -> None:
        heard = once("POST", "/v1/recommend", {"user_id": "u1"}, headers={"X-Request-Id": "from-outside"})
        assert heard.json["request_id"] == "from-outside" == heard.headers["x-request-id"]

    def test_requests_at_once_share_a_batch_and_keep_their_own_answers(self) -> None:
        funnel = StandIn(V1)

        async def script(say: Any) -> list[Heard]:
            bodies = [{"user_id": f"u{n}", "k": n + 1} for n in range(8)]
            return await asyncio.gather(*(say("POST", "/v1/recommend", orjson.dumps(b)) for b in bodies))

        answers = talk(script, funnel=funnel)
        assert [len(a.json["items"]) for a in answers] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert funnel.batches == [8]

    def test_a_client_that_leaves_cancels_nobody_else(self) -> None:
        async def script(say: Any) -> tuple[Any, Heard]:
            leaver = asyncio.create_task(say("POST", "/v1/recommend", b'{"user_id": "u1"}'))
            stayer = asyncio.create_task(say("POST", "/v1/recommend", b'{"user_id": "u2"}'))
            await asyncio.sleep(0.05)  # both are in one batch by now, whose recall takes 0.15 s
            leaver.cancel()
            return await asyncio.gather(leaver, return_exceptions=True), await stayer

        [left], stayed = talk(script, funnel=StandIn(V1, slow_at="coarse_rank", slow_s=0.07))
        assert isinstance(left, asyncio.CancelledError)
        assert stayed.status == 200
        assert stayed.json["degraded"] == []

    def test_the_deadline_of_the_request_holds(self) -> None:
        heard = once("POST", "/v1/recommend", {"user_id": "u1", "timeout_ms": 30}, funnel=StandIn(V1, slow_at="fine_rank", slow_s=0.15))
        assert heard.status == 200
        assert heard.json["degraded"] == [{"stage": "fine_rank", "rung": "coarse_order", "reason": "timeout"}]
        assert heard.json["items"][0]["item_id"] == "i99"


BAD_RECOMMEND: list[tuple[Any, int, str, str | None]] = [
    ({"user_id": "u", "k": 0}, 422, "k_out_of_range", "k"),
    ({"user_id": "u", "k": -1}, 422, "k_out_of_range", "k"),
    ({"user_id": "u", "k": 1_000_000}, 422, "k_out_of_range", "k"),
    ({"user_id": "u", "k": "ten"}, 422, "wrong_type", "k"),
    ({"user_id": "u", "k": True}, 422, "wrong_type", "k"),
    ({"user_id": "u", "k": 2.5}, 422, "wrong_type", "k"),
    ({"k": 3}, 422, "missing_field", "user_id"),
    ({"user_id": None}, 422, "wrong_type", "user_id"),
    ({"user_id": ["u"]}, 422, "wrong_type", "user_id"),
    ({"user_id": True}, 422, "wrong_type", "user_id"),
    ({"user_id": "  "}, 422, "empty_id", "user_id"),
    ({"user_id": "u\0v"}, 422, "invalid_value", "user_id"),
    ({"user_id": "x" * 10_240}, 422, "id_too_long", "user_id"),
    ({"user_id": "é" * 129}, 422, "id_too_long", "user_id"),  # 258 bytes
    ({"user_id": "u", "usr": 1}, 422, "unknown_field", "usr"),
    ({"user_id": "u", "context": "mobile"}, 422, "wrong_type", "context"),
    ({"user_id": "u", "context": {"a": {"b": 1}}}, 422, "wrong_type", "context"),
    ({"user_id": "u", "context": {"a": 2**63 - 1}}, 422, "wrong_type", "context"),
    ({"user_id": "u", "exclude": "i1"}, 422, "wrong_type", "exclude"),
    ({"user_id": "u", "exclude": ["i"] * 1_001}, 422, "too_many_items", "exclude"),
    ({"user_id": "u", "filter": ["red"]}, 422, "wrong_type", "filter"),
    ({"user_id": "u", "filter": {"party": "odd"}}, 422, "unknown_field", "filter.party"),
    ({"user_id": "u", "filter": {"parity": {"min": 3}}}, 422, "wrong_type", "filter.parity"),
    ({"user_id": "u", "request_id": "r" * 300}, 422, "id_too_long", "request_id"),
    ({"user_id": "u", "timeout_ms": -5}, 422, "invalid_value", "timeout_ms"),
    ([], 422, "wrong_type", None),
    (b"", 400, "malformed_json", None),
    (b"{", 400, "malformed_json", None),
    (b"\xff\xfe", 400, "malformed_json", None),
    (b"[" * 100_000, 400, "malformed_json", None),
    (b'{"user_id": "\\ud800"}', 400, "malformed_json", None),
    (b'{"user_id": "u", "k": ' + b"9" * 400 + b"}", 422, "k_out_of_range", "k"),
    (b" " * 1_000_001, 413, "body_too_large", None),
    (b"x" * 10_000_000, 413, "body_too_large", None),
]


@pytest.mark.parametrize(("body", "status", "code", "field"), BAD_RECOMMEND, ids=lambda v: str(v)[:40])
def test_a_bad_request_is_told_what_is_wrong(body: Any, status: int, code: str, field: str | None) -> None:
    heard = once("POST", "/v1/recommend", body)
    error = heard.json["error"]
    assert (heard.status, error["code"], error.get("field")) == (status, code, field), error
    assert error["message"].endswith(".")
    assert error["request_id"] == heard.headers["x-request-id"]
    assert "Traceback" not in error["message"]


class TestRank:
    def test_given_items_come_back_ranked_and_unknown_ones_are_left_out(self) -> None:
        heard = once("POST", "/v1/rank", {"user_id": "u1", "item_ids": ["i9", "nothing", "i3", 5]})
        assert [i["item_id"] for i in heard.json["items"]] == ["i3", "i9"]
        assert heard.json["model_version"] == V1

    def test_a_broken_fine_stage_leaves_the_order_given(self) -> None:
        heard = once("POST", "/v1/rank", {"user_id": "u1", "item_ids": ["i9", "i3"]}, funnel=StandIn(V1, break_at="rank"))
        assert [i["item_id"] for i in heard.json["items"]] == ["i9", "i3"]
        assert heard.json["degraded"] == [{"stage": "fine_rank", "rung": "recall_order", "reason": "error"}]

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"user_id": "u", "item_ids": []}, "empty_list"),
            ({"user_id": "u"}, "missing_field"),
            ({"user_id": "u", "item_ids": ["i"] * 1_001}, "too_many_items"),
            ({"user_id": "u", "item_ids": ["i" * 300]}, "id_too_long"),
            ({"user_id": "u", "item_ids": [None]}, "wrong_type"),
        ],
    )
    def test_bad_lists_are_refused(self, body: Any, code: str) -> None:
        heard = once("POST", "/v1/rank", body)
        assert (heard.status, heard.json["error"]["code"]) == (422, code)


class TestVersionsBeside:
    """Production V2, its predecessor V1 and the canary V3 are held; no stage elsewhere has V2 any more."""

    def asked(self, path: str, body: Any, *, absent: str | None = None) -> tuple[Heard, list[str]]:
        """The answer, and the versions that were asked for elsewhere; `absent` is let go of right after it was listed."""
        V2, V3 = "v000002-aaaaaaaa", "v000003-aaaaaaaa"

        class Swapped(Rollout):
            @property
            def promoted(self) -> list[str]:
                return [*([absent] if absent else []), *super().promoted]

        asked: list[str] = []

        async def elsewhere(version: str, *_: Any) -> Any:
            asked.append(version)
            raise VersionAbsentError("gone")

        async def run() -> Heard:
            registry = StandInRegistry(**{v: StandIn(v) for v in (V1, V2, V3)})
            registry.named = {"production": V1}
            rollout = Swapped(registry, registry.load(), poll_s=3600)  # type: ignore[arg-type]
            rollout.start()
            registry.named = {"production": V2, "previous": V1, "canary": V3}
            rollout.poll()
            service = Service(ServeConfig(), rollout, MemoryStore(), elsewhere={"recall": elsewhere}, rank_elsewhere=elsewhere)
            try:
                return await speak(Edge(service), "POST", path, orjson.dumps(body))
            finally:
                await service.close()

        heard = asyncio.run(run())
        return heard, list(dict.fromkeys(asked))

    @pytest.mark.parametrize(("path", "more"), [("/v1/recommend", {}), ("/v1/rank", {"item_ids": ["i9", "i3"]})])
    def test_a_canary_answers_in_nobodys_place(self, path: str, more: dict[str, Any]) -> None:
        heard, asked = self.asked(path, {"user_id": "u1"} | more)
        assert asked == ["v000002-aaaaaaaa", V1]
        assert (heard.status, heard.json["degraded"][0]["reason"]) == (200, "unavailable")

    def test_a_version_let_go_of_between_the_listing_and_the_call_is_passed_over(self) -> None:
        heard, asked = self.asked("/v1/rank", {"user_id": "u1", "item_ids": ["i9", "i3"]}, absent="v000009-aaaaaaaa")
        assert asked == ["v000002-aaaaaaaa", V1]
        assert heard.status == 200


def event(**given: Any) -> dict[str, Any]:
    return {"user_id": "u1", "item_id": "i40", "event": "click"} | given


class TestEvents:
    def test_an_event_changes_the_next_answer(self) -> None:
        async def script(say: Any) -> tuple[Heard, Heard]:
            posted = await say("POST", "/v1/events", orjson.dumps(event()))
            return posted, await say("POST", "/v1/recommend", b'{"user_id": "u1", "k": 1}')

        posted, page = talk(script)
        assert posted.status == 202
        assert posted.json == {"accepted": 1, "duplicates": 0, "rejected": []}
        assert page.json["items"][0]["item_id"] == "i42"

    def test_a_repeated_post_is_harmless(self) -> None:
        body = orjson.dumps([event(time="2026-01-01T00:00:00Z"), event(event_id="mine", item_id="i2")])

        async def script(say: Any) -> list[Any]:
            return [(await say("POST", "/v1/events", body)).json for _ in range(2)]

        first, second = talk(script)
        assert (first["accepted"], first["duplicates"]) == (2, 0)
        assert (second["accepted"], second["duplicates"]) == (0, 2)

    def test_good_events_are_taken_and_bad_ones_named(self) -> None:
        rows = [
            event(),
            event(user_id=None),
            event(item_id="x" * 257),
            event(event=""),
            event(time="yesterday"),
            event(time=32503680000000),
            event(time=-1),
            event(value=float("nan")),
            "not an object",
            event(item_id="an item that nobody knows / 商品"),
            event(mistake=1),
        ]
        rows[7]["value"] = "NaN"
        heard = once("POST", "/v1/events", rows)
        assert heard.status == 202
        assert heard.json["accepted"] == 2
        assert [(r["index"], r["code"]) for r in heard.json["rejected"]] == [
            (1, "wrong_type"),
            (2, "id_too_long"),
            (3, "invalid_value"),
            (4, "bad_time"),
            (5, "future_time"),
            (6, "bad_time"),
            (7, "invalid_value"),
            (8, "wrong_type"),
            (10, "unknown_field"),
        ]

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("  ", "is blank"),
            ("", "is blank"),
            ("cl\0ick", "cannot be shown"),
            ("cli\u200bck", "cannot be shown"),
            ("a\nb", "cannot be shown"),
        ],
    )
    def test_an_event_whose_name_nobody_could_read_is_refused_singly_and_in_a_batch(self, name: str, why: str) -> None:
        alone = once("POST", "/v1/events", event(event=name))
        assert (alone.status, alone.json["error"]["code"], alone.json["error"]["field"]) == (422, "invalid_value", "event")
        assert alone.json["error"]["message"].startswith("'event': the name ")
        assert why in alone.json["error"]["message"]
        heard = once("POST", "/v1/events", [event(), event(event=name)])
        assert heard.json["accepted"] == 1
        assert [(r["index"], r["code"]) for r in heard.json["rejected"]] == [(1, "invalid_value")]

    def test_white_space_around_a_name_is_no_other_event_and_any_clean_name_is_taken(self) -> None:
        rows = [event(event=" click "), event(event="click"), event(event="加入购物车"), event(event="add to cart")]
        answer = once("POST", "/v1/events", [row | {"time": 1_700_000_000_000} for row in rows]).json
        assert (answer["accepted"], answer["duplicates"], answer["rejected"]) == (3, 1, [])

    def test_where_events_are_declared_another_name_is_refused_with_the_one_that_was_meant(self) -> None:
        async def script(say: Any) -> Any:
            alone = await say("POST", "/v1/events", orjson.dumps(event(event="clik")))
            return alone, await say("POST", "/v1/events", orjson.dumps([event(event=n) for n in ("click", "zzz", "dislike", "impression")]))

        known = DataConfig.model_validate({"interactions": {"path": "log.csv"}, "events": ["click", "buy"]}).event_names
        alone, batch = talk(script, events=known)
        assert (alone.status, alone.json["error"]["code"]) == (422, "unknown_event")
        assert alone.json["error"]["message"] == "'event' is 'clik', which is not among data.events; did you mean 'click'?"
        assert batch.json["accepted"] == 3
        message = "'event' is 'zzz', which is not among data.events; known: click, buy, impression, dislike, hide, not_interested."
        assert batch.json["rejected"] == [{"index": 1, "code": "unknown_event", "message": message}]

    def test_ten_thousand_events_are_taken_at_once_and_one_more_is_not(self) -> None:
        whole = {
            "event": "view",
            "request_id": "r" * 36,
            "time": 1_700_000_000_000,
            "value": 9.5,
            "context": {"device": "web", "page": "home"},
        }
        rows = [{"user_id": n % 50, "item_id": n, "event_id": f"{n:036}"} | whole for n in range(10_001)]
        assert len(orjson.dumps(rows)) > 1_500_000, "more than any other request may have"
        assert once("POST", "/v1/events", rows[:-1]).json["accepted"] == 10_000
        heard = once("POST", "/v1/events", rows)
        assert (heard.status, heard.json["error"]["code"]) == (422, "too_many_events")

    def test_one_event_of_many_is_not_larger_than_a_request(self) -> None:
        heard = once("POST", "/v1/events", [event(), event(context={"note": "x" * 1_000_000})])
        assert heard.json["accepted"] == 1
        assert [(r["index"], r["code"]) for r in heard.json["rejected"]] == [(1, "row_too_large")]
        alone = once("POST", "/v1/events", event(context={"note": "x" * 1_000_000}))
        assert (alone.status, alone.json["error"]["code"]) == (413, "row_too_large")
        unnamed = once("POST", "/v1/events", {"user_id": "u1", "event": "click"})
        assert (unnamed.status, unnamed.json["error"]["field"]) == (422, "item_id")

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"[]", 422, "empty_list"),
            (b"nonsense", 400, "malformed_json"),
            (b'"text"', 422, "wrong_type"),
            (b"{}", 422, "missing_field"),
            (b"[" * 3_000, 400, "malformed_json"),
            (b"[" + b" " * 16_000_000 + b"]", 413, "body_too_large"),
        ],
    )
    def test_a_body_that_holds_no_events_is_refused(self, body: bytes, status: int, code: str) -> None:
        heard = once("POST", "/v1/events", body)
        assert (heard.status, heard.json["error"]["code"]) == (status, code)

    def test_without_a_store_events_are_refused_and_pages_go_on(self) -> None:
        async def script(say: Any) -> tuple[Heard, Heard]:
            return await say("POST", "/v1/events", orjson.dumps(event())), await say("POST", "/v1/recommend", b'{"user_id": "u1"}')

        refused, page = talk(script, store=DownStore())
        assert refused.status == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "store_unavailable"
        assert "secret" not in refused.body.decode()
        assert page.status == 200
        assert page.json["degraded"] == [{"stage": "user_state", "rung": "stale", "reason": "unavailable"}]


class TestSimilar:
    def test_neighbours_of_an_item(self) -> None:
        heard = once("GET", "/v1/items/i7/similar", query="k=2")
        assert heard.json["items"] == [{"item_id": "i8", "score": 1.0}, {"item_id": "i9", "score": 0.5}]

    def test_an_id_may_hold_slashes_and_any_letter(self) -> None:
        heard = once("GET", "/v1/items/a/b/ü 商/similar")
        assert (heard.status, heard.json["error"]["code"]) == (404, "unknown_item")

    @pytest.mark.parametrize(("query", "code"), [("k=0", "k_out_of_range"), ("k=1000000", "k_out_of_range"), ("k=many", "wrong_type")])
    def test_k_is_checked(self, query: str, code: str) -> None:
        heard = once("GET", "/v1/items/i7/similar", query=query)
        assert (heard.status, heard.json["error"]["code"]) == (422, code)

    def test_a_long_id_is_refused(self) -> None:
        assert once("GET", f"/v1/items/{'x' * 10_240}/similar").json["error"]["code"] == "id_too_long"


class TestSimilarUsers:
    def test_neighbours_of_a_user_follow_from_what_he_did_until_now(self) -> None:
        async def script(say: Any) -> tuple[Heard, Heard]:
            before = await say("GET", "/v1/users/u7/similar", query="k=2")
            await say("POST", "/v1/events", orjson.dumps(event(user_id="u7", item_id="i3")))
            return before, await say("GET", "/v1/users/u7/similar", query="k=1")

        before, after = talk(script)
        assert before.json["users"] == [{"user_id": "u7, 0 events, 1", "score": 1.0}, {"user_id": "u7, 0 events, 2", "score": 0.5}]
        assert after.json["users"] == [{"user_id": "u7, 1 events, 1", "score": 1.0}]
        assert (after.json["user_id"], after.json["model_version"], after.json["degraded"]) == ("u7", V1, [])

    def test_without_a_store_the_training_log_is_what_is_known(self) -> None:
        heard = once("GET", "/v1/users/u7/similar", store=DownStore())
        assert heard.status == 200
        assert heard.json["degraded"] == [{"stage": "user_state", "rung": "stale", "reason": "unavailable"}]

    @pytest.mark.parametrize(
        ("path", "query", "status", "code"),
        [
            ("nobody", "", 404, "unknown_user"),
            ("a/b/ü 商", "", 404, "unknown_user"),
            ("u7", "k=0", 422, "k_out_of_range"),
            ("u7", "k=many", 422, "wrong_type"),
            ("x" * 10_240, "", 422, "id_too_long"),
        ],
    )
    def test_what_cannot_be_answered_is_told(self, path: str, query: str, status: int, code: str) -> None:
        heard = once("GET", f"/v1/users/{path}/similar", query=query)
        assert (heard.status, heard.json["error"]["code"]) == (status, code)

    def test_a_fault_of_the_stage_is_a_503(self) -> None:
        heard = once("GET", "/v1/users/u7/similar", funnel=StandIn(V1, break_at="similar_users"))
        assert (heard.status, heard.json["error"]["code"]) == (503, "unavailable")

    def test_a_stage_of_its_own_gets_the_queries(self) -> None:
        async def elsewhere(version: str, queries: Any, k: int, left_s: float) -> list[tuple[str, float]]:
            assert left_s > 0
            return [(f"{version}: {queries.user_ids[0]} elsewhere", float(k))]

        heard = talk(lambda ask: ask("GET", "/v1/users/u1/similar", query="k=3"), similar_users_elsewhere=elsewhere)
        assert heard.json["users"] == [{"user_id": f"{V1}: u1 elsewhere", "score": 3.0}]


class TestTheRest:
    def test_health_readiness_and_version(self) -> None:
        assert once("GET", "/healthz").json == {"status": "ok"}
        assert once("GET", "/readyz").json == {"status": "ready", "version": V1}
        version = once("GET", "/v1/version").json
        assert (version["version"], version["aliases"], version["refused"]) == (V1, {"production": V1}, {})
        assert version["topology"]["recall"] == "gateway"

    def test_it_is_ready_once_the_stages_elsewhere_hold_the_version(self) -> None:
        answers: list[str | None] = ["fine_rank: still loading", None]

        async def why_not(version: str) -> str | None:
            return answers.pop(0)

        async def thrice(ask: Callable[..., Awaitable[Heard]]) -> list[Heard]:
            return [await ask("GET", "/readyz") for _ in range(3)]

        first, second, third = talk(thrice, why_not=why_not)
        assert (first.status, first.json["error"]["message"]) == (503, "The service is starting: fine_rank: still loading.")
        assert (second.status, third.status) == (200, 200)

    def test_unknown_paths_and_methods_have_the_same_shape_of_error(self) -> None:
        for method, path, status, code in (("GET", "/nothing", 404, "not_found"), ("GET", "/v1/recommend", 405, "method_not_allowed")):
            heard = once(method, path)
            assert (heard.status, heard.json["error"]["code"]) == (status, code)

    def test_the_documents_name_every_route_and_the_body_of_the_hot_ones(self) -> None:
        assert once("GET", "/docs").status == 200
        paths = once("GET", "/openapi.json").json["paths"]
        body = paths["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "at least one of them" in body["properties"]["filter"]["description"]
        assert set(paths) == {
            "/v1/recommend",
            "/v1/rank",
            "/v1/events",
            "/v1/items/{item_id}/similar",
            "/v1/users/{user_id}/similar",
            "/v1/items",
            "/v1/items/{one_id}",
            "/v1/users",
            "/v1/users/{one_id}",
            "/v1/rules",
            "/v1/ingest",
            "/healthz",
            "/readyz",
            "/v1/version",
        }
        body = paths["/v1/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["required"] == ["user_id"]
        assert body["properties"]["exclude"]["description"] == "Items that must not come back; unknown ids are ignored."

    def test_a_fault_of_ours_is_a_sentence_and_never_a_500(self) -> None:
        class Broken(StandIn):
            def page(self, queries: Any, candidates: Any) -> Any:
                raise ZeroDivisionError("secret detail")

        heard = once("POST", "/v1/recommend", {"user_id": "u1"}, funnel=Broken(V1))
        assert heard.status == 503
        assert heard.json["error"]["code"] == "unavailable"
        assert "secret" not in heard.body.decode()

    def test_a_sentence_for_the_operator_stays_in_the_log(self, caplog: Any) -> None:
        async def damaged() -> dict[str, Any]:
            raise BundleError("'/srv/registry/aliases.json' is damaged.")

        heard = talk(lambda ask: ask("GET", "/v1/ingest"), ingest_status=damaged)
        assert (heard.status, heard.json["error"]["message"]) == (503, "The service met a fault. Try again; its log has the details.")
        assert "/srv/registry" in caplog.text

    def test_a_store_that_is_away_says_so_of_the_question_that_was_asked(self) -> None:
        async def away() -> dict[str, Any]:
            raise StoreUnavailableError("The feature store at redis://host did not answer.")

        heard = talk(lambda ask: ask("GET", "/v1/ingest"), ingest_status=away)
        assert (heard.status, heard.json["error"]["code"], heard.headers["retry-after"]) == (503, "store_unavailable", "1")
        assert heard.json["error"]["message"] == "The store does not answer at the moment. Try again."
        told = once("POST", "/v1/events", event(), store=DownStore()).json["error"]["message"]
        assert told == "Events cannot be stored at the moment, so none was taken. Send them again later."

    def test_a_row_of_the_catalogue_nested_beyond_all_measure_is_rejected_singly(self) -> None:
        deep = b'{"user_id": ' + b"[" * 1000 + b"]" * 1000 + b"}"
        heard = once("DELETE", "/v1/users", b"[" + deep + b', {"user_id": "u1"}]')
        assert (heard.status, heard.json["accepted"]) == (200, 1)
        assert [(r["index"], r["code"]) for r in heard.json["rejected"]] == [(0, "wrong_type")]
