"""What keeps an answer coming when a part of the service does not: deadlines, one retry, and the names of every fallback.

A deadline is an absolute instant of this process's monotonic clock; between processes only the milliseconds that are
left travel, because two hosts do not share a clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Literal, NamedTuple, TypeVar

import grpc  # type: ignore[import-untyped]
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from recsys.core import Candidates, Queries
from recsys.errors import StoreUnavailableError, VersionAbsentError

T = TypeVar("T")
log = logging.getLogger(__name__)

Rung = Literal["stale", "default", "partial", "recall_order", "coarse_order", "cached", "popular"]
Reason = Literal["timeout", "error", "overload", "open_circuit", "unavailable", "invalid"]

GONE = (RayActorError, grpc.aio.AioRpcError, DeploymentUnavailableError)
"""What a call meets whose replica died or cannot be reached. The call may have run: every stage is idempotent."""


class Degraded(NamedTuple):
    """One stage of an answer that something lesser stood in for, and why. The words are a closed vocabulary."""

    stage: str
    rung: Rung
    reason: Reason

    def shown(self) -> dict[str, str]:
        return {"stage": self.stage, "rung": self.rung, "reason": self.reason}


class Deadline(NamedTuple):
    """The instant by which an answer must be out."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at

    def sooner(self, seconds: float) -> Deadline:
        """The earlier of this deadline and `seconds` from now."""
        return Deadline(min(self.at, time.monotonic() + seconds))


def reason_of(error: BaseException) -> Reason:
    """The word of the vocabulary for an exception."""
    if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
        return "timeout"
    if isinstance(error, BackPressureError):
        return "overload"
    if isinstance(error, (*GONE, StoreUnavailableError, VersionAbsentError)):
        return "unavailable"
    return "error"


class Seldom:
    """Logs what would else be logged with every micro-batch: each kind at once, and then once in `every_s` with a count."""

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._told: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def warn(self, kind: str, text: str, error: BaseException, *, traceback: bool = False) -> None:
        """Warn of `text` and the error, of which others of this kind say the same; with its traceback where nobody foresaw it."""
        now = time.monotonic()
        if now - self._told.get(kind, -self._every_s) < self._every_s:
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return
        more = self._untold.pop(kind, 0)
        self._told[kind] = now
        again = f" (and {more} times since it was last said)" if more else ""
        log.warning("%s %s%s", text, error or type(error).__name__, again, exc_info=error if traceback else None)


async def called_twice(call: Callable[[float], Awaitable[T]], deadline: Deadline) -> T:
    """Await `call(seconds left)`; where its replica is gone or lacks the version, once more within the same deadline.

    Another replica may be alive and may hold the version. Raises what the second try raised, or TimeoutError.
    """
    try:
        return await _bounded(call, deadline)
    except (*GONE, VersionAbsentError):
        if deadline.passed:
            raise
        return await _bounded(call, deadline)


class Preferred(Generic[T]):
    """A call with a stand-in: where the first is gone, late, full or without the version, the second answers in the time left.

    After such a failure the first rests for `rest_s`: nobody waits again and again for what is not there.
    """

    SHARE = 0.5
    """Of the time left, what the first may take."""

    def __init__(self, first: Callable[..., Awaitable[T]], second: Callable[..., Awaitable[T]], *, rest_s: float = 1.0) -> None:
        self._first, self._second, self._rest_s = first, second, rest_s
        self._rests_until = 0.0

    async def __call__(self, version: str, queries: Queries, candidates: Candidates | None, left_s: float) -> T:
        """Call both alike."""
        given, deadline = (version, queries, candidates), Deadline.after(left_s)
        if time.monotonic() >= self._rests_until:
            try:
                return await _bounded(lambda left: self._first(*given, left), deadline.sooner(self.SHARE * left_s))
            except (TimeoutError, BackPressureError, VersionAbsentError, *GONE):
                self._rests_until = time.monotonic() + self._rest_s
        return await _bounded(lambda left: self._second(*given, left), deadline)


async def _bounded(call: Callable[[float], Awaitable[T]], deadline: Deadline) -> T:
    left = deadline.left_s
    if left <= 0:
        raise TimeoutError("The deadline had passed before the call.")
    response = call(left)
    try:
        return await asyncio.wait_for(response, left)
    except (TimeoutError, asyncio.CancelledError):
        # Without this the replica goes on working for nobody, unless the transport happens to be gRPC.
        cancel = getattr(response, "cancel", None)
        if cancel is not None:
            cancel()
        raise
    except RayServeException as error:
        # How Serve tells that an actor died under a call that another actor had passed on.
        if isinstance(error.__cause__, RayActorError):
            raise error.__cause__ from error
        raise
