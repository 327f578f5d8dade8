"""What users refused: out of histories and pages in both roads alike, beside the history, bounded, forgotten in time."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.config import Config, load
from recsys.core import UNKNOWN
from recsys.data.interactions import Interactions
from recsys.data.synthetic import named
from recsys.errors import ConfigError
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import told
from recsys.features.refusals import Refusals, still_refused
from recsys.features.store import MemoryStore, NewEvent, StoreConfig
from recsys.funnel import Funnel, FunnelRequest
from recsys.moments import Moments
from recsys.recipe import past
from recsys.requests import Past, query_of
from tests.small import Small

KINDS = ("click", "dislike", "hide", "like", "view")
USERS, ITEMS = named("u", 2), named("i", 6)
DAY = 86_400.0


def log_of(rows: list[tuple[int, int, str, float]]) -> Interactions:
    """(user, item, event, Unix seconds) in log order."""
    user, item, kind, time = zip(*rows, strict=True) if rows else ((), (), (), ())
    codes = [KINDS.index(k) for k in kind]
    return Interactions.of(user, item, np.array(time, float), users=USERS, items=ITEMS, event=codes, event_names=KINDS)


def moments(log: Interactions, history: HistoryConfig, *, exclude_seen: bool = True) -> Moments:
    return Moments(log, told(log, history), history.length, exclude_seen, Refusals.of(log, history))


def test_a_refused_item_leaves_the_history_from_the_next_moment_on_and_is_excluded():
    log = log_of(
        [(0, 1, "click", 10), (0, 2, "click", 20), (0, 1, "dislike", 30), (0, 3, "click", 40), (1, 1, "click", 50), (1, 2, "click", 60)]
    )
    queries = moments(log, HistoryConfig(length=3), exclude_seen=False).queries(np.array([2, 3, 5]))
    assert queries.history.tolist() == [[-1, 1, 2], [-1, -1, 2], [-1, -1, 1]], "before it, after it, another user"
    assert queries.exclude.tolist() == [[-1], [1], [-1]], "though what was seen may come back"
    assert queries.wishes is not None
    assert [w and w.unwanted for w in queries.wishes] == [None, (1,), None]
    np.testing.assert_array_equal(queries.history_times[1], [np.nan, np.nan, 20.0])


def test_refusals_make_a_history_shorter_and_do_not_reach_further_back():
    log = log_of([(0, i, "click", 10 * i) for i in range(5)] + [(0, 4, "hide", 50), (0, 5, "click", 60)])
    queries = moments(log, HistoryConfig(length=3)).queries(np.array([6]))
    assert queries.history.tolist() == [[-1, 2, 3]], "the newest three are 2, 3 and 4"
    assert sorted(queries.exclude[0].tolist()) == [0, 1, 2, 3, 4]


def test_a_refusal_is_forgotten_after_its_days_and_one_beyond_the_count_at_once():
    history = HistoryConfig(length=5, refused=2, refused_days=1)
    log = log_of([(0, 1, "hide", 0), (0, 2, "hide", 10), (0, 3, "hide", 20), (0, 5, "click", 30), (0, 5, "click", DAY + 15)])
    of = moments(log, history, exclude_seen=False)
    assert [np.sort(x[x >= 0]).tolist() for x in of.queries(np.array([2, 3, 4])).exclude] == [[1, 2], [2, 3], [3]]
    assert still_refused({1: 0.0, 2: 10.0, 3: np.nan}, DAY + 5, ITEMS, history).tolist() == [2, 3], "nobody knows how old 3 is"
    assert still_refused({1: 0.0, 2: 0.0, 3: np.nan}, 5.0, ITEMS, history).tolist() == [1, 2]


def test_a_log_without_times_forgets_nothing():
    log = Interactions.of([0, 0], [1, 2], users=USERS, items=ITEMS, event=[1, 0], event_names=KINDS)
    assert Refusals.of(log, HistoryConfig()).closing()[2].tolist() == pytest.approx([np.nan], nan_ok=True)
    assert moments(log, HistoryConfig(refused_days=1e-9)).queries(np.array([1])).exclude.tolist() == [[1]]


ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 5), st.sampled_from(KINDS), st.integers(0, 40)),
    min_size=1,
    max_size=40,
    unique_by=lambda r: (r[0], r[3]),
)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, length=st.integers(1, 4), most=st.integers(1, 3), days=st.sampled_from([1e-4, 365.0]), cut=st.integers(0, 40))
def test_histories_and_exclusions_of_the_streaming_road_are_those_of_the_batch_road(rows, length, most, days, cut):
    """A bundle that was trained on what came before `cut`, and a store that was told the rest, at the time of every event."""
    rows = sorted((u, i, k, float(t)) for u, i, k, t in rows)
    rows.sort(key=lambda r: r[3])
    history = HistoryConfig(length=length, refused=most, refused_days=days)
    config = Config.model_validate(
        {
            "data": {"interactions": {"path": "log.csv"}},
            "features": {"history": history.model_dump()},
            "recall": {"exclude_seen": False},
        }
    )
    whole = log_of(rows)
    batch = moments(whole, history, exclude_seen=False)
    known = log_of([r for r in rows if r[3] < cut])
    bundle = past(known, told(known, history), history)

    async def served() -> None:
        store = MemoryStore(StoreConfig(), history)
        for at, (u, i, k, t) in enumerate(rows):
            if t < cut:
                continue
            (state,) = await store.read([f"u{u}"], timeout_s=1)
            request = FunnelRequest(f"u{u}", 5, t, events=state.events, refused=state.refused)
            query = query_of(request, users=USERS, items=ITEMS, past=bundle, config=config)
            expected = batch.queries(np.array([at]))
            own = expected.history[0]
            assert query.items[-length:].tolist() == own[own != UNKNOWN].tolist()
            assert sorted(query.exclude.tolist()) == sorted(x for x in expected.exclude[0].tolist() if x != UNKNOWN)
            mine, theirs = query.wishes, expected.wishes[0] if expected.wishes else None
            assert (mine.unwanted if mine else ()) == (theirs.unwanted if theirs else ())
            await store.append([NewEvent(f"u{u}", f"i{i}", k, int(1000 * t), None, f"e{at}")])

    asyncio.run(served())


def test_a_bundle_remembers_what_was_refused_and_an_old_one_has_nothing(tmp_path: Path):
    history = HistoryConfig(length=3)
    log = log_of([(0, 1, "click", 10), (0, 1, "hide", 20), (1, 4, "dislike", 30), (1, 3, "dislike", 40)])
    kept = past(log, told(log, history), history)
    kept.save(tmp_path / "past")
    loaded = Past.load(tmp_path / "past")
    assert (loaded.refused(0), loaded.refused(1), loaded.refused(UNKNOWN)) == ({1: 20.0}, {3: 40.0, 4: 30.0}, {})
    for name in ("refused_indptr", "refused_items", "refused_times"):
        (tmp_path / "past" / f"{name}.npy").unlink()
    assert Past.load(tmp_path / "past").refused(1) == {}


def test_what_the_store_says_was_refused_is_on_no_page_whatever_may_be_shown_again(small: Small):
    funnel = Funnel.load(small.folder)
    object.__setattr__(
        funnel, "config", funnel.config.model_copy(update={"recall": funnel.config.recall.model_copy(update={"exclude_seen": False})})
    )

    def page(**more: object) -> list[str]:
        queries = funnel.queries([FunnelRequest("u0", 10, 1_700_100_000.0, **more)])  # type: ignore[arg-type]
        return [item.item_id for item in funnel.page(queries, funnel.recommend(queries))[0]]

    first = page()
    hides = dict.fromkeys(first[:3], 1_700_000_000_000)
    assert not set(first[:3]) & set(page(refused=hides))
    assert set(page(refused=dict.fromkeys(first[:3], 0))) & set(first[:3]), "of 1970: long forgotten"


# ---- one declaration ------------------------------------------------------------------------------------------------------


def configured(tmp_path: Path, **sections: object) -> Config:
    (tmp_path / "c.yaml").write_text(json.dumps({"data": {"interactions": {"path": "log.csv"}}} | sections))
    return load([tmp_path / "c.yaml"])


def test_the_old_key_counts_as_the_new_one_and_a_bundles_document_reads_back(tmp_path: Path):
    config = configured(tmp_path, recall={"not_interested": ["nope", "hide"]})
    assert config.data.refusals == ("nope", "hide")
    assert (config.history.refuses("nope"), config.history.refuses("dislike"), config.history.admits("dislike")) == (True, False, True)
    assert Config.model_validate(config.document()).history == config.history
    assert configured(tmp_path).data.refusals == ("dislike", "hide", "not_interested")


def test_two_declarations_that_differ_are_a_fault_that_names_both(tmp_path: Path):
    data = {"interactions": {"path": "log.csv"}, "refusals": ["hide"]}
    with pytest.raises(ConfigError, match=r"recall.not_interested.*is the old name of data.refusals, which says otherwise \(hide\)"):
        configured(tmp_path, data=data, recall={"not_interested": ["nope"]})


@pytest.mark.parametrize(
    ("data", "features", "sentence"),
    [
        ({}, {"history": {"events": ["click", "hide"]}}, "holds 'hide', which data.refusals names: a refusal is no member of a history"),
        ({"events": ["click"]}, {"history": {"events": ["clik"]}}, "holds 'clik', which is not among data.events; did you mean 'click'?"),
        ({"events": ["click", "click"]}, {}, "names one type twice: click"),
        ({"refusals": [" "]}, {}, "' ' is blank"),
        ({"events": ["cl\0ick"]}, {}, "holds characters that cannot be shown"),
        (
            {"events": ["click"]},
            {"aggregates": {"n": {"kind": "count", "key": "item", "events": ["buy"]}}},
            "holds 'buy', which is not among data.events; known: click, impression, dislike, hide, not_interested",
        ),
    ],
)
def test_names_that_contradict_the_declaration_are_faults(tmp_path: Path, data, features, sentence):
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, data={"interactions": {"path": "log.csv"}, **data}, features=features)
    assert sentence in str(raised.value)
