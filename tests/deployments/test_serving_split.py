"""The service with every stage as its own deployment answers the same, and survives the loss of any of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployments.live import STAGES, Live, kill_under_load, ranks_and_finds_neighbours, same_pages, serving, swap_under_load
from tests.processes import replicas
from tests.small import Small

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def split(small: Small, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serving(small, tmp_path_factory.mktemp("split"), ray_cluster, "split", "own")


def test_every_stage_is_its_own_deployment_and_pages_are_the_pure_funnels(split: Live) -> None:
    assert all(replicas("split", name) for name in (*STAGES, "gateway", "store"))
    same_pages(split)


def test_given_items_are_ranked_and_neighbours_found(split: Live) -> None:
    ranks_and_finds_neighbours(split)


def test_a_promoted_version_serves_without_a_failed_request(split: Live) -> None:
    swap_under_load(split)


@pytest.mark.parametrize("deployment", STAGES)
def test_a_killed_stage_fails_nobody(split: Live, deployment: str) -> None:
    kill_under_load(split, deployment)
