"""The first hop: entries of a partition's log become counters of its users, in fenced steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.catch_up import CatchUp
from cluster.event_log import Entry, EventLog, place
from cluster.owned import Batch, Holding, Known, Owned, Taken, uncounted
from cluster.partition import Claim, Step, UserChange
from recsys.features.counting import Counting, Name
from recsys.features.reading import Touched
from recsys.features.records import counted_field
from recsys.features.stream import States

Said = tuple[Taken, Touched]


class UserHop:
    """Counts users of the partitions that are held."""

    def __init__(self, held: Holding, log: EventLog, past: CatchUp) -> None:
        self._held, self._log, self._past = held, log, past

    async def step(self, *, wait_ms: int = 0) -> dict[int, Exception | int]:
        """One step of every partition that has news: how many entries it took, or why it was not applied."""
        held, counting = self._held, self._held.counting
        for p, behind in list(held.owned.items()):
            if not behind.caught_up:
                await self._past.users(p, behind)
                behind.caught_up = held.counting is counting
        claims = {p: owned.claim for p, owned in held.owned.items() if owned.caught_up}
        pages = await self._log.read({p: c.at for p, c in claims.items()}, held.config.ingest.batch, wait_ms=wait_ms)
        left = {p: entries for p, entries in self._left(pages, claims).items() if self._same(p, claims[p])}
        batches = {p: await held.batch(p, claims[p].n, entries) for p, entries in left.items() if entries}
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
            change = self._change(counting, (p, user_id), states[p, user_id], mine, batches[p])
            if change.fields or change.gone:
                users[p].append(change)
        steps = []
        for p, batch in batches.items():
            buried = sum(letter.position in {t.entry.position for t in batch.taken} for letter in batch.dead) if batch.dead else 0
            last = batch.entries[-1].position
            rows = len(batch.taken) - buried
            steps.append(Step(p, claims[p], last, claims[p].n + len(batch.entries), rows, users[p], batch.dead, batch.marks))
        skipped = {p: lost for p, entries in left.items() if not entries and (lost := held.owned[p].lost) is not None}
        steps += [Step(p, claims[p], at, n, 0, ()) for p, (at, n) in skipped.items()]
        out: dict[int, Exception | int] = {}
        for step, answer in zip(steps, await held.store.apply(steps) if steps else [], strict=True):
            out[step.partition] = answer if isinstance(answer, Exception) else step.n - step.claim.n
            owned = held.owned.get(step.partition)
            if isinstance(answer, Exception) or owned is None or owned.claim is not step.claim:
                continue
            owned.claim = step.claim._replace(at=step.at, n=step.n)
            if step.partition in skipped:
                owned.lost = None
            if answer:
                await self._restore(counting, owned, step, [step.users[i].user_id for i in answer])
        self._bound()
        return out

    def _left(self, pages: Mapping[int, Sequence[Entry]], claims: Mapping[int, Claim]) -> dict[int, Sequence[Entry]]:
        """Pages without what stands behind entries that the log lost, until the partition has gone on behind those."""
        out = dict(pages)
        for p in claims:
            if (owned := self._held.owned.get(p)) is not None and owned.lost is not None:
                end = place(owned.lost[0])
                out[p] = [entry for entry in pages.get(p, ()) if place(entry.position) <= end]
        return out

    def _same(self, partition: int, claim: object) -> bool:
        return partition in self._held.owned and self._held.owned[partition].claim is claim

    async def _states(self, counting: Counting, users: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Known]:
        """What is known of users, from memory or the store."""
        held = self._held
        if not counting.users.plan.groups:
            return {user: Known({}, seeded=True) for user in users}
        found: dict[tuple[int, str], Known] = {}
        for p, user_id in users:
            owned = held.owned.get(p)  # it may have gone while its entries were read: then the step is fenced, or still ours to make
            if owned is not None and (known := owned.users.get(user_id)) is not None:
                owned.users.move_to_end(user_id)
                found[p, user_id] = known
        absent = [user for user in users if user not in found]
        for (p, user_id), values in zip(absent, await held.store.counters(absent) if absent else [], strict=True):
            states = counting.user_states(values)
            found[p, user_id] = Known(states, not counting.lacking(states), counting.user_records.stale(values))
            if p in held.owned:
                held.owned[p].users[user_id] = found[p, user_id]
        return found

    def _change(self, counting: Counting, who: tuple[int, str], known: Known, mine: Sequence[Taken], batch: Batch) -> UserChange:
        """Count a user's events, and what is to be written of it."""
        (partition, user_id), states, before = who, known.states, bool(known.states)
        seeds: States = {}
        lacking = set() if known.seeded else counting.lacking(states)
        said: list[Said] = []
        for taken in mine:
            if not known.seeded and not counting.covered.holds(partition, taken.n, taken.entry.told_ms):
                seeds = counting.seeds(user_id, lacking)
                states.update(seeds)
                known.seeded = True
            try:
                touched = counting.users.touched(taken.row)
            except Exception as fault:  # noqa: BLE001  one event must not stop its partition
                batch.bury(taken.entry, uncounted(fault))
                continue
            if not known.seeded:  # the event is among what the seeds of these groups know
                touched = [t for t in touched if t[0] not in lacking]
            said.append((taken, touched))
        changed, gone = self._count(counting, states, said, batch)
        change = counting.user_change(states, (seeds.keys() | changed) - gone, gone)
        fields = change.fields | counted_field(mine[-1].n + 1) if change.fields else change.fields
        stale, known.stale = known.stale, []
        return UserChange(user_id, before, fields, [*change.gone, *stale])

    def _count(self, counting: Counting, states: States, said: Sequence[Said], batch: Batch) -> tuple[set[Name], set[Name]]:
        """Events into states: all at once, or, where one of them cannot be counted, each by itself. The keys changed, and those gone."""
        try:
            return counting.add_user(states, [touch for _, touched in said for touch in touched])
        except Exception as fault:  # noqa: BLE001  one event must not stop its partition
            if len(said) == 1:
                batch.bury(said[0][0].entry, uncounted(fault))
                return set(), set()
        changed, gone = set[Name](), set[Name]()
        for one in said:
            now, left = self._count(counting, states, [one], batch)
            changed, gone = (changed | now) - left, (gone | left) - now
        return changed, gone

    async def _restore(self, counting: Counting, owned: Owned, step: Step, users: Sequence[str]) -> None:
        """The store had forgotten these users (it was short of memory, or they were away for long) while we knew them: tell it all."""
        to = counted_field(owned.claim.n)
        told = [
            UserChange(u, False, counting.user_change(known.states, list(known.states), ()).fields | to)
            for u in users
            if (known := owned.users.get(u)) is not None
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
