"""Ray under our feet: adopt the cluster that is there, or start a small local one with the right environment.

The trap: Ray and Ray Serve read their environment variables when they are imported and hand them to every process they
start, so they must be set before the first `import ray` of the process; a runtime_env is too late for them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from recsys.errors import ConfigError, RayfunnelError
from recsys.serve_config import ServeConfig

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 300 * 2**20
"""Shared memory of a local cluster: stages pass ids and scores, and training reads Parquet by itself."""
JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entrypoint process of a submitted job, and nowhere else."""


def inside_job() -> bool:
    """Whether this process is the entrypoint of a job submitted to a Ray cluster."""
    return bool(os.environ.get(JOB_MARK))


def refuse_relative_workdir(workdir: str | None) -> None:
    """Inside a submitted job a relative workdir would vanish with the job's copy of the code: ConfigError."""
    if inside_job() and (workdir is None or not ("://" in workdir or Path(workdir).is_absolute())):
        shown = "the default (./.rayfunnel/<name>)" if workdir is None else f"'{workdir}'"
        raise ConfigError(
            f"workdir is {shown}, a relative path, but this command runs inside a Ray job, whose folder is deleted when the job ends. "
            "Give an absolute path or a URI, for example --set workdir=/data/rayfunnel or --set workdir=s3://bucket/rayfunnel."
        )


def serving_environment(serve: ServeConfig) -> dict[str, str]:
    """The variables that every node must have before Ray starts, for this service's data plane.

    HAProxy's files go to a private folder per user and port: by default all clusters of a host share one, world-writable.
    """
    fast = serve.data_plane == "haproxy"
    env = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1" if fast else "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if fast else "0",
        # A stopped ingress replica would otherwise linger for 30 s before it exits.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(serve.drain_s),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(max(serve.drain_s, 1)),
        # Else warnings wait in memory for 999 others before they are in the replica's log. Requests write no line (see app.QUIET).
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # Replica ids in controller metrics make a new time series for every restart.
        "RAY_SERVE_CONTROLLER_METRICS_INCLUDE_HIGH_CARDINALITY_TAGS": "0",
        "RAY_SERVE_REQUEST_LATENCY_BUCKETS_MS": "1,2,3,5,7,10,15,20,30,50,75,100,150,200,300,500,1000,2000,5000",
    }
    if fast:
        folder = _haproxy_folder(serve.port)
        threads = serve.haproxy.threads or (1 if (os.cpu_count() or 1) <= 4 else 4)
        stats, metrics, fallback = _free_ports(serve.haproxy.stats_port, serve.haproxy.metrics_port, None)
        env |= {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            # Where HAProxy sends requests while no gateway is up. By default all clusters of a host listen on one port together, and
            # another service would answer them, and accept their events, as its own.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(threads),
            # A log line a request, parsed in Python: a tenth of what serving costs. The gateway's own metrics tell the same.
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            # A replica that dies with a request in flight: try another. Safe, because every endpoint is idempotent.
            # It can only repeat what it holds: many clients send headers and body apart, so it must wait for both before it
            # passes a request on. Ray has no switch for that; this value ends a line of HAProxy's `defaults` section.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response\n    option http-buffer-request",
        }
    return env


def start_ray(
    num_cpus: int | None = None,
    env: Mapping[str, str] | None = None,
    dashboard: bool = False,
    *,
    object_store_bytes: int = OBJECT_STORE_BYTES,
) -> None:
    """Adopt the cluster named by RAY_ADDRESS (or of the job we run in), else start a local one; twice is once.

    `env` reaches every process of a local cluster. Sizes and `env` are the owner's business on an adopted cluster.
    Raises RayfunnelError when RAY_ADDRESS names a cluster that does not answer, or Ray cannot start.
    """
    adopt = bool(os.environ.get("RAY_ADDRESS")) or inside_job()
    if adopt:
        _knock(os.environ.get("RAY_ADDRESS", ""))
    else:
        _set_environment(env or {})
    import ray

    if ray.is_initialized():
        return
    try:
        if adopt:
            ray.init(address="auto", log_to_driver=True)
        else:
            # "local": a Ray that somebody else started on this host is not ours to use unless RAY_ADDRESS says so.
            # Workers log into files of the session: progress and faults reach the caller as such, not as chatter.
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises the bare Exception where its processes do not come up in time
        where = f"the cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}" if adopt else "a local Ray cluster"
        raise RayfunnelError(f"Could not reach {where}: {error} On a busy host, give the command again.") from error
    resources = ray.cluster_resources()
    log.info("ray %s cpus=%g gpus=%g", "adopted" if adopt else "started", resources.get("CPU", 0), resources.get("GPU", 0))


def _knock(address: str) -> None:
    """Fail at once where nobody listens at host:port; Ray itself would try for half a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RayfunnelError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({error}). Start it, correct the address, or unset RAY_ADDRESS to use a local one."
        ) from error


def _set_environment(env: Mapping[str, str]) -> None:
    """What Ray must see before it is imported. Values the user set for Ray's own security and reporting win."""
    late = sorted(name for name, value in env.items() if name.startswith("RAY_SERVE_") and os.environ.get(name) != value)
    if late and "ray.serve" in sys.modules:
        log.warning("ray.serve was imported before these were set, so this process keeps their old values: %s", ", ".join(late))
    os.environ.update(env)
    # Explicit, because Ray's default depends on what lies in the home folder. A token, because whoever reaches an open
    # cluster's ports runs code on it; Ray writes one to ~/.ray/auth_token where there is none.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs workers at nice 15: beside anything else that computes, training and serving would hardly get a turn.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray would override CUDA_VISIBLE_DEVICES with "" in zero-GPU actors; we ask for GPUs explicitly where we want them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def haproxy_folder(port: int) -> Path:
    """Where this user's HAProxy for a port keeps its files.

    Under /tmp and with a short name, because Ray appends 57 characters for the node and HAProxy refuses sockets whose
    path is longer than 97.
    """
    return Path("/tmp") / f"rf-{os.getuid()}-{port}"  # noqa: S108 - made 0700 below, and refused if it is not ours


def _haproxy_folder(port: int) -> Path:
    """The folder, which only this user can enter."""
    folder = haproxy_folder(port)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RayfunnelError(f"'{folder}' belongs to somebody else. Remove it, or serve on another port.")
    folder.chmod(0o700)
    return folder


def _free_ports(*wanted: int | None) -> list[int]:
    """Each wanted port, or a free one; held open together, so that no two are equal."""
    with_sockets: list[tuple[int, socket.socket | None]] = []
    for port in wanted:
        if port is not None:
            with_sockets.append((port, None))
            continue
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        with_sockets.append((probe.getsockname()[1], probe))
    for _, probe_or_none in with_sockets:
        if probe_or_none is not None:
            probe_or_none.close()
    return [port for port, _ in with_sockets]
