"""The pure funnel: recall -> coarse rank -> fine rank -> re-rank as plain calls on one process.

Offline evaluation runs it, training examples are drawn through it, and the service must return exactly what it returns.
Every public stage takes a batch of queries and gives candidates; `recommend` is the four of them in a row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from recsys import channels
from recsys.allowed import Condition, Filter
from recsys.config import Config
from recsys.core import UNKNOWN, Candidates, Queries, Query, Recaller, Reranker, Vocabulary, Wishes, load_arrow, top_k
from recsys.delta import Comparing, Delta, LiveVocabulary, Parts
from recsys.errors import BundleError, RequestError
from recsys.evidence import EVIDENCE, evidence, share_of_best
from recsys.export import RankerEngine
from recsys.features.catalogue import Catalogue
from recsys.features.filters import Filters
from recsys.features.inputs import Live
from recsys.features.live_items import ItemRecord
from recsys.features.schema import FeatureSpace
from recsys.features.states import load_live
from recsys.features.store import StoredEvent
from recsys.models.two_tower import TwoTower
from recsys.prepared import load_columns
from recsys.recall.merge import MergeConfig, merge
from recsys.recall.popular import first_of
from recsys.recall.taste import RowVectors
from recsys.recall.user_cf import UserCF, UserCFConfig
from recsys.rerank.diversity import MMR
from recsys.rerank.rules import REASONS, RULES, Known, Rules

STAGES = ("recall", "coarse_rank", "fine_rank", "rerank")
POPULAR = "popular"
log = logging.getLogger(__name__)


@dataclass(slots=True)
class FunnelRequest:
    """One request in outside terms: ids are the caller's, `events` the user's live history (oldest first); `filter` is what
    `Funnel.filters.parse` made of the caller's."""

    user_id: str
    k: int
    at: float
    events: Sequence[StoredEvent] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    explain: bool = False
    filter: Filter | None = None
    counters: bytes = b""
    """The user's packed counters, as the store holds them; without them the bundle's stand."""
    diversity: float | None = None
    """0 keeps the order of relevance, 1 only avoids likeness; None: as configured."""
    boosts: Sequence[tuple[Condition, float]] = ()
    """Conditions and what the scores of items that hold are multiplied with."""
    pins: Sequence[tuple[str, int]] = ()
    """Item ids and their places on the page, from 1."""


class PageItem(NamedTuple):
    """One item of an answer. `explain` holds per stage {rank, score}, and per channel likewise under `recall`."""

    item_id: str
    score: float
    sources: list[str]
    title: str | None
    explain: dict[str, Any] | None


class Past(NamedTuple):
    """What the training log knows of each user: lists by user row, memory-mapped in a loaded bundle.

    indptr (U + 1,); items (S,) item rows and times (S,) Unix seconds, oldest first, the newest `history.length` of each
    user; seen_indptr (U + 1,) and seen_items: every item the user has had, ascending.
    """

    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray
    seen_indptr: np.ndarray
    seen_items: np.ndarray

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(self._fields, self, strict=True):
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Funnel:
    """A funnel of one version. Stages that were not loaded are None; asking them is a BundleError.

    item_columns: field -> (I, …) encoded; catalogue: the values of item columns, which filters ask; vectors (I, d) float32 unit
    vectors of the two-tower; popular_items (I,) item rows, most popular first: the last rung, which needs nothing else.
    """

    version: str
    config: Config
    space: FeatureSpace
    users: Vocabulary
    items: Vocabulary
    user_columns: dict[str, np.ndarray]
    item_columns: dict[str, np.ndarray]
    catalogue: Catalogue
    past: Past
    popular_items: np.ndarray
    channels: dict[str, Recaller]
    tower: TwoTower | None = None
    vectors: np.ndarray | None = None
    ranker: RankerEngine | None = None
    reranker: Reranker | None = None
    titles: pa.Array | None = None
    live: Live | None = None
    filters: Filters = field(init=False, repr=False)
    delta: Delta | None = field(default=None, init=False, repr=False)
    exposures: Mapping[int, int] = field(default_factory=dict, init=False, repr=False)
    """Row of a new item -> how often it was shown, as far as this process has heard."""

    def __post_init__(self) -> None:
        self.filters = Filters(self.catalogue, self.items)

    # ---- what changes while it serves -----------------------------------------------------------------------------

    def follow(self, records: Sequence[ItemRecord], *, anew: bool = False) -> None:
        """Take over changes of the catalogue; `anew` forgets those of before. One thread at a time; batches under way keep what they have."""
        if not records and not (anew and self.delta is not None):
            return
        before = self.delta if self.delta is not None and not anew else Delta.nothing(len(self.items))
        delta = before.changed(self._parts(), records)
        live = LiveVocabulary.over(self.items)
        live.names = {row: item_id for item_id, row in delta.later.items()}
        live.later = delta.later
        self.items = live
        if self.reranker is not None:
            vectors: RowVectors | None = self.vectors
            if self.vectors is not None and delta.vectors is not None:
                vectors = delta.grown(self.vectors, delta.vectors)
            columns: dict[str, RowVectors] = {
                name: delta.grown(c, delta.columns[name]) if name in delta.columns else c for name, c in self.item_columns.items()
            }
            self.reranker = self.config.rerank.build(vectors=vectors, columns=columns)
        self.delta = delta

    def _parts(self) -> Parts:
        return Parts(
            self.items, self.space, self.item_columns, self.catalogue, self.filters, self.channels, self.tower, self.ranker, self.live
        )

    def _pinned(self, queries: Queries) -> Delta | None:
        """The catalogue's changes as this process knew them when it first saw the batch."""
        if "delta" not in queries.memo:
            queries.memo["delta"] = self.delta
        delta: Delta | None = queries.memo["delta"]
        return delta

    def _shown(self, queries: Queries, candidates: Candidates) -> Candidates:
        """The candidates without items that were deleted since they were recalled, or that another process heard of first."""
        delta = self._pinned(queries)
        if delta is None and candidates.items.max(initial=UNKNOWN) < len(self.items):
            return candidates
        hidden = (delta or Delta.nothing(len(self.items))).absent(candidates.items)
        if not hidden.any():
            return candidates
        order = np.argsort(hidden, axis=1, kind="stable")
        out = candidates.reordered(order, np.take_along_axis(np.where(hidden, -np.inf, candidates.scores), order, 1))
        out.items = np.where(np.take_along_axis(hidden, order, 1), UNKNOWN, out.items).astype(np.int32)
        return out

    # ---- from outside to rows -------------------------------------------------------------------------------------

    def queries(self, requests: Sequence[FunnelRequest]) -> Queries:
        """Outside ids to rows: history is the training log's, continued by live events; what was seen is excluded."""
        return Queries.of([self._query(r) for r in requests], history_length=self.config.history.length)

    def _query(self, r: FunnelRequest) -> Query:
        user = self.users.row(r.user_id)
        items, times, seen = self._snapshot(user)
        against = self.config.recall.not_interested
        unwanted = [row for e in r.events if e.event in against and (row := self.items.row(e.item_id)) != UNKNOWN]
        live = [(row, e.time_ms / 1000) for e in r.events if e.event not in against and (row := self.items.row(e.item_id)) != UNKNOWN]
        if unwanted:  # what was taken and then refused triggers nothing either
            live = [(row, time) for row, time in live if row not in unwanted]
            kept = ~np.isin(items, unwanted)
            items, times = items[kept], times[kept]
        if live:
            items, times = _continued(items, times, live)
        out = [*unwanted, *(self.items.row(i) for i in r.exclude)]
        if self.config.recall.exclude_seen and live:
            out += [row for row, _ in live]
        exclude = np.concatenate([seen, np.array([row for row in out if row != UNKNOWN], np.int32)]) if out else seen
        return Query(
            user_id=r.user_id,
            user=user,
            k=r.k,
            at=r.at,
            items=items,
            times=times,
            context=r.context,
            profile=r.profile,
            exclude=exclude,
            explain=r.explain,
            filter=((*(r.filter or ()), *self.config.rules.filter) or None),
            state=r.counters,
            wishes=self._wishes(r, unwanted),
        )

    def _wishes(self, r: FunnelRequest, unwanted: list[int]) -> Wishes | None:
        if r.diversity is None and not (r.boosts or r.pins or unwanted):
            return None
        pins = tuple((row, place) for item, place in r.pins if (row := self.items.row(item)) != UNKNOWN)
        return Wishes(r.diversity, tuple(r.boosts), pins, tuple(dict.fromkeys(unwanted)))

    def _snapshot(self, user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if user == UNKNOWN:
            return np.empty(0, np.int32), np.empty(0, np.float64), np.empty(0, np.int32)
        a, b = self.past.indptr[user], self.past.indptr[user + 1]
        seen = np.empty(0, np.int32)
        if self.config.recall.exclude_seen:
            seen = self.past.seen_items[self.past.seen_indptr[user] : self.past.seen_indptr[user + 1]]
        return self.past.items[a:b], self.past.times[a:b], seen

    def lane(self, k: int) -> int:
        """Requests may share a batch only within one lane: the depth of every stage follows the deepest page asked for."""
        return max(k, self.config.fine_rank.keep)

    # ---- the stages -----------------------------------------------------------------------------------------------

    def recall(self, queries: Queries) -> Candidates:
        """All channels, merged with provenance. A channel that fails is left out and named in `lost`."""
        depth = self._depth(queries)
        merging = _deepened(self.config.recall.merge, depth)
        self._admit(queries)
        delta = self._pinned(queries)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        lost = []
        for name, channel in self.channels.items():
            try:
                quota = merging.quota_of(name)
                found[name] = (
                    delta.recall(name, channel, queries, queries.memo["beside"], quota) if delta else channel.recall(queries, quota)
                )
                if queries.allowed is not None:  # a channel that knows nothing of filters loses places, never the promise
                    found[name] = queries.allowed.kept(*found[name], len(self.items))
            except Exception:  # a channel's bug must not take the page with it: the answer names it
                log.exception("Channel %s failed; its candidates are left out.", name)
                found[name] = (np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.float32))
                lost.append(name)
        out = merge(tuple(found), list(found.values()), merging, n_queries=len(queries))
        out.lost, out.merged = tuple(lost), out.scores
        if queries.explain:
            out.noted()
        return out

    def coarse_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """Two-tower cosine with cached item vectors, plus a share of the merged score: what one model alone cannot know."""
        if self.vectors is None:
            raise BundleError("This funnel was loaded without its coarse stage. Load it with stages=('coarse_rank', …).")
        candidates = self._shown(queries, candidates)
        wanted = self._item_vectors(queries, candidates.items)  # (B, N, d); row -1 of an empty slot is ignored below
        scores = np.einsum("bd,bnd->bn", self.user_vectors(queries), wanted, optimize=True)
        if self.config.coarse_rank.merged and candidates.merged is not None:
            scores = scores + np.float32(self.config.coarse_rank.merged) * share_of_best(candidates.merged)
        keep = max(self.config.coarse_rank.keep, self._depth(queries))
        return candidates.ranked(scores, keep, stage="coarse_rank", explain=queries.explain)

    def fine_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """The ranker with every feature; scores become probabilities."""
        keep = max(self.config.fine_rank.keep, self._depth(queries))
        candidates = self._shown(queries, candidates)
        return candidates.ranked(self.fine_scores(queries, candidates), keep, stage="fine_rank", explain=queries.explain)

    def fine_scores(self, queries: Queries, candidates: Candidates) -> np.ndarray:
        """(B, N) probabilities of the fine ranker."""
        if self.ranker is None:
            raise BundleError("This funnel was loaded without its fine stage. Load it with stages=('fine_rank', …).")
        pairs = {EVIDENCE: evidence(candidates)} if any(f.name == EVIDENCE for f in self.ranker.pair_fields) else {}
        fields = self.user_fields(queries)
        if self.live is not None:
            before, asked = self.live.snapshot_s, self.live.query_fields(queries)
            fields = fields | asked
            # Counters know the bundle's items: the keys of a later one would be another's.
            counted = self.live.pair_fields(queries, np.where(candidates.items < len(self.items), candidates.items, UNKNOWN))
            pairs |= counted
            if before == self.live.snapshot_s:  # for whoever logs the page; not where the snapshot was replaced meanwhile
                queries.memo["used"] = (candidates.items, asked, counted, before)
        delta = self._pinned(queries)
        if delta is None:
            logits = self.ranker.score(fields, candidates.items, pairs)
        else:
            logits = self.ranker.score(fields, delta.storage(candidates.items), pairs, delta.ranked)
        scores: np.ndarray = 1.0 / (1.0 + np.exp(-np.clip(logits, -40, 40)))
        if not np.isfinite(scores).all():
            raise BundleError(
                f"The fine ranker of version {self.version} gave scores that are no numbers. Roll back, then look at its training."
            )
        return scores

    def rerank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """The page: at most max(k) items a query; `page` cuts each to its own k."""
        k = int(queries.k.max(initial=1))
        candidates = self._shown(queries, candidates)
        if isinstance(self.reranker, MMR):
            known = Known(self._passes, self.items.row, self._shown_often, self._may)
            out = Rules(self.config.rules, self.reranker, known, self.reranker.vectors).rerank(queries, candidates, k)
        elif self.reranker is not None:
            out = self.reranker.rerank(queries, candidates, k)
        else:
            out = candidates.reordered(*_first(candidates, k), stage="rerank")
        if queries.explain:
            out.noted()
        return out

    def _passes(self, queries: Queries, condition: Condition, items: np.ndarray) -> np.ndarray:
        """(B, N) bool: the items that a condition means."""
        delta, n = self._pinned(queries), len(self.items)
        if delta is None:
            lies, mask, slots = items, self.filters.mask((condition,)), np.zeros(1, bool)
        else:
            lies, (mask, slots) = np.where(items < 0, UNKNOWN, delta.storage(items)), delta.mask((condition,), self._parts())
        inside = np.append(mask.items, False)[np.where((lies >= 0) & (lies < n), lies, -1)]
        found: np.ndarray = inside | np.append(slots, False)[np.where(lies >= n, lies - n, -1)]
        return found

    def _may(self, queries: Queries, items: np.ndarray) -> np.ndarray:
        """(B, N) bool: the items that a query's filter and the catalogue of now let be shown."""
        self._admit(queries)
        delta, n = self._pinned(queries) or Delta.nothing(len(self.items)), len(self.items)
        out = (items != UNKNOWN) & ~delta.absent(items)
        b, slot = np.nonzero(out)
        lies = delta.storage(items[b, slot])
        ok = np.ones(len(b), bool)
        inside = lies < n
        if queries.allowed is not None:
            ok[inside] = queries.allowed.admits(b[inside], lies[inside])
        if (~inside).any():
            ok[~inside] = queries.memo["beside"].admits(b[~inside], lies[~inside] - n)
        out[b, slot] = ok
        may: np.ndarray = out
        return may

    def _shown_often(self, items: np.ndarray) -> np.ndarray:
        """(B, N) how often items that came after the training were shown; NaN for all others."""
        out = np.full(items.shape, np.nan)
        for at in np.argwhere(items >= len(self.items)).tolist():
            out[tuple(at)] = self.exposures.get(int(items[tuple(at)]), 0)
        return out

    def recommend(self, queries: Queries) -> Candidates:
        """All four stages. The batch must be of one lane (see `lane`)."""
        candidates = self.recall(queries)
        candidates = self.coarse_rank(queries, candidates)
        candidates = self.fine_rank(queries, candidates)
        return self.rerank(queries, candidates)

    def popular(self, queries: Queries) -> Candidates:
        """The last rung: what is popular, not excluded and allowed. Needs no model, no store, no other stage."""
        self._admit(queries)
        chosen = first_of(self.popular_items, queries, int(queries.k.max(initial=1)))
        place = np.arange(1, chosen.shape[1] + 1)
        values = np.where(chosen == UNKNOWN, -np.inf, 1 / place).astype(np.float32)
        ranks = np.where(chosen == UNKNOWN, 0, place).astype(np.int16)
        return Candidates(chosen, values, (POPULAR,), values[:, :, None], ranks[:, :, None], stage=POPULAR)

    def rank(self, queries: Queries, item_ids: Sequence[Sequence[str]]) -> Candidates:
        """The fine stage over given items (unknown ids are left out): nothing recalled them, so no channel vouches for them."""
        rows = [[row for i in dict.fromkeys(ids) if self.shows(row := self.items.row(i))] for ids in item_ids]
        B, N, C = len(rows), max(map(len, rows), default=0), len(self.config.recall.channels)
        items = np.full((B, N), UNKNOWN, np.int32)
        for b, found in enumerate(rows):
            items[b, : len(found)] = found
        given = Candidates(
            items,
            np.where(items == UNKNOWN, -np.inf, 0).astype(np.float32),
            tuple(self.config.recall.channels),
            np.full((B, N, C), np.nan, np.float32),
            np.zeros((B, N, C), np.int16),
        )
        if self.vectors is not None:
            given = given.ranked(
                np.einsum("bd,bnd->bn", self.user_vectors(queries), self._item_vectors(queries, items)),
                N,
                stage="coarse_rank",
                explain=queries.explain,
            )
        return self.fine_rank(queries, given)

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """The k nearest items by the first channel that has neighbours, else by two-tower vectors. 404 for an unknown item."""
        row = self.items.row(item_id)
        if not self.shows(row):
            raise RequestError("unknown_item", f"Item '{item_id[:80]}' is not in version {self.version}.", field="item_id", status=404)
        if self.delta is not None:
            return self._similar_now(self.delta, row, k)
        for channel in self.channels.values():
            if hasattr(channel, "similar"):
                items, scores = channel.similar(np.array([row], np.int32), k)
                known = items[0] != UNKNOWN
                return list(zip(self.items.outside(items[0][known]), map(float, scores[0][known]), strict=True))
        if self.vectors is None:
            return []
        near = (self.vectors @ self.vectors[row])[None, :]
        near[0, row] = -np.inf
        items, scores = top_k(near, k)
        return list(zip(self.items.outside(items[0]), map(float, scores[0]), strict=True))

    def _similar_now(self, delta: Delta, row: int, k: int) -> list[tuple[str, float]]:
        """`similar` among the items of now: by the first channel that knows neighbours of the item, those with neighbour lists first."""
        first = [(name, c) for name, c in self.channels.items() if hasattr(c, "similar")]
        for name, channel in [*first, *((n, c) for n, c in self.channels.items() if (n, c) not in first and isinstance(c, Comparing))]:
            items, scores = delta.similar(name, channel, row, self._parts(), k)
            if len(items := items[items != UNKNOWN]):
                return list(zip(self.items.outside(items), map(float, scores[: len(items)]), strict=True))
        return []

    def shows(self, row: int) -> bool:
        """Whether an item may be shown: it is known and was not deleted."""
        return row != UNKNOWN and not (self.delta is not None and bool(self.delta.absent(np.array([row]))[0]))

    def _item_vectors(self, queries: Queries, items: np.ndarray) -> np.ndarray:
        """(…, d) two-tower vectors of item rows; what stands for -1 means nothing."""
        assert self.vectors is not None  # noqa: S101 - stages that need them have asked
        delta = self._pinned(queries)
        if delta is None or delta.vectors is None:
            found: np.ndarray = self.vectors[np.where(items < len(self.items), items, UNKNOWN)]
            return found
        return delta.grown(self.vectors, delta.vectors)[items]

    def check_similar_users(self, queries: Queries) -> None:
        """RequestError (404) where `similar_users` has no answer to a batch of one: no such channel, or a user without any event."""
        if not any(isinstance(c, UserCFConfig) for c in self.config.recall.channels.values()):
            text = f"Version {self.version} has no channel that compares users. Add user_cf to recall.channels and train again."
            raise RequestError("no_similar_users", text, status=404)
        if queries.users[0] == UNKNOWN and not (queries.history[0] != UNKNOWN).any():
            text = f"User '{queries.user_ids[0][:80]}' is not in version {self.version} and has done nothing since."
            raise RequestError("unknown_user", text, field="user_id", status=404)

    def similar_users(self, queries: Queries, k: int) -> list[tuple[str, float]]:
        """The k users nearest to the history of the one query, live events included, by the first channel that compares users."""
        for channel in self.channels.values():
            if isinstance(channel, UserCF):
                users, scores = channel.similar_users(queries, k)
                known = users[0] != UNKNOWN
                return list(zip(self.users.outside(users[0][known]), map(float, scores[0][known]), strict=True))
        raise BundleError("This funnel was loaded without a channel that compares users. Load it with stages=('recall', …).")

    # ---- what several stages need, computed once a batch ----------------------------------------------------------

    def user_fields(self, queries: Queries) -> dict[str, np.ndarray]:
        """The encoded user, context and history fields of a batch: field -> (B, …)."""
        if "fields" not in queries.memo:
            delta = self._pinned(queries)
            queries.memo["fields"] = self.space.encode_queries(queries, self.user_columns, delta.item_ids() if delta else None)
        fields: dict[str, np.ndarray] = queries.memo["fields"]
        return fields

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, d) float32 unit vectors of the user tower."""
        if self.tower is None:
            raise BundleError("This funnel was loaded without its two-tower. Load it with stages=('recall', 'coarse_rank', …).")
        if "vectors" not in queries.memo:
            queries.memo["vectors"] = self.tower.user_vectors(self.user_fields(queries))
        vectors: np.ndarray = queries.memo["vectors"]
        return vectors

    def _admit(self, queries: Queries) -> None:
        """Make the bitmaps of the queries' filters and of what was deleted, once a batch."""
        delta = self._pinned(queries)
        if delta is not None:
            if "beside" not in queries.memo:
                queries.allowed, queries.memo["beside"] = delta.allowed(queries, self._parts())
        elif queries.filters is not None and queries.allowed is None:
            queries.allowed = self.filters.allowed(queries.filters)

    def _depth(self, queries: Queries) -> int:
        """How many items every stage must let through: 0 unless a page is deeper than what the fine stage keeps."""
        k = int(queries.k.max(initial=1))
        return k if k > self.config.fine_rank.keep else 0

    # ---- from rows to outside -------------------------------------------------------------------------------------

    def page(self, queries: Queries, candidates: Candidates) -> list[list[PageItem]]:
        """B answers, each with at most its query's k items, in the order of `candidates`."""
        candidates, delta = self._shown(queries, candidates), self._pinned(queries)
        known = (candidates.items != UNKNOWN) & (np.arange(candidates.width)[None, :] < queries.k[:, None])
        rows = candidates.items[known]
        ids, scores = self.items.outside(rows), _shown_scores(candidates)[known].tolist()
        inside = np.where(rows < len(self.items), rows, UNKNOWN)
        titles = self.titles.take(pa.array(inside, mask=inside < 0)).to_pylist() if self.titles is not None else [None] * len(ids)
        if delta is not None:
            titles = [delta.title(row) or title for row, title in zip(rows.tolist(), titles, strict=True)]
        bits = ((candidates.channel_ranks > 0) << np.arange(len(candidates.channels))).sum(2)[known].tolist()
        names = {m: [c for i, c in enumerate(candidates.channels) if m >> i & 1] for m in set(bits)}
        flat = [PageItem(i, s, names[m], t, None) for i, s, m, t in zip(ids, scores, bits, titles, strict=True)]
        if queries.explain:
            where = np.argwhere(known)
            flat = [item._replace(explain=_explained(candidates, int(b), int(n))) for item, (b, n) in zip(flat, where, strict=True)]
        ends = np.cumsum(known.sum(1)).tolist()
        return [flat[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    # ---- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: Path, *, stages: Collection[str] = STAGES) -> Self:
        """Read a verified bundle. A stage's replica loads only what that stage needs; arrays are memory-mapped."""
        config = Config.model_validate(json.loads((folder / "config.json").read_text()))
        manifest = json.loads((folder / "manifest.json").read_text()) if (folder / "manifest.json").exists() else {}
        space = FeatureSpace.load(folder / "features")
        item_columns = load_columns(folder / "item_columns")
        meta = load_arrow(folder / "item_meta.arrow")
        funnel = cls(
            version=str(manifest.get("version", folder.name)),
            config=config,
            space=space,
            users=Vocabulary.load(folder, "users"),
            items=Vocabulary.load(folder, "items"),
            user_columns=load_columns(folder / "user_columns"),
            item_columns=item_columns,
            catalogue=Catalogue.load(folder / "catalogue"),
            past=Past.load(folder / "past"),
            popular_items=np.load(folder / "popular.npy", mmap_mode="r"),
            channels={},
            titles=meta.column("title").combine_chunks() if "title" in meta.column_names else None,
        )
        if "fine_rank" in stages and (folder / "aggregates").exists():
            funnel.live = load_live(folder / "aggregates", space, funnel.users, funnel.items)
        if {"recall", "coarse_rank", "rerank"} & set(stages):  # the re-rank compares items that came later, too
            funnel.tower = TwoTower.load(folder / "two_tower") if (folder / "two_tower").exists() else None
        if "coarse_rank" in stages or "rerank" in stages:
            funnel.vectors = np.load(folder / "vectors.npy", mmap_mode="r") if (folder / "vectors.npy").exists() else None
        if "recall" in stages:
            funnel.channels = channels.load(config.recall.channels, folder / "recall", funnel)
        if "fine_rank" in stages and (folder / "fine_rank").exists():
            funnel.ranker = RankerEngine.load(folder / "fine_rank", item_columns)
        if "rerank" in stages:
            funnel.reranker = config.rerank.build(vectors=funnel.vectors, columns=item_columns)
        return funnel


def _deepened(config: MergeConfig, depth: int) -> MergeConfig:
    """The merge of a page deeper than the fine stage usually keeps: every channel and the whole let at least `depth` through."""
    if not depth:
        return config
    quotas = {name: max(quota, depth) for name, quota in config.quotas.items()}
    return config.model_copy(update={"limit": max(config.limit, depth), "quota": max(config.quota, depth), "quotas": quotas})


def _continued(items: np.ndarray, times: np.ndarray, live: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """A training-log history continued by live events; one that the log already holds is not told twice."""
    told = set(zip(items.tolist(), times.tolist(), strict=True))
    new = [pair for pair in live if pair not in told]
    if not new:
        return items, times
    all_items = np.concatenate([items, np.array([i for i, _ in new], np.int32)])
    all_times = np.concatenate([times, np.array([t for _, t in new], np.float64)])
    # A log without times sorts before everything live: NaN would sort last.
    order = np.argsort(np.nan_to_num(all_times, nan=-np.inf), kind="stable")
    return all_items[order], all_times[order]


def _first(candidates: Candidates, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.broadcast_to(np.arange(min(k, candidates.width)), (len(candidates), min(k, candidates.width)))
    return order, candidates.scores[:, :k]


def _shown_scores(candidates: Candidates) -> np.ndarray:
    """The score of an answer is the fine score, before re-rank (or that of the last rung that ordered it)."""
    return candidates.scores


def _explained(c: Candidates, b: int, n: int) -> dict[str, Any]:
    stages: dict[str, Any] = {s: {"rank": int(r[b, n]), "score": float(v[b, n])} for s, (r, v) in c.trail.items() if s != RULES}
    recalled = {
        name: {"rank": int(c.channel_ranks[b, n, i]), "score": float(c.channel_scores[b, n, i])}
        for i, name in enumerate(c.channels)
        if c.channel_ranks[b, n, i] > 0
    }
    told: dict[str, Any] = {"channels": recalled, "stages": stages}
    if RULES in c.trail:
        codes, chance = c.trail[RULES]
        told |= {"rule": REASONS[codes[b, n]], "propensity": float(chance[b, n])}
    return told
