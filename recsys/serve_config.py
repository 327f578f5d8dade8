"""How the funnel is served: where it listens, which stage is its own deployment, its budgets, replicas and limits.

The values are plain data; `deployments` turns them into Ray Serve deployments and `cluster.runtime` into the
environment that Ray must see before it starts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from recsys.core import FrozenConfig

Place = Literal["gateway", "own"]
Port = Annotated[int, Field(ge=1, le=65_535)]


class TopologyConfig(FrozenConfig):
    """Where each stage runs: inside the gateway's replica (`gateway`) or as its own autoscaled deployment (`own`)."""

    recall: Place = "gateway"
    """All recall channels and their merge."""
    coarse_rank: Place = "gateway"
    """The two-tower dot product over cached item vectors."""
    fine_rank: Place = "gateway"
    """The ranker with all features; usually the first stage worth its own deployment."""
    rerank: Place = "gateway"
    """Diversity and rules over the page."""


class MicroBatchConfig(FrozenConfig):
    """How the gateway joins concurrent requests; a single request is a batch of one."""

    max_size: PositiveInt = 32
    """Requests in one micro-batch at most."""
    wait_ms: NonNegativeFloat = 1.0
    """Longest wait for company. 0 sends what is there."""


class TimeoutsConfig(FrozenConfig):
    """Milliseconds that one stage may take before the next rung of the fallback ladder answers for it."""

    user_state: PositiveFloat = 50.0
    """The one read of the feature store; later than this, the bundle's own history answers (stale)."""
    recall: PositiveFloat = 150.0
    """All channels together; what has not answered by then is left out."""
    coarse_rank: PositiveFloat = 80.0
    """Later than this, recall order stands."""
    fine_rank: PositiveFloat = 200.0
    """Later than this, coarse order stands."""
    rerank: PositiveFloat = 80.0
    """Later than this, fine order stands."""


class ReplicasConfig(FrozenConfig):
    """Autoscaling and resources of one deployment."""

    min_replicas: PositiveInt = 1
    """Replicas that are always there."""
    max_replicas: PositiveInt = 1
    """Replicas under load at most."""
    target_ongoing_requests: PositiveFloat = 8.0
    """Load per replica that autoscaling steers at; 2 or more, or it flaps."""
    max_ongoing_requests: PositiveInt = 64
    """Requests (gateway) or batches (stages) that one replica works on at once."""
    max_queued_requests: int = Field(default=1_000, ge=-1)
    """Requests that may wait at one caller before 503; -1 is without bound."""
    upscale_delay_s: NonNegativeFloat = 5.0
    """How long load must be high before a replica is added."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """How long load must be low before a replica goes."""
    num_cpus: NonNegativeFloat = 0.1
    """CPUs that Ray books per replica; bookkeeping, not a cap."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray books per replica."""
    threads: PositiveInt = 1
    """Threads that torch and Faiss may use inside one replica."""


class StagesConfig(FrozenConfig):
    """Replicas of the gateway and of every stage whose topology is `own`."""

    gateway: ReplicasConfig = ReplicasConfig(min_replicas=2, max_replicas=2)
    """The HTTP edge and the stages that run inside it. Two replicas survive the loss of one without a failed request."""
    recall: ReplicasConfig = ReplicasConfig()
    """Used where topology.recall is own."""
    coarse_rank: ReplicasConfig = ReplicasConfig()
    """Used where topology.coarse_rank is own."""
    fine_rank: ReplicasConfig = ReplicasConfig()
    """Used where topology.fine_rank is own."""
    rerank: ReplicasConfig = ReplicasConfig()
    """Used where topology.rerank is own."""


class LimitsConfig(FrozenConfig):
    """What the HTTP edge refuses, with 4xx, a code and a sentence."""

    id_bytes: PositiveInt = 256
    """Longest user, item or event id, in UTF-8 bytes."""
    body_bytes: PositiveInt = 1_000_000
    """Largest request body, and largest event, item or user of a call that holds many."""
    batch_bytes: PositiveInt = 16_000_000
    """Largest body of a call that may hold many: POST /v1/events, PUT and DELETE of items and users."""
    k: PositiveInt = 1_000
    """Most items one request may ask for, and most items of one /v1/rank call."""
    events_per_call: PositiveInt = 10_000
    """Most events in one POST /v1/events."""
    items_per_call: PositiveInt = 10_000
    """Most items or users in one PUT or DELETE."""
    future_s: NonNegativeFloat = 300.0
    """How far ahead of our clock an event may be: clocks differ. It keeps its time; what is further ahead is rejected by itself."""


class HAProxyConfig(FrozenConfig):
    """Where HAProxy keeps its side doors; two services on one host must not share them."""

    stats_port: Port | None = None
    """Port of its statistics page. null: a free one."""
    metrics_port: Port | None = None
    """Port of its Prometheus metrics. null: a free one."""
    threads: PositiveInt | None = None
    """Worker threads. null: 1 on hosts of up to 4 CPUs, else 4."""


class ImpressionsConfig(FrozenConfig):
    """The log of what was shown, as Parquet under `impressions` of the workdir (a folder, not a URI)."""

    sample: float = Field(default=0.01, ge=0, le=1)
    """Share of the pages that are logged, by the hash of the request id; 0: none."""
    flush_s: PositiveFloat = 5.0
    """How often a replica writes what waits: a kill costs as much."""
    most_waiting: PositiveInt = 10_000
    """Pages that may wait in one replica; beyond it pages are dropped and counted, and answers never wait."""


class ServeConfig(FrozenConfig):
    """Everything about the live service that is not the model."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens the service to the network."""
    port: Port = 8_000
    """Port of the HTTP API."""
    variant: str = Field(default="default", min_length=1, max_length=64)
    """What answers and logged pages are said to be part of where the request does not say it itself."""
    data_plane: Literal["python", "haproxy"] = "haproxy"
    """haproxy: Serve's throughput mode behind HAProxy, five times faster. python: plain Serve, the switch back."""
    topology: TopologyConfig = TopologyConfig()
    """Where each stage runs."""
    micro_batch: MicroBatchConfig = MicroBatchConfig()
    """Joining of concurrent requests in the gateway."""
    deadline_ms: PositiveFloat = 500.0
    """Time for a whole answer; what is not done by then is left to the fallback ladder."""
    timeouts_ms: TimeoutsConfig = TimeoutsConfig()
    """Budget per stage, inside the deadline."""
    stages: StagesConfig = StagesConfig()
    """Replicas, autoscaling and resources per deployment."""
    limits: LimitsConfig = LimitsConfig()
    """Sizes that the HTTP edge refuses."""
    impressions: ImpressionsConfig = ImpressionsConfig()
    """Logging of pages with the feature values they were ranked by."""
    registry_poll_s: PositiveFloat = 1.0
    """How often the service looks for a newly promoted version."""
    items_poll_s: PositiveFloat = 0.2
    """How often every replica looks for items that were put or deleted."""
    drain_s: NonNegativeInt = 1
    """How long a leaving replica still answers; raise it behind a load balancer of your own."""
    haproxy: HAProxyConfig = HAProxyConfig()
    """Ports and threads of HAProxy, where data_plane is haproxy."""
