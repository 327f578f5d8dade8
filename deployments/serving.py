"""Starting and stopping the service on this machine: Ray with the right environment, the application, and the wait until it answers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from cluster.runtime import haproxy_folder, serving_environment, start_ray
from deployments.abandoned import end_abandoned
from recsys.config import Config
from recsys.errors import RayfunnelError
from recsys.serve_config import ServeConfig

log = logging.getLogger(__name__)

APPLICATION = "rayfunnel"
START_S = 300.0
"""How long the replicas may take to load their bundle and answer."""


@contextlib.contextmanager
def running(config: Config, say: Callable[[str], None]) -> Iterator[str]:
    """The service of a configuration, up and answering at the URL given; everything started here is stopped at the end.

    Raises RayfunnelError where the port is taken or the service does not come up.
    """
    serving = config.serve
    check_port(serving)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    already = bool(os.environ.get("RAY_ADDRESS"))
    say("starting Ray")
    start_ray(num_cpus=cpus_for(config), env=serving_environment(serving))
    import ray
    from ray import serve

    from deployments.app import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    # `kill` ends it as cleanly as Ctrl-C (Ray's own handler would abort), and a shell that starts it in the background has told
    # it to ignore Ctrl-C.
    for number in before:
        signal.signal(number, _interrupt)
    try:
        try:
            serve.start(http_options={"host": serving.host, "port": serving.port}, logging_config={"log_level": "WARNING"})
        except (ray.exceptions.RayError, RuntimeError, TimeoutError) as error:  # its controller or proxy did not come up in time
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RayfunnelError(f"Ray Serve did not start: {why} On a busy host, give the command again.") from error
        say("starting the service")
        try:
            serve.run(application(config), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise RayfunnelError(f"The service did not start. {_why(error)}") from error
        url = f"http://{'127.0.0.1' if serving.host == '0.0.0.0' else serving.host}:{serving.port}"  # noqa: S104  compared, not bound
        wait_until_ready(url)
        yield url
    finally:
        say("stopping")
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave half of it running
        with contextlib.redirect_stdout(io.StringIO()):  # Ray tells of its controller's end, which we asked for, as of a failure
            if already:
                serve.delete(APPLICATION)
            else:
                serve.shutdown()
            ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def until_interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_port(serving: ServeConfig) -> None:
    """Raises RayfunnelError where somebody listens on the port already. HAProxy of a service that was killed there is ended first."""
    if ended := end_abandoned(haproxy_folder(serving.port)):
        log.warning(
            "HAProxy (pid %s) of a service that was killed still held port %d; it is ended", ", ".join(map(str, ended)), serving.port
        )
    with socket.socket(socket.AF_INET6 if ":" in serving.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except PermissionError as error:
            raise RayfunnelError(
                f"Port {serving.port} may not be opened by this user ({error.strerror}). Choose one above 1023: --port 8001."
            ) from error
        except OSError as error:
            raise RayfunnelError(
                f"Port {serving.port} on {serving.host} cannot be used: {error.strerror}. Stop what listens there, or choose another: --port {serving.port + 1}."
            ) from error


def wait_until_ready(url: str, patience_s: float = START_S) -> None:
    """Return when the service answers /readyz. Raises RayfunnelError when it does not in time."""
    until = time.monotonic() + patience_s
    last = "no answer"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310  our own http URL
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as error:
            last = f"status {error.code}"
        except OSError as error:
            last = str(error)
        time.sleep(0.1)
    raise RayfunnelError(
        f"{url}/readyz did not answer within {patience_s:.0f} s ({last}). The replicas' log under /tmp/ray/session_latest/logs/serve says why."
    )


def cpus_for(config: Config) -> int:
    """CPUs to announce: bookings are small, and a booking that never fits would wait for ever."""
    stages = config.serve.stages
    booked = sum(r.max_replicas * r.num_cpus for r in (stages.gateway, stages.recall, stages.coarse_rank, stages.fine_rank, stages.rerank))
    return max(os.cpu_count() or 1, int(booked) + 2)


def _why(error: RuntimeError) -> str:
    """The sentence of the error that a replica raised: Serve keeps the whole traceback as the status of its deployment."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    told = [status.message for status in application.deployments.values()] if application is not None else []
    for text in [*told, str(error)]:
        found = re.findall(r"^(?:recsys|ray|redis)[\w.]*Error: (.+)$", text, re.MULTILINE)
        if found:
            return str(found[-1])
    return f"{error} The replicas' log under /tmp/ray/session_latest/logs/serve says why."
