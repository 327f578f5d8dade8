"""The funnel on a small real bundle: what is loaded equals what was trained, batches equal singles, rungs stand alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from recsys import packing
from recsys.core import UNKNOWN
from recsys.data.interactions import Interactions
from recsys.errors import BundleError, RequestError
from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from recsys.recall.user_cf import UserCFConfig
from tests.small import Small

AT = 1_700_100_000.0


@pytest.fixture(scope="module")
def funnel(small: Small) -> Funnel:
    return Funnel.load(small.folder)


def request(user: str, k: int = 5, **more) -> FunnelRequest:
    return FunnelRequest(user_id=user, k=k, at=AT, **more)


def pages(funnel: Funnel, requests: list[FunnelRequest]):
    queries = funnel.queries(requests)
    return funnel.page(queries, funnel.recommend(queries))


def clicked(item: str, at: float = AT - 60) -> StoredEvent:
    return StoredEvent(item, "click", int(at * 1000), None, f"e-{item}")


def test_a_page_has_k_distinct_unseen_items_with_titles_scores_and_sources(funnel):
    page = pages(funnel, [request("u0")])[0]
    seen = set(funnel.items.outside(funnel.queries([request("u0")]).exclude[0]))
    assert len({item.item_id for item in page}) == 5
    assert not seen & {item.item_id for item in page}
    assert all(item.title and item.title.startswith("Item") and item.sources for item in page)
    assert all(0 < item.score < 1 for item in page)


def test_a_user_of_even_items_gets_even_items(funnel):
    items = [item.item_id for item in pages(funnel, [request("u0", 3)])[0]]
    assert all(int(i[1:]) % 2 == 0 for i in items)


def test_a_batch_answers_like_singles(funnel):
    requests = [request(f"u{n}") for n in range(20)] + [request("nobody"), request("u1", events=[clicked("i2"), clicked("i4")])]
    together, alone = pages(funnel, requests), [pages(funnel, [r])[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert [i.item_id for i in a] == [i.item_id for i in b]
        np.testing.assert_allclose([i.score for i in a], [i.score for i in b], atol=1e-6)


def test_an_unknown_user_gets_popular_items(funnel):
    page = pages(funnel, [request("nobody")])[0]
    assert len(page) == 5
    assert all("popular" in item.sources or "two_tower" in item.sources for item in page)


def test_a_live_event_enters_the_history_and_is_not_recommended_again(funnel):
    before = pages(funnel, [request("u0")])[0]
    top = before[0].item_id
    queries = funnel.queries([request("u0", events=[clicked(top)])])
    assert queries.history[0, -1] == funnel.items.row(top)
    assert top not in {item.item_id for item in funnel.page(queries, funnel.recommend(queries))[0]}


def test_an_event_that_the_log_already_holds_is_not_told_twice(funnel):
    queries = funnel.queries([request("u0")])
    item, at = int(queries.history[0, -1]), float(queries.history_times[0, -1])
    again = funnel.queries([request("u0", events=[clicked(funnel.items.outside([item])[0], at)])])
    np.testing.assert_array_equal(again.history, queries.history)


def test_live_events_of_unknown_items_are_passed_over(funnel):
    queries = funnel.queries([request("nobody", events=[clicked("never heard of")])])
    assert queries.history.shape[1] == 0


def test_excluded_items_do_not_come_back(funnel):
    first = pages(funnel, [request("u0")])[0]
    again = pages(funnel, [request("u0", exclude=[i.item_id for i in first] + ["unknown"])])[0]
    assert not {i.item_id for i in first} & {i.item_id for i in again}


def test_the_coarse_score_is_the_cosine_plus_half_of_the_merged_score_as_a_share_of_the_best(funnel):
    queries = funnel.queries([request("u0"), request("nobody")])
    merged = funnel.recall(queries)
    coarse = funnel.coarse_rank(queries, merged)
    for b in range(2):
        want = {
            int(item): float(funnel.user_vectors(queries)[b] @ funnel.vectors[item]) + 0.5 * float(score / merged.scores[b, 0])
            for item, score in zip(merged.items[b], merged.scores[b], strict=True)
            if item >= 0
        }
        got = {int(i): float(s) for i, s in zip(coarse.items[b], coarse.scores[b], strict=True) if i >= 0}
        assert got == pytest.approx({i: want[i] for i in got}, abs=1e-5)
        assert sorted(got.values(), reverse=True) == list(got.values())


def test_explain_gives_every_stage_and_every_channel(funnel):
    item = pages(funnel, [request("u0", explain=True)])[0][0]
    assert item.explain is not None
    assert set(item.explain["stages"]) == {"recall", "coarse_rank", "fine_rank", "rerank"}
    assert item.explain["stages"]["rerank"]["rank"] == 1
    assert sorted(item.explain["channels"]) == sorted(item.sources)
    assert item.explain["stages"]["fine_rank"]["score"] == pytest.approx(item.score)


def test_a_page_deeper_than_the_fine_stage_keeps_is_filled_as_far_as_the_catalogue_goes(funnel):
    deep = request("nobody", 1000)
    assert funnel.lane(1000) == 1000
    assert len(pages(funnel, [deep])[0]) == len(funnel.items)


def test_popular_needs_no_model_and_leaves_out_what_was_seen(funnel):
    bare = Funnel.load(funnel_folder(funnel), stages=())
    queries = bare.queries([request("u0", 7)])
    page = bare.page(queries, bare.popular(queries))[0]
    assert len(page) == 7
    assert {item.sources[0] for item in page} == {"popular"}
    assert not set(bare.items.outside(queries.exclude[0])) & {item.item_id for item in page}


def funnel_folder(funnel: Funnel):
    from pathlib import Path

    return Path(str(funnel.past.items.filename)).parents[1]


def test_a_stage_that_was_not_loaded_says_how_to_load_it(funnel):
    bare = Funnel.load(funnel_folder(funnel), stages=("recall",))
    queries = bare.queries([request("u0")])
    with pytest.raises(BundleError, match="without its fine stage"):
        bare.fine_rank(queries, bare.recall(queries))


def test_given_items_are_ranked_by_the_fine_stage_and_unknown_ones_left_out(funnel):
    queries = funnel.queries([request("u0", 10)])
    page = funnel.page(queries, funnel.rank(queries, [["i1", "i2", "what", "i2", "cold"]]))[0]
    assert {item.item_id for item in page} == {"i1", "i2", "cold"}
    assert [i.score for i in page] == sorted((i.score for i in page), reverse=True)


def test_similar_items_share_users(funnel):
    items = [i for i, _ in funnel.similar("i3", 4)]
    assert "i3" not in items
    assert all(int(i[1:]) % 2 == 1 for i in items)


def test_an_unknown_item_has_no_similar_ones(funnel):
    with pytest.raises(RequestError, match="not in version"):
        funnel.similar("what", 3)


def test_similar_users_share_items_live_events_included(funnel):
    log = Interactions.of(
        np.repeat(np.arange(len(funnel.users)), np.diff(funnel.past.indptr)), funnel.past.items, users=funnel.users, items=funnel.items
    )
    config = funnel.config.model_copy(deep=True)
    config.recall.channels["user_cf"] = UserCFConfig()
    comparing = replace(funnel, config=config, channels={**funnel.channels, "user_cf": UserCFConfig().build().fit(log)})
    live = [clicked(f"i{n}") for n in (3, 5, 7)]
    for asked, parity in ((request("u4"), 0), (request("nobody", events=live), 1)):
        queries = comparing.queries([asked])
        comparing.check_similar_users(queries)
        users = comparing.similar_users(queries, 4)
        assert len(users) == 4
        assert all(int(u[1:]) % 2 == parity and u != asked.user_id for u, _ in users)
    with pytest.raises(RequestError, match=r"User 'nobody' is not in version .* and has done nothing since") as unknown:
        comparing.check_similar_users(comparing.queries([request("nobody")]))
    assert (unknown.value.code, unknown.value.status) == ("unknown_user", 404)


def test_a_funnel_that_compares_no_users_says_what_to_add(funnel):
    queries = funnel.queries([request("u1")])
    with pytest.raises(RequestError, match=r"no channel that compares users\. Add user_cf to recall.channels"):
        funnel.check_similar_users(queries)
    with pytest.raises(BundleError, match="loaded without a channel that compares users"):
        funnel.similar_users(queries, 3)


def test_a_channel_that_fails_is_named_and_the_page_goes_on(funnel):
    class Broken:
        name = "item_cf"

        def recall(self, queries, k):
            raise RuntimeError("broken on purpose")

    whole = Funnel.load(funnel_folder(funnel))
    whole.channels["item_cf"] = Broken()
    queries = whole.queries([request("u0")])
    candidates = whole.recall(queries)
    assert candidates.lost == ("item_cf",)
    assert (candidates.items[0] != UNKNOWN).any()


def test_golden_requests_are_answered_as_when_published(funnel):
    folder = funnel_folder(funnel)
    assert packing.differences(Funnel.load(folder), folder) == []


def test_a_ranker_that_answers_otherwise_than_when_published_is_found(funnel):
    folder = funnel_folder(funnel)
    other = Funnel.load(folder)
    other.ranker.items = other.ranker.items.clone() + 1.0
    assert "scores differ" in packing.differences(other, folder)[0]


def test_a_bundle_says_nothing_of_the_machine_it_was_made_on(small):
    assert str(small.config.root) not in json.dumps(json.loads((small.folder / "config.json").read_text()))


FILTERS = ({"colour": "red"}, {"colour": ["blue"], "price": {"min": 10, "max": 30}}, {"item_id": ["i3", "i4", "cold"]}, {"colour": "green"})


def filtered(funnel: Funnel, user: str, asked: dict, k: int = 5):
    return request(user, k, filter=funnel.filters.parse(asked))


def test_a_filtered_page_has_k_items_of_those_that_pass_or_all_there_are(funnel):
    for asked, passing in zip(FILTERS, (20, 11, 3, 0), strict=True):  # red: 20 even items and cold; blue from 10 to 30: i9 to i29
        for user in ("u0", "u1", "nobody"):
            queries = funnel.queries([filtered(funnel, user, asked, 50)])
            mask = funnel.filters.mask(queries.filters[0]).items
            wanted = set(np.flatnonzero(mask).tolist()) - set(queries.exclude[0].tolist())
            assert mask.sum() == passing + (asked == FILTERS[0])
            for candidates in (funnel.recommend(queries), funnel.popular(queries)):
                items = candidates.items[0]
                assert set(items[items != UNKNOWN].tolist()) == wanted


def test_a_batch_of_many_filters_answers_like_singles(funnel):
    requests = [filtered(funnel, f"u{n}", FILTERS[n % 4] if n % 3 else {}) for n in range(16)]
    together, alone = pages(funnel, requests), [pages(funnel, [r])[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert [i.item_id for i in a] == [i.item_id for i in b]


def test_a_channel_that_knows_nothing_of_filters_cannot_break_them(funnel):
    class Deaf:
        name = "deaf"

        def recall(self, queries, k):
            return np.tile(np.arange(5, dtype=np.int32), (len(queries), 1)), np.ones((len(queries), 5), np.float32)

    own = funnel.channels
    try:
        funnel.channels = {"deaf": Deaf()}
        candidates = funnel.recall(funnel.queries([filtered(funnel, "nobody", {"colour": "blue"}), request("nobody")]))
    finally:
        funnel.channels = own
    assert sorted(candidates.items[0].tolist()) == [-1, -1, -1, 1, 3]
    assert sorted(candidates.items[1].tolist()) == [0, 1, 2, 3, 4]


def test_channels_of_a_loaded_funnel_stand_as_they_did_in_training(small: Small, funnel):
    """Each channel is a few columns of the ranker's evidence: in another order they would be read as another channel's."""
    assert list(funnel.channels) == list(small.config.recall.channels)
    assert list(funnel.channels) != sorted(funnel.channels)
