"""Items that come, change and go while a bundle serves: what is beside it answers as if it had been in it."""

from __future__ import annotations

import pickle
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.allowed import Mask
from recsys.core import UNKNOWN, Queries, Vocabulary
from recsys.data.columns import ColumnConfig
from recsys.data.synthetic import checkerboard
from recsys.delta import Delta, LiveVocabulary, Parts
from recsys.errors import RequestError, StoreError
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters
from recsys.features.live_items import ItemChange, ItemRecord, MemoryItemLog, checked, from_json, to_json
from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from recsys.recall.content import ContentConfig
from recsys.recall.links import recency
from recsys.recall.taste import tastes
from recsys.recall.vector import VectorConfig, VectorRecaller
from recsys.rerank.diversity import CapConfig
from tests.contracts import queries_of
from tests.small import Small

AT = 1_700_100_000.0
USERS = [f"u{n}" for n in range(12)] + ["nobody"]


@pytest.fixture
def funnel(small: Small) -> Funnel:
    return Funnel.load(small.folder)


def told(funnel: Funnel, *changes: ItemChange, log: MemoryItemLog | None = None) -> Funnel:
    log = log or MemoryItemLog()
    log.change(changes)
    funnel.follow(log.since(0).records)
    return funnel


def ask(funnel: Funnel, user: str = "u0", k: int = 5, **more):
    return FunnelRequest(user_id=user, k=k, at=AT, **more)


def pages(funnel: Funnel, *requests: FunnelRequest):
    queries = funnel.queries(requests)
    return funnel.page(queries, funnel.recommend(queries))


def ids(page) -> list[str]:
    return [item.item_id for item in page]


NEW = ItemChange("new", {"colour": "red", "price": 5}, "Brand new")


def test_nothing_told_changes_nothing(small: Small, funnel: Funnel) -> None:
    plain = Funnel.load(small.folder)
    funnel.follow([])
    assert funnel.delta is None
    told(funnel, ItemChange("new", None))  # a deletion of what nobody has
    assert pages(funnel, *(ask(funnel, u) for u in USERS)) == pages(plain, *(ask(plain, u) for u in USERS))


def test_a_new_item_is_to_a_model_what_an_item_without_events_in_the_bundle_is(funnel: Funnel) -> None:
    """`cold` is in the bundle, red, 5, and nobody had it; so is `new`."""
    told(funnel, NEW)
    queries = funnel.queries([ask(funnel, u) for u in USERS])
    found = funnel.rank(queries, [["cold", "new"]] * len(USERS))
    for page in funnel.page(queries, found):
        score = {item.item_id: item.score for item in page}
        assert score["new"] == pytest.approx(score["cold"], abs=1e-6)
    assert funnel.delta is not None
    assert funnel.delta.vectors is not None
    assert funnel.vectors is not None
    np.testing.assert_allclose(funnel.delta.vectors[0], funnel.vectors[funnel.items.row("cold")], atol=1e-6)


def test_a_new_item_is_recalled_filtered_titled_and_explained(funnel: Funnel) -> None:
    told(funnel, NEW)
    row = funnel.items.row("new")
    assert row >= len(funnel.items)
    queries = funnel.queries([ask(funnel, filter=funnel.filters.parse({"item_id": ["new"]}), explain=True)])
    (page,) = funnel.page(queries, funnel.recommend(queries))
    assert [(i.item_id, i.title) for i in page] == [("new", "Brand new")]
    assert "two_tower" in page[0].sources
    assert page[0].explain is not None
    assert set(page[0].explain["stages"]) == {"recall", "coarse_rank", "fine_rank", "rerank"}


def test_a_deleted_item_is_in_no_channel_no_rung_and_no_neighbours(funnel: Funnel) -> None:
    top = ids(pages(funnel, ask(funnel))[0])[0]
    told(funnel, ItemChange(top, None), NEW, ItemChange("new", None))
    queries = funnel.queries([ask(funnel, u, 40) for u in USERS])
    gone = [funnel.items.row(top), funnel.items.row("new")]
    candidates = funnel.recall(queries)
    for stage in (funnel.popular(queries), candidates, funnel.coarse_rank(queries, candidates), funnel.recommend(queries)):
        assert not np.isin(stage.items, gone).any()
    assert all(item not in ids(page) for page in pages(funnel, *(ask(funnel, u, 40) for u in USERS)) for item in (top, "new"))
    assert all(top not in dict(funnel.similar(f"i{n}", 40)) for n in range(0, 40) if f"i{n}" != top)
    with pytest.raises(RequestError, match=f"Item '{top}' is not in version"):
        funnel.similar(top, 3)
    assert ids(funnel.page(queries.take([0]), funnel.rank(queries.take([0]), [[top, "i8"]]))[0]) == ["i8"]


def test_an_item_deleted_after_it_was_recalled_is_not_shown(funnel: Funnel) -> None:
    queries = funnel.queries([ask(funnel)])
    found = funnel.fine_rank(queries, funnel.coarse_rank(queries, funnel.recall(queries)))
    first = funnel.items.outside(found.items[0, :1])[0]
    told(funnel, ItemChange(first, None))
    elsewhere = pickle.loads(pickle.dumps(queries))  # noqa: S301 - as it reaches the process of the next stage
    page = ids(funnel.page(elsewhere, funnel.rerank(elsewhere, found))[0])
    assert first not in page
    assert len(page) == 5


@pytest.mark.parametrize("n", [3, 3_000])
def test_many_ids_are_found_as_one_is(n: int) -> None:
    """Long lists are looked up another way than short ones: b came after the bundle, c nobody knows."""
    grown = LiveVocabulary.over(Vocabulary(["x", "a"]), {"b": 2})
    asked = [*"abc"] * (n // 3)
    for form in (asked, np.array(asked, object), pa.array(asked)):
        assert grown.rows(form).tolist() == [1, 2, UNKNOWN] * (n // 3)


def test_a_row_that_this_process_has_not_heard_of_is_left_out(small: Small, funnel: Funnel) -> None:
    told(funnel, NEW)
    behind = Funnel.load(small.folder)  # another process, which has read less of the log
    some = funnel.filters.parse({"item_id": ["new", *(f"i{n}" for n in range(1, 20, 2))]})
    queries = funnel.queries([ask(funnel, filter=some, events=[StoredEvent("new", "click", int(AT * 1000) - 5, None, "e")])])
    queries.exclude = np.full((1, 1), UNKNOWN, np.int32)
    found = funnel.recall(queries)
    assert (found.items == funnel.items.row("new")).any()
    elsewhere = pickle.loads(pickle.dumps(queries))  # noqa: S301 - as above
    ranked = behind.rerank(elsewhere, behind.fine_rank(elsewhere, behind.coarse_rank(elsewhere, found)))
    assert "new" not in ids(behind.page(elsewhere, ranked)[0])
    assert len(behind.page(elsewhere, ranked)[0]) == 5


def test_a_deleted_item_that_comes_again_is_shown_again(funnel: Funnel) -> None:
    log = MemoryItemLog()
    told(funnel, NEW, log=log)
    told(funnel, ItemChange("new", None), log=log)
    assert not funnel.shows(funnel.items.row("new"))
    told(funnel, ItemChange("new", {"colour": "blue"}), log=log)
    only = funnel.filters.parse({"item_id": "new", "colour": "blue"})
    assert ids(pages(funnel, ask(funnel, filter=only))[0]) == ["new"]
    assert log.since(0).records[0].columns == {"colour": "blue"}, "what it was before it went is forgotten"


def test_what_a_bundles_item_had_before_it_was_deleted_does_not_come_back(small: Small, funnel: Funnel) -> None:
    """i2 is red and "Item 2" in the bundle. Told anew with a price alone it is to every reader what an item never heard of is."""
    log = MemoryItemLog()
    told(funnel, ItemChange("i2", {"colour": "blue"}, "Blue"), log=log)
    told(funnel, ItemChange("i2", None), log=log)
    told(funnel, ItemChange("i2", {"price": 900}), ItemChange("new", {"price": 900}), ItemChange("i4", {"price": 900}), log=log)
    restarted = Funnel.load(small.folder)
    restarted.follow([from_json(r.item_id, r.number, to_json(r)) for r in log.since(0).records])
    for one in (funnel, restarted):
        for colour, left in (("red", ["i4"]), ("blue", [])):
            wanted = one.filters.parse({"item_id": ["i2", "i4", "new"], "colour": colour})
            assert ids(pages(one, ask(one, "nobody", filter=wanted))[0]) == left, "i4 was never deleted: it keeps its red"
        queries = one.queries([ask(one, "nobody", filter=one.filters.parse({"price": {"min": 900}}))])
        page = one.page(queries, one.recommend(queries))[0]
        assert {i.item_id: i.title for i in page} == {"i2": None, "new": None, "i4": "Item 4"}
        assert one.delta is not None
        i2, new, i4 = (one.delta.at[one.items.row(i)] - len(one.items) for i in ("i2", "new", "i4"))
        for name, column in one.delta.columns.items():
            assert name == "item_id" or np.array_equal(column[i2], column[new]), name
        assert one.delta.columns["colour"][i4] != one.delta.columns["colour"][i2]


def test_a_record_from_before_the_mark_reads_as_it_did() -> None:
    old = b'[1,1700000000000,{"x":1},"A"]'
    assert from_json("a", 3, old) == ItemRecord("a", 3, {"x": 1}, "A", 1_700_000_000_000, anew=False)
    assert to_json(from_json("a", 3, old)) == old, "an older release reads what was never deleted"
    again = ItemRecord("a", 3, {"x": 1}, None, 5, anew=True)
    assert from_json("a", 3, to_json(again)) == again
    with pytest.raises(StoreError, match=r"a record of version 3, this code reads versions 1 and 2. Run the newer release"):
        from_json("a", 3, b"[3,5,{},null]")


def test_a_changed_attribute_counts_in_filters_and_in_the_ranker_and_the_rest_stays(funnel: Funnel) -> None:
    before = pages(funnel, ask(funnel, "u1", 40))[0]
    told(funnel, ItemChange("i2", {"price": 900}))
    dear = funnel.filters.parse({"price": {"min": 800}})
    assert ids(pages(funnel, ask(funnel, "u1", filter=dear))[0]) == ["i2"]
    both = funnel.filters.parse({"price": {"min": 800}, "colour": "red"})
    assert ids(pages(funnel, ask(funnel, "u1", filter=both))[0]) == ["i2"], "its colour is the bundle's"
    assert not pages(funnel, ask(funnel, "u1", filter=funnel.filters.parse({"item_id": "i2", "price": {"max": 5}})))[0]
    page = pages(funnel, ask(funnel, "u1", 40))[0]
    old, new = ({i.item_id: i.score for i in p} for p in (before, page))
    assert new["i2"] != pytest.approx(old["i2"], abs=1e-7)
    assert next(i.title for i in page if i.item_id == "i2") == "Item 2"
    queries = funnel.queries([ask(funnel, "u1")])
    scores = funnel.page(queries, funnel.rank(queries, [["i2", "i4"]]))[0]
    plain = {i.item_id: i.score for i in scores}
    assert plain.keys() == {"i2", "i4"}


def test_an_upsert_that_says_nothing_new_answers_as_before(small: Small, funnel: Funnel) -> None:
    plain = Funnel.load(small.folder)
    told(funnel, *(ItemChange(f"i{n}", {}) for n in range(0, 40, 3)))
    for mine, theirs in zip(pages(funnel, *(ask(funnel, u) for u in USERS)), pages(plain, *(ask(plain, u) for u in USERS)), strict=True):
        assert ids(mine) == ids(theirs)
        np.testing.assert_allclose([i.score for i in mine], [i.score for i in theirs], atol=1e-6)


def test_a_caps_column_follows_the_change(small: Small) -> None:
    funnel = Funnel.load(small.folder)
    caps = (CapConfig(column="colour", at_most=1, window=40),)
    funnel.config = funnel.config.model_copy(update={"rerank": funnel.config.rerank.model_copy(update={"caps": caps})})
    funnel.reranker = funnel.config.rerank.build(vectors=funnel.vectors, columns=funnel.item_columns)
    even = funnel.filters.parse({"colour": "red"})
    two = pages(funnel, ask(funnel, "u0", 2, filter=even))[0]
    told(funnel, ItemChange(ids(two)[1], {"colour": "blue"}))
    either = funnel.filters.parse({"item_id": ids(two)})
    queries = funnel.queries([ask(funnel, "u0", 2, filter=either)])
    page = funnel.recommend(queries)
    assert funnel.reranker is not None
    _, reasons = funnel.reranker.rerank_with_reasons(page, 2)
    assert not reasons.any(), "one red and one blue: no cap gave way"


def test_what_a_user_did_with_a_new_item_counts(funnel: Funnel) -> None:
    told(funnel, NEW)
    click = StoredEvent("new", "click", int(AT * 1000) - 1000, None, "e1")
    queries = funnel.queries([ask(funnel, "nobody", events=[click])])
    assert queries.history[0, -1] == funnel.items.row("new")
    assert "new" not in ids(funnel.page(queries, funnel.recommend(queries))[0])
    unheard = funnel.queries([ask(funnel, "nobody")])
    assert not np.allclose(funnel.user_vectors(queries), funnel.user_vectors(unheard))


def test_neighbours_of_a_new_item_and_new_neighbours(funnel: Funnel) -> None:
    told(funnel, NEW)
    near = dict(funnel.similar("new", 3))
    assert near["cold"] == pytest.approx(1.0, abs=1e-5)
    assert "new" not in near


def test_a_new_version_that_has_the_item_takes_over(small: Small) -> None:
    funnel = Funnel.load(small.folder)
    told(funnel, ItemChange("cold", {"colour": "red", "price": 5}, "Known by now"))
    assert funnel.items.row("cold") < len(funnel.items)
    only = funnel.filters.parse({"item_id": "cold"})
    assert [(i.item_id, i.title) for i in pages(funnel, ask(funnel, filter=only))[0]] == [("cold", "Known by now")]


def test_a_log_that_began_anew_is_forgotten(small: Small, funnel: Funnel) -> None:
    told(funnel, NEW, ItemChange("i2", None))
    funnel.follow([], anew=True)
    plain = Funnel.load(small.folder)
    assert pages(funnel, *(ask(funnel, u) for u in USERS)) == pages(plain, *(ask(plain, u) for u in USERS))


def test_rows_are_the_same_whoever_reads_the_log_how_fast(small: Small) -> None:
    log, one, other = MemoryItemLog(), Funnel.load(small.folder), Funnel.load(small.folder)
    position = 0
    for n in range(30):
        log.change([ItemChange(f"n{n % 17}", {"price": n}), ItemChange(f"i{n}", {"price": n})])
        if n % 7 == 0:
            changes = log.since(position)
            position = changes.position
            one.follow(changes.records)
    one.follow(log.since(position).records)
    other.follow(log.since(0).records)
    assert [one.items.row(f"n{n}") for n in range(17)] == [other.items.row(f"n{n}") for n in range(17)]
    for user in USERS:
        a, b = pages(one, ask(one, user, 20))[0], pages(other, ask(other, user, 20))[0]
        assert ids(a) == ids(b)


# ---- beside an index is as in it --------------------------------------------------------------------------------------

D = 4


def vectors_of(n: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(3, 12),
    later=st.integers(0, 8),
    data=st.data(),
    k=st.integers(1, 25),
)
def test_searching_beside_equals_an_index_over_all(n: int, later: int, data: st.DataObject, k: int) -> None:
    """Items replaced, added, deleted, excluded: as one index over what is left."""
    base, beside = vectors_of(n, 1), vectors_of(later, 2)
    rows = data.draw(st.lists(st.integers(0, n + 7), min_size=later, max_size=later, unique=True))
    gone_rows = data.draw(st.sets(st.integers(0, n + 7), max_size=4))
    m = n + 8
    at, gone, slots = np.full(m, UNKNOWN, np.int32), np.zeros(m, bool), np.array(rows, np.int32)
    at[:n] = np.arange(n)
    at[slots] = n + np.arange(later, dtype=np.int32)
    gone[list(gone_rows)] = True
    delta = Delta(n, at, gone, slots=slots, near={"two_tower": (beside, np.ones(later, bool))})
    delta.masks[()] = Mask(~gone[:n]), ~gone[slots]
    users = vectors_of(3, 3)
    exclude = np.array(data.draw(st.lists(st.integers(-1, m - 1), min_size=3, max_size=6)), np.int32)
    queries = Queries.of([], history_length=0)
    queries.user_ids, queries.exclude = ["a", "b", "c"], np.broadcast_to(exclude, (3, len(exclude)))
    queries.allowed, allowed_beside = delta.allowed(queries, Parts.__new__(Parts))
    channel = VectorRecaller("two_tower", lambda _: users, VectorConfig(kind="flat").build().fit(base))
    items, scores = delta.recall("two_tower", channel, queries, allowed_beside, k)

    everything = {row: base[row] for row in range(n)} | {row: beside[i] for i, row in enumerate(rows)}
    left = {row: v for row, v in everything.items() if not gone[row] and row not in exclude}
    for b in range(3):
        order = sorted(left, key=lambda row: (-float(left[row] @ users[b]), row))[:k]
        found = items[b][items[b] != UNKNOWN].tolist()
        assert found == order
        np.testing.assert_allclose(scores[b][: len(order)], [left[row] @ users[b] for row in order], atol=1e-6)


def test_content_beside_the_bundle_equals_content_with_all_items_in_the_index() -> None:
    log = checkerboard(n_users=16, n_items=12, events_per_user=4)
    columns = {"tags": ColumnConfig(kind="tags"), "size": ColumnConfig(kind="number")}
    raw = {"tags": ["a b", "b", "a", "c b", "c", "a c"] * 2, "size": [float(x) for x in range(12)]}
    items = Catalogue.of(columns, raw, 12)
    channel = ContentConfig(kind="flat").build().fit(log, items)
    parts = Parts(
        items=log.items,
        space=_plain_space(),
        item_columns={"item_id": np.ones(12, np.int32)},
        catalogue=items,
        filters=Filters(items, log.items),
        channels={"content": channel},
    )
    changes = [ItemRecord("0", 0, {"tags": "c"}, None, 0), ItemRecord("x", 1, {"tags": ["a", "never seen"], "size": 3}, None, 0)]
    delta = Delta.nothing(12).changed(parts, [r._replace(item_id=log.items.outside([0])[0]) if r.number == 0 else r for r in changes])
    queries = queries_of([0, 1], [3, 12 + 1], [5])
    _, beside = delta.allowed(queries, parts)
    found, _ = delta.recall("content", channel, queries, beside, 14)

    whole = {"tags": ["c", *raw["tags"][1:], None, "a never"], "size": [*raw["size"], None, 3.0]}
    vectors = channel.space.later(Catalogue.of(columns, whole, 14))
    users = tastes(vectors, queries.history, recency(queries, decay=0.95))
    for b in range(3):
        rows = [r for r in range(14) if r != 12]
        best = sorted(rows, key=lambda r: (-round(float(vectors[r] @ users[b]), 5), r))
        mine = found[b][found[b] != UNKNOWN].tolist()
        assert [round(float(vectors[r] @ users[b]), 4) for r in mine] == [round(float(vectors[r] @ users[b]), 4) for r in best]
        assert set(mine) == set(best)


def test_content_of_an_item_that_came_anew_is_not_the_bundles() -> None:
    """Item 0 had tag a; put anew with a size alone it is as near to others as an item without tags."""
    log = checkerboard(n_users=16, n_items=12, events_per_user=4)
    columns = {"tags": ColumnConfig(kind="tags"), "size": ColumnConfig(kind="number")}
    items = Catalogue.of(columns, {"tags": ["a b", "b", "a", "c b", "c", "a c"] * 2, "size": [float(x) for x in range(12)]}, 12)
    channel = ContentConfig(kind="flat").build().fit(log, items)
    parts = Parts(log.items, _plain_space(), {"item_id": np.ones(12, np.int32)}, items, Filters(items, log.items), {"content": channel})
    first = log.items.outside([0])[0]
    records = [ItemRecord(first, 0, {"size": 3}, None, 0, anew=True), ItemRecord("x", 1, {"size": 3}, None, 0)]
    near, has = Delta.nothing(12).changed(parts, records).near["content"]
    np.testing.assert_array_equal(near[0], near[1])
    assert has[0] == has[1]
    kept, _ = Delta.nothing(12).changed(parts, [records[0]._replace(anew=False)]).near["content"]
    assert not np.allclose(kept[0], near[0])


def _plain_space():
    class Plain:
        encoders: ClassVar = {"item": {}}

        def encode(self, side, frame):
            return {"item_id": np.ones(len(frame["item_id"]), np.int32)}

    return Plain()


def test_slots_that_were_replaced_are_cleared_away(funnel: Funnel) -> None:
    log, position = MemoryItemLog(), 0
    for n in range(200):
        log.change([ItemChange("new", {"price": n})])
        changes = log.since(position)
        position = changes.position
        funnel.follow(changes.records)
    assert funnel.delta is not None
    assert len(funnel.delta.slots) < 80
    assert len(funnel.delta.segments) < 10
    last = funnel.filters.parse({"price": {"min": 199}})
    assert ids(pages(funnel, ask(funnel, filter=last))[0]) == ["new"]


# ---- what a change may hold -------------------------------------------------------------------------------------------

DECLARED = {
    "price": ColumnConfig(kind="number", min_value=0, max_value=100),
    "tags": ColumnConfig(kind="tags"),
    "colour": ColumnConfig(kind="category"),
    "title": ColumnConfig(kind="text"),
    "image": ColumnConfig(kind="vector", dim=2),
    "hour": ColumnConfig(kind="hour"),
}


def test_a_change_that_fits_is_kept_as_it_came() -> None:
    given = {"price": "9.5", "tags": ["a", 1], "colour": 7, "title": "A b", "image": [1, 2.5]}
    assert checked(given, DECLARED, whose="item") == {"price": 9.5, "tags": ["a", 1], "colour": 7, "title": "A b", "image": [1.0, 2.5]}
    assert checked({"price": None}, DECLARED, whose="item") == {"price": None}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prise": 1}, "'columns.prise' is no declared item column. Did you mean 'price'?"),
        ({"hour": 1}, "is no declared item column"),
        ({"price": "cheap"}, "expected a finite number, got 'cheap'"),
        ({"price": True}, "expected a finite number"),
        ({"price": 101}, "'columns.price' is 101; declared are 0 to 100."),
        ({"tags": [["a"]]}, "expected one text or number"),
        ({"tags": ["x"] * 1001}, "has 1001 values; at most 1000 are taken"),
        ({"colour": ["a"]}, "expected one text or number"),
        ({"title": 5}, "expected text, got '5'"),
        ({"image": [1]}, "expected a list of 2 numbers, got 1"),
        ({"image": [1, "x"]}, "expected a finite number"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_with_a_sentence(columns, says) -> None:
    with pytest.raises(RequestError) as refused:
        checked(columns, DECLARED, whose="item")
    assert says in str(refused.value)
    assert refused.value.field == f"columns.{next(iter(columns))}"
