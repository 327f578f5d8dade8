"""The service as users meet it, all stages inside the gateway: real Ray Serve, HTTP, bundle and Valkey."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.embedded import EmbeddedValkey
from deployments.replica_log import log_folder
from tests.deployments.client import crowd, eventually
from tests.deployments.live import (
    STAGES,
    Live,
    kill_under_load,
    logs_its_last_pages,
    ranks_and_finds_neighbours,
    same_pages,
    serving,
    swap_under_load,
)
from tests.processes import below
from tests.small import Small

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def fused(small: Small, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serving(small, tmp_path_factory.mktemp("fused"), ray_cluster, "fused", "gateway")


def test_pages_are_the_pure_funnels(fused: Live) -> None:
    same_pages(fused)


def test_what_replicas_say_is_in_the_log_that_the_terminal_names(fused: Live) -> None:
    said = "".join(path.read_text() for path in Path(log_folder()).glob("replica_*gateway*.log"))
    assert f"version {fused.version()['version']} loaded in" in said


def test_an_event_enters_the_next_answer(fused: Live) -> None:
    client = fused.client()
    top = client.recommend("u5").json["items"][0]["item_id"]
    told = client.ask("POST", "/v1/events", {"user_id": "u5", "item_id": top, "event": "click"})
    assert (told.status, told.json["accepted"]) == (202, 1)
    assert top not in [i["item_id"] for i in client.recommend("u5").json["items"]]


def test_explain_names_channels_and_every_stage(fused: Live) -> None:
    item = fused.client().recommend("u7", 1, explain=True).json["items"][0]
    assert set(item["explain"]["stages"]) == set(STAGES)
    assert item["sources"] == [
        c for c in ("two_tower", "item_cf", "markov", "realtime", "popular") if c in item["explain"]["channels"]
    ] or set(item["sources"]) == set(item["explain"]["channels"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/recommend", {"user_id": "u1", "k": 0}, 422, "k_out_of_range"),
        ("POST", "/v1/recommend", {"user_id": "u1", "k": 1_000_000}, 422, "k_out_of_range"),
        ("POST", "/v1/recommend", b"{", 400, "malformed_json"),
        ("POST", "/v1/recommend", {"user_id": "x" * 10_240}, 422, "id_too_long"),
        ("POST", "/v1/recommend", b"x" * 10_000_000, 413, "body_too_large"),
        ("POST", "/v1/events", [], 422, "empty_list"),
        ("POST", "/v1/events", [{"user_id": "u", "item_id": "i", "event": "e"}] * 10_001, 422, "too_many_events"),
        ("GET", "/v1/items/a/b%2Fc%20%E5%95%86/similar", None, 404, "unknown_item"),
        ("GET", "/v1/users/u1/similar", None, 404, "no_similar_users"),
        ("GET", "/nowhere", None, 404, "not_found"),
        ("GET", "/v1/recommend", None, 405, "method_not_allowed"),
    ],
)
def test_bad_input_is_told_what_is_wrong(fused: Live, method: str, path: str, body: Any, status: int, code: str) -> None:  # noqa: PLR0917
    told = fused.client().ask(method, path, body)
    assert (told.status, told.json["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({"rules": {}}, "rules"),
        ({"diversity": -1}, "diversity"),
        ({"boosts": [{"filter": {"colour": "red"}, "factor": -2}]}, "boosts.0.factor"),
        ({"boosts": [{"filter": {"color": "red"}, "factor": 2}]}, "boosts.0.filter.color"),
        ({"pins": [{"item_id": "i1", "place": 0}]}, "pins.0.place"),
        ({"pins": [{"item_id": "i" * 9_999, "place": 1}]}, "pins.0.item_id"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(fused: Live, rules: dict[str, Any], field: str) -> None:
    told = fused.client().recommend("u1", 5, **rules)
    assert (told.status, told.json["error"]["field"]) == (422, field)
    assert told.json["error"]["message"].endswith(".")


def test_rules_of_a_request_are_obeyed_whatever_else_it_asks(fused: Live) -> None:
    pins = [{"item_id": item, "place": n + 1} for n, item in enumerate(["i30", "nobody", "i32", "i34", "i36"])]
    told = fused.client().recommend("somebody", 4, pins=pins, exclude=["i32"], diversity=1, explain=True)
    items = told.json["items"]
    assert (told.status, told.json["degraded"], len({i["item_id"] for i in items})) == (200, [], 4)
    assert [i["item_id"] for i in items if i["explain"]["rule"] == "pinned"] == ["i30", "i34"]
    assert (items[0]["item_id"], items[3]["item_id"]) == ("i30", "i34")


def test_strange_but_valid_input_is_answered(fused: Live) -> None:
    client = fused.client()
    assert client.recommend("ü/商 \U0001f600").status == 200
    assert len(client.recommend("u1", 1_000).json["items"]) <= 41
    assert client.recommend("u1", 3, context={"device": ["odd", None]}, features={"country": 5}).status == 200
    refused = client.recommend("u1", 3, features={"nobody": "knows"})
    assert (refused.status, refused.json["error"]["field"]) == (422, "features.nobody")
    events = [{"user_id": f"w{n % 9}", "item_id": f"new/{n}", "event": "view"} for n in range(10_000)]
    told = client.ask("POST", "/v1/events", events)
    assert (told.status, told.json["accepted"]) == (202, 10_000)


def test_given_items_are_ranked_and_neighbours_found(fused: Live) -> None:
    ranks_and_finds_neighbours(fused)


def test_a_promoted_version_serves_without_a_failed_request(fused: Live) -> None:
    swap_under_load(fused)


def test_a_broken_version_is_refused_and_named(fused: Live) -> None:
    broken = fused.registry.publish(fused.registry.bundles / fused.versions[0])
    file = fused.registry.bundles / broken / "popular.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    aliases = fused.registry.root / "aliases.json"
    before = json.loads(aliases.read_text())
    new = aliases.with_suffix(".new")
    new.write_text(json.dumps(before | {"production": broken}))  # promote itself would refuse
    new.replace(aliases)
    why = "'popular.npy' was changed"
    eventually(lambda: why in fused.version()["refused"].get(broken, ""), 15, "the broken version is named")
    assert fused.client().recommend("u1").json["model_version"] == fused.versions[0]
    fused.registry.promote(fused.versions[0])


def test_a_killed_gateway_fails_nobody(fused: Live) -> None:
    kill_under_load(fused, "gateway")


def test_a_killed_store_is_named_and_comes_back_with_what_it_had_accepted(fused: Live) -> None:
    client = fused.client()
    told = client.ask("POST", "/v1/events", {"user_id": "keeper", "item_id": "i3", "event": "click"})
    assert told.status == 202
    owner = EmbeddedValkey(fused.config.place("store"))
    [pid] = [p for p, seen in below(os.getpid()).items() if str(owner.folder) in seen.name and "valkey" in seen.name] or [0]
    pid = pid or int((owner.folder / "valkey.pid").read_text())
    os.kill(pid, signal.SIGSTOP)  # it hangs: worse than gone
    try:
        page = client.recommend("u1")
        assert page.status == 200
        assert page.json["degraded"] == [{"stage": "user_state", "rung": "stale", "reason": "timeout"}]
        refused = client.ask("POST", "/v1/events", {"user_id": "keeper", "item_id": "i5", "event": "click"})
        assert (refused.status, refused.json["error"]["code"], refused.headers["retry-after"]) == (503, "store_unavailable", "1")
    finally:
        os.kill(pid, signal.SIGKILL)
    with crowd(fused.url, 4) as tally:
        eventually(lambda: client.recommend("u1").json["degraded"] == [], 60, "user state is back")
    assert tally.failed == {}
    eventually(
        lambda: client.ask("POST", "/v1/events", {"user_id": "k", "item_id": "i7", "event": "click"}).status == 202,
        30,
        "events are taken",
    )
    assert "i3" not in [i["item_id"] for i in client.recommend("keeper", 40).json["items"]]  # known before the kill, known after


def test_a_killed_owner_of_the_store_takes_it_over_again(fused: Live) -> None:
    kill_under_load(fused, "store")
    assert fused.client().recommend("u1").json["degraded"] == []


def test_an_ended_service_has_written_the_pages_that_waited(fused: Live) -> None:
    logs_its_last_pages(fused)
