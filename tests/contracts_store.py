"""What every FeatureStore promises, written once: the memory store and the store on a real server both run it."""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable

import pytest

from recsys.data.sources import AGAINST
from recsys.errors import StoreError
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import Event, Instant, LastN
from recsys.features.store import FeatureStore, NewEvent, StoreConfig, StoredEvent, event_identity, partition_of

Scenario = Callable[[FeatureStore], Awaitable[None]]
END = Instant(math.inf, 1 << 60)


def event(user: str, item: str, time_ms: int, event_id: str | None = None, *, kind: str = "click", value=None, **rest) -> NewEvent:
    return NewEvent(user, item, kind, time_ms, value, event_id or event_identity(user, item, kind, time_ms), **rest)


async def items_of(store: FeatureStore, user: str) -> list[str]:
    (state,) = await store.read([user], timeout_s=5.0)
    return [e.item_id for e in state.events]


async def seen_by(store: FeatureStore, user: str) -> set[str]:
    (state,) = await store.read([user], timeout_s=5.0)
    return state.seen


async def whole_log(store: FeatureStore, partitions: int) -> list[NewEvent]:
    return [logged.event for p in range(partitions) async for logged in store.read_log(p)]


async def append_in_steps(store: FeatureStore, arrivals: list[NewEvent], rng: random.Random) -> None:
    """Tell a store of events in their order, some at a time."""
    at = 0
    while at < len(arrivals):
        step = rng.randrange(1, 9)
        await store.append(arrivals[at : at + step])
        at += step


class FeatureStoreContract:
    def make(self, config: StoreConfig, history: HistoryConfig) -> FeatureStore:
        raise NotImplementedError

    def run(
        self,
        scenario: Scenario,
        *,
        length: int = 5,
        events: tuple[str, ...] | None = None,
        partitions: int = 4,
        refused: int = 500,
        seen: int = 1_000,
        refusals: tuple[str, ...] = AGAINST,
    ) -> None:
        async def whole() -> None:
            history = HistoryConfig(length=length, events=events, refused=refused, seen=seen).refusing(refusals)
            store = self.make(StoreConfig(partitions=partitions), history)
            try:
                await scenario(store)
            finally:
                await store.close()

        asyncio.run(whole())

    def test_a_user_nobody_told_of_has_an_empty_state_in_its_place(self):
        async def scenario(store):
            await store.append([event("known", "a", 1)])
            states = await store.read(["nobody", "known", "nobody"], timeout_s=5.0)
            assert [len(s.events) for s in states] == [0, 1, 0]
            assert states[0].profile == {}
            await store.ping()

        self.run(scenario)

    def test_an_event_comes_back_as_it_was_told(self):
        async def scenario(store):
            result = await store.append(
                [event("u", "a", 1_700_000_000_123, "id-1", kind="rating", value=4.5), event("u", "b", 1_700_000_000_124, "id-2")]
            )
            assert result == (2, 0)
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert state.events == [
                StoredEvent("a", "rating", 1_700_000_000_123, 4.5, "id-1"),
                StoredEvent("b", "click", 1_700_000_000_124, None, "id-2"),
            ]

        self.run(scenario)

    def test_nothing_told_and_nobody_asked_for_is_nothing(self):
        async def scenario(store):
            assert await store.append([]) == (0, 0)
            assert await store.read([], timeout_s=5.0) == []

        self.run(scenario)

    def test_a_repeated_event_id_counts_once_per_user(self):
        async def scenario(store):
            assert await store.append([event("u", "a", 1, "x"), event("u", "b", 2, "x"), event("v", "a", 1, "x")]) == (2, 1)
            assert await store.append([event("u", "a", 1, "x"), event("u", "c", 3, "y")]) == (1, 1)
            assert await items_of(store, "u") == ["a", "c"]
            assert await items_of(store, "v") == ["a"]
            assert len(await whole_log(store, 4)) == 3

        self.run(scenario)

    def test_a_late_event_finds_its_place_and_equal_times_stand_as_they_came(self):
        async def scenario(store):
            await store.append([event("u", "t5", 5), event("u", "t9", 9)])
            await store.append([event("u", "t7", 7)])
            await store.append([event("u", "t7b", 7), event("u", "t1", 1)])
            assert await items_of(store, "u") == ["t1", "t5", "t7", "t7b", "t9"]

        self.run(scenario)

    def test_a_history_keeps_the_newest_and_an_older_event_does_not_enter_a_full_one(self):
        async def scenario(store):
            await store.append([event("u", str(t), t) for t in (10, 20, 30, 40)])
            assert await items_of(store, "u") == ["20", "30", "40"]
            await store.append([event("u", "5", 5)])
            assert await items_of(store, "u") == ["20", "30", "40"]
            await store.append([event("u", "25", 25)])
            assert await items_of(store, "u") == ["25", "30", "40"]

        self.run(scenario, length=3)

    def test_times_before_1970_and_far_ahead_keep_their_order(self):
        async def scenario(store):
            times = [0, -5, 2**42, -(2**40), 7]
            await store.append([event("u", str(t), t) for t in times])
            assert await items_of(store, "u") == [str(t) for t in sorted(times)]

        self.run(scenario)

    def test_several_callers_in_one_round_each_hear_of_their_own_events(self):
        async def scenario(store):
            await store.append([event("v", "old", 1)])
            calls = [[event("u", "a", 1), event("u", "b", 2)], [], [event("v", "old", 1), event("u", "a", 1)], [event("w", "c", 3)]]
            assert await store.append_all(calls) == [(2, 0), (0, 0), (0, 2), (1, 0)]
            assert await store.append_all([]) == []
            assert await items_of(store, "u") == ["a", "b"]

        self.run(scenario)

    def test_impressions_are_logged_but_are_no_history(self):
        async def scenario(store):
            await store.append(
                [event("u", "shown", 1, kind="impression"), event("u", "seen", 2, kind="view"), event("u", "liked", 3, kind="like")]
            )
            assert await items_of(store, "u") == ["liked"]
            assert sorted(e.item_id for e in await whole_log(store, 4)) == ["liked", "seen", "shown"]

        self.run(scenario)

    def test_the_configuration_says_which_events_are_history(self):
        async def scenario(store):
            await store.append([event("u", "a", 1, kind="view"), event("u", "b", 2, kind="click")])
            assert await items_of(store, "u") == ["a"]

        self.run(scenario, events=("view",))

    def test_a_refusal_is_no_history_stands_beside_it_and_outlives_its_length(self):
        async def scenario(store):
            await store.append([event("u", "a", 1), event("u", "b", 2, kind="dislike"), event("u", "a", 3, kind="hide")])
            await store.append([event("u", f"x{t}", t) for t in range(10, 20)])
            (state, other) = await store.read(["u", "v"], timeout_s=5.0)
            assert [e.item_id for e in state.events] == ["x17", "x18", "x19"]
            assert state.refused == {"b": 2, "a": 3}
            assert other.refused == {}
            assert len(await whole_log(store, 4)) == 13, "the log has them all"

        self.run(scenario, length=3)

    def test_an_item_is_refused_once_and_as_of_the_last_time_whatever_comes_when(self):
        async def scenario(store):
            await store.append([event("u", "a", 9, "1", kind="dislike"), event("u", "a", 4, "2", kind="hide")])
            assert await store.append([event("u", "a", 9, "1", kind="dislike")]) == (0, 1)
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert state.refused == {"a": 9}

        self.run(scenario)

    def test_of_too_many_refusals_those_of_longest_ago_are_forgotten(self):
        async def scenario(store):
            times = {"a": 50, "b": 20, "c": 40, "d": 20, "e": 30, "f": 10}
            await store.append([event("u", item, t, kind="dislike") for item, t in times.items()])
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert state.refused == {"a": 50, "c": 40, "e": 30, "d": 20}, "of b and d, as old, the greater id stays"
            await store.append([event("u", "b", 60, kind="hide")])
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert state.refused == {"a": 50, "c": 40, "e": 30, "b": 60}

        self.run(scenario, refused=4)

    def test_the_configuration_says_which_events_refuse(self):
        async def scenario(store):
            await store.append([event("u", "a", 1, kind="dislike"), event("u", "b", 2, kind="nope"), event("u", "c", 3)])
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert [e.item_id for e in state.events] == ["a", "c"]
            assert state.refused == {"b": 2}

        self.run(scenario, refusals=("nope",))

    def test_what_falls_off_a_history_is_seen_still_and_what_never_entered_it_is_not(self):
        async def scenario(store):
            await store.append([event("u", "shown", 1, kind="view"), event("u", "bad", 2, kind="hide")])
            await store.append([event("u", item, t) for t, item in enumerate("abcde", 3)])
            mine, other = await store.read(["u", "v"], timeout_s=5.0)
            assert [e.item_id for e in mine.events] == ["c", "d", "e"]
            assert (mine.seen, other.seen) == ({"a", "b"}, set())
            await store.append([event("u", "late", 1)])
            assert await seen_by(store, "u") == {"a", "b", "late"}, "older than a full history, it falls off at once"
            await store.append([event("u", "a", 9)])
            assert await items_of(store, "u") == ["d", "e", "a"]
            assert await seen_by(store, "u") == {"a", "b", "c", "late"}

        self.run(scenario, length=3)

    def test_beyond_the_limit_the_newest_that_fell_stay_each_as_of_its_last_time(self):
        async def scenario(store):
            await store.append([event("u", "now", 100), event("u", "a", 50), event("u", "b", 20), event("u", "c", 40)])
            await store.append([event("u", "a", 30), event("u", "a", 10), event("u", "d", 60)])
            assert await seen_by(store, "u") == {"a", "c", "d"}, "a of 50, c of 40 and d of 60; b of 20 goes, whatever is told of a later"
            await store.append([event("u", "e", 45), event("u", "b", 21)])
            assert await seen_by(store, "u") == {"a", "d", "e"}
            await store.append([event("u", "b", 70)])
            assert await seen_by(store, "u") == {"a", "b", "d"}

        self.run(scenario, length=1, seen=3)

    def test_of_items_as_old_the_greater_ids_stay_by_bytes(self):
        names = ["a", "B", "10", "9", "é", "z", "aa", "用"]  # by bytes: 10 9 B a aa z é 用

        async def scenario(store):
            await store.append([event("u", "now", 9), *(event("u", name, 5) for name in names)])
            assert await seen_by(store, "u") == {"aa", "z", "é", "用"}

        self.run(scenario, length=1, seen=4)

    def test_a_repeated_event_falls_off_once(self):
        async def scenario(store):
            told = [event("u", "old", 1), event("u", "mid", 2), event("u", "new", 3)]
            assert await store.append(told) == (3, 0)
            assert await store.append([*told, event("u", "newer", 4)]) == (1, 3)
            assert await items_of(store, "u") == ["newer"]
            assert await seen_by(store, "u") == {"mid", "new"}

        self.run(scenario, length=1, seen=2)

    def test_where_nothing_that_fell_is_kept_nothing_is(self):
        async def scenario(store):
            await store.append([event("u", str(t), t) for t in range(9)])
            assert await seen_by(store, "u") == set()

        self.run(scenario, length=2, seen=0)

    @pytest.mark.parametrize(("seed", "most"), [(1, 3), (2, 7), (3, 12), (4, 40)])
    def test_what_is_seen_follows_from_the_events_and_not_from_how_they_came(self, seed, most):
        """160 arrivals of 120 events on 30 items, late ones, repeats and ties among them; the history holds the newest 4."""
        rng = random.Random(seed)
        pool = [event("u", f"i{rng.randrange(30)}", rng.randrange(90), str(n)) for n in range(120)]
        arrivals = [rng.choice(pool) for _ in range(160)]
        once = list(dict.fromkeys(arrivals))
        newest: dict[str, int] = {}
        for e in sorted(once, key=lambda e: e.time_ms)[:-4]:
            newest[e.item_id] = max(e.time_ms, newest.get(e.item_id, 0))
        expected = sorted(newest, key=lambda item: (newest[item], item))[-most:]

        async def scenario(store):
            await append_in_steps(store, arrivals, rng)
            assert await seen_by(store, "u") == set(expected)

        self.run(scenario, length=4, seen=most)

    @pytest.mark.parametrize("seed", range(3))
    def test_of_one_instant_the_greatest_ids_by_bytes_stay(self, seed):
        """Ids that share up to 200 bytes, one the beginning of another, some of two bytes a character; seven of forty stay."""
        rng = random.Random(seed)
        stem = "https://shop.example/é/" * 9
        ids = list({stem[: rng.randrange(200)] + rng.choice(["", "a", "b", "é", "zz", stem[:40]]) for _ in range(60)})[:40]
        newest = set(sorted(ids, key=str.encode)[-7:])

        async def scenario(store):
            await store.append([event("u", item, 9, f"r{item}", kind="hide") for item in ids])
            await store.append([event("v", item, 9, item) for item in [*ids, "last", "of all"]])
            (refuser,) = await store.read(["u"], timeout_s=5.0)
            assert set(refuser.refused) == newest
            assert await seen_by(store, "v") == newest

        self.run(scenario, length=2, refused=7, seen=7)

    @pytest.mark.parametrize("name", ["用户/一 ☃", "nul\x00inside", 'a"b\\c', "{0}:{1}", "é" * 128, "", "-1", "7"])
    def test_ids_of_what_fell_are_any_text(self, name):
        async def scenario(store):
            await store.append([event(name, name, -5), event(name, "new", 1)])
            assert await seen_by(store, name) == {name}

        self.run(scenario, length=1)

    @pytest.mark.parametrize("name", ["用户/一 ☃", "nul\x00inside", 'a"b\\c', "{0}:{1}", "é" * 128, "", "-1", "7"])
    def test_ids_of_refusals_are_any_text(self, name):
        async def scenario(store):
            await store.append([event(name, name, 1_700_000_000_123, "id", kind="hide")])
            (state,) = await store.read([name], timeout_s=5.0)
            assert (state.events, state.refused) == ([], {name: 1_700_000_000_123})

        self.run(scenario)

    @pytest.mark.parametrize("name", ["用户/一 ☃", "a b\tc", "nul\x00inside", "{0}:{1}", "x" * 256, "é" * 128, "", "-1"])
    def test_ids_are_any_text(self, name):
        async def scenario(store):
            await store.append([event(name, name, 1, name or "id", value=0.1)])
            (state,) = await store.read([name], timeout_s=5.0)
            assert state.events == [StoredEvent(name, "click", 1, 0.1, name or "id")]

        self.run(scenario)

    def test_the_log_carries_everything_that_training_will_ask_for(self):
        told = event("u", "a", 7, "id", value=2.0, request_id="req-1", context={"tab": 3, "where": ["x", {"y": None}], "名": "值"})

        async def scenario(store):
            await store.append([told, event("u", "b", 8)])
            logged = [x async for x in store.read_log(partition_of("u", 4))]
            assert logged[0].event == told
            assert logged[1].event == event("u", "b", 8)._replace(context={})
            after = [x.event.item_id async for x in store.read_log(partition_of("u", 4), after=logged[0].position)]
            assert after == ["b"]
            assert [x async for x in store.read_log(partition_of("u", 4), after=logged[1].position)] == []

        self.run(scenario)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_no_number_is_no_value(self, value):
        async def scenario(store):
            await store.append([event("u", "a", 1, value=value)])
            (state,) = await store.read(["u"], timeout_s=5.0)
            assert state.events[0].value is None
            assert (await whole_log(store, 4))[0].value is None

        self.run(scenario)

    def test_what_cannot_be_written_is_refused_with_a_sentence_and_nothing_is_kept(self):
        async def scenario(store):
            with pytest.raises(StoreError, match="cannot be written as JSON"):
                await store.append([event("u", "a", 1), event("u", "b", 2, "bad", context={"x": object()})])
            assert await items_of(store, "u") == []

        self.run(scenario)

    def test_a_profile_is_merged_and_forgotten_and_read_beside_the_history(self):
        async def scenario(store):
            async def profiles():
                return [state.profile for state in await store.read(["u", "v"], timeout_s=5.0)]

            await store.change_profiles({"u": {"age": 31, "likes": ["a", "b"], "city": "上海"}, "v": {"age": 1}})
            await store.append([event("u", "a", 1)])
            assert await profiles() == [{"age": 31, "likes": ["a", "b"], "city": "上海"}, {"age": 1}]
            assert await items_of(store, "u") == ["a"]
            await store.change_profiles({"u": {"age": 32, "city": None, "likes": []}})
            assert await profiles() == [{"age": 32, "likes": []}, {"age": 1}]
            await store.change_profiles({"u": None, "v": {"age": None, "none": None}})
            assert await profiles() == [{}, {}]
            await store.change_profiles({f"w{n}": {"n": n} for n in range(450)})
            found = await store.read([f"w{n}" for n in range(450)], timeout_s=5.0)
            assert [state.profile["n"] for state in found] == list(range(450))
            with pytest.raises(StoreError, match="profile of user 'u' cannot be written as JSON"):
                await store.change_profiles({"u": {"age": object()}})

        self.run(scenario)

    def test_profiles_that_many_change_at_once_lose_nothing(self):
        """Twenty writers of a column each, all of one user and all at the same moment."""

        async def scenario(store):
            await asyncio.gather(*(store.change_profiles({"u": {f"c{n}": n}, "v": {"last": n}}) for n in range(20)))
            one, other = await store.read(["u", "v"], timeout_s=5.0)
            assert one.profile == {f"c{n}": n for n in range(20)}
            assert other.profile["last"] in range(20)

        self.run(scenario)

    def test_ten_thousand_events_go_in_one_call(self):
        async def scenario(store):
            many = [event(f"u{i % 7}", f"i{i}", i) for i in range(10_000)]
            assert await store.append(many) == (10_000, 0)
            assert await store.append(many) == (0, 10_000)
            assert await items_of(store, "u3") == [f"i{i}" for i in range(10_000) if i % 7 == 3][-5:]
            assert sorted(e.time_ms for e in await whole_log(store, 4)) == list(range(10_000))

        self.run(scenario)

    def test_a_batch_is_as_good_as_its_events_one_by_one(self):
        rng = random.Random(3)
        told = [event(f"u{rng.randrange(3)}", f"i{rng.randrange(9)}", rng.randrange(40)) for _ in range(60)]

        async def scenario(store):
            await store.append([e._replace(user_id="batch-" + e.user_id) for e in told])
            for e in told:
                await store.append([e._replace(user_id="single-" + e.user_id)])
            for user in ("u0", "u1", "u2"):
                assert await items_of(store, "batch-" + user) == await items_of(store, "single-" + user)

        self.run(scenario)

    @pytest.mark.parametrize("seed", range(5))
    def test_histories_after_a_replay_are_last_n_of_the_feature_definition(self, seed):
        rng = random.Random(seed)
        pool = [event(f"u{rng.randrange(4)}", f"i{i}", rng.randrange(60), kind=rng.choice(["click", "like", "view"])) for i in range(80)]
        arrivals = [rng.choice(pool) for _ in range(160)]  # late ones, repeats and ties among them
        feature = LastN(6)
        states, seen = defaultdict(feature.init), set()
        for position, e in enumerate(arrivals):
            if e not in seen and e.event != "view":
                states[e.user_id] = feature.apply(states[e.user_id], Event(e.time_ms, position, e.item_id))
            seen.add(e)

        async def scenario(store):
            await append_in_steps(store, arrivals, rng)
            for user in ("u0", "u1", "u2", "u3"):
                assert await items_of(store, user) == list(feature.value(states[user], END))

        self.run(scenario, length=6)
