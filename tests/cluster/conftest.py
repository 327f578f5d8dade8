"""What tests of the feature store and of consumers share: one real Valkey a file."""

from __future__ import annotations

import pytest

from cluster.embedded import EmbeddedValkey


@pytest.fixture(scope="module")
def url(valkey: EmbeddedValkey) -> str:
    """Where the file's server is found."""
    return valkey.url
