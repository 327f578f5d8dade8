"""What every implementation of a role must do: a test class inherits its role's suite and says how to make one.

class TestItemCF(RecallerContract):
    def make(self, interactions): return ItemCFConfig().build().fit(interactions)
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.allowed import Allowed, Mask
from recsys.core import UNKNOWN, Candidates, Queries, Query, Ranker, Recaller, Reranker
from recsys.data.interactions import Interactions
from recsys.data.synthetic import checkerboard, named

NOTHING = np.empty(0, np.int32)


def queries_of(
    *histories: list[int], exclude: list[list[int]] | None = None, users: list[int] | None = None, k: int = 10, at: float = 1e9
) -> Queries:
    """A batch by item rows; events are a minute apart, the newest a minute before `at`."""
    batch = [
        Query(
            user_id=f"user {b}",
            user=users[b] if users else UNKNOWN,
            k=k,
            at=at,
            items=np.array(history, np.int32),
            times=at - 60.0 * np.arange(len(history), 0, -1),
            exclude=np.array(exclude[b], np.int32) if exclude else NOTHING,
        )
        for b, history in enumerate(histories)
    ]
    return Queries.of(batch, history_length=1_000)


def log_of(*users: list[int], n_items: int | None = None, times: list[list[float]] | None = None) -> Interactions:
    """A log in which user u has these item rows in this order, an hour apart, or at these Unix seconds."""
    n_items = n_items if n_items is not None else 1 + max((i for items in users for i in items), default=-1)
    user = np.concatenate([np.full(len(items), u) for u, items in enumerate(users)] or [NOTHING])
    item = np.concatenate([np.array(items, np.int32) for items in users] or [NOTHING])
    time = (
        np.concatenate([np.array(t) for t in times])
        if times
        else np.concatenate([3600.0 * np.arange(len(items)) for items in users] or [NOTHING])
    )
    return Interactions.of(user, item, time, users=named("u", len(users)), items=named("i", n_items))


def seen_of(log: Interactions) -> list[list[int]]:
    """Each user's item rows, oldest first."""
    indptr, order = log.by_user()
    return [log.item[order[a:b]].tolist() for a, b in pairwise(indptr)]


def same_one_by_one(channel: Recaller, queries: Queries, k: int) -> None:
    """Each query of a batch is answered as if it came alone."""
    items, scores = channel.recall(queries, k)
    for b in range(len(queries)):
        one_items, one_scores = channel.recall(queries.take([b]), k)
        width = one_items.shape[1]
        np.testing.assert_array_equal(items[b, :width], one_items[0])
        np.testing.assert_array_equal(scores[b, :width], one_scores[0])
        assert (items[b, width:] == UNKNOWN).all()


class RecallerContract:
    """Every recall channel."""

    answers_without_history = False
    """Whether an unknown user without events gets items (popular does)."""

    def make(self, interactions: Interactions) -> Recaller:
        """A channel fitted on this log."""
        raise NotImplementedError

    def reload(self, folder: Path, channel: Any) -> Recaller:
        """The channel that was saved in `folder`."""
        return channel.config.load(folder)  # type: ignore[no-any-return]

    @pytest.fixture
    def log(self) -> Interactions:
        return checkerboard(n_users=16, n_items=12, events_per_user=4)

    @pytest.fixture
    def channel(self, log: Interactions) -> Recaller:
        return self.make(log)

    def batch(self, log: Interactions, *, excluded: bool = True) -> Queries:
        """Every user of the log, an unknown one with a history, one with a history of unknown items, one without any."""
        seen = [*seen_of(log), [0, 2], [UNKNOWN, 10_000], []]
        users = [*range(log.n_users), UNKNOWN, UNKNOWN, UNKNOWN]
        return queries_of(*seen, users=users, exclude=[s[:2] for s in seen] if excluded else None)

    def test_it_is_a_recaller_with_a_name(self, channel: Recaller) -> None:
        assert isinstance(channel, Recaller)
        assert channel.name

    def test_answers_are_best_first_without_repeats_and_padded_at_the_end(self, log: Interactions, channel: Recaller) -> None:
        queries = self.batch(log)
        for k in (1, 3, 1_000):
            items, scores = channel.recall(queries, k)
            assert items.dtype == np.int32
            assert scores.dtype == np.float32
            assert items.shape == scores.shape
            assert items.shape[0] == len(queries)
            assert items.shape[1] <= min(k, log.n_items)
            assert ((items == UNKNOWN) == np.isneginf(scores)).all()
            assert (scores[:, 1:] <= scores[:, :-1]).all()
            assert items.max(initial=-1) < log.n_items
            for row in items:
                known = row[row != UNKNOWN]
                assert len(set(known.tolist())) == len(known)
                assert (row[: len(known)] == known).all()

    def test_a_checkerboard_user_gets_the_withheld_items_first(self, log: Interactions, channel: Recaller) -> None:
        seen = seen_of(log)
        items, _ = channel.recall(queries_of(*seen, users=list(range(log.n_users)), exclude=seen), 2)
        assert ((items % 2) == np.arange(log.n_users)[:, None] % 2).all()

    def test_excluded_items_never_come_back(self, log: Interactions, channel: Recaller) -> None:
        queries = self.batch(log)
        items, _ = channel.recall(queries, log.n_items)
        for row, out in zip(items, queries.exclude, strict=True):
            assert not set(row[row != UNKNOWN].tolist()) & set(out.tolist())

    def test_excluding_costs_no_places(self, log: Interactions, channel: Recaller) -> None:
        every, _ = channel.recall(self.batch(log, excluded=False), log.n_items)
        queries = self.batch(log)
        items, _ = channel.recall(queries, 3)
        for b, (all_items, row) in enumerate(zip(every, items, strict=True)):
            wanted = [i for i in all_items.tolist() if i != UNKNOWN and i not in queries.exclude[b]][:3]
            assert [i for i in row.tolist() if i != UNKNOWN] == wanted

    def test_excluding_everything_leaves_nothing(self, log: Interactions, channel: Recaller) -> None:
        items, _ = channel.recall(queries_of([0, 2], exclude=[list(range(log.n_items))]), 5)
        assert (items == UNKNOWN).all()

    def filtered(self, log: Interactions) -> Queries:
        """The batch, its queries in turn without a filter, with one half of the items, with the other, with nothing allowed."""
        queries, low = self.batch(log), np.arange(log.n_items) < log.n_items // 2
        masks = (Mask(low), Mask(~low), Mask(np.zeros(log.n_items, bool)))
        return replace(queries, allowed=Allowed(masks, np.arange(len(queries)) % 4 - 1), memo={})

    def test_filtering_costs_no_places(self, log: Interactions, channel: Recaller) -> None:
        every, _ = channel.recall(self.batch(log), log.n_items)
        queries = self.filtered(log)
        assert queries.allowed is not None
        items, scores = channel.recall(queries, 3)
        for b, (all_items, row) in enumerate(zip(every, items, strict=True)):
            which = queries.allowed.of[b]
            passes = queries.allowed.masks[which].items if which >= 0 else np.ones(log.n_items, bool)
            assert row[row != UNKNOWN].tolist() == [i for i in all_items.tolist() if i != UNKNOWN and passes[i]][:3]
        assert ((items == UNKNOWN) == np.isneginf(scores)).all()

    def test_a_batch_of_many_filters_equals_batches_of_one(self, log: Interactions, channel: Recaller) -> None:
        same_one_by_one(channel, self.filtered(log), 4)

    def test_an_unknown_user_without_events_gets_nothing_unless_the_channel_needs_none(self, log: Interactions, channel: Recaller) -> None:
        items, _ = channel.recall(queries_of([]), 3)
        assert (items != UNKNOWN).sum() == (3 if self.answers_without_history else 0)

    def test_unknown_items_of_a_history_or_an_exclusion_are_ignored(self, log: Interactions, channel: Recaller) -> None:
        plain, _ = channel.recall(queries_of([0, 2], users=[0]), 5)
        items, _ = channel.recall(queries_of([UNKNOWN, 0, 2], users=[0], exclude=[[10_000, UNKNOWN]]), 5)
        np.testing.assert_array_equal(items, plain)

    def test_no_query_gives_no_answer(self, channel: Recaller) -> None:
        items, scores = channel.recall(queries_of(), 5)
        assert len(items) == len(scores) == 0

    def test_a_batch_equals_batches_of_one(self, log: Interactions, channel: Recaller) -> None:
        same_one_by_one(channel, self.batch(log), 7)

    def test_what_is_saved_and_loaded_answers_the_same(self, log: Interactions, channel: Recaller, tmp_path: Path) -> None:
        folder = tmp_path / "recall" / channel.name
        channel.save(folder)
        assert not list(folder.rglob("*.pkl"))
        queries = self.batch(log)
        for got, want in zip(self.reload(folder, channel).recall(queries, 7), channel.recall(queries, 7), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_a_catalogue_of_one_item_works(self) -> None:
        channel = self.make(log_of([0], [0]))
        items, _ = channel.recall(queries_of([0], [], users=[0, UNKNOWN]), 5)
        assert set(items.ravel().tolist()) <= {0, UNKNOWN}
        items, _ = channel.recall(queries_of([0], users=[0], exclude=[[0]]), 5)
        assert (items == UNKNOWN).all()

    def test_items_without_any_event_do_no_harm(self) -> None:
        channel = self.make(log_of([0, 1], [0, 1], [], n_items=5))
        items, scores = channel.recall(queries_of([0], users=[2]), 5)
        assert not np.isnan(scores).any()
        assert items.max(initial=-1) < 5


def candidates_of(items: list[list[int]], scores: list[list[float]] | None = None, channels: tuple[str, ...] = ("a",)) -> Candidates:
    """Lists by item rows, best first (scores 1, 1/2, 1/3, … unless given), all recalled by the first channel; short lists are padded."""
    B, N, C = len(items), max(map(len, items), default=0), len(channels)
    out = Candidates(
        np.full((B, N), UNKNOWN, np.int32),
        np.full((B, N), -np.inf, np.float32),
        channels,
        np.full((B, N, C), np.nan, np.float32),
        np.zeros((B, N, C), np.int16),
    )
    for b, row in enumerate(items):
        n = len(row)
        out.items[b, :n] = row
        out.scores[b, :n] = scores[b] if scores else 1 / np.arange(1, n + 1)
        out.channel_scores[b, :n, 0] = out.scores[b, :n]
        out.channel_ranks[b, :n, 0] = np.arange(1, n + 1)
    return out


class RankerContract:
    """Every coarse or fine ranker. `items` are rows it knows; `history` a history it accepts."""

    items = (0, 1, 2, 3, 4)
    history = (1, 2)

    def make(self) -> Ranker:
        """A fitted ranker."""
        raise NotImplementedError

    @pytest.fixture
    def ranker(self) -> Ranker:
        return self.make()

    def test_scores_are_numbers_of_the_shape_of_the_candidates(self, ranker: Ranker) -> None:
        c = candidates_of([list(self.items), list(self.items[:2])])
        scores = ranker.score(queries_of(list(self.history), []), c)
        assert scores.shape == c.items.shape
        assert scores.dtype == np.float32
        assert np.isfinite(scores[c.items != UNKNOWN]).all()

    def test_no_candidates_and_no_queries_are_no_error(self, ranker: Ranker) -> None:
        assert ranker.score(queries_of([]), Candidates.empty(1, ("a",))).shape == (1, 0)
        assert ranker.score(queries_of(), Candidates.empty(0, ("a",))).shape == (0, 0)

    def test_unknown_users_and_items_are_scored(self, ranker: Ranker) -> None:
        c = candidates_of([list(self.items)])
        assert np.isfinite(ranker.score(queries_of([UNKNOWN]), c)).all()

    def test_a_batch_equals_batches_of_one(self, ranker: Ranker) -> None:
        queries = queries_of(list(self.history), [], [self.items[0]])
        c = candidates_of([list(self.items), list(self.items[::-1]), list(self.items[:1])])
        scores = ranker.score(queries, c)
        for b in range(len(queries)):
            known = c.items[b] != UNKNOWN
            np.testing.assert_allclose(ranker.score(queries.take([b]), c.take([b]))[0][known], scores[b][known], atol=1e-5)

    def test_a_score_does_not_depend_on_the_other_candidates(self, ranker: Ranker) -> None:
        query = queries_of(list(self.history))
        every = ranker.score(query, candidates_of([list(self.items)]))[0]
        for n, item in enumerate(self.items):
            np.testing.assert_allclose(ranker.score(query, candidates_of([[item]]))[0, 0], every[n], atol=1e-5)


class RerankerContract:
    """Every re-ranker. It must know item rows 0 to 9."""

    def make(self) -> Reranker:
        """A re-ranker ready to work."""
        raise NotImplementedError

    @pytest.fixture
    def reranker(self) -> Reranker:
        return self.make()

    def test_the_page_is_made_of_candidates_each_once_with_their_fine_scores(self, reranker: Reranker) -> None:
        c = candidates_of([[3, 1, 4, 0, 5], [9, 2], []])
        page = reranker.rerank(queries_of([], [], []), c, 4)
        assert page.items.shape == (3, 4)
        for b in range(3):
            fine = dict(zip(c.items[b].tolist(), c.scores[b].tolist(), strict=True))
            known = page.items[b] != UNKNOWN
            assert known.sum() == min(4, (c.items[b] != UNKNOWN).sum())
            assert len(set(page.items[b][known].tolist())) == known.sum()
            assert not known[int(known.sum()) :].any()
            assert [fine[i] for i in page.items[b].tolist()] == page.scores[b].tolist()

    def test_provenance_moves_with_the_items(self, reranker: Reranker) -> None:
        c = candidates_of([[3, 1, 4, 0, 5]])
        page = reranker.rerank(queries_of([]), c, 5)
        rank = dict(zip(c.items[0].tolist(), c.channel_ranks[0, :, 0].tolist(), strict=True))
        assert [rank[i] for i in page.items[0].tolist()] == page.channel_ranks[0, :, 0].tolist()
        assert page.channels == c.channels

    def test_a_page_longer_than_the_candidates_is_all_of_them(self, reranker: Reranker) -> None:
        page = reranker.rerank(queries_of([]), candidates_of([[3, 1]]), 50)
        assert sorted(page.items[0].tolist()) == [1, 3]

    def test_no_candidates_and_no_queries_are_no_error(self, reranker: Reranker) -> None:
        assert reranker.rerank(queries_of([]), Candidates.empty(1, ("a",)), 5).items.shape == (1, 0)
        assert reranker.rerank(queries_of(), Candidates.empty(0, ("a",)), 5).items.shape == (0, 0)

    def test_a_batch_equals_batches_of_one(self, reranker: Reranker) -> None:
        c = candidates_of([[3, 1, 4, 0, 5, 9], [9, 2], [7, 8, 6, 1, 0]])
        page = reranker.rerank(queries_of([], [], []), c, 5)
        for b, n in enumerate((6, 2, 5)):
            alone = candidates_of([c.items[b, :n].tolist()], [c.scores[b, :n].tolist()])
            one = reranker.rerank(queries_of([]), alone, 5)
            np.testing.assert_array_equal(page.items[b, : one.width], one.items[0])
            assert (page.items[b, one.width :] == UNKNOWN).all()
