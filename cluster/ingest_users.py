"""The first hop: entries of a partition's log become counters of its users, in fenced steps."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.event_log import EventLog
from cluster.owned import Batch, Holding, Owned, Taken, uncounted
from cluster.partition import Step, UserChange
from recsys.features.counting import Counting
from recsys.features.records import counted_field
from recsys.features.stream import Key, States

Name = tuple[int, Key]


class UserHop:
    """Counts users of the partitions that are held."""

    def __init__(self, held: Holding, log: EventLog) -> None:
        self._held, self._log = held, log

    async def step(self, *, wait_ms: int = 0) -> dict[int, Exception | int]:
        """One step of every partition that has news: how many entries it took, or why it was not applied."""
        held, counting = self._held, self._held.counting
        claims = {p: owned.claim for p, owned in held.owned.items()}
        pages = await self._log.read({p: c.at for p, c in claims.items()}, held.config.ingest.batch, wait_ms=wait_ms)
        batches = {p: await held.batch(p, claims[p].n, entries) for p, entries in pages.items() if entries and self._same(p, claims[p])}
        by_user: dict[tuple[int, str], list[Taken]] = {}
        for p, batch in batches.items():
            for taken in batch.taken:
                by_user.setdefault((p, taken.event.user_id), []).append(taken)
        states = await self._states(counting, list(by_user))
        if held.counting is not counting:  # another declaration came in force meanwhile: these are states of the old one
            for one in held.owned.values():
                one.users.clear()
            return {}
        users: dict[int, list[UserChange]] = {p: [] for p in batches}
        buried = 0
        for (p, user_id), mine in by_user.items():
            change = self._change(counting, user_id, states[p, user_id], mine, batches[p])
            if change.fields or change.gone:
                users[p].append(change)
        steps = []
        for p, batch in batches.items():
            buried = sum(letter.position in {t.entry.position for t in batch.taken} for letter in batch.dead) if batch.dead else 0
            last = batch.entries[-1].position
            rows = len(batch.taken) - buried
            steps.append(Step(p, claims[p], last, claims[p].n + len(batch.entries), rows, users[p], batch.dead, batch.marks))
        out: dict[int, Exception | int] = {}
        for step, answer in zip(steps, await held.store.apply(steps) if steps else [], strict=True):
            out[step.partition] = answer if isinstance(answer, Exception) else len(batches[step.partition].entries)
            owned = held.owned.get(step.partition)
            if isinstance(answer, Exception) or owned is None or owned.claim is not step.claim:
                continue
            owned.claim = step.claim._replace(at=step.at, n=step.n)
            if answer:
                await self._restore(counting, owned, step, [step.users[i].user_id for i in answer])
        self._bound()
        return out

    def _same(self, partition: int, claim: object) -> bool:
        return partition in self._held.owned and self._held.owned[partition].claim is claim

    async def _states(self, counting: Counting, users: Sequence[tuple[int, str]]) -> dict[tuple[int, str], tuple[States, bool]]:
        """Users' states, from memory or the store, and whether the store holds them whole."""
        held = self._held
        if not counting.users.plan.groups:
            return {user: ({}, True) for user in users}
        found: dict[tuple[int, str], tuple[States, bool]] = {}
        for p, user_id in users:
            cache = held.owned[p].users
            if user_id in cache:
                cache.move_to_end(user_id)
                found[p, user_id] = cache[user_id], True
        absent = [user for user in users if user not in found]
        for (p, user_id), values in zip(absent, await held.store.counters(absent) if absent else [], strict=True):
            found[p, user_id] = counting.user_states(user_id, values)
            if p in held.owned:
                held.owned[p].users[user_id] = found[p, user_id][0]
        return found

    def _change(self, counting: Counting, user_id: str, known: tuple[States, bool], mine: Sequence[Taken], batch: Batch) -> UserChange:
        """Count a user's events, and what is to be written of it. known: the states, and whether the store holds them whole."""
        states, whole = known
        changed: set[Name] = set()
        gone: set[Name] = set()
        before = bool(states)
        for taken in mine:
            try:
                now, left = counting.add_user(states, counting.users.touched(taken.row))
            except Exception as fault:  # noqa: BLE001  one event must not stop its partition
                batch.bury(taken.entry, uncounted(fault))
                continue
            changed, gone = (changed | now) - left, (gone | left) - now
        change = counting.user_change(states, changed if whole else list(states), gone)
        fields = change.fields | counted_field(mine[-1].n + 1) if change.fields else change.fields
        return UserChange(user_id, whole and before, fields, change.gone)

    async def _restore(self, counting: Counting, owned: Owned, step: Step, users: Sequence[str]) -> None:
        """The store had forgotten these users (it was short of memory, or they were away for long) while we knew them: tell it all."""
        to = counted_field(owned.claim.n)
        told = [
            UserChange(u, False, counting.user_change(owned.users[u], list(owned.users[u]), ()).fields | to)
            for u in users
            if u in owned.users
        ]
        again = Step(step.partition, owned.claim, owned.claim.at, owned.claim.n, 0, told)
        (answer,) = await self._held.store.apply([again])
        if isinstance(answer, Exception):
            raise answer

    def _bound(self) -> None:
        """Forget the users that were counted longest ago."""
        most = max(1, self._held.config.ingest.cached_users // max(1, len(self._held.owned)))
        for owned in self._held.owned.values():
            while len(owned.users) > most:
                owned.users.popitem(last=False)
