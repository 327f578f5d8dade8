"""Items come and go in a service whose stages are apart: shown within a second under load, never again, and after a restart too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deployments.client import Client, crowd, eventually
from tests.deployments.live import STAGES, Live, serving
from tests.processes import replicas
from tests.small import Small

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def split(small: Small, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serving(small, tmp_path_factory.mktemp("items"), ray_cluster, "items", "own")


def ids(client: Client, user: str, **more: Any) -> list[str]:
    told = client.recommend(user, 20, **more)
    assert told.status == 200
    return [item["item_id"] for item in told.json["items"]]


def test_a_new_item_is_shown_and_a_deleted_one_is_not_under_load_and_after_a_restart(split: Live) -> None:
    client = split.client()
    only = {"filter": {"item_id": ["new", "i2", "i3"]}}
    with crowd(split.url, 8) as tally:
        put = client.ask("PUT", "/v1/items", {"item_id": "new", "columns": {"colour": "red", "price": 5}, "title": "Brand new"})
        assert put.json["accepted"] == 1
        took = eventually(lambda: "new" in ids(client, "stranger", **only), 15, "the new item is shown")
        assert took < 1 or os.getloadavg()[0] > 3, f"took {took:.1f} s"
        assert client.ask("DELETE", "/v1/items/i2").json["accepted"] == 1
        eventually(lambda: "i2" not in ids(client, "stranger", **only), 15, "the deleted item is gone")
        for n in range(30):
            assert "i2" not in ids(client, f"u{n}")
    assert tally.failed == {}, (tally.broken[:3], tally.statuses)
    assert client.ask("GET", "/v1/items/i2/similar").status == 404

    for stage in STAGES:
        before = replicas(split.name, stage)
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda s=stage, b=before: bool(set(replicas(split.name, s)) - set(b)), 90, f"{stage} is back")  # type: ignore[misc]
    time.sleep(2)

    def whole() -> bool:
        told = client.recommend("stranger", 20, **only)
        return told.status == 200 and told.json["degraded"] == []

    eventually(whole, 60, "every stage answers again")
    found = ids(client, "stranger", **only)
    assert "new" in found
    assert "i2" not in found
    version = split.version()["items"]
    assert (version["changed"], version["deleted"]) == (1, 1)
    assert version["staleness_s"] < 5
    stages = split.version()["stages"]
    assert set(stages) == set(STAGES)
    for stage, [told] in stages.items():
        assert told["held"] == split.version()["held"]
        assert (told["items"]["changed"], told["items"]["deleted"]) == (1, 1)
        assert ("item_counters" in told) == (stage in ("recall", "fine_rank"))
