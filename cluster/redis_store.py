"""The feature store on Redis or Valkey: one Lua call makes an event durable, idempotent and visible in its user's history.

Keys, all of a user in one hash slot (ready for a cluster), p being the user's partition:
    rf:{p}:log            stream, the log; never expires and is never evicted (eviction takes only keys with a TTL)
    rf:{p}:h:<user>       string, the history: 11 bytes of head, then entries (see `to_entry`), oldest first; TTL
    rf:{p}:p:<user>       string, the profile as JSON; no TTL, nothing could rebuild it
    rf:{p}:e:<digest>     mark of an event already told; TTL
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson
from redis import exceptions as faults
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.schema import HistoryConfig
from recsys.features.store import (
    AppendResult,
    LoggedEvent,
    NewEvent,
    StoreConfig,
    StoredEvent,
    UserState,
    from_record,
    partition_of,
    to_profile,
    to_record,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

PASSWORD_VARIABLE = "RAYFUNNEL_REDIS_PASSWORD"  # noqa: S105 - the name of a variable, not a password
EVENTS_A_CALL = 500
"""Events per Lua call: longer scripts would hold up the reads of other users."""

APPEND = """
-- KEYS: log, then mark and history of each event. ARGV: mark TTL (s), history TTL (s), history length, then entry and record of each.
-- An empty entry stays out of the history. Answers how many events were new.
local limit, accepted = tonumber(ARGV[3]), 0
for i = 1, (#KEYS - 1) / 2 do
  local mark, key, entry, record = KEYS[2 * i], KEYS[2 * i + 1], ARGV[2 * i + 2], ARGV[2 * i + 3]
  if redis.call('SET', mark, '', 'NX', 'EX', ARGV[1]) then
    redis.call('XADD', KEYS[1], '*', 'e', record)
    accepted = accepted + 1
    if entry ~= '' then
      local count, newest, body = 0, 0, ''
      local held = redis.call('GET', key)
      if held and string.byte(held) == 1 then
        local _
        _, count, newest = struct.unpack('<BHi8', held)
        body = string.sub(held, 12)
      end
      local time = struct.unpack('<i8', entry, 3)
      if count == 0 or time >= newest then
        body, newest = body .. entry, time
      else  -- late: behind every entry that is not newer
        local at = 1
        while struct.unpack('<i8', body, at + 2) <= time do
          at = at + 10 + struct.unpack('<H', body, at)
        end
        body = string.sub(body, 1, at - 1) .. entry .. string.sub(body, at)
      end
      count = count + 1
      while count > limit do
        body = string.sub(body, 11 + struct.unpack('<H', body))
        count = count - 1
      end
      redis.call('SET', key, struct.pack('<BHi8', 1, count, newest) .. body, 'EX', ARGV[2])
    end
  end
end
return accepted
"""
_SHA = hashlib.sha1(APPEND.encode(), usedforsecurity=False).hexdigest()
_HEAD = struct.Struct("<BHq")
_ENTRY = struct.Struct("<HqHBB")


def to_entry(event: NewEvent) -> bytes:
    """An event in a history: size (2 bytes, of what follows the time), time_ms (8), then the lengths of item (2) and event type (1),
    whether a value follows (1), item, event type, value (8, if any), event id. StoreError where a part is too long."""
    item, kind, event_id = event.item_id.encode(), event.event.encode(), event.event_id.encode()
    value = b"" if event.value is None or not math.isfinite(event.value) else struct.pack("<d", event.value)
    body = item + kind + value + event_id
    try:
        return _ENTRY.pack(len(body) + 4, event.time_ms, len(item), len(kind), bool(value)) + body
    except struct.error as fault:
        raise StoreError(
            f"An event of {len(body):,} bytes (type of {len(kind):,}) at {event.time_ms} ms does not fit in a history ({fault}). Shorten its ids."
        ) from fault


def from_history(held: bytes | None) -> list[StoredEvent]:
    """The events of a stored history, oldest first. One of another version counts as none: it is rebuilt from the log."""
    if not held or held[0] != 1:
        return []
    events, at, end = [], _HEAD.size, len(held)
    while at < end:
        size, time_ms, n_item, n_kind, has_value = _ENTRY.unpack_from(held, at)
        item = at + _ENTRY.size
        kind = item + n_item
        rest = kind + n_kind
        at += 10 + size
        value = None
        if has_value:
            (value,) = struct.unpack_from("<d", held, rest)
            rest += 8
        events.append(StoredEvent(held[item:kind].decode(), held[kind : kind + n_kind].decode(), time_ms, value, held[rest:at].decode()))
    return events


def redacted(url: str) -> str:
    """A URL that may be shown: without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


class RedisStore:
    """The FeatureStore on a Redis or Valkey server, for one event loop; it reconnects by itself."""

    def __init__(self, url: str, config: StoreConfig | None = None, history: HistoryConfig | None = None) -> None:
        """`url`: redis://, rediss:// or unix://. A password may stand in the environment instead, as RAYFUNNEL_REDIS_PASSWORD."""
        self.config, self.history, self.shown_url = config or StoreConfig(), history or HistoryConfig(), redacted(url)
        password = {} if urlsplit(url).password else {"password": os.environ.get(PASSWORD_VARIABLE)}
        try:
            pool = BlockingConnectionPool.from_url(
                url, max_connections=16, retry=Retry(NoBackoff(), 1), socket_connect_timeout=1.0, **password
            )
        except ValueError as fault:
            raise ConfigError(f"redis_url '{self.shown_url}' is no address of a Redis ({fault}). Expected redis://host:6379/0.") from fault
        self._redis = Redis(connection_pool=pool)
        self._prepared: bool = False
        self._wait_for_disk = False

    def _key(self, partition: int, part: str, user_id: str = "") -> bytes:
        return f"{self.config.prefix}:{{{partition}}}:{part}{user_id}".encode()

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        """See FeatureStore: durable, atomic per event; grouped by partition, one round trip."""
        calls = self._calls(events)
        accepted = await self._answered(self._append(calls), self.config.append_timeout_ms / 1000.0) if calls else 0
        return AppendResult(accepted, len(events) - accepted)

    def _calls(self, events: Sequence[NewEvent]) -> list[list[Any]]:
        """The arguments of each Lua call: at most EVENTS_A_CALL events of one partition, in the order they came."""
        by_partition: dict[int, list[NewEvent]] = defaultdict(list)
        for event in events:
            by_partition[partition_of(event.user_id, self.config.partitions)].append(event)
        limits = [math.ceil(self.config.duplicate_ttl_h * 3600), math.ceil(self.config.user_ttl_h * 3600), self.history.length]
        calls = []
        for partition, told in by_partition.items():
            for a in range(0, len(told), EVENTS_A_CALL):
                keys, values = [self._key(partition, "log")], list[Any](limits)
                for event in told[a : a + EVENTS_A_CALL]:
                    keys += [self._mark(partition, event), self._key(partition, "h:", event.user_id)]
                    values += [to_entry(event) if self.history.admits(event.event) else b"", to_record(event)]
                calls.append([len(keys), *keys, *values])
        return calls

    def _mark(self, partition: int, event: NewEvent) -> bytes:
        user = event.user_id.encode()
        told = len(user).to_bytes(4, "little") + user + event.event_id.encode()
        return self._key(partition, "e:") + hashlib.blake2b(told, digest_size=12).digest()

    async def _append(self, calls: list[list[Any]]) -> int:
        await self._prepare()
        answers = await self._eval(calls)
        unknown = [i for i, answer in enumerate(answers) if isinstance(answer, faults.NoScriptError)]
        if unknown:  # a server that has just started does not know the script
            await self._redis.script_load(APPEND)
            for i, answer in zip(unknown, await self._eval([calls[i] for i in unknown]), strict=True):
                answers[i] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return sum(answers)

    async def _eval(self, calls: list[list[Any]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for arguments in calls:
                pipe.evalsha(_SHA, *arguments)
            if self._wait_for_disk:
                pipe.execute_command("WAITAOF", 1, 0, int(self.config.append_timeout_ms))
            answers = list(await pipe.execute(raise_on_error=False))
        if self._wait_for_disk and (isinstance(synced := answers.pop(), Exception) or synced[0] < 1):
            raise StoreUnavailableError(
                f"The feature store at {self.shown_url} did not reach its disk ({synced}). Nothing is confirmed; send again."
            )
        return answers

    async def read(self, user_ids: Sequence[str], *, timeout_s: float) -> list[UserState]:
        """See FeatureStore: one pipeline, one command per partition."""
        return await self._answered(self._read(user_ids), timeout_s) if user_ids else []

    async def _read(self, user_ids: Sequence[str]) -> list[UserState]:
        await self._prepare()
        places: dict[int, list[int]] = defaultdict(list)
        for i, user_id in enumerate(user_ids):
            places[partition_of(user_id, self.config.partitions)].append(i)
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition, at in places.items():
                pipe.mget([self._key(partition, part, user_ids[i]) for i in at for part in ("h:", "p:")])
            answers = await pipe.execute()
        states = [UserState() for _ in user_ids]
        for at, held in zip(places.values(), answers, strict=True):
            for i, history, profile in zip(at, held[::2], held[1::2], strict=True):
                states[i] = UserState(from_history(history), orjson.loads(profile) if profile else {})
        return states

    async def put_profile(self, user_id: str, profile: Mapping[str, Any]) -> None:
        """See FeatureStore."""
        key = self._key(partition_of(user_id, self.config.partitions), "p:", user_id)
        call = self._redis.set(key, to_profile(user_id, profile)) if profile else self._redis.delete(key)
        await self._answered(call, self.config.append_timeout_ms / 1000.0)

    async def read_log(self, partition: int, after: str = "") -> AsyncIterator[LoggedEvent]:
        """See FeatureStore; positions are ids of the stream."""
        while True:
            call = self._redis.xrange(self._key(partition, "log"), f"({after}" if after else "-", "+", count=EVENTS_A_CALL)
            page = await self._answered(call, self.config.append_timeout_ms / 1000.0)
            for position, fields in page:
                after = position.decode()
                yield LoggedEvent(after, from_record(fields[b"e"]))
            if len(page) < EVENTS_A_CALL:
                return

    async def ping(self) -> None:
        """See FeatureStore; within a second."""
        await self._answered(self._redis.ping(), 1.0)

    async def close(self) -> None:
        """See FeatureStore."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _prepare(self) -> None:
        """Once: agree on the number of partitions, and learn whether an answer of the server means that the disk has it."""
        if self._prepared:
            return
        asked = self.config.partitions
        key = f"{self.config.prefix}:partitions"
        held = int(await self._redis.set(key, asked, nx=True, get=True) or asked)
        if held != asked:
            raise StoreError(
                f"The feature store at {self.shown_url} holds {held} partitions, the configuration says {asked}. Set store.partitions: {held}."
            )
        try:
            said = await self._redis.config_get("append*")
        except faults.ResponseError:  # managed servers hide their configuration
            said = {}
            log.info("feature store durability=unknown (CONFIG is not allowed at %s)", self.shown_url)
        kept, synced = said.get("appendonly", "yes"), said.get("appendfsync", "always")
        if kept != "yes":
            log.warning("The feature store at %s has appendonly %s: accepted events do not survive its end.", self.shown_url, kept)
        self._wait_for_disk = kept == "yes" and synced != "always"
        self._prepared = True

    async def _answered(self, call: Awaitable[T], timeout_s: float) -> T:
        """The answer of a call within its time; whatever a server says instead becomes a sentence."""
        where = f"The feature store at {self.shown_url}"
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except (TimeoutError, faults.TimeoutError) as fault:
            raise StoreUnavailableError(
                f"{where} did not answer within {1000 * timeout_s:.0f} ms. Check its load, or raise the limit."
            ) from fault
        except (faults.AuthenticationError, faults.AuthorizationError, faults.NoPermissionError) as fault:
            raise StoreUnavailableError(
                f"{where} refuses us ({fault}). Check the user and password of redis_url, or {PASSWORD_VARIABLE}."
            ) from fault
        except faults.BusyLoadingError as fault:
            raise StoreUnavailableError(f"{where} is still loading its data after a start. Try again shortly.") from fault
        except faults.ReadOnlyError as fault:
            raise StoreUnavailableError(f"{where} is a read-only replica. Point redis_url to the primary.") from fault
        except faults.OutOfMemoryError as fault:
            raise StoreUnavailableError(
                f"{where} has reached its maxmemory, and the log is never evicted. Give it memory, or trim the log."
            ) from fault
        except (faults.RedisError, OSError) as fault:
            raise StoreUnavailableError(f"{where} is not available ({fault}). It is asked again at the next call.") from fault
