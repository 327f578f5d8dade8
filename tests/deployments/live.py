"""A running service for tests, over a registry and a store of its own, and the claims that hold of every topology."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.registry import Registry
from deployments.impressions import sampled
from recsys.config import Config
from recsys.funnel import Funnel, FunnelRequest
from recsys.impressions import read
from recsys.serve_config import ImpressionsConfig, Place, ServeConfig, TimeoutsConfig, TopologyConfig
from tests.deployments.client import Client, Told, crowd, eventually
from tests.processes import replicas
from tests.small import Small

STAGES = ("recall", "coarse_rank", "fine_rank", "rerank")


class Live(NamedTuple):
    """A running application over a registry of its own, with two versions, the first of them in production."""

    name: str
    url: str
    config: Config
    registry: Registry
    versions: list[str]

    def client(self) -> Client:
        return Client(self.url)

    def version(self) -> dict[str, Any]:
        told: dict[str, Any] = self.client().ask("GET", "/v1/version").json
        return told


def serving(small: Small, folder: Path, url: str, name: str, place: Place) -> Iterator[Live]:
    """Deploy, wait, give, delete."""
    from ray import serve

    from deployments.app import application
    from deployments.serving import wait_until_ready

    registry = Registry(folder / "registry")
    versions = [registry.publish(small.folder), registry.publish(small.folder)]
    registry.promote(versions[0])
    patient = ServeConfig(  # a busy test host must not degrade what is compared
        topology=TopologyConfig(recall=place, coarse_rank=place, fine_rank=place, rerank=place),
        deadline_ms=20_000,
        timeouts_ms=TimeoutsConfig(user_state=2_000, recall=5_000, coarse_rank=5_000, fine_rank=5_000, rerank=5_000),
        registry_poll_s=0.5,
        impressions=ImpressionsConfig(flush_s=3_600),
    )
    config = small.config.model_copy(update={"serve": patient, "workdir": str(folder), "registry": str(registry.root)})
    serve.run(application(config), name=name, route_prefix="/")
    wait_until_ready(url)
    try:
        yield Live(name, url, config, registry, versions)
    finally:
        serve.delete(name)


def logs_its_last_pages(live: Live) -> None:
    """End the application: what was shown, and not written yet, is on disk. The last claim of a module."""
    from ray import serve

    request_id = next(f"last {n}" for n in range(10_000) if sampled(f"last {n}", live.config.serve.impressions.sample))
    assert live.client().recommend("u1", request_id=request_id).status == 200
    serve.delete(live.name)
    assert request_id in read(f"{live.config.root}/impressions").column("request_id").to_pylist()


def expected(live: Live, asked: list[tuple[str, dict[str, Any]]], k: int) -> list[list[tuple[str, float]]]:
    """What the pure funnel answers to users with filters."""
    funnel = Funnel.load(live.registry.bundles / live.versions[0])
    queries = funnel.queries([FunnelRequest(u, k, time.time(), filter=funnel.filters.parse(f)) for u, f in asked])
    return [[(i.item_id, i.score) for i in page] for page in funnel.page(queries, funnel.recommend(queries))]


def same_pages(live: Live) -> None:
    """Every user's page, with a filter or without, asked for by many at once, is the pure funnel's."""
    from concurrent.futures import ThreadPoolExecutor

    users = [f"u{n}" for n in range(60)] * 3 + [f"stranger {n}" for n in range(20)]
    filters: list[dict[str, Any]] = [{}, {"colour": "red"}, {}, {"price": {"min": 20}, "colour": ["blue"]}, {}]
    asked = [(user, filters[n % 5]) for n, user in enumerate(users)]

    def ask(one: tuple[str, dict[str, Any]]) -> Told:
        client = live.client()
        try:
            return client.recommend(one[0], 7, filter=one[1])
        finally:
            client.close()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, asked))
    assert {a.status for a in answers} == {200}
    assert [a.json["degraded"] for a in answers] == [[]] * len(users)
    assert [a.json.get("cold_start") for a in answers] == ["popular" if u.startswith("stranger") else None for u in users]
    for user, answer, page in zip(asked, answers, expected(live, asked, 7), strict=True):
        assert [i["item_id"] for i in answer.json["items"]] == [item for item, _ in page], user
        np.testing.assert_allclose([i["score"] for i in answer.json["items"]], [score for _, score in page], atol=1e-5)


def ranks_and_finds_neighbours(live: Live) -> None:
    """Of the items given, those that exist are ranked; an even item's neighbours are even, as the log was made."""
    client = live.client()
    ranked = client.ask("POST", "/v1/rank", {"user_id": "u1", "item_ids": ["i1", "i2", "no"]}).json["items"]
    assert {i["item_id"] for i in ranked} == {"i1", "i2"}
    assert all(int(i["item_id"][1:]) % 2 == 0 for i in client.ask("GET", "/v1/items/i2/similar?k=3").json["items"])


def swap_under_load(live: Live) -> None:
    """Promote the second version and go back, without a failed request."""
    first, second = live.versions[:2]
    with crowd(live.url, 8) as tally:
        time.sleep(1)
        for target in (second, first):
            live.registry.promote(target)
            took = eventually(lambda to=target: live.version()["version"] == to, 15, f"{target} serves")  # type: ignore[misc]
            assert took < 5 or os.getloadavg()[0] > 3, f"took {took:.1f} s"
            time.sleep(1)
    assert tally.failed == {}, tally.broken[:3]
    assert set(tally.versions) == {first, second}


def kill_under_load(live: Live, deployment: str) -> None:
    """SIGKILL one replica under 16 connections: every request is answered, and the replica comes back."""
    with crowd(live.url, 16) as tally:
        time.sleep(1)
        before: list[int] = []
        eventually(lambda: bool(before.extend(replicas(live.name, deployment)) or before), 30, f"{deployment} is there")
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: len(set(replicas(live.name, deployment)) - {before[0]}) >= len(before), 90, f"{deployment} is back")
        time.sleep(2)
    assert tally.failed == {}, (tally.broken[:3], tally.statuses)
