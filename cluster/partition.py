"""What consumers keep of a partition in the store, and the fence: all writes name the owner's epoch and the position they begin at.

Keys of partition p, one hash slot (beside those of `cluster.redis_store`):
    rf:{p}:owned          hash: owner, until (server's ms), epoch; at, n (the log's entries applied to users); rows, dead (counts);
                          snapshot (its number); since (JSON: what the item-side states of each declaration began with);
                          counts (marks of the declarations that users' counters are up to date in)
    rf:{p}:from           hash: source partition -> "position n": how far that partition's log is counted in our item side
    rf:{p}:items          hash: item-side counters, a field per key; TTL
    rf:{p}:s:<user>       hash: a user's counters, a field per key; TTL
    rf:{p}:k:<digest>     log position of an event, where the log may repeat it; TTL
    rf:{p}:dead           stream: what could not be read, and why
    rf:{p}:snapshot       string: the item side's values at one time, for rankers; TTL

Two owners cannot both apply: taking a partition over raises its epoch, and a script of an older epoch changes nothing. A step
whose answer was lost is not repeated: the position that it begins at has moved on. Consumers go on where the server is out of
memory (`allow-oom`, Redis 7 or Valkey): only they can make room, by bringing the log to Parquet and trimming it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from redis import exceptions as faults
from redis.asyncio import Redis

from cluster.redis_round import IN_MEMORY, Kept, run, run_script
from recsys.errors import RayfunnelError, StoreError

CLAIM = """#!lua flags=allow-oom
-- KEYS: owned. ARGV: owner, lease ms. Answers epoch, at, n; or 0 and the ms for which somebody else has it.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'owner', 'until', 'epoch', 'at', 'n')
if held[1] and held[1] ~= ARGV[1] and tonumber(held[2]) > now then return {0, tonumber(held[2]) - now} end
local epoch = tonumber(held[3] or '0') + 1
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'until', now + ARGV[2], 'epoch', epoch)
return {epoch, held[4] or '', tonumber(held[5] or '0')}
"""
RENEW = """#!lua flags=allow-oom
-- KEYS: owned. ARGV: epoch, lease ms (0 gives it free). Answers whether it is still ours.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'until', t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[2])
return 1
"""
APPLY = """#!lua flags=allow-oom
-- Users. KEYS: owned, dead, counters of each user, marks. ARGV: epoch, at before, at after, n after, rows, TTL s, dead letters kept, users,
-- dead letters (number, then position, record, reason of each), per user: known, fields, gone, then field and value of each, then the
-- fields gone; then mark TTL s and the value of each mark. Answers the numbers of users that were known and are not there any more.
local held = redis.call('HMGET', KEYS[1], 'epoch', 'at')
if held[1] ~= ARGV[1] then return redis.error_reply('FENCED another owner has the partition') end
if (held[2] or '') ~= ARGV[2] then return redis.error_reply('AHEAD the partition is at ' .. (held[2] or 'its beginning')) end
local a, lost = 10, {}
redis.call('HSET', KEYS[1], 'at', ARGV[3], 'n', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'rows', ARGV[5])
local dead, users = tonumber(ARGV[9]), tonumber(ARGV[8])
if dead > 0 then redis.call('HINCRBY', KEYS[1], 'dead', dead) end
for i = 1, dead do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[7], '*', 'at', ARGV[a], 'e', ARGV[a + 1], 'why', ARGV[a + 2])
  a = a + 3
end
for u = 1, users do
  local key, known, fields, gone = KEYS[2 + u], ARGV[a], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2])
  a = a + 3
  if known == '1' and redis.call('EXISTS', key) == 0 then lost[#lost + 1] = u - 1 end
  for i = 1, fields do
    redis.call('HSET', key, ARGV[a], ARGV[a + 1])
    a = a + 2
  end
  for i = 1, gone do
    redis.call('HDEL', key, ARGV[a])
    a = a + 1
  end
  redis.call('EXPIRE', key, ARGV[6])
end
local ttl = ARGV[a]
for i = 3 + users, #KEYS do
  redis.call('SET', KEYS[i], ARGV[a + i - 2 - users], 'EX', ttl)
end
return lost
"""
COUNT = """#!lua flags=allow-oom
-- Items. KEYS: owned, from, items. ARGV: epoch, TTL s, sources, per source: number, before, after; fields, then field and value of each;
-- then the fields gone; since, or nothing where it is known. Answers how many fields there are.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('FENCED another owner has the partition') end
local a, sources = 4, tonumber(ARGV[3])
for i = 0, sources - 1 do
  local held = redis.call('HGET', KEYS[2], ARGV[a + 3 * i]) or ''
  if held ~= ARGV[a + 3 * i + 1] then return redis.error_reply('AHEAD source ' .. ARGV[a + 3 * i] .. ' is at ' .. held) end
end
for i = 0, sources - 1 do redis.call('HSET', KEYS[2], ARGV[a + 3 * i], ARGV[a + 3 * i + 2]) end
a = a + 3 * sources
local fields = tonumber(ARGV[a])
a = a + 1
for i = 1, fields do
  redis.call('HSET', KEYS[3], ARGV[a], ARGV[a + 1])
  a = a + 2
end
for i = a, #ARGV - 1 do redis.call('HDEL', KEYS[3], ARGV[i]) end
if ARGV[#ARGV] ~= '' then redis.call('HSET', KEYS[1], 'since', ARGV[#ARGV]) end
redis.call('EXPIRE', KEYS[3], ARGV[2])
return redis.call('HLEN', KEYS[3])
"""
PUBLISH = """
-- KEYS: owned, snapshot. ARGV: epoch, TTL s, value. Answers the snapshot's number, which stands before the value as 8 bytes.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('FENCED another owner has the partition') end
local number = redis.call('HINCRBY', KEYS[1], 'snapshot', 1)
redis.call('SET', KEYS[2], struct.pack('<I8', number) .. ARGV[3], 'EX', ARGV[2])
return number
"""
DECLARE = """#!lua flags=allow-oom
-- KEYS: owned. ARGV: epoch, counts.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return redis.error_reply('FENCED another owner has the partition') end
redis.call('HSET', KEYS[1], 'counts', ARGV[2])
return 1
"""
SEEN = """#!lua flags=allow-oom
-- KEYS: owned. Writes something, so that waiting for replicas waits for all that this node did before.
return redis.call('HINCRBY', KEYS[1], 'seen', 1)
"""


class FencedError(RayfunnelError):
    """Another owner has the partition, or it is not where this one thought: nothing was changed. Take it again, or let it be."""


class Claim(NamedTuple):
    """A partition that is ours: its epoch, the position applied, and how many entries that are."""

    epoch: int
    at: str
    n: int


class UserChange(NamedTuple):
    """What a step changes of a user: fields set, fields gone, and whether the store is thought to hold the rest."""

    user_id: str
    known: bool
    fields: Mapping[bytes, bytes]
    gone: Sequence[bytes] = ()


class DeadLetter(NamedTuple):
    """A record that could not be read, its position, and why."""

    position: str
    record: bytes
    why: str


class Step(NamedTuple):
    """One atomic step of a partition's users."""

    partition: int
    claim: Claim
    at: str
    n: int
    rows: int
    users: Sequence[UserChange]
    dead: Sequence[DeadLetter] = ()
    marks: Mapping[bytes, int] = {}


class ItemStep(NamedTuple):
    """One atomic step of a partition's item side. sources: partition -> (position before, position after), each "position n"; since:
    what its states began with, where the store does not know."""

    partition: int
    epoch: int
    sources: Mapping[int, tuple[str, str]]
    fields: Mapping[bytes, bytes]
    gone: Sequence[bytes] = ()
    since: str = ""


class Head(NamedTuple):
    """Where a partition stands: owner and until when (server's ms), how many entries are applied, rows and dead letters ever, and
    per source how many of its entries the item side has counted, and up to which position."""

    partition: int
    owner: str
    until_ms: int
    epoch: int
    at: str
    n: int
    rows: int
    dead: int
    counted: dict[int, int]
    reached: dict[int, str]


class PartitionStore:
    """The scripts above on one server, whose changes are `kept` before they count. Faults of the connection are the client's own."""

    def __init__(self, redis: Redis, prefix: str, *, ttl_s: int, mark_ttl_s: int, dead_letters: int, kept: Kept = IN_MEMORY) -> None:
        self._redis, self._prefix, self._kept = redis, prefix, kept
        self._ttl_s, self._mark_ttl_s, self._dead_letters = ttl_s, mark_ttl_s, dead_letters

    def key(self, partition: int, part: str) -> bytes:
        """A key of the partition's slot."""
        return f"{self._prefix}:{{{partition}}}:{part}".encode()

    async def now(self) -> float:
        """Unix seconds by the server's clock: the one clock that all consumers have in common."""
        seconds, micros = await self._redis.time()
        moment: float = seconds + micros / 1e6
        return moment

    async def _run(self, script: str, calls: Sequence[tuple[list[Any], list[Any]]]) -> list[Any]:
        """One round: the answer or the fault of each call."""
        answers = await run_script(self._redis, script, [(len(keys), *keys, *arguments) for keys, arguments in calls], self._kept)
        return [_fenced(a) if isinstance(a, Exception) else a for a in answers]

    async def _one(self, script: str, keys: list[Any], arguments: list[Any]) -> Any:
        (answer,) = await self._run(script, [(keys, arguments)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def claim(self, partition: int, owner: str, lease_s: float) -> Claim | None:
        """Take a partition that nobody has, whose owner is silent, or that is ours; None where somebody else has it."""
        epoch, *rest = await self._one(CLAIM, [self.key(partition, "owned")], [owner, int(1000 * lease_s)])
        return Claim(epoch, rest[0].decode(), rest[1]) if epoch else None

    async def renew(self, claims: Mapping[int, Claim], lease_s: float) -> dict[int, bool]:
        """Which partitions are still ours; 0 seconds gives them free."""
        calls = [([self.key(p, "owned")], [c.epoch, int(1000 * lease_s)]) for p, c in claims.items()]
        answers = await self._run(RENEW, calls) if calls else []
        for answer in answers:
            if isinstance(answer, Exception):  # a node that is away says nothing about whose its partitions are
                raise answer
        return {p: answer == 1 for p, answer in zip(claims, answers, strict=True)}

    async def counters(self, users: Sequence[tuple[int, str]]) -> list[list[bytes]]:
        """The packed counters of (partition, user id) pairs, in one round."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition, user_id in users:
                pipe.hvals(self.key(partition, f"s:{user_id}"))
            found: list[list[bytes]] = await pipe.execute()
        return found

    async def marks(self, keys: Sequence[bytes]) -> list[int | None]:
        """The log position that each mark holds."""
        return [None if held is None else int(held) for held in (await self._redis.mget(keys) if keys else [])]

    async def apply(self, steps: Sequence[Step]) -> list[list[int] | Exception]:
        """Each step whole or not at all, in one round: the users (by place) whose counters the store had lost, or its fault."""
        calls = []
        for s in steps:
            keys = [
                self.key(s.partition, "owned"),
                self.key(s.partition, "dead"),
                *(self.key(s.partition, f"s:{u.user_id}") for u in s.users),
                *s.marks,
            ]
            told: list[Any] = [s.claim.epoch, s.claim.at, s.at, s.n, s.rows, self._ttl_s, self._dead_letters, len(s.users), len(s.dead)]
            for letter in s.dead:
                told += letter
            for user in s.users:
                told += [int(user.known), len(user.fields), len(user.gone)]
                for pair in user.fields.items():
                    told += pair
                told += user.gone
            calls.append((keys, [*told, self._mark_ttl_s, *s.marks.values()]))
        return await self._run(APPLY, calls)

    async def count(self, steps: Sequence[ItemStep]) -> list[int | Exception]:
        """Each step whole or not at all, in one round: how many item-side keys the store then holds, or its fault."""
        calls = []
        for s in steps:
            told: list[Any] = [s.epoch, self._ttl_s, len(s.sources)]
            for source, (before, after) in s.sources.items():
                told += [source, before, after]
            told.append(len(s.fields))
            for pair in s.fields.items():
                told += pair
            calls.append(([self.key(s.partition, part) for part in ("owned", "from", "items")], [*told, *s.gone, s.since]))
        return await self._run(COUNT, calls)

    @property
    def replicated(self) -> bool:
        """Whether a change counts only when replicas have it."""
        return self._kept.replicas > 0

    async def heads(self, partitions: Sequence[int], *, kept: bool = False) -> list[Head]:
        """Where partitions stand, whoever owns them; `kept`: and where they would stand as well behind a failover."""
        calls: list[tuple[Any, ...]] = []
        for p in partitions:
            owned = self.key(p, "owned")
            calls.append(("HMGET", owned, "owner", "until", "epoch", "at", "n", "rows", "dead"))
            calls.append(("HGETALL", self.key(p, "from")))
            if kept and self.replicated:
                calls.append(("EVAL", SEEN, 1, owned))
        found = await run(self._redis, calls, self._kept if kept else IN_MEMORY)
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        out, each = [], len(calls) // max(1, len(partitions))
        for p, held, sources in zip(partitions, found[::each], found[1::each], strict=True):
            owner, until, epoch, at, n, rows, dead = held
            parted = {int(s): told.decode().rpartition(" ") for s, told in sources.items()}
            counted, reached = {s: int(n) for s, (_, _, n) in parted.items()}, {s: position for s, (position, _, _) in parted.items()}
            until_ms, number, n_, rows_, dead_ = (int(x or 0) for x in (until, epoch, n, rows, dead))
            out.append(Head(p, (owner or b"").decode(), until_ms, number, (at or b"").decode(), n_, rows_, dead_, counted, reached))
        return out

    async def counted(self, partition: int) -> tuple[dict[int, str], list[bytes], bytes | None]:
        """How far each source is counted in a partition's item side, its packed counters, and what they began with (`packed_since`)."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.key(partition, "from"))
            pipe.hvals(self.key(partition, "items"))
            pipe.hget(self.key(partition, "owned"), "since")
            sources, values, since = await pipe.execute()
        return {int(source): held.decode() for source, held in sources.items()}, values, since

    async def counts(self, partition: int) -> set[bytes]:
        """The marks of the declarations that the counters of a partition's users are up to date in."""
        held: bytes | None = await cast("Awaitable[Any]", self._redis.hget(self.key(partition, "owned").decode(), "counts"))
        return {bytes.fromhex(mark) for mark in held.decode().split()} if held else set()

    async def declare(self, partition: int, epoch: int, marks: Iterable[bytes]) -> None:
        """Say of which declarations they are. FencedError where somebody else owns the partition."""
        await self._one(DECLARE, [self.key(partition, "owned")], [epoch, " ".join(mark.hex() for mark in marks)])

    async def publish(self, partition: int, epoch: int, value: bytes) -> int:
        """Replace a partition's snapshot; gives its number. FencedError where somebody else owns the partition."""
        return int(await self._one(PUBLISH, [self.key(partition, "owned"), self.key(partition, "snapshot")], [epoch, self._ttl_s, value]))


def _fenced(fault: Exception) -> Exception:
    text = str(fault)
    if "FENCED" in text or "AHEAD" in text:
        return FencedError(f"A step was not applied ({text}).")
    return fault if isinstance(fault, faults.RedisError | RayfunnelError | OSError) else StoreError(text)
