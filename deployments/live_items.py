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
from recsys.rerank.live_rules import Stored, from_json, in_force, origins
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
        self._funnels: weakref.WeakKeyDictionary[Funnel, RulesConfig] = weakref.WeakKeyDictionary()
        self._told: tuple[int, bytes] = (0, b"")
        self._live: Stored | None = None
        self._unread = ""
        self._unmet: dict[str, list[str]] = {}
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
            with self._lock:
                own = rules or funnel.config.rules
                self._rule(funnel, own, rerank)
                funnel.follow(list(self._held.values()))
                self._funnels[funnel] = own
            return funnel

        return follow

    def _rule(self, funnel: Funnel, configured: RulesConfig, rerank: MMRConfig | None = None) -> None:
        """The configured rules, and over them those that were told, are in force from now on."""
        said = self._unmet.get(funnel.version, [])
        unmet = funnel.rule(in_force(configured, self._live.rules if self._live is not None else None), rerank)
        for sentence in unmet:
            if sentence not in said:
                log.warning("%s", sentence)
        self._unmet[funnel.version] = unmet

    def _take_rules(self, told: tuple[int, bytes]) -> None:
        """Read a document and obey it. One that this release cannot read is told and passed over: pages must go on."""
        self._told, self._unread, self._live = told, "", None
        try:
            self._live = from_json(told[1]) if told[1] else None
        except StoreError as error:
            self._unread = str(error)
            log.warning("Live rules %d are passed over, those of the configuration are in force: %s.", told[0], error)
        else:
            log.info("live rules %d: %s", told[0], "taken back" if self._live is None else "in force")
        for funnel, configured in list(self._funnels.items()):
            self._rule(funnel, configured)

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
            if changes.rules != self._told:
                self._take_rules(changes.rules)
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
            try:
                self._log.show(noted)
            except StoreError:
                with self._noting:
                    self._noted.update(noted)  # handed on when the store is back; twice, where only its answer was lost
                raise
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
        told = {"changed": len(held) - deleted, "deleted": deleted, "position": self._position, "staleness_s": stale}
        return told | {"rules": self._told[0] if self._live is not None else None}

    def rules(self, funnel: Funnel) -> dict[str, Any]:
        """What GET /v1/rules tells of the rules that this process obeys for a version, and where each part of them comes from."""
        with self._lock:
            told, live, unread, configured = self._told, self._live, self._unread, self._funnels.get(funnel, funnel.config.rules)
            unmet = list(self._unmet.get(funnel.version, []))
        rules = live.rules if live is not None else None
        stale = round(time.monotonic() - self._read_at, 3) if self._read_at else None
        out: dict[str, Any] = {
            "number": told[0],
            "live": None if live is None else live.rules.model_dump(mode="json", exclude_unset=True),
            "since_ms": None if live is None else live.time_ms,
            "configuration": configured.model_dump(mode="json"),
            "in_force": in_force(configured, rules).model_dump(mode="json"),
            "origin": origins(configured, rules),
            "staleness_s": stale,
        }
        passed_over = [f"Live rules {told[0]} are passed over: {unread}."] if unread else []
        return out | {"not_in_force": passed_over + unmet}
