"""One round of commands to a server, or to the nodes of a cluster, and when what they changed counts as kept.

A server's answer says that its memory has a change. `WAITAOF` and `WAIT`, sent behind the changes on their own connection, answer
when its disk and so many of its replicas have them as well. They cover what that connection wrote: a script that finds its work
done already must write something all the same, or the repetition of a refused call would be confirmed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from redis import exceptions as faults

from recsys.errors import StoreUnavailableError

Call = Sequence[Any]
"""A command and its arguments."""


@dataclass(frozen=True)
class Kept:
    """What has a change before anybody is told. `where`: the server's name in sentences; waits end after `timeout_s`."""

    where: str = ""
    timeout_s: float = 5.0
    disk: bool = False
    replicas: int = 0

    @property
    def commands(self) -> list[tuple[Any, ...]]:
        """Sent behind the changes, on the connection that made them."""
        patience_ms = max(1, int(500 * self.timeout_s))  # before the caller's own patience ends, so that the sentence is the right one
        disk: list[tuple[Any, ...]] = [("WAITAOF", 1, 0, patience_ms)] if self.disk else []
        return disk + ([("WAIT", self.replicas, patience_ms)] if self.replicas else [])

    def confirmed(self, answers: Sequence[Any], said: Sequence[Any]) -> list[Any]:
        """The answers where `said`, the answers to `commands`, is enough; else a fault in the place of every change."""
        fault = self._fault(list(said))
        return list(answers) if fault is None else [answer if isinstance(answer, Exception) else fault for answer in answers]

    def _fault(self, said: list[Any]) -> StoreUnavailableError | None:
        if self.disk and (isinstance(synced := said.pop(0), Exception) or synced[0] < 1):
            return StoreUnavailableError(
                f"The feature store at {self.where} did not reach its disk ({synced}). Nothing is confirmed; send again."
            )
        if self.replicas and (isinstance(taken := said.pop(0), Exception) or taken < self.replicas):
            return StoreUnavailableError(
                f"The feature store at {self.where} did not reach its replicas (store.replicas_acked: {self.replicas}, answered: {taken}). "
                "Nothing is confirmed; send again."
            )
        return None


IN_MEMORY = Kept()
"""Whatever the server's own answer means."""


async def run(redis: Any, calls: Sequence[Call], kept: Kept = IN_MEMORY) -> list[Any]:
    """The answer of each call or its fault, in one round. Faults of the connection are raised, or stand in the place of answers."""
    if not calls:
        return []
    async with redis.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.execute_command(*call)
        if hasattr(pipe, "execute_kept"):
            answers: list[Any] = await pipe.execute_kept(kept)
            return answers
        for command in kept.commands:
            pipe.execute_command(*command)
        answers = list(await pipe.execute(raise_on_error=False))
    return kept.confirmed(answers[: len(calls)], answers[len(calls) :])


async def run_script(redis: Any, script: str, calls: Sequence[Call], kept: Kept = IN_MEMORY) -> list[Any]:
    """As `run`, of one script: a call is the number of keys, the keys, the arguments. A server that does not know the script (it has
    just started, or taken the place of another) is sent the text."""
    answers = await run(redis, [("EVALSHA", digest(script), *call) for call in calls], kept)
    unknown = [i for i, answer in enumerate(answers) if isinstance(answer, faults.NoScriptError)]
    for i, answer in zip(unknown, await run(redis, [("EVAL", script, *calls[i]) for i in unknown], kept), strict=True):
        answers[i] = answer
    return answers


@cache
def digest(script: str) -> str:
    """What servers call a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
