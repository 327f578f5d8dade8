"""The pure funnel: recall -> coarse rank -> fine rank -> re-rank as plain calls on one process.

Offline evaluation runs it, training examples are drawn through it, and the service must return exactly what it returns.
Every public stage takes a batch of queries and gives candidates; `recommend` is the four of them in a row.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from recsys import channels
from recsys.config import Config
from recsys.core import UNKNOWN, Candidates, Queries, Recaller, Reranker, Used, Vocabulary, load_arrow
from recsys.data.columns import FROM_TIME, ColumnConfig
from recsys.delta import Delta, LiveVocabulary, Parts
from recsys.eligibility import Eligibility
from recsys.errors import BundleError, RequestError
from recsys.evidence import EVIDENCE, evidence, share_of_best
from recsys.export import RankerEngine
from recsys.features.catalogue import LISTED, Catalogue
from recsys.features.filters import Filters
from recsys.features.inputs import Live
from recsys.features.live_items import ItemRecord
from recsys.features.schema import FeatureSpace
from recsys.features.states import load_live
from recsys.models.two_tower import TwoTower
from recsys.page import LeftOut, PageItem, pages
from recsys.prepared import load_columns
from recsys.recall.cold_start import led, stand
from recsys.recall.content import ContentConfig
from recsys.recall.merge import merge
from recsys.recall.popular import first_of
from recsys.requests import FunnelRequest, Past, query_of
from recsys.rerank.diversity import MMR, MMRConfig
from recsys.rerank.rules import RULES, Known, MatchConfig, Rules, RulesConfig, lifted, pinned, unfit, unmoved
from recsys.similar import check_similar_users, similar_items, similar_items_now, similar_users

__all__ = ["POPULAR", "STAGES", "Funnel", "FunnelRequest", "PageItem"]

STAGES = ("recall", "coarse_rank", "fine_rank", "rerank")
POPULAR = "popular"
log = logging.getLogger(__name__)


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
        self.items = LiveVocabulary.over(self.items, delta.later)
        if self.reranker is not None:
            self.reranker = self._reranker_of(delta)
        self.delta = delta

    def _reranker_of(self, delta: Delta | None) -> Reranker:
        """The re-rank over the bundle's items and those that came later."""
        if delta is None:
            return self.config.rerank.build(vectors=self.vectors, columns=self.item_columns)
        vectors = self.vectors if self.vectors is None or delta.vectors is None else delta.grown(self.vectors, delta.vectors)
        columns = {name: delta.grown(c, delta.columns[name]) if name in delta.columns else c for name, c in self.item_columns.items()}
        return self.config.rerank.build(vectors=vectors, columns=columns)

    def rule(self, rules: RulesConfig, rerank: MMRConfig | None = None) -> list[str]:
        """From now on answers are ordered by these, not by those the version was published with (None: as they are). Nothing is fitted
        anew for them. A sentence for each part that asks for a column which this version lacks: that part is not in force."""
        wrong = dict(unfit(rules, {n: str(c.kind) for n, c in self.catalogue.columns.items() if n in self.filters.columns}))
        missing = []
        kept: dict[str, tuple[MatchConfig, ...]] = {}
        for part, done in (("blocks", "blocked"), ("boosts", "boosted")):
            matches = list(enumerate(getattr(rules, part)))
            bad = {n for n, _ in matches if wrong.keys() & {f"{part}.{n}.column", f"{part}.{n}.values"}}
            kept[part] = tuple(match for n, match in matches if n not in bad)
            missing += [(f"rules.{part}", match.column, done) for n, match in matches if n in bad]
        rules = rules.model_copy(update=kept) if missing else rules
        if rerank is not None:
            able = tuple(cap for cap in rerank.caps if cap.column in self.item_columns)
            missing += [("rerank.caps", cap.column, "capped") for cap in rerank.caps if cap not in able]
            rerank = rerank if len(able) == len(rerank.caps) else rerank.model_copy(update={"caps": able})
        changed = rerank is not None and rerank != self.config.rerank
        self.config = self.config.model_copy(update={"rules": rules} | ({"rerank": rerank} if changed else {}))
        if changed and self.reranker is not None:
            self.reranker = self._reranker_of(self.delta)
        return [
            f"{where}: version {self.version} has no column '{column}'{'' if column not in self.filters.columns else ' of such values'}, "
            f"so nothing is {done} by it. Retrain."
            for where, column, done in sorted(set(missing))
        ]

    @property
    def cap_columns(self) -> list[str]:
        """Item columns whose values can be counted: texts and bins, no raw numbers and no vectors."""
        return [name for name, column in self.item_columns.items() if np.issubdtype(column.dtype, np.integer)]

    def cap_column(self, name: str, where: str) -> str:
        """The name. RequestError (422) where no cap can be by this column; `where` is the field of the request that names it."""
        known = self.cap_columns
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            text = f"'{where}' names '{name[:64]}', which is no item column whose values can be capped. {hint}Known: {', '.join(known)}."
            raise RequestError("unknown_field", text, field=where)
        return name

    @property
    def profile_columns(self) -> Mapping[str, ColumnConfig]:
        """What a user's profile may hold: user columns, and what the content channels read as a declared interest."""
        interests: dict[str, ColumnConfig] = {}
        for channel in self.config.recall.channels.values():
            if isinstance(channel, ContentConfig):
                listed = {n: c for n, c in self.catalogue.columns.items() if c.kind in LISTED}
                columns = {n: c.model_copy(update={"kind": "tags"}) for n, c in listed.items()}  # one may like several
                named = {name: columns[target] for name, target in channel.interests.items() if target in columns}
                interests |= {n: c for n, c in columns.items() if channel.columns is None or channel.columns.get(n)} | named
        return interests | dict(self.space.columns["user"])

    @property
    def context_names(self) -> set[str]:
        """What something reads of a request's context: declared columns, and interests as in a profile. Clocks read the time alone."""
        declared = self.space.columns["context"]
        return {name for name, column in declared.items() if column.kind not in FROM_TIME} | self.profile_columns.keys()

    def _parts(self) -> Parts:
        return Parts(
            self.items, self.space, self.item_columns, self.catalogue, self.filters, self.channels, self.tower, self.ranker, self.live
        )

    def _eligibility(self, queries: Queries) -> Eligibility:
        """What the batch may be shown, by the catalogue's changes as this process knew them when it first saw the batch."""
        if "eligibility" not in queries.memo:
            queries.memo["eligibility"] = Eligibility(self._parts(), self.delta)
        eligibility: Eligibility = queries.memo["eligibility"]
        return eligibility

    # ---- from outside to rows -------------------------------------------------------------------------------------

    def queries(self, requests: Sequence[FunnelRequest]) -> Queries:
        """Outside ids to rows: history is the training log's, continued by live events; what was seen is excluded."""
        made = (query_of(r, users=self.users, items=self.items, past=self.past, config=self.config) for r in requests)
        return Queries.of(list(made), history_length=self.config.history.length)

    def lane(self, k: int) -> int:
        """Requests may share a batch only within one lane: the depth of every stage follows the deepest page asked for."""
        return max(k, self.config.fine_rank.keep)

    # ---- the stages -----------------------------------------------------------------------------------------------

    def recall(self, queries: Queries) -> Candidates:
        """All channels, merged with provenance. A channel that fails is left out and named in `lost`."""
        merging, eligibility = self.config.recall.merge.at_depth(self._depth(queries)), self._eligibility(queries)
        eligibility.admit(queries)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        lost = []
        for name, channel in self.channels.items():
            try:
                found[name] = eligibility.recall(name, channel, queries, merging.quota_of(name))
            except Exception:  # a channel's bug must not take the page with it: the answer names it
                log.exception("Channel %s failed; its candidates are left out.", name)
                found[name] = (np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.float32))
                lost.append(name)
        out = merge(tuple(found), list(found.values()), merging, n_queries=len(queries))
        out.lost, out.merged = tuple(lost), out.scores
        able = {name: channel for name, channel in self.channels.items() if name not in lost}
        out.cold = stand(queries, self.config.cold_start, able, found)
        if queries.explain:
            out.noted()
        return out

    def coarse_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """Two-tower cosine with cached item vectors, plus a share of the merged score: what one model alone cannot know."""
        if self.vectors is None:
            raise BundleError("This funnel was loaded without its coarse stage. Load it with stages=('coarse_rank', …).")
        eligibility = self._eligibility(queries)
        candidates = eligibility.shown(candidates)
        wanted = eligibility.vectors(self.vectors, candidates.items)  # (B, N, d); row -1 of an empty slot is ignored below
        scores = np.einsum("bd,bnd->bn", self.user_vectors(queries), wanted, optimize=True)
        if self.config.coarse_rank.merged and candidates.merged is not None:
            scores = scores + np.float32(self.config.coarse_rank.merged) * share_of_best(candidates.merged)
        keep = max(self.config.coarse_rank.keep, self._depth(queries))
        by = led(candidates, scores, self.config.cold_start)
        cut = self._with_a_start(candidates, scores if by is None else by)
        return candidates.ranked(scores, keep, stage="coarse_rank", explain=queries.explain, by=by, cut=cut)

    def fine_rank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """The ranker with every feature; scores become probabilities. Of new users it may not have the last word (see recall.cold_start)."""
        keep = max(self.config.fine_rank.keep, self._depth(queries))
        candidates = self._eligibility(queries).shown(candidates)
        scores, used = self._fine(queries, candidates)
        by = led(candidates, scores, self.config.cold_start)
        cut = self._with_a_start(candidates, scores if by is None else by)
        out = candidates.ranked(scores, keep, stage="fine_rank", explain=queries.explain, by=by, cut=cut)
        out.used = used
        return out

    def fine_scores(self, queries: Queries, candidates: Candidates) -> np.ndarray:
        """(B, N) probabilities of the fine ranker."""
        return self._fine(queries, candidates)[0]

    def _fine(self, queries: Queries, candidates: Candidates) -> tuple[np.ndarray, Used | None]:
        if self.ranker is None:
            raise BundleError("This funnel was loaded without its fine stage. Load it with stages=('fine_rank', …).")
        pairs = {EVIDENCE: evidence(candidates)} if any(f.name == EVIDENCE for f in self.ranker.pair_fields) else {}
        fields, used = self.user_fields(queries), None
        if self.live is not None:
            before, asked = self.live.snapshot, self.live.query_fields(queries)
            fields = fields | asked
            counted = self.live.pair_fields(queries, self._counted_rows(self.live, candidates.items))
            pairs |= counted
            if before is self.live.snapshot:  # for whoever logs the page; not where the snapshot was replaced meanwhile
                cut = (None, None) if before is None else (before.at, before.counted)
                used = Used(np.arange(len(queries)), candidates.items, asked, counted, *cut)
        delta = self._eligibility(queries).delta
        if delta is None:
            logits = self.ranker.score(fields, candidates.items, pairs)
        else:
            logits = self.ranker.score(fields, delta.storage(candidates.items), pairs, delta.ranked)
        scores: np.ndarray = 1.0 / (1.0 + np.exp(-np.clip(logits, -40, 40)))
        if not np.isfinite(scores).all():
            raise BundleError(
                f"The fine ranker of version {self.version} gave scores that are no numbers. Roll back, then look at its training."
            )
        return scores, used

    def _counted_rows(self, live: Live, items: np.ndarray) -> np.ndarray:
        """(B, N) rows of items as counters have them: they number later items by themselves, for they may know them before `follow`."""
        if not (later := items >= len(self.items)).any():
            return items
        rows, at = np.unique(items[later], return_inverse=True)
        out = items.copy()
        out[later] = live.item_rows(self.items.outside(rows))[at]
        return out

    def rerank(self, queries: Queries, candidates: Candidates) -> Candidates:
        """The page: at most max(k) items a query; `page` cuts each to its own k."""
        k = int(queries.k.max(initial=1))
        eligibility = self._eligibility(queries)
        candidates = eligibility.shown(candidates)
        if isinstance(self.reranker, MMR):
            known = self._known(eligibility)
            base = led(candidates, candidates.scores, self.config.cold_start)
            out = Rules(self.config.rules, self.reranker, known, self.reranker.vectors).rerank(queries, candidates, k, base=base)
        elif self.reranker is not None:
            out = self.reranker.rerank(queries, candidates, k)
        else:
            order = np.broadcast_to(np.arange(min(k, candidates.width)), (len(candidates), min(k, candidates.width)))
            out = candidates.reordered(order, candidates.scores[:, :k], stage="rerank")
        if queries.explain:
            out.noted()
        return out

    def _with_a_start(self, candidates: Candidates, scores: np.ndarray) -> np.ndarray | None:
        """(B, N) by what candidates are cut, where new items have a boost: one that never reaches the re-rank gains nothing from it."""
        boost = self.config.rules.new_items
        if boost.factor == 1 or not (candidates.items >= len(self.items)).any():
            return None
        return lifted(scores, boost.factors(self._shown_often(candidates.items)))

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
        self._eligibility(queries).admit(queries)
        chosen = first_of(self.popular_items, queries, int(queries.k.max(initial=1)))
        place = np.arange(1, chosen.shape[1] + 1)
        values = np.where(chosen == UNKNOWN, -np.inf, 1 / place).astype(np.float32)
        ranks = np.where(chosen == UNKNOWN, 0, place).astype(np.int16)
        found = Candidates(chosen, values, (POPULAR,), values[:, :, None], ranks[:, :, None], stage=POPULAR)
        return self._with_pins(queries, found) if self.config.rules.pins or queries.wishes is not None else found

    def _known(self, eligibility: Eligibility) -> Known:
        return Known(lambda _, wanted, items: eligibility.passes(wanted, items), self.items.row, self._shown_often, eligibility.may)

    def _with_pins(self, queries: Queries, found: Candidates) -> Candidates:
        """A page that no re-rank has seen, with its pins: they hang on the catalogue alone."""
        k = int(queries.k.max(initial=1))
        filled = pinned(self.config.rules.pins, self._known(self._eligibility(queries)), queries, found, unmoved(found), k=k)
        if queries.explain:
            filled.page.trail = {**filled.page.trail, RULES: (filled.reasons.astype(np.int16), filled.chance)}
        return filled.page

    def pins_left_out(self, queries: Queries, b: int, pins: Sequence[tuple[str, int]], page: Sequence[PageItem]) -> list[LeftOut]:
        """The pins of query b, its own (item id, place) and the configured ones, that its page does not have, and why."""
        out: list[LeftOut] = []
        places: dict[int, int] = {}
        there, k = [item.item_id for item in page], int(queries.k[b])
        for item_id, place in (*pins, *((p.item_id, p.place) for p in self.config.rules.pins)):
            row = self.items.row(item_id)
            why = self._why_not_pinned(queries, b, row)
            if not why and place > k:
                why = f"the page has {k} places"
            elif not why and (place in places or row in places.values()):
                why = "a pin before it has its place" if place in places else "a pin before it has the item"
            elif not why:
                places[place] = row
                if item_id not in there:
                    why = "the stage that pins was not reached"
            if why:
                out.append(LeftOut(item_id, place, why))
        return out

    def _why_not_pinned(self, queries: Queries, b: int, row: int) -> str:
        if row == UNKNOWN:
            return "no such item is known"
        if not self.shows(row):
            return "the item was deleted or is blocked"
        if row in queries.exclude[b]:
            return "the request excludes it, or the user has had it"
        one = queries.take([b])
        return "" if self._eligibility(one).may(one, np.array([[row]]))[0, 0] else "the request's filter does not let it pass"

    def rank(self, queries: Queries, item_ids: Sequence[Sequence[str]]) -> Candidates:
        """The fine stage over given items (unknown ids are left out): nothing recalled them, so no channel vouches for them."""
        rows = [self._shown_of([self.items.row(i) for i in dict.fromkeys(ids)]) for ids in item_ids]
        N = max(map(len, rows), default=0)
        items = np.full((len(rows), N), UNKNOWN, np.int32)
        for b, found in enumerate(rows):
            items[b, : len(found)] = found
        given = Candidates.given(items, tuple(self.config.recall.channels))
        if self.vectors is not None:
            likeness = np.einsum("bd,bnd->bn", self.user_vectors(queries), self._eligibility(queries).vectors(self.vectors, items))
            given = given.ranked(likeness, N, stage="coarse_rank", explain=queries.explain)
        return self.fine_rank(queries, given)

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """The k nearest items by the first channel that has neighbours, else by two-tower vectors. 404 for an unknown item."""
        row = self.items.row(item_id)
        if not self.shows(row):
            raise RequestError("unknown_item", f"Item '{item_id[:80]}' is not in version {self.version}.", field="item_id", status=404)
        most = k
        while True:
            if self.delta is not None:
                rows, scores = similar_items_now(row, most, self.delta, self._parts())
            else:
                rows, scores = similar_items(row, most, self.channels, self.vectors)
            free = ~self.blocked(rows)
            if int(free.sum()) >= k or len(rows) < most:
                break
            most *= 4  # what is blocked goes, and others take its place
        return list(zip(self.items.outside(rows[free][:k]), map(float, scores[free][:k]), strict=True))

    def shows(self, row: int) -> bool:
        """Whether an item may be shown: it is known, was not deleted and is not blocked by the rules."""
        return bool(self._shown_of([row]))

    def _shown_of(self, rows: Sequence[int]) -> list[int]:
        """Those of these rows that may be shown."""
        asked = np.array(rows, np.int64)
        hidden = asked == UNKNOWN if self.delta is None else (asked == UNKNOWN) | self.delta.absent(asked)
        shown: list[int] = asked[~hidden & ~self.blocked(asked)].tolist()
        return shown

    def blocked(self, rows: np.ndarray) -> np.ndarray:
        """(n,) item rows -> (n,) bool: what the rules let nobody see."""
        now, free = Eligibility(self._parts(), self.delta), np.ones(len(rows), bool)
        for condition in self.config.rules.filter:
            free &= now.passes(condition, rows[None, :])[0]
        return ~free

    def check_similar_users(self, queries: Queries) -> None:
        """RequestError (404) where `similar_users` has no answer to a batch of one: no such channel, or a user without any event."""
        check_similar_users(queries, self.config.recall.channels, self.version)

    def similar_users(self, queries: Queries, k: int) -> list[tuple[str, float]]:
        """The k users nearest to the history of the one query, live events included, by the first channel that compares users."""
        rows, scores = similar_users(queries, k, self.channels)
        return list(zip(self.users.outside(rows), map(float, scores), strict=True))

    # ---- what several stages need, computed once a batch ----------------------------------------------------------

    def user_fields(self, queries: Queries) -> dict[str, np.ndarray]:
        """The encoded user, context and history fields of a batch: field -> (B, …)."""
        if "fields" not in queries.memo:
            delta = self._eligibility(queries).delta
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

    def _depth(self, queries: Queries) -> int:
        """How many items every stage must let through: 0 unless a page is deeper than what the fine stage keeps."""
        k = int(queries.k.max(initial=1))
        return k if k > self.config.fine_rank.keep else 0

    # ---- from rows to outside -------------------------------------------------------------------------------------

    def page(self, queries: Queries, candidates: Candidates) -> list[list[PageItem]]:
        """B answers, each with at most its query's k items, in the order of `candidates`."""
        eligibility = self._eligibility(queries)
        return pages(queries, eligibility.shown(candidates), items=self.items, titles=self.titles, delta=eligibility.delta)

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
