"""What tests of the feature store and of consumers share: one real Valkey a file, and one in cluster mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.embedded import EmbeddedValkey
from tests.cluster.valkey_process import cluster_of_one


@pytest.fixture(scope="module")
def url(valkey: EmbeddedValkey) -> str:
    """Where the file's server is found."""
    return valkey.url


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a cluster of one."""
    with cluster_of_one(tmp_path_factory.mktemp("node")) as port:
        yield port
