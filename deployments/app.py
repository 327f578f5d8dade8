"""The Serve application: `build(args)` turns a configuration and a topology into deployments.

No `from __future__ import annotations` here: Serve looks at build's real annotation to validate its arguments.
"""

from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.embedded import check_folder
from deployments.coarse_rank import CoarseRank
from deployments.fine_rank import FineRank
from deployments.gateway import STAND_IN, Gateway
from deployments.ingest import IngestReplica
from deployments.recall import Recall
from deployments.rerank import Rerank
from deployments.stage import Stage
from deployments.store_owner import StoreOwner
from recsys.config import Config, load
from recsys.core import FrozenConfig
from recsys.errors import ConfigError
from recsys.funnel import STAGES
from recsys.ingest_config import IngestConfig
from recsys.serve_config import ReplicasConfig, StagesConfig, TopologyConfig

DEPLOYMENTS: dict[str, type[Stage]] = {"recall": Recall, "coarse_rank": CoarseRank, "fine_rank": FineRank, "rerank": Rerank}
HOME = Path(__file__).resolve().parents[1]


class ServeArgs(FrozenConfig):
    """`args` of the application in a Serve config file."""

    config: tuple[str, ...] = Field(min_length=1)
    """Configuration files of the recommender; later ones win. Relative to where Ray was started, else to this project."""
    set: tuple[str, ...] = ()
    """dotted.path=value over all files."""
    topology: TopologyConfig | None = None
    """Where each stage runs; absent: serve.topology of the configuration."""
    stages: StagesConfig | None = None
    """Replicas, autoscaling and resources per deployment; absent: serve.stages of the configuration."""
    recall_stand_in: ReplicasConfig | None = None
    """A second, small recall deployment that answers where the first (with GPUs) is gone, late or full."""


def build(args: ServeArgs) -> Application:
    """The application of `serve run` and `serve deploy`. Raises ConfigError with every fault of the configuration."""
    config = load([_found(name) for name in args.config], args.set)
    given: dict[str, Any] = {"topology": args.topology, "stages": args.stages}
    serving = config.serve.model_copy(update={name: value for name, value in given.items() if value is not None})
    return application(config.model_copy(update={"serve": serving}), recall_stand_in=args.recall_stand_in)


def application(config: Config, *, recall_stand_in: ReplicasConfig | None = None) -> Application:
    """The deployments of a configuration: the gateway, the stages whose place is `own`, and the store's owner without redis_url.

    Raises ConfigError where one of them could not be.
    """
    config = settled(config)
    if config.redis_url is None:
        check_folder(config.place("store"))
    places = config.serve.topology.model_dump()
    own = [name for name in STAGES if places[name] == "own"]
    handles = {}
    stages = config.serve.stages
    sizes = {"recall": stages.recall, "coarse_rank": stages.coarse_rank, "fine_rank": stages.fine_rank, "rerank": stages.rerank}
    for name in own:
        replicas = sizes[name]
        handles[name] = serve.deployment(DEPLOYMENTS[name]).options(name=name, **options(replicas)).bind(config, replicas.threads)
    if recall_stand_in is not None:
        if "recall" not in own:
            raise ConfigError(
                "recall_stand_in stands in for a recall deployment, but topology.recall is gateway. Set it to own, or leave the stand-in out."
            )
        handles[STAND_IN] = (
            serve.deployment(Recall).options(name=STAND_IN, **options(recall_stand_in)).bind(config, recall_stand_in.threads)
        )
    owner = (
        serve.deployment(StoreOwner).options(name="store", **owner_options()).bind(config.place("store"), config.store.memory_mb)
        if config.redis_url is None
        else None
    )
    ingest = None
    if config.ingest.with_service and config.ingest.replicas:
        ingest = serve.deployment(IngestReplica).options(name="ingest", **ingest_options(config.ingest)).bind(config, owner)
    gateway = serve.deployment(Gateway).options(name="gateway", **options(config.serve.stages.gateway))
    return gateway.bind(config, handles, owner, ingest)


QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve's own log of a replica. A line a request costs more than batching one, metrics tell the same, and without the level Serve
still builds the line that it then drops."""


def settled(config: Config) -> Config:
    """The configuration with absolute places: a replica's current folder is not the one in which the command was given."""
    return config.model_copy(update={"workdir": config.root, "registry": config.place("registry")})


def options(replicas: ReplicasConfig) -> dict[str, Any]:
    """One deployment's options of Serve."""
    scaling: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min_replicas,
                max_replicas=replicas.max_replicas,
                target_ongoing_requests=replicas.target_ongoing_requests,
                upscale_delay_s=replicas.upscale_delay_s,
                downscale_delay_s=replicas.downscale_delay_s,
            )
        }
    return scaling | {
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_queued_requests": replicas.max_queued_requests,
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        # The default back-off, 25 to 500 ms, is longer than a request's whole deadline.
        "request_router_config": RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.05),
        "graceful_shutdown_timeout_s": 10.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "logging_config": QUIET,
    }


def ingest_options(ingest: IngestConfig) -> dict[str, Any]:
    """Consumers take no requests. A replica that stops has to write Parquet first."""
    return {
        "num_replicas": ingest.replicas,
        "ray_actor_options": {"num_cpus": 0.1},
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": 20.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "logging_config": QUIET,
    }


def owner_options() -> dict[str, Any]:
    """The store's owner is one, and does next to nothing."""
    return {
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 0.01},
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 5.0,
        "logging_config": QUIET,
    }


def _found(name: str) -> Path:
    path = Path(name)
    return path if path.is_absolute() or path.exists() else HOME / path
