"""GET, PUT and DELETE of /v1/rules: what an engineer on call changes on the running service, checked whole and on disk before the answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
from pydantic import ValidationError

from deployments.catalogue import away
from deployments.checks import check_id, check_text, faults
from deployments.live_items import ItemsFollower
from deployments.rollout import Rollout
from recsys.errors import RequestError, StoreUnavailableError
from recsys.features.live_items import ItemLog
from recsys.rerank.live_rules import LiveRules, contradictions, to_json
from recsys.serve_config import LimitsConfig


class RulesDesk:
    """What of the gateway changes and shows rules. Without a follower nothing would obey them."""

    def __init__(self, rollout: Rollout, items: ItemLog, follower: ItemsFollower | None, limits: LimitsConfig) -> None:
        self._rollout, self._items, self._follower, self._limits = rollout, items, follower, limits

    async def show(self) -> bytes:
        """The answer of GET /v1/rules as JSON. Raises RequestError (404) where the service follows no rules."""
        return orjson.dumps(self._followed().rules(self._rollout.funnel()))

    async def put(self, raw: bytes) -> bytes:
        """The answer of PUT /v1/rules as JSON: the document stands in place of the one before. Raises RequestError with every fault."""
        self._followed()
        rules = self._checked(raw)
        number = await self._keep(to_json(rules))
        told = rules.model_dump(mode="json", exclude_unset=True)
        return orjson.dumps({"number": number, "live": told, "notes": self._notes(rules)})

    async def delete(self) -> bytes:
        """The answer of DELETE /v1/rules as JSON: those of the configuration are in force alone."""
        self._followed()
        return orjson.dumps({"number": await self._keep(b""), "live": None, "notes": []})

    def _followed(self) -> ItemsFollower:
        if self._follower is None:
            raise RequestError("not_found", "This service follows no store, so it has no live rules.", status=404)
        return self._follower

    async def _keep(self, document: bytes) -> int:
        try:
            return await asyncio.to_thread(self._items.rule, document)
        except StoreUnavailableError as error:
            raise away() from error

    def _checked(self, raw: bytes) -> LiveRules:
        try:
            body = orjson.loads(raw)
            json.dumps(body, allow_nan=False)  # 1e999 is a number to the parser, and none to whoever reads the store
        except (orjson.JSONDecodeError, ValueError, RecursionError) as error:
            raise RequestError("malformed_json", f"The body is not valid JSON: {error}.", status=400) from None
        check_text(body)
        try:
            rules = LiveRules.model_validate(body)
        except ValidationError as error:
            raise faults(error) from None
        funnel = self._rollout.funnel()
        kinds = {name: str(c.kind) for name, c in funnel.catalogue.columns.items() if name in funnel.filters.columns}
        if wrong := list(contradictions(rules, kinds)):
            raise RequestError("invalid_value", " ".join(f"'{path}' {sentence}." for path, sentence in wrong), field=wrong[0][0])
        for n, pin in enumerate(rules.pins):
            check_id(f"pins.{n}.item_id", pin.item_id, self._limits)
        return rules

    def _notes(self, rules: LiveRules) -> list[str]:
        items: Any = self._rollout.funnel().items
        pins = [(f"pins.{n}", p.item_id) for n, p in enumerate(rules.pins)]
        blocks = [(f"blocks.{n}", str(v)) for n, b in enumerate(rules.blocks) if b.column == "item_id" for v in b.texts]
        return [f"'{where}': item '{one[:80]}' is not known yet." for where, one in (*pins, *blocks) if items.row(one) < 0]
