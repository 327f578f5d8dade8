"""The log of changed items on Redis or Valkey: one Lua call keeps a change and gives it its position.

Keys, all in one hash slot; none expires, for nothing could rebuild them:
    rf:{items}:held      hash, item id -> its number, a space, its newest record as JSON
    rf:{items}:order     sorted set, item id -> position of its newest change: what lies behind a position is one range
    rf:{items}:changes   how many changes there were; the newest position
    rf:{items}:epoch     names this log: another one, or an emptied one, has another
    rf:{items}:shown     hash, item id -> how often it was shown since it was told of
    rf:{items}:rules     how often rules were told, a space, their newest document (see rerank.live_rules), empty: taken back
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis import exceptions as faults

from cluster.redis_cluster import as_server_faults, blocking_client_of, check, is_cluster, run_blocking
from cluster.redis_round import Kept, digest
from cluster.redis_store import PASSWORD_VARIABLE, TRIES, pause_s, reason, redacted
from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.live_items import Changes, ItemChange, ItemRecord, from_json, merged, to_json
from recsys.features.store import StoreConfig

T = TypeVar("T")
ITEMS_A_CALL = 500
"""Changes per Lua call, and records per read."""

CHANGE = """
-- KEYS: held, order, changes, epoch. ARGV: a name for the log, then of each item its id, what it was merged with, and its record.
-- Answers the places of those that somebody has changed meanwhile, and the newest position.
redis.call('SET', KEYS[4], ARGV[1], 'NX')
local missed = {}
for i = 2, #ARGV, 3 do
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  if (held or '') ~= ARGV[i + 1] then
    missed[#missed + 1] = (i - 2) / 3
  else
    local number = held and string.match(held, '^%d+') or redis.call('HLEN', KEYS[1])
    redis.call('HSET', KEYS[1], ARGV[i], number .. ' ' .. ARGV[i + 2])
    redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[i])
  end
end
return {missed, redis.call('GET', KEYS[3]) or '0'}
"""

RULE = """
-- KEYS: rules. ARGV: a document. Answers how often rules were told.
local held = redis.call('GET', KEYS[1])
local number = (held and tonumber(string.match(held, '^%d+')) or 0) + 1
redis.call('SET', KEYS[1], string.format('%d', number) .. ' ' .. ARGV[1])
return number
"""


class RedisItemLog:
    """The ItemLog on a server. Blocking: replicas follow it from a thread of their own."""

    def __init__(self, url: str, config: StoreConfig | None = None, *, timeout_s: float | None = None) -> None:
        """`url` as for RedisStore; a call may take `timeout_s` (default: store.append_timeout_ms)."""
        config = config or StoreConfig()
        self.shown_url, self._timeout_s = redacted(url), timeout_s or config.append_timeout_ms / 1000.0
        self._keys = [f"{config.prefix}:{{items}}:{part}" for part in ("held", "order", "changes", "epoch")]
        self._shown_key, self._rules_key = f"{config.prefix}:{{items}}:shown", f"{config.prefix}:{{items}}:rules"
        self._url, self._secret = url, os.environ.get(PASSWORD_VARIABLE)
        try:
            if is_cluster(url):
                check(url)
            else:
                redis.Redis.from_url(url)
        except ValueError as fault:
            raise ConfigError(
                f"redis_url '{self.shown_url}' is no address of a Redis ({fault}). Expected redis://host:6379/0, or redis+cluster://host:6379."
            ) from fault
        self._kept: Kept | None = None
        self._replicas = config.replicas_acked

    @cached_property
    def _redis(self) -> redis.Redis:
        """Made at the first call: a cluster's client connects then, and is made again where that fails."""
        limits = {"socket_timeout": self._timeout_s, "socket_connect_timeout": 1.0}
        if is_cluster(self._url):
            return blocking_client_of(self._url, self._secret, **limits)
        password = {} if urlsplit(self._url).password else {"password": self._secret}
        return redis.Redis.from_url(self._url, protocol=2, **limits, **password)

    def change(self, changes: Sequence[ItemChange]) -> int:
        """See ItemLog; what others change at the same time is merged, none is lost."""
        position = 0
        for at in range(0, len(changes), ITEMS_A_CALL):
            left = list(changes[at : at + ITEMS_A_CALL])
            for n in range(TRIES):
                left, position = self._answered(lambda left=left: self._attempt(left))  # type: ignore[misc]
                if not left:
                    break
                time.sleep(pause_s(n))
            else:
                raise StoreError(f"{len(left)} items are changed by somebody else all the time. Send them again.")
        return position

    def _attempt(self, changes: Sequence[ItemChange]) -> tuple[list[ItemChange], int]:
        by_item: dict[str, list[ItemChange]] = {}
        for change in changes:
            by_item.setdefault(change.item_id, []).append(change)
        held: Any = self._redis.hmget(self._keys[0], list(by_item))
        now = int(1000 * time.time())
        arguments: list[Any] = [uuid.uuid4().hex]
        for (item_id, told), value in zip(by_item.items(), held, strict=True):
            record = _record(item_id, value) if value else None
            for change in told:  # an item told of twice in one call is merged with what it has just become
                record = merged(record, change, now)
            assert record is not None  # noqa: S101 - nobody is here without a change
            arguments += [item_id, value or b"", to_json(record)]
        missed, position = self._run(CHANGE, [len(self._keys), *self._keys, *arguments])
        items = list(by_item.values())
        return [change for n in missed for change in items[int(n)]], int(position)

    def _run(self, script: str, call: list[Any]) -> Any:
        """The answer of a script whose changes are on disk and at the replicas."""
        if self._kept is None:
            try:
                said: Any = self._redis.config_get("append*")
            except faults.ResponseError:  # managed servers hide their configuration
                said = {}
            disk = said.get("appendonly", "yes") == "yes" and said.get("appendfsync", "always") != "always"
            self._kept = Kept(self.shown_url, self._timeout_s, disk, self._replicas)
        (answer,) = run_blocking(self._redis, [("EVALSHA", digest(script), *call)], self._keys[0], self._kept)
        if isinstance(answer, faults.NoScriptError):
            (answer,) = run_blocking(self._redis, [("EVAL", script, *call)], self._keys[0], self._kept)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def since(self, position: int) -> Changes:
        """See ItemLog."""
        return self._answered(lambda: self._since(position))

    def _since(self, position: int) -> Changes:
        held_key, order, changes, epoch = self._keys
        records: dict[str, ItemRecord] = {}
        while True:
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.get(epoch).get(changes).zrangebyscore(order, f"({position}", "+inf", start=0, num=ITEMS_A_CALL, withscores=True)
                pipe.get(self._rules_key)
                name, newest, page, ruled = pipe.execute()
            if page:
                ids = [item_id for item_id, _ in page]
                values: Any = self._redis.hmget(held_key, ids)
                # An item changed again between the two reads comes with its newer record now, and once more at the next call.
                records |= {i.decode(): _record(i.decode(), value) for i, value in zip(ids, values, strict=True) if value}
                position = int(page[-1][1])
            if len(page) < ITEMS_A_CALL:
                # A log shorter than what was read of it is another log, whatever it is called.
                name = (name or b"").decode() if int(newest or 0) >= position else uuid.uuid4().hex
                told, _, document = (ruled or b"0 ").partition(b" ")
                return Changes(name, position, list(records.values()), (int(told) if told.isdigit() else 0, document))

    def rule(self, document: bytes) -> int:
        """See ItemLog."""
        return int(self._answered(lambda: self._run(RULE, [1, self._rules_key, document])))

    def show(self, counts: Mapping[str, int]) -> None:
        """See ItemLog."""

        def add() -> None:
            with self._redis.pipeline(transaction=False) as pipe:
                for item_id, n in counts.items():
                    pipe.hincrby(self._shown_key, item_id, n)
                pipe.execute()

        self._answered(add)

    def shown(self) -> dict[str, int]:
        """See ItemLog."""
        held: Any = self._answered(lambda: self._redis.hgetall(self._shown_key))
        return {item_id.decode(): int(n) for item_id, n in held.items()}

    def close(self) -> None:
        """See ItemLog."""
        if "_redis" in self.__dict__:
            self._redis.close()

    def _answered(self, call: Callable[[], T]) -> T:
        try:
            with as_server_faults():
                return call()
        except (faults.RedisError, OSError) as fault:
            if is_cluster(self._url) and isinstance(fault, faults.ConnectionError | faults.TimeoutError | OSError):
                self.close()  # the library forgets the nodes that the URL names: a new client asks them
                self.__dict__.pop("_redis", None)
            raise StoreUnavailableError(f"The feature store at {self.shown_url} {reason(fault, self._timeout_s)}") from fault


def _record(item_id: str, held: bytes) -> ItemRecord:
    number, _, told = held.partition(b" ")
    return from_json(item_id, int(number), told)
