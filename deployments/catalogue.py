"""PUT and DELETE of items and users: each checked against the declared columns, durable before the answer, one or many a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from deployments.checks import check_id, check_size, check_text, fault
from deployments.rollout import Rollout
from deployments.schemas import ITEM, USER, ItemBody, UserBody
from recsys.errors import RequestError, StoreUnavailableError
from recsys.features.live_items import ItemChange, ItemLog, checked
from recsys.features.store import FeatureStore
from recsys.serve_config import LimitsConfig

T = TypeVar("T")


class CatalogueWrites:
    """What of the gateway changes items and users."""

    def __init__(self, rollout: Rollout, store: FeatureStore, items: ItemLog, limits: LimitsConfig) -> None:
        self._rollout, self._store, self._items, self._limits = rollout, store, items, limits

    async def put_items(self, raw: bytes) -> bytes:
        """The answer of PUT /v1/items as JSON. Raises RequestError."""
        return await self._change(raw, self._upsert)

    async def delete_items(self, raw: bytes) -> bytes:
        """The answer of DELETE /v1/items as JSON. Raises RequestError."""
        return await self._change(raw, lambda row: ItemChange(self._item(_bare(row, "item_id")).item_id, None))

    async def put_users(self, raw: bytes) -> bytes:
        """The answer of PUT /v1/users as JSON. Raises RequestError."""
        users, rejected = await self._read(raw, self._profile)
        changes: dict[str, dict[str, Any]] = {}
        for _, (user_id, columns) in users:
            changes.setdefault(user_id, {}).update(columns)
        await self._profiles(changes)
        return _answer(len(users), rejected)

    async def delete_users(self, raw: bytes) -> bytes:
        """The answer of DELETE /v1/users as JSON: their profiles are forgotten. Raises RequestError."""
        users, rejected = await self._read(raw, lambda row: self._user(_bare(row, "user_id")))
        await self._profiles({user.user_id: None for _, user in users})
        return _answer(len(users), rejected)

    # ---- items ----------------------------------------------------------------------------------------------------

    def _upsert(self, row: Any) -> ItemChange:
        body = self._item(row)
        return ItemChange(body.item_id, checked(body.columns, self._rollout.funnel().space.columns["item"], whose="item"), body.title)

    async def _change(self, raw: bytes, one: Callable[[Any], ItemChange]) -> bytes:
        changes, rejected = await self._read(raw, one)
        position = 0
        if changes:
            try:
                position = await asyncio.to_thread(self._items.change, [change for _, change in changes])
            except StoreUnavailableError as error:
                raise away() from error
        return _answer(len(changes), rejected, position)

    def _item(self, row: Any) -> ItemBody:
        return self._body(ITEM, row, lambda body: ("item_id", body.item_id))

    # ---- users ----------------------------------------------------------------------------------------------------

    def _user(self, row: Any) -> UserBody:
        return self._body(USER, row, lambda body: ("user_id", body.user_id))

    def _profile(self, row: Any) -> tuple[str, dict[str, Any]]:
        body = self._user(row)
        return body.user_id, checked(body.columns, self._rollout.funnel().profile_columns, whose="user")

    async def _profiles(self, changes: dict[str, Any]) -> None:
        """Each user's profile with what was given; None forgets it."""
        try:
            await self._store.change_profiles(changes)
        except StoreUnavailableError as error:
            raise away() from error

    # ---- bodies ---------------------------------------------------------------------------------------------------

    async def _read(self, raw: bytes, one: Callable[[Any], T]) -> tuple[list[tuple[int, T]], list[dict[str, Any]]]:
        """What may be stored with its index, and the rejections; beside the event loop where there is much of it."""
        return await asyncio.to_thread(self._rows, raw, one) if len(raw) > 32_768 else self._rows(raw, one)

    def _body(self, shape: TypeAdapter[T], row: Any, named: Callable[[T], tuple[str, str]]) -> T:
        """One row as its shape; `named` gives the name and the value of its id, which is checked too."""
        try:
            body = shape.validate_python(row)
        except ValidationError as error:
            raise fault(error) from None
        check_id(*named(body), self._limits)
        return body

    def _rows(self, raw: bytes, one: Callable[[Any], T]) -> tuple[list[tuple[int, T]], list[dict[str, Any]]]:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise RequestError("malformed_json", f"The body is not valid JSON: {error}.", status=400) from None
        rows: Sequence[Any] = body if isinstance(body, list) else [body]
        if not rows:
            raise RequestError("empty_list", "The list is empty. Send at least one.")
        if len(rows) > (most := self._limits.items_per_call):
            raise RequestError("too_many_items", f"{len(rows)} came; at most {most} are taken in one call. Send them in parts.")
        found: list[tuple[int, T]] = []
        rejected: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            try:
                check_text(row)
                check_size(row, len(raw), self._limits)
                found.append((index, one(row)))
            except RequestError as error:
                _reject(raw, rejected, index, error)
        return found, rejected


def _reject(raw: bytes, rejected: list[dict[str, Any]], index: int, error: RequestError) -> None:
    """Take note of a row that cannot be taken; one that came alone is refused as a whole."""
    if raw.lstrip()[:1] != b"[":
        raise error
    rejected.append({"index": index, "code": error.code, "message": str(error)})


def _bare(row: Any, name: str) -> Any:
    """A row of a DELETE, which may be an id alone."""
    return row if isinstance(row, dict) else {name: row}


def _answer(accepted: int, rejected: list[dict[str, Any]], position: int | None = None) -> bytes:
    return orjson.dumps({"accepted": accepted, "rejected": rejected} | ({} if position is None else {"position": position}))


def away() -> RequestError:
    """What a change answers while the store is away."""
    text = "The store does not answer, so it is not certain that anything was kept. Send it again: repeating is harmless."
    return RequestError("store_unavailable", text, status=503)
