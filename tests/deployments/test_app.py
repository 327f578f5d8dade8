"""The shipped Serve configurations build what they say; arguments that do not fit are told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.build_app import build_app

from deployments.app import ServeArgs, application, build, settled
from recsys.errors import ConfigError
from recsys.serve_config import ReplicasConfig, ServeConfig, StagesConfig, TopologyConfig
from tests.small import config_of, write_data

SHIPPED = Path(__file__).parents[2] / "configs" / "serve"
STAGES = ["coarse_rank", "fine_rank", "recall", "rerank"]


def deployments(app: Any) -> dict[str, Any]:
    """Deployment name -> deployment."""
    return {d.name: d for d in build_app(app, name="test").deployments}


def shipped(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = yaml.safe_load((SHIPPED / name).read_text())
    [app] = whole["applications"]
    assert app["import_path"] == "deployments.app:build"
    assert "deployments" not in app  # an error for stages that the topology did not build
    return whole, deployments(build(ServeArgs.model_validate(app["args"])))


def test_local_is_the_gateway_the_store_and_the_consumers() -> None:
    whole, built = shipped("local.yaml")
    assert sorted(built) == ["gateway", "ingest", "store"]
    assert whole["http_options"]["host"] == "127.0.0.1"
    assert built["gateway"].num_replicas == 2


def test_cluster_has_every_stage_autoscaled_on_its_own_terms() -> None:
    _, built = shipped("cluster.yaml")
    assert sorted(built) == sorted([*STAGES, "gateway", "ingest", "store"])
    scaling = {name: built[name]._deployment_config.autoscaling_config for name in (*STAGES, "gateway")}
    assert {name: (s.min_replicas, s.max_replicas) for name, s in scaling.items()} == {
        "gateway": (2, 8),
        "recall": (2, 8),
        "coarse_rank": (1, 4),
        "fine_rank": (2, 16),
        "rerank": (1, 4),
    }
    assert scaling["fine_rank"].target_ongoing_requests == 2


def test_gpu_books_a_gpu_for_recall_and_none_for_its_stand_in() -> None:
    _, built = shipped("gpu.yaml")
    assert sorted(built) == sorted([*STAGES, "gateway", "ingest", "store", "recall_stand_in"])
    assert built["recall"].ray_actor_options["num_gpus"] == 1
    assert built["recall_stand_in"].ray_actor_options["num_gpus"] == 0


def test_arguments_are_typed() -> None:
    with pytest.raises(ValidationError, match="topolgy"):
        ServeArgs.model_validate({"config": ["a.yaml"], "topolgy": {}})
    with pytest.raises(ValidationError, match="'gateway' or 'own'"):
        ServeArgs.model_validate({"config": ["a.yaml"], "topology": {"recall": "elsewhere"}})


def test_a_stand_in_for_a_stage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_data(tmp_path)
    with pytest.raises(ConfigError, match=r"topology\.recall is gateway"):
        application(config_of(tmp_path), recall_stand_in=ReplicasConfig())


def test_replicas_get_absolute_places_and_their_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    config = config_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert settled(config.model_copy(update={"workdir": "here"})).workdir == str(tmp_path / "here")
    serving = ServeConfig(
        topology=TopologyConfig(fine_rank="own"),
        stages=StagesConfig(fine_rank=ReplicasConfig(min_replicas=3, max_replicas=3, num_cpus=0.2)),
    )
    built = deployments(application(config.model_copy(update={"serve": serving, "redis_url": "redis://somewhere"})))
    assert sorted(built) == ["fine_rank", "gateway", "ingest"]  # a Redis of the user's own needs no owner
    assert built["fine_rank"].num_replicas == 3
    assert built["fine_rank"].ray_actor_options["num_cpus"] == 0.2
