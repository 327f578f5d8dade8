"""Which bundle versions a process holds: it watches the registry's aliases, loads what is promoted, refuses what is broken.

Loading happens in a thread of its own and a loaded version is swapped in by one assignment, so no request waits for it.
The versions of before stay: a request keeps the version it was given until its answer is out.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.registry import Registry
from recsys.bundle import read_manifest
from recsys.errors import BundleError, RayfunnelError, VersionAbsentError
from recsys.funnel import STAGES, Funnel, FunnelRequest
from recsys.packing import GOLDEN, differences

log = logging.getLogger(__name__)

RETRY_S, RETRY_AT_MOST_S = 5.0, 600.0
"""After what may pass by itself (a registry that timed out, a full disk) a version is tried again: first after 5 s, then after
twice as long each time."""
HELD = 3
"""Versions that a process keeps: the serving one, its predecessor, and a canary or the one before."""

Load = Callable[[Path], Funnel]
Ready = Callable[[str], str | None]


class Rollout:
    """The versions of one process. `current` answers requests that name none.

    `load(folder)` reads a verified bundle. `ready(version)` says why the rest of the service cannot serve it yet (None: it
    can): a gateway switches only when every stage of its own deployment holds the version.
    """

    def __init__(self, registry: Registry, load: Load, *, poll_s: float, ready: Ready | None = None) -> None:
        self._registry, self._load, self._poll_s, self._ready = registry, load, poll_s, ready
        self._held: dict[str, Funnel] = {}
        self._promoted: set[str] = set()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self._waiting: tuple[str, float] = ("", 0.0)
        self.current = ""
        self.aliases: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._retry: dict[str, tuple[float, float]] = {}

    # ---- what is held ---------------------------------------------------------------------------------------------

    def funnel(self, version: str | None = None) -> Funnel:
        """The funnel of a version (default: the current one). Raises VersionAbsentError."""
        held, name = self._held, version or self.current
        if name not in held:
            raise VersionAbsentError(
                f"Version '{name}' is not held here. Held: {', '.join(held) or 'none'}. Ask again, or ask for one of these."
            )
        return held[name]

    @property
    def held(self) -> list[str]:
        """The versions in memory, the current one first, then the youngest."""
        names = list(self._held)
        return [n for n in (self.current,) if n in names] + [n for n in reversed(names) if n != self.current]

    @property
    def promoted(self) -> list[str]:
        """As `held`, without what was never in production here: a canary must not answer in another's place."""
        return [v for v in self.held if v in self._promoted]

    def funnels(self) -> list[Funnel]:
        """Every version in memory."""
        return list(self._held.values())

    # ---- watching -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load production (or previous, where production is refused), then watch. Raises BundleError where neither can serve."""
        self.aliases = self._registry.aliases()
        self._promoted = _promoted(self.aliases)
        for alias in ("production", "previous"):
            version = self.aliases.get(alias)
            if version is not None and self._take(version):
                self.current = version
                break
        else:
            why = "; ".join(self.refused.values()) or f"the registry '{self._registry.root}' has no production version"
            raise BundleError(
                f"There is nothing to serve: {why}. Train and promote a version first: rayfunnel train -c FILE, rayfunnel promote -c FILE."
            )
        self._watcher = threading.Thread(target=self._watch, name="rollout", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop watching; what is held stays."""
        self._stop.set()

    @property
    def alive(self) -> bool:
        """Whether the watcher runs; a process without one would serve an old version for ever."""
        return self._watcher is not None and self._watcher.is_alive()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.poll()
            except (RayfunnelError, OSError):
                log.exception("The registry could not be read; version %s keeps serving.", self.current)

    def poll(self) -> None:
        """Look at the aliases once: load what is new, switch to a production version that is ready, let go of what is old."""
        aliases = self._registry.aliases()
        for version in set(self.refused) - set(aliases.values()):
            del self.refused[version]  # it may come back mended
            self._retry.pop(version, None)
        self.aliases = aliases
        self._promoted = (self._promoted & {*self._held}) | _promoted(aliases)
        wanted = list(dict.fromkeys(v for a in ("production", "canary", "previous") if (v := aliases.get(a))))
        for version in wanted:
            self._take(version)
            if version == aliases.get("production"):
                self._switch(version)
        self._let_go(wanted)

    def _switch(self, version: str) -> None:
        if version == self.current or version not in self._held:
            return
        why = self._ready(version) if self._ready is not None else None
        if why is None:
            log.info("version %s serves, after %s", version, self.current)
            self.current = version
            self._waiting = ("", 0.0)
        elif self._waiting[0] != version or time.monotonic() - self._waiting[1] > 10:
            self._waiting = (version, time.monotonic())
            log.warning("Version %s waits: %s. %s keeps serving.", version, why, self.current)

    def _take(self, version: str) -> bool:
        if version in self._held:
            return True
        at, pause_s = self._retry.get(version, (math.inf, RETRY_S / 2))
        if version in self.refused and time.monotonic() < at:
            return False
        started = time.perf_counter()
        try:
            funnel = self._load(self._registry.local_copy(version))
        except Exception as error:
            told = isinstance(error, RayfunnelError)
            self.refused[version] = str(error) if told else f"{version} cannot be loaded here ({type(error).__name__}: {error})"
            again = ""
            if not _lasting(error):
                pause_s = min(2 * pause_s, RETRY_AT_MOST_S)
                self._retry[version] = (time.monotonic() + pause_s, pause_s)
                again = f" It is tried again in {pause_s:g} s."
            log.exception("Version %s is refused; %s keeps serving.%s", version, self.current or "nothing", again)
            return False
        self.refused.pop(version, None)
        self._retry.pop(version, None)
        self._held = {**self._held, version: funnel}
        log.info("version %s loaded in %.1f s", version, time.perf_counter() - started)
        return True

    def _let_go(self, wanted: list[str]) -> None:
        keep = dict.fromkeys([self.current, *wanted])
        for version in reversed(self._held):  # youngest first
            if len(keep) >= HELD:
                break
            if version in self._promoted:  # a canary whose alias was taken away goes at once
                keep[version] = None
        self._held = {v: f for v, f in self._held.items() if v in keep}


def _lasting(error: Exception) -> bool:
    """Whether the bundle itself was found wanting, and not the way to it: a registry that did not answer is a BundleError by OSError."""
    return isinstance(error, BundleError) and not isinstance(error.__cause__, OSError)


def _promoted(aliases: Mapping[str, str]) -> set[str]:
    return {v for alias in ("production", "previous") if (v := aliases.get(alias))}


def loader(*stages: str) -> Load:
    """Reads the given stages of a verified bundle, checks that its schema is the one it claims, and warms it up."""

    def load(folder: Path) -> Funnel:
        funnel = Funnel.load(folder, stages=stages)
        claimed = read_manifest(folder).schema_hash
        if claimed and claimed != funnel.space.schema_hash:
            raise BundleError(
                f"Bundle '{folder}' claims schema {claimed[:12]}, its features are of schema {funnel.space.schema_hash[:12]}. Publish it again."
            )
        if set(STAGES) <= set(stages) and (folder / GOLDEN).exists():
            # Also warms it up: the first caller does not pay for page faults and lazy set-up.
            if faults := differences(funnel, folder):
                raise BundleError(f"Bundle '{folder}' answers otherwise than when it was published ({faults[0]}). Publish it again.")
        else:
            warm(funnel, stages)
        return funnel

    return load


def warm(funnel: Funnel, stages: tuple[str, ...]) -> None:
    """Pass one request through the loaded stages; a bundle that cannot is refused."""
    queries = funnel.queries(
        [FunnelRequest(user_id=u, k=10, at=time.time()) for u in ("", *funnel.users.outside(range(min(1, len(funnel.users)))))]
    )
    candidates = funnel.popular(queries)
    if "recall" in stages:
        candidates = funnel.recall(queries)
    elif "fine_rank" in stages:
        candidates = funnel.rank(queries, [[i.item_id for i in page] for page in funnel.page(queries, candidates)])
    funnel.page(queries, candidates)
