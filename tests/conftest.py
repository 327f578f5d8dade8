"""What all tests share: the environment that Ray must see before it is imported, and one small cluster for the session."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cluster.embedded import EmbeddedValkey
from cluster.registry import Registry
from cluster.runtime import serving_environment
from recsys.serve_config import ServeConfig
from tests.small import Small, config_of, publish, write_data


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


HTTP_PORT = free_port()
ENVIRONMENT = serving_environment(ServeConfig(port=HTTP_PORT)) | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    # A port of a killed replica would else rest for 150 s; the tests kill more of them than there is patience.
    "RAY_SERVE_PORT_QUARANTINE_S": "1",
    # Replicas and workers import the tests' own stand-ins.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])),
}
os.environ.update(ENVIRONMENT)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Tables are as wide as the first test that looks makes them: the same whichever it is.
os.environ["COLUMNS"] = "200"


# The gate says the same of the same commit every time. To look further: HYPOTHESIS_PROFILE=explore.
settings.register_profile("gate", derandomize=True)
settings.register_profile("explore", max_examples=1_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A server that the tests of a file share; each takes a prefix of its own."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The session's Ray, started when the first test asks. Gives the base URL of Serve's HTTP port (nothing is deployed yet).

    Tests deploy applications by name and delete them; nobody calls `ray stop`, which ends every Ray of the machine.
    """
    from cluster.runtime import start_ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Serve's own modules still speak pydantic's old dialect when they are first imported
        import ray
        from ray import serve
    start_ray(num_cpus=8, env=ENVIRONMENT)
    serve.start(http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    yield f"http://127.0.0.1:{HTTP_PORT}"
    serve.shutdown()
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a plain mistake is told before Ray starts."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


def pytest_unconfigure() -> None:
    """HAProxy's folder was made for this session alone."""
    shutil.rmtree(ENVIRONMENT["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"], ignore_errors=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small recommender, trained in this process and published once for the session. Read it; publish into a registry of your own."""
    folder = tmp_path_factory.mktemp("small")
    write_data(folder)
    config = config_of(folder)
    registry = Registry(config.place("registry"))
    return Small(config, registry, publish(config, registry))
