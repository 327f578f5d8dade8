"""Counters and histograms of the gateway, in Prometheus through Ray.

Recorded once a micro-batch where they can be: a metric costs as much as parsing a request.
No user, item or version stands in a tag: their number has no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.serve import metrics

from deployments.resilience import Degraded

_MS = [1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0, 2000.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 64.0, 128.0]


class Monitor:
    """Takes note of nothing; what stands in where there is no Serve replica to report for."""

    def request(self, route: str, seconds: float) -> None:
        """A request was answered."""

    def batch(self, rows: int, timings: Mapping[str, float], degraded: Sequence[Degraded]) -> None:
        """A micro-batch was answered; timings are milliseconds by stage."""

    def new_user(self, rung: str) -> None:
        """A page was answered to a user without a history."""

    def events(self, accepted: int, duplicates: int, rejected: int, unknown_items: int) -> None:
        """A call with events was answered."""


class ServeMonitor(Monitor):
    """Reports through ray.serve.metrics, which adds application, deployment and replica."""

    def __init__(self) -> None:
        self._requests = metrics.Histogram(
            "rayfunnel_request_ms", "Latency of an answer inside the gateway.", boundaries=_MS, tag_keys=("route",)
        )
        self._stages = metrics.Histogram("rayfunnel_stage_ms", "Time of one stage over a micro-batch.", boundaries=_MS, tag_keys=("stage",))
        self._sizes = metrics.Histogram("rayfunnel_batch_size", "Requests in a micro-batch.", boundaries=_SIZES)
        self._degraded = metrics.Counter(
            "rayfunnel_degraded_total", "Answers in which something lesser stood in for a stage.", tag_keys=("stage", "rung", "reason")
        )
        self._new_users = metrics.Counter(
            "rayfunnel_new_user_pages_total", "Pages of users without a history, by the rung of cold_start.", tag_keys=("rung",)
        )
        self._events = metrics.Counter("rayfunnel_events_total", "Events by what became of them.", tag_keys=("outcome",))

    def request(self, route: str, seconds: float) -> None:
        self._requests.observe(1000 * seconds, {"route": route})

    def batch(self, rows: int, timings: Mapping[str, float], degraded: Sequence[Degraded]) -> None:
        self._sizes.observe(rows)
        for stage, ms in timings.items():
            self._stages.observe(ms, {"stage": stage})
        for note in degraded:
            self._degraded.inc(rows or 1, {"stage": note.stage, "rung": note.rung, "reason": note.reason})

    def new_user(self, rung: str) -> None:
        self._new_users.inc(1, {"rung": rung})

    def events(self, accepted: int, duplicates: int, rejected: int, unknown_items: int) -> None:
        for outcome, n in (("accepted", accepted), ("duplicate", duplicates), ("rejected", rejected), ("unknown_item", unknown_items)):
            if n:
                self._events.inc(n, {"outcome": outcome})
