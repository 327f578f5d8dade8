"""The feature store on Redis or Valkey: one Lua call makes an event durable, idempotent and visible in its user's history.

Keys, all of a user in one hash slot (ready for a cluster), p being the user's partition:
    rf:{p}:log            stream, the log; never expires and is never evicted (eviction takes only keys with a TTL)
    rf:{p}:h:<user>       string, the history (see `from_history`); TTL
    rf:{p}:r:<user>       string, refused items as JSON, item -> time_ms; TTL, of features.history.refused_days
    rf:{p}:b:<user>       list, items of before the history (see `from_fallen`); TTL
    rf:{p}:s:<user>       hash, the user's counters: written by consumers alone (cluster/partition.py); TTL
    rf:{p}:p:<user>       string, the profile as JSON; no TTL, nothing could rebuild it
    rf:{p}:e:<digest>     mark of an event already told; TTL
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import random
import re
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import orjson
from redis import exceptions as faults
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cluster.redis_cluster import client_of, clustered, is_cluster
from cluster.redis_round import Kept, run_script
from recsys.config_faults import redact
from recsys.errors import ConfigError, StoreError, StoreUnavailableError
from recsys.features.declaration import HistoryConfig
from recsys.features.store import (
    AppendResult,
    LoggedEvent,
    NewEvent,
    ProfileChange,
    StoreConfig,
    StoredEvent,
    UserState,
    from_record,
    merged_profile,
    newest_items,
    partition_of,
    to_record,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

PASSWORD_VARIABLE = "RAYFUNNEL_REDIS_PASSWORD"  # noqa: S105 - the name of a variable, not a password
EVENTS_A_CALL = 500
"""Events per Lua call: longer scripts would hold up the reads of other users."""
PROFILES_A_ROUND = 200
TRIES = 50
"""How often a change is merged again because somebody changed the same thing meanwhile."""
PAUSE_S = 0.002, 0.1
"""Longest pause after the first and after any later miss: drawn at random, or equally fast writers could miss each other for long."""

APPEND = """
-- KEYS: log, then of each event its mark, its user's history and what fell off it; of a refusal, its user's refusals in place of the
-- history. ARGV: mark TTL (s), history TTL (s), history length, refusals TTL (s), refusals kept, fallen items kept, then entry, record
-- and item of each. An empty entry stays out of the history, an empty record out of the log; the item is ! and the id for a refusal,
-- whose entry is its time_ms, else empty.
-- Answers a character per event: 1 where it was new.
-- Where none was, a mark is written again as it is: whoever waits for disk and replicas waits for what their connection wrote.
local limit, most, told, new = tonumber(ARGV[3]), tonumber(ARGV[6]), {}, false
local function older(a, at, b, bt)  -- of equal times the smaller id, by bytes: < of strings goes by the server's locale
  if at ~= bt then return at < bt end
  local same, most = 0, math.min(#a, #b)  -- bytes that both begin with: halved, as ids such as URLs share hundreds
  while same < most do
    local half = math.ceil((same + most) / 2)
    if string.sub(a, same + 1, half) == string.sub(b, same + 1, half) then same = half else most = half - 1 end
  end
  if same < math.min(#a, #b) then return string.byte(a, same + 1) < string.byte(b, same + 1) end
  return #a < #b
end
-- An item that falls off goes behind the others: so an event writes a few bytes to the append-only file, not all items again. The
-- list holds an item as often as it fell, and a quarter more entries than are kept; then it is written anew.
local function fall(key, time, entry)
  local length = redis.call('RPUSH', key, struct.pack('>i8', 2 ^ 52 + time) .. cjson.decode(entry)[1])
  if 4 * length > 5 * most then
    local times, items = {}, {}
    for _, held in ipairs(redis.call('LRANGE', key, 0, -1)) do
      local at, item = struct.unpack('>i8', held), string.sub(held, 9)
      if not times[item] then items[#items + 1] = item end
      times[item] = math.max(times[item] or at, at)
    end
    table.sort(items, function(a, b) return older(a, times[a], b, times[b]) end)
    for n, item in ipairs(items) do items[n] = struct.pack('>i8', times[item]) .. item end
    redis.call('DEL', key)
    for first = math.max(1, #items - most + 1), #items, 500 do
      redis.call('RPUSH', key, unpack(items, first, math.min(first + 499, #items)))
    end
  end
  redis.call('EXPIRE', key, ARGV[2])
end
local function refuse(key, item, time)
  local held = cjson.decode(redis.call('GET', key) or '{}')
  held[item] = math.max(held[item] or time, time)
  local n = 0
  for _ in pairs(held) do n = n + 1 end
  while n > tonumber(ARGV[5]) do
    local oldest
    for id, at in pairs(held) do
      if not oldest or older(id, at, oldest, held[oldest]) then oldest = id end
    end
    held[oldest], n = nil, n - 1
  end
  redis.call('SET', key, cjson.encode(held), 'EX', ARGV[4])
end
for i = 1, (#KEYS - 1) / 3 do
  local mark, key, fallen = KEYS[3 * i - 1], KEYS[3 * i], KEYS[3 * i + 1]
  local entry, record, item = ARGV[3 * i + 4], ARGV[3 * i + 5], ARGV[3 * i + 6]
  told[i] = redis.call('SET', mark, '', 'NX', 'EX', ARGV[1]) and '1' or '0'
  if told[i] == '1' then
    new = true
    if record ~= '' then redis.call('XADD', KEYS[1], '*', 'e', record) end
    if item ~= '' then
      refuse(key, string.sub(item, 2), tonumber(entry))
    elseif entry ~= '' then
      local time, size = struct.unpack('<i8', entry), #entry - 8
      local count, index, body = 0, '', ''
      local held = redis.call('GET', key)
      if held and string.byte(held) == 1 then
        count = struct.unpack('<H', held, 2)
        index, body = string.sub(held, 4, 3 + 10 * count), string.sub(held, 4 + 10 * count)
      end
      local at, start = 10 * count, #body  -- where the entry goes: behind all that are not newer
      while at > 0 do
        local length, before = struct.unpack('<Hi8', index, at - 9)
        if before <= time then break end
        at, start = at - 10, start - length
      end
      index = string.sub(index, 1, at) .. struct.pack('<Hi8', size, time) .. string.sub(index, at + 1)
      body = string.sub(body, 1, start) .. string.sub(entry, 9) .. string.sub(body, start + 1)
      count = count + 1
      while count > limit do
        local length, oldest = struct.unpack('<Hi8', index)
        if most > 0 then fall(fallen, oldest, string.sub(body, 1, length - 1)) end
        body = string.sub(body, 1 + length)
        index, count = string.sub(index, 11), count - 1
      end
      redis.call('SET', key, struct.pack('<BH', 1, count) .. index .. body, 'EX', ARGV[2])
    end
  end
end
if not new then redis.call('SET', KEYS[2], '', 'XX', 'KEEPTTL') end
return table.concat(told)
"""
SWAP = """
-- KEYS: profile. ARGV: what it was, what it is to be; nothing is no profile. Answers whether it still was. Writes in any case, as APPEND.
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) end
return 1
"""
_COUNT, _TIME, _INDEX = struct.Struct("<H"), struct.Struct("<q"), struct.Struct("<Hq")
_LONGEST = 65_535


def to_entry(event: NewEvent) -> bytes:
    """An event on its way into a history: time_ms (8 bytes), then `[item, event, value, event id],` as JSON."""
    value = None if event.value is None or not math.isfinite(event.value) else float(event.value)
    try:
        told = orjson.dumps([event.item_id, event.event, value, event.event_id]) + b","
        time = _TIME.pack(event.time_ms)
    except (TypeError, ValueError, struct.error) as fault:
        raise StoreError(
            f"Event '{event.event_id}' of user '{event.user_id}' cannot be stored ({fault}). Send text ids and a time_ms since 1970."
        ) from fault
    if len(told) > _LONGEST:
        raise StoreError(
            f"An event of user '{event.user_id[:64]}' takes {len(told):,} bytes, a history holds {_LONGEST:,} each. Shorten its ids."
        )
    return time + told


def from_history(held: bytes | None) -> list[StoredEvent]:
    """The events of a stored history, oldest first.

    It holds a version (1 byte), the count (2), for each event its size (2) and time_ms (8), then the events as `to_entry`
    wrote them: the server moves them without reading them, and JSON reads them all at once. One of another version counts
    as none: the log can rebuild it.
    """
    if not held or held[0] != 1:
        return []
    body = 3 + _INDEX.size * int(_COUNT.unpack_from(held, 1)[0])
    told = orjson.loads(b"[" + held[body:-1] + b"]")
    times = _INDEX.iter_unpack(held[3:body])
    return [StoredEvent(item, kind, time, value, event_id) for (item, kind, value, event_id), (_, time) in zip(told, times, strict=True)]


def from_fallen(held: Sequence[bytes], most: int) -> set[str]:
    """The newest `most` items of what fell off a history.

    An entry is time_ms + 2^52 (8 bytes, big-endian) and the item, so that entries sort as they do in `newest_items`. They stand as
    they fell, and an item in several: the server prunes now and then.
    """
    newest = held if len(held) <= most else sorted(held, reverse=True)
    return {item.decode() for item in islice(dict.fromkeys(entry[_TIME.size :] for entry in newest), most)}


def redacted(url: str) -> str:
    """A URL that may be shown: without its password."""
    parts = urlsplit(url)
    return redact(url.replace(f":{parts.password}@", ":***@") if parts.password else url)


def connected(url: str, *, timeout_s: float | None = None) -> Redis:
    """A client of the server at `url`: redis://, rediss:// or unix://, or of a cluster: redis+cluster://, rediss+cluster://. With TLS, `?ssl_ca_certs=FILE`
    names an authority that the host does not know. It asks again once where a connection was closed meanwhile.

    A password may stand in the environment instead, as RAYFUNNEL_REDIS_PASSWORD. Raises ConfigError for what is no address.
    """
    secret = os.environ.get(PASSWORD_VARIABLE)
    password = {} if urlsplit(url).password else {"password": secret}
    try:
        if is_cluster(url):
            return cast("Redis", client_of(url, secret, socket_connect_timeout=1.0, socket_timeout=timeout_s))
        pool = BlockingConnectionPool.from_url(
            url,
            protocol=2,
            max_connections=16,
            retry=Retry(NoBackoff(), 1),
            socket_connect_timeout=1.0,
            socket_timeout=timeout_s,
            **password,
        )
    except ValueError as fault:
        raise ConfigError(
            f"redis_url '{redacted(url)}' is no address of a Redis ({fault}). Expected redis://host:6379/0, or redis+cluster://host:6379."
        ) from fault
    return Redis.from_pool(pool)


class RedisStore:
    """The FeatureStore on a Redis or Valkey server, for one event loop; it reconnects by itself."""

    def __init__(self, url: str, config: StoreConfig | None = None, history: HistoryConfig | None = None) -> None:
        """`url` as in `connected`."""
        self.config, self.history, self.shown_url = config or StoreConfig(), history or HistoryConfig(), redacted(url)
        self._redis = connected(url)
        self._clustered = clustered(self._redis)
        self._prepared: bool = False
        self._kept = Kept(self.shown_url, self.config.append_timeout_ms / 1000.0, replicas=self.config.replicas_acked)

    def _key(self, partition: int, part: str, user_id: str = "") -> bytes:
        return f"{self.config.prefix}:{{{partition}}}:{part}{user_id}".encode()

    async def append(self, events: Sequence[NewEvent]) -> AppendResult:
        """See FeatureStore: durable, atomic per event; grouped by partition, one round trip."""
        return (await self.append_all([events]))[0]

    async def append_all(self, calls: Sequence[Sequence[NewEvent]]) -> list[AppendResult]:
        """See FeatureStore: one round trip for all callers."""
        events = [event for told in calls for event in told]
        if not events:
            return [AppendResult(0, 0) for _ in calls]
        new = await self._answered(self._told(events), self.config.append_timeout_ms / 1000.0)
        results, at = [], 0
        for told in calls:
            accepted = sum(new[at : at + len(told)])
            results.append(AppendResult(accepted, len(told) - accepted))
            at += len(told)
        return results

    async def _told(self, events: Sequence[NewEvent]) -> list[bool]:
        """Log events and update histories; whether each was new."""
        return await self._append(*self._calls(events, to_record), len(events))

    def _calls(self, events: Sequence[NewEvent], record: Callable[[NewEvent], bytes]) -> tuple[list[list[Any]], list[list[int]]]:
        """The arguments of each Lua call, at most EVENTS_A_CALL events of one partition in the order they came; and which."""
        by_partition: dict[int, list[int]] = defaultdict(list)
        for i, event in enumerate(events):
            by_partition[partition_of(event.user_id, self.config.partitions)].append(i)
        history = self.history
        limits = [math.ceil(self.config.duplicate_ttl_h * 3600), math.ceil(self.config.user_ttl_h * 3600), history.length]
        limits += [math.ceil(history.refused_s), history.refused, history.seen]
        calls, which = [], []
        for partition, mine in by_partition.items():
            for a in range(0, len(mine), EVENTS_A_CALL):
                keys, values = [self._key(partition, "log")], list[Any](limits)
                for i in mine[a : a + EVENTS_A_CALL]:
                    event = events[i]
                    refuses = history.refuses(event.event)
                    keys += [self._mark(partition, event)]
                    keys += [self._key(partition, part, event.user_id) for part in ("r:" if refuses else "h:", "b:")]
                    if refuses:
                        values += [event.time_ms, record(event), b"!" + event.item_id.encode()]
                    else:
                        values += [to_entry(event) if history.admits(event.event) else b"", record(event), b""]
                calls.append([len(keys), *keys, *values])
                which.append(mine[a : a + EVENTS_A_CALL])
        return calls, which

    def _mark(self, partition: int, event: NewEvent) -> bytes:
        user = event.user_id.encode()
        told = len(user).to_bytes(4, "little") + user + event.event_id.encode()
        return self._key(partition, "e:") + hashlib.blake2b(told, digest_size=12).digest()

    async def _append(self, calls: list[list[Any]], which: list[list[int]], n: int) -> list[bool]:
        new = [False] * n
        for answer, mine in zip(await self._run(APPEND, calls), which, strict=True):
            for i, said in zip(mine, answer, strict=True):
                new[i] = said == ord("1")
        return new

    async def _run(self, script: str, calls: list[list[Any]]) -> list[Any]:
        """The answers of a script's calls, whose changes are on disk and at the replicas. Raises the first fault among them."""
        await self._prepare()
        answers = await run_script(self._redis, script, calls, self._kept)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def read(self, user_ids: Sequence[str], *, timeout_s: float) -> list[UserState]:
        """See FeatureStore: one round trip for the whole micro-batch."""
        return await self._answered(self._read(user_ids), timeout_s) if user_ids else []

    async def _read(self, user_ids: Sequence[str]) -> list[UserState]:
        await self._prepare()
        homes = [(partition_of(user_id, self.config.partitions), user_id) for user_id in user_ids]
        names = [self._key(p, part, user_id) for p, user_id in homes for part in ("h:", "r:", "p:")]
        async with self._redis.pipeline(transaction=False) as pipe:
            if self._clustered:  # MGET is of one slot
                for name in names:
                    pipe.get(name)
            else:
                pipe.mget(names)
            for p, user_id in homes:
                pipe.hvals(self._key(p, "s:", user_id))
                if self.history.seen:
                    pipe.lrange(self._key(p, "b:", user_id).decode(), 0, -1)
            held, *more = await pipe.execute()
            if self._clustered:
                held, more = [held, *more[: len(names) - 1]], more[len(names) - 1 :]
        counters, fallen = (more[::2], more[1::2]) if self.history.seen else (more, [[]] * len(homes))
        return [
            UserState(*self._parted(from_history(h), r), from_fallen(f, self.history.seen), orjson.loads(p) if p else {}, b"".join(c))
            for h, r, p, f, c in zip(held[::3], held[1::3], held[2::3], fallen, counters, strict=True)
        ]

    def _parted(self, events: list[StoredEvent], held: bytes | None) -> tuple[list[StoredEvent], dict[str, int]]:
        """The history and what was refused; a history written by an earlier release holds both."""
        refused: dict[str, int] = orjson.loads(held) if held else {}
        refuses = self.history.refuses
        if not any(refuses(e.event) for e in events):
            return events, refused
        for e in events:
            if refuses(e.event):
                refused[e.item_id] = max(e.time_ms, refused.get(e.item_id, e.time_ms))
        return [e for e in events if not refuses(e.event)], newest_items(refused, self.history.refused)

    async def change_profiles(self, changes: Mapping[str, ProfileChange]) -> None:
        """See FeatureStore. A profile that somebody else changed between being read and being written is read and merged again."""
        users, timeout_s = list(changes), self.config.append_timeout_ms / 1000.0
        for at in range(0, len(users), PROFILES_A_ROUND):
            left = users[at : at + PROFILES_A_ROUND]
            for n in range(TRIES):
                left = await self._answered(self._swap({user_id: changes[user_id] for user_id in left}), timeout_s)
                if not left:
                    break
                await asyncio.sleep(pause_s(n))
            else:
                raise StoreUnavailableError(
                    f"The profiles of {len(left)} users are changed by somebody else all the time. Send them again."
                )

    async def _swap(self, changes: Mapping[str, ProfileChange]) -> list[str]:
        """Write what is still as it was read; gives the users that somebody else was faster with."""
        keys = [self._key(partition_of(user_id, self.config.partitions), "p:", user_id) for user_id in changes]
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.get(key)
            held = [profile or b"" for profile in await pipe.execute()]
        calls = [[1, k, h, merged_profile(u, h, changes[u])] for k, h, u in zip(keys, held, changes, strict=True)]
        return [user_id for user_id, done in zip(changes, await self._run(SWAP, calls), strict=True) if not done]

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
        if not self._clustered:
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
        self._kept = replace(self._kept, disk=kept == "yes" and synced != "always")
        if self._clustered and not self._kept.replicas:
            log.warning(
                "The cluster at %s confirms an event before a replica has it: a failover may cost the last accepted events. "
                "Set store.replicas_acked to the number of replicas that each primary has.",
                self.shown_url,
            )
        self._prepared = True

    async def _answered(self, call: Awaitable[T], timeout_s: float) -> T:
        """The answer of a call within its time; whatever a server says instead becomes a sentence."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except (TimeoutError, faults.RedisError, OSError) as fault:
            raise StoreUnavailableError(f"The feature store at {self.shown_url} {reason(fault, timeout_s)}") from fault


def pause_s(n: int) -> float:
    """How long to wait after the n-th miss, counted from 0."""
    return random.uniform(0, min(PAUSE_S[0] * 2.0**n, PAUSE_S[1]))  # noqa: S311 - no secret


_CERTIFICATE = re.compile(r"certificate verify failed: (.*?)\.? \(_ssl")
_REASONS: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((TimeoutError, faults.TimeoutError), "did not answer within {ms:.0f} ms. Check its load, or raise the limit."),
    (
        (faults.AuthenticationError, faults.AuthorizationError, faults.NoPermissionError),
        "refuses us ({fault}). Check the user and password of redis_url, or {variable}.",
    ),
    ((faults.BusyLoadingError,), "is still loading its data after a start. Try again shortly."),
    ((faults.ReadOnlyError,), "is a read-only replica. Point redis_url to the primary."),
    ((faults.OutOfMemoryError,), "has reached its maxmemory, and the log is never evicted. Give it memory, or trim the log."),
    ((Exception,), "is not available ({fault}). It is asked again at the next call."),
)


def reason(fault: BaseException, timeout_s: float) -> str:
    """What to say of a server that answered with a fault, or not at all."""
    if isinstance(fault, faults.ConnectionError) and isinstance(fault.__cause__, faults.RedisError):
        fault = fault.__cause__  # what a server says while a connection is being made comes wrapped
    if (verified := _CERTIFICATE.search(str(fault))) is not None:
        return (
            f"shows a certificate that cannot be trusted ({verified[1]}). Name the file of its authority in redis_url: "
            "rediss://host:6379/0?ssl_ca_certs=/path/ca.pem."
        )
    text = next(text for kinds, text in _REASONS if isinstance(fault, kinds))
    return text.format(ms=1000 * timeout_s, fault=fault, variable=PASSWORD_VARIABLE)
