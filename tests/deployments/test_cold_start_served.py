"""A new user as the service meets him: the answer names his rung, and what PUT /v1/users keeps of his interests leads the page."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from deployments.edge import Edge
from deployments.impressions import ImpressionLog
from deployments.monitoring import Monitor
from deployments.rollout import Rollout
from deployments.service import Service
from recsys import impressions
from recsys.features.store import MemoryStore
from recsys.serve_config import ImpressionsConfig, ServeConfig, TimeoutsConfig
from tests.deployments.standin import StandIn, StandInRegistry
from tests.deployments.test_edge import V1, speak
from tests.small import config_of, recipe_of, write_data

CHANNELS = "recall.channels={two_tower: {}, popular: {}, content: {}, popular_segment: {by: country, minimum_events: 1}}"

PATIENT = ServeConfig(
    deadline_ms=60_000, timeouts_ms=TimeoutsConfig(user_state=20_000, recall=20_000, coarse_rank=20_000, fine_rank=20_000, rerank=20_000)
)
"""A busy test host must not degrade what is looked at."""


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    """Of a funnel with a content and a segment channel; even items are red."""
    folder = tmp_path_factory.mktemp("served")
    write_data(folder)
    funnel = recipe_of(config_of(folder, CHANNELS)).judged()
    funnel.version = V1
    registry = StandInRegistry(**{V1: funnel})  # type: ignore[arg-type]
    registry.named = {"production": V1}
    made = Rollout(registry, registry.load(), poll_s=3600)  # type: ignore[arg-type]
    made.start()
    yield made
    made.stop()


class Counting(Monitor):
    """Counts the pages of new users by rung."""

    def __init__(self) -> None:
        self.rungs: Counter[str] = Counter()

    def new_user(self, rung: str) -> None:
        self.rungs[rung] += 1


def told(rollout: Rollout, *requests: tuple[str, str, Any], monitor: Monitor | None = None) -> list[tuple[int, Any]]:
    """(status, JSON) of each request, one after another, over one store."""

    async def run() -> list[tuple[int, Any]]:
        edge = Edge(Service(PATIENT, rollout, MemoryStore(), monitor=monitor))
        heard = [await speak(edge, method, path, orjson.dumps(body)) for method, path, body in requests]
        return [(h.status, h.json) for h in heard]

    return asyncio.run(run())


def asked(user: str, **more: Any) -> tuple[str, str, Any]:
    return ("POST", "/v1/recommend", {"user_id": user, "k": 5, **more})


def test_interests_that_a_profile_declares_lead_the_page_until_the_user_has_a_history(rollout: Rollout) -> None:
    for colour, parity in (("red", 0), ("blue", 1)):
        before, put, after, _, later, forgotten, at_last = told(
            rollout,
            asked("new"),
            ("PUT", "/v1/users", {"user_id": "new", "columns": {"colour": [colour]}}),
            asked("new"),
            ("POST", "/v1/events", {"user_id": "new", "item_id": "i4", "event": "click"}),
            asked("new"),
            ("PUT", "/v1/users", {"user_id": "newer", "columns": {"colour": colour, "country": "nl"}}),
            asked("newer"),
        )
        assert (before[0], before[1]["cold_start"]) == (200, "popular")
        assert (put[0], put[1]["accepted"], forgotten[1]["accepted"]) == (200, 1, 1)
        assert after[1]["cold_start"] == at_last[1]["cold_start"] == "interests"
        assert [int(i["item_id"][1:]) % 2 if i["item_id"] != "cold" else 0 for i in after[1]["items"]] == [parity] * 5
        assert "content" in after[1]["items"][0]["sources"]
        assert "cold_start" not in later[1], "one event makes a history"


def test_a_segment_is_named_and_a_known_user_has_no_rung(rollout: Rollout) -> None:
    monitor = Counting()
    requests = (asked("n", features={"country": "fr"}), asked("n", context={"colour": "red"}), asked("u3"))
    segment, context, known = told(rollout, *requests, monitor=monitor)
    assert monitor.rungs == {"segment": 1, "interests": 1}
    assert (segment[1]["cold_start"], context[1]["cold_start"]) == ("segment", "interests")
    assert "cold_start" not in known[1]


def test_the_rung_is_logged_with_the_page(rollout: Rollout, tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(PATIENT, rollout, MemoryStore(), impressions=ImpressionLog(tmp_path, ImpressionsConfig(sample=1.0)))
        for method, path, body in (asked("n", features={"country": "fr"}), asked("u3"), asked("m")):
            assert (await speak(Edge(service), method, path, orjson.dumps(body))).status == 200
        await service.close()

    asyncio.run(run())
    shown = impressions.read(str(tmp_path))
    rungs = dict(zip(shown["user_id"].to_pylist(), shown["cold_start"].to_pylist(), strict=True))
    assert rungs == {"n": "segment", "u3": None, "m": "popular"}


def test_an_interest_of_a_column_that_items_do_not_have_is_refused_by_name(rollout: Rollout) -> None:
    [(status, body)] = told(rollout, ("PUT", "/v1/users", {"user_id": "new", "columns": {"color": "red"}}))
    assert (status, body["error"]["field"]) == (422, "columns.color")
    assert "Did you mean 'colour'? Known: colour, country." in body["error"]["message"]


def test_a_page_that_no_recall_made_names_no_rung(rollout: Rollout) -> None:
    registry = StandInRegistry(**{V1: StandIn(V1, break_at="recall")})
    registry.named = {"production": V1}
    broken = Rollout(registry, registry.load(), poll_s=3600)  # type: ignore[arg-type]
    broken.start()
    [(status, body)] = told(broken, asked("new"))
    broken.stop()
    assert (status, body["degraded"][-1]["rung"]) == (200, "popular")
    assert "cold_start" not in body
