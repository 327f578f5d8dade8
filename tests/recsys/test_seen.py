"""recall.exclude_seen: what a user had is on no page, however much came since, in service as in training and evaluation."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import Config
from recsys.core import UNKNOWN, Query
from recsys.data.interactions import Interactions
from recsys.data.synthetic import named
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import told
from recsys.features.refusals import Refusals
from recsys.features.store import MemoryStore, NewEvent, StoreConfig, StoredEvent, UserState
from recsys.funnel import Funnel, FunnelRequest
from recsys.moments import Moments
from recsys.recipe import past
from recsys.requests import query_of
from tests.small import Small

KINDS = ("click", "hide", "like", "view")
USERS, ITEMS = named("u", 2), named("i", 9)
Row = tuple[int, int, str, float]


def log_of(rows: list[Row]) -> Interactions:
    """(user, item, event, Unix seconds) in log order."""
    user, item, kind, time = zip(*rows, strict=True) if rows else ((), (), (), ())
    codes = [KINDS.index(k) for k in kind]
    return Interactions.of(user, item, np.array(time, float), users=USERS, items=ITEMS, event=codes, event_names=KINDS)


def config_of(*, length: int, seen: int = 1_000, exclude_seen: bool = True) -> Config:
    return Config.model_validate(
        {
            "data": {"interactions": {"path": "log.csv"}},
            "features": {"history": {"length": length, "seen": seen}},
            "recall": {"exclude_seen": exclude_seen},
        }
    )


async def asked(rows: list[Row], config: Config, *, cut: float) -> list[Query]:
    """What each row's user asks just before it, of a bundle made of what came before `cut` and a store told the rest."""
    known = log_of([r for r in rows if r[3] < cut])
    bundle = past(known, told(known, config.history), config.history)
    store, queries = MemoryStore(StoreConfig(), config.history), []
    for at, (u, i, k, t) in enumerate(rows):
        (state,) = await store.read([f"u{u}"], timeout_s=1)
        request = FunnelRequest(f"u{u}", 5, t, state.events, state.refused, state.seen)
        queries.append(query_of(request, users=USERS, items=ITEMS, past=bundle, config=config))
        if t >= cut:
            await store.append([NewEvent(f"u{u}", f"i{i}", k, int(1000 * t), None, f"e{at}")])
    return queries


ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 8), st.sampled_from(KINDS), st.integers(0, 60)),
    min_size=1,
    max_size=60,
    unique_by=lambda r: (r[0], r[3]),
)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, length=st.integers(1, 4), cut=st.integers(0, 60))
def test_the_live_road_excludes_what_training_and_evaluation_exclude(rows, length, cut):
    rows = sorted(((u, i, k, float(t)) for u, i, k, t in rows), key=lambda r: r[3])
    config = config_of(length=length)
    whole = log_of(rows)
    offline = Moments(whole, told(whole, config.history), length, True, Refusals.of(whole, config.history))
    queries = asyncio.run(asked(rows, config, cut=cut))
    for at, (query, row) in enumerate(zip(queries, rows, strict=True)):
        if row[3] < cut:  # the bundle knows what came later
            continue
        expected = offline.queries(np.array([at])).exclude[0]
        assert sorted(set(query.exclude.tolist())) == sorted(x for x in expected.tolist() if x != UNKNOWN)


EIGHT = [(0, i, "click", 10.0 + i) for i in range(8)]


@pytest.mark.parametrize(("seen", "excluded"), [(1_000, [0, 1, 2, 3, 4, 5, 6]), (2, [3, 4, 5, 6]), (0, [5, 6])])
def test_beyond_the_limit_the_newest_stay_excluded(seen, excluded):
    """Seven items since the training log, two of them in the history: five fell off it."""
    query = asyncio.run(asked(EIGHT, config_of(length=2, seen=seen), cut=0))[-1]
    assert sorted(query.exclude.tolist()) == excluded
    assert query.items.tolist() == [5, 6], "the history is what it was"


def test_what_may_be_shown_again_is_neither_kept_nor_excluded():
    config = config_of(length=2, exclude_seen=False)
    assert (config.history.seen, config.features.history.seen, config_of(length=2).history.seen) == (0, 1_000, 1_000)
    assert config.history.refuses("hide"), "the rest of the declaration stays"
    assert asyncio.run(asked(EIGHT, config, cut=0))[-1].exclude.tolist() == []
    request = FunnelRequest("u0", 5, 99.0, [StoredEvent("i1", "click", 1, None, "e")], seen={"i2"})
    known = log_of([])
    bundle = past(known, told(known, config.history), config.history)
    query = query_of(request, users=USERS, items=ITEMS, past=bundle, config=config)
    assert query.exclude.tolist() == [], "kept by a service of another configuration"


def test_a_page_does_not_show_what_fell_off_the_history(small: Small):
    """A history of the small recommender is ten events; u0 takes what leads his pages, and then ten other items."""
    funnel = Funnel.load(small.folder)
    store = MemoryStore(StoreConfig(), funnel.config.history)

    def asks() -> tuple[UserState, list[str], list[str]]:
        """What the store holds, the page, and what is popular."""
        (state,) = asyncio.run(store.read(["u0"], timeout_s=1))
        queries = funnel.queries([FunnelRequest("u0", 10, 1_700_100_000.0, state.events, state.refused, state.seen)])
        page, popular = (funnel.page(queries, found)[0] for found in (funnel.recommend(queries), funnel.popular(queries)))
        return state, [item.item_id for item in page], [item.item_id for item in popular]

    _, page, popular = asks()
    first = {page[0], page[1], popular[0]}
    others = [f"i{n}" for n in range(40) if f"i{n}" not in first][:10]
    events = [NewEvent("u0", item, "click", 1_700_090_000_000 + t, None, f"e{t}") for t, item in enumerate([*first, *others])]
    asyncio.run(store.append(events))
    state, page, popular = asks()
    assert [e.item_id for e in state.events] == others, "the first are not in the history any more"
    assert not first & {*page, *popular}


def test_a_user_of_before_what_fell_was_kept_is_excluded_what_his_history_holds():
    config = config_of(length=2)
    store = MemoryStore(StoreConfig(), HistoryConfig(length=2, seen=0))
    asyncio.run(store.append([NewEvent("u0", f"i{i}", "click", i, None, f"e{i}") for i in range(4)]))
    (state,) = asyncio.run(store.read(["u0"], timeout_s=1))
    known = log_of([])
    bundle = past(known, told(known, config.history), config.history)
    request = FunnelRequest("u0", 5, 99.0, state.events, state.refused, state.seen)
    assert query_of(request, users=USERS, items=ITEMS, past=bundle, config=config).exclude.tolist() == [2, 3]
