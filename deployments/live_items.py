"""Every process follows the log of changed items in a thread of its own, and brings each version that it holds up to date.

A change is in every replica within two looks at the log. A process that starts, and a version that is loaded later, first take
over everything that was ever told. Where the store is away, the last known catalogue stands; `staleness_s` says since when.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deployments.resilience import Seldom
from deployments.rollout import Load
from recsys.errors import RayfunnelError, StoreError
from recsys.features.live_items import ItemLog, ItemRecord
from recsys.funnel import Funnel
from recsys.rerank.diversity import MMRConfig
from recsys.rerank.rules import RulesConfig

log = logging.getLogger(__name__)

COUNT_S = 1.0
"""How often the exposures of new items are added up over all gateways."""


class ItemsFollower:
    """One reader of the log per process."""

    def __init__(self, items: ItemLog, *, poll_s: float) -> None:
        self._log, self._poll_s = items, poll_s
        self._held: dict[str, ItemRecord] = {}
        self._epoch, self._position, self._read_at = "", 0, 0.0
        self._funnels: weakref.WeakSet[Funnel] = weakref.WeakSet()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._noted: Counter[str] = Counter()
        self._noting, self._counted_at = threading.Lock(), -COUNT_S
        self._seldom = Seldom()
        self._thread: threading.Thread | None = None

    def loading(self, load: Load, rules: RulesConfig | None = None, rerank: MMRConfig | None = None) -> Load:
        """`load`, and the version it gives is up to date and stays so. It answers by these rules and this re-rank, not by those it was
        published with: `load` has compared its answers with the published ones before."""

        def follow(folder: Path) -> Funnel:
            funnel = load(folder)
            for sentence in funnel.rule(rules or funnel.config.rules, rerank):
                log.warning("%s", sentence)
            with self._lock:
                funnel.follow(list(self._held.values()))
                self._funnels.add(funnel)
            return funnel

        return follow

    def start(self, patience_s: float = 5.0) -> None:
        """Read the whole log, then go on in the background. A store that does not answer for `patience_s` is waited for no longer."""
        until = time.monotonic() + patience_s
        while True:
            try:
                self.poll()
                break
            except StoreError as error:
                if time.monotonic() > until:
                    log.warning("Changes of items are not known yet; the bundle's catalogue stands. %s", error)
                    break
                time.sleep(0.1)
        self._thread = threading.Thread(target=self._follow, name="items", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._log.close()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.poll()
            except RayfunnelError as error:
                self._seldom.warn("items", "The catalogue is stale.", error)
            except Exception:  # one bad record must not end the thread: everything after it would be lost too
                log.exception("Changes of items could not be taken over; tried again.")

    def poll(self) -> None:
        """Look once. Raises StoreError where the store does not answer."""
        now = time.monotonic()
        changes = self._log.since(self._position)
        anew = changes.epoch != self._epoch and self._position > 0
        if anew:
            log.warning("The log of items is not the one of before: it is read from its beginning.")
            changes = self._log.since(0)
        with self._lock:
            if changes.records or anew:
                held = {} if anew else self._held
                self._held = held | {record.item_id: record for record in changes.records}
                for funnel in list(self._funnels):
                    funnel.follow(changes.records, anew=anew)
            self._epoch, self._position, self._read_at = changes.epoch, changes.position, now
        if self._held and now - self._counted_at >= COUNT_S:
            self._count(now)

    def note(self, item_ids: Iterable[str]) -> None:
        """These items were shown: those that came or changed since the training are counted, for the boost of new ones."""
        if self._held and (mine := [i for i in item_ids if i in self._held]):
            with self._noting:
                self._noted.update(mine)

    def _count(self, now: float) -> None:
        """Hand on what was shown here, and take over what was shown anywhere."""
        with self._noting:
            noted, self._noted = self._noted, Counter()
        if noted:
            self._log.show(noted)
        shown = self._log.shown()
        with self._lock:
            for funnel in list(self._funnels):
                funnel.exposures = {row: n for item_id, n in shown.items() if (row := funnel.items.row(item_id)) >= len(funnel.items)}
        self._counted_at = now

    def state(self) -> dict[str, Any]:
        """What /v1/version tells: how many items were changed or deleted, up to which position, and how old that knowledge is."""
        held = list(self._held.values())
        deleted = sum(record.columns is None for record in held)
        stale = round(time.monotonic() - self._read_at, 3) if self._read_at else None
        return {"changed": len(held) - deleted, "deleted": deleted, "position": self._position, "staleness_s": stale}
