"""What editors and requests want of a page, over what the ranker thinks: boosts, novelty, diversity, pins, exploration.

The order, each on what the one before left:
    1. blocks, exclusions, filters   inside every search, long before: what they forbid is not here any more
    2. worth                         fine score x boosts x novelty x what is like something unwanted x new items; who stands first
    3. diversity and caps            on worth (see diversity.py); a cap gives way before a place stays empty
    4. pins                          at their places, whatever else wants them and whatever cap they exceed
    5. exploration                   any other place goes, now and then, to a candidate drawn at random
Exploration comes last, so that each item's probability to stand where it stands is known exactly. Scores stay the fine scores: rules change the order alone, so what is logged of a page is what the ranker said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from recsys.allowed import Condition, Filter
from recsys.core import UNKNOWN, Candidates, FrozenConfig, Queries, Wishes, canonical_id, id_hash
from recsys.features.encoders import spelled
from recsys.recall.order import among
from recsys.recall.taste import RowVectors, unit
from recsys.rerank import diversity
from recsys.rerank.diversity import MMR

RULES = "rules"
"""The entry of a page's trail that holds, per item, the code of the rule that moved it and the probability of its being there."""
PINNED, EXPLORED, BOOSTED, SEEN, UNWANTED, NEW = range(len(diversity.REASONS), len(diversity.REASONS) + 6)
REASONS = (
    *diversity.REASONS,
    "pinned",
    "explored: drawn at random",
    "moved up by a boost",
    "moved down: seen lately",
    "moved down: like something not wanted",
    "moved up: new",
)
"""What an answer says of an item, by code."""


class MatchConfig(FrozenConfig):
    column: str
    """Item column, or item_id."""
    values: tuple[str | int | float, ...] = Field(min_length=1)
    """An item with at least one of these is meant."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The values as filters spell them."""
        return tuple(sorted({spelled(v) for v in self.values}))


class BoostConfig(MatchConfig):
    factor: PositiveFloat
    """What the item's score is multiplied with: 2 doubles it, 0.5 halves it."""


def _item_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not canonical_id(value):
        raise ValueError("an id is a text that is not empty, or a number")
    return canonical_id(value)


class PinConfig(FrozenConfig):
    item_id: Annotated[str, BeforeValidator(_item_id)]
    """The item. One that a request excludes or filters out, or that was deleted, leaves its place to others."""
    place: PositiveInt
    """1 is the first of the page. A page that ends before does not have it."""


class NoveltyConfig(FrozenConfig):
    weight: float = Field(default=0.0, ge=0, le=1)
    """How much of its score an item loses right after the user had it; matters where recall.exclude_seen is off. 0: none."""
    half_life_h: PositiveFloat = 720.0
    """Hours in which half of that is forgotten."""


class NewItemsConfig(FrozenConfig):
    factor: float = Field(default=1.0, ge=1)
    """What the score of an item that came after the training is multiplied with while nobody has seen it. 1: no boost."""
    exposures: PositiveFloat = 100.0
    """Times shown after which half of the boost is left: enough to learn whether it is liked."""

    def factors(self, shown: np.ndarray) -> np.ndarray:
        """(B, N) what each score is multiplied with, by how often the item was shown (NaN: it is not new)."""
        extra = (self.factor - 1) * 0.5 ** (np.nan_to_num(shown) / self.exposures)
        return np.where(np.isnan(shown), 1.0, 1 + extra)


class ExploreConfig(FrozenConfig):
    share: float = Field(default=0.0, ge=0, le=1)
    """Probability that a place goes to a candidate drawn at random; what each item's probability was is in the answer's `explain`."""
    new_users: float | None = Field(default=None, ge=0, le=1)
    """The same for users without a history (see cold_start), of whom the ranker knows least. null: as `share`."""
    first_place: PositiveInt = 3
    """Places above this one are never explored."""


class RulesConfig(FrozenConfig):
    """What editors want of every page. A request may add boosts, pins and a diversity of its own."""

    boosts: tuple[BoostConfig, ...] = ()
    """Items whose scores are multiplied."""
    pins: tuple[PinConfig, ...] = ()
    """Items at fixed places."""
    blocks: tuple[MatchConfig, ...] = ()
    """Items that are never shown, on any rung."""
    novelty: NoveltyConfig = NoveltyConfig()
    """What the user had lately stands lower."""
    unwanted: NonNegativeFloat = Field(default=0.5, le=1)
    """How much of its score an item loses for being just like one that the user does not want (see recall.not_interested)."""
    new_items: NewItemsConfig = NewItemsConfig()
    """A start for items that no model knows yet."""
    explore: ExploreConfig = ExploreConfig()
    """Places given away at random, to learn of items that the ranker overlooks."""

    @property
    def filter(self) -> Filter:
        """The blocks as conditions of every query."""
        return tuple(Condition(b.column, none=b.texts) for b in self.blocks)


def unfit(rules: RulesConfig, kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(dotted path below rules, sentence) of each boost and block that the items' columns, name -> kind, cannot meet."""
    for part, matches in (("boosts", rules.boosts), ("blocks", rules.blocks)):
        for index, match in enumerate(matches):
            kind = kinds.get(match.column)
            if match.column != "item_id" and kind is None:
                known = ", ".join(["item_id", *kinds])
                yield f"{part}.{index}.column", f"names '{match.column}', which no item column declares; known: {known}"
            elif kind in ("number", "bins") and not all(_is_number(v) for v in match.values):
                yield f"{part}.{index}.values", f"are not all numbers, as '{match.column}' holds"


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


@dataclass(frozen=True)
class Known:
    """What rules ask of the catalogue. passes(condition, (B, N) items) -> (B, N) bool; row(item id) -> its row; shown(B x N
    items) -> (B, N) how often each new item was shown, NaN for one that is not new; may(queries, (B, N) items) -> bool."""

    passes: Callable[[Queries, Condition, np.ndarray], np.ndarray]
    row: Callable[[str], int]
    shown: Callable[[np.ndarray], np.ndarray]
    may: Callable[[Queries, np.ndarray], np.ndarray]


class _Filled(NamedTuple):
    """A page, the codes of what moved its items, and the probability of each to stand where it does, (B, k) each."""

    page: Candidates
    reasons: np.ndarray
    chance: np.ndarray


class Rules:
    """The last stage: MMR with caps, and everything above around it."""

    def __init__(self, config: RulesConfig, mmr: MMR, known: Known, vectors: RowVectors | None) -> None:
        self.config, self.mmr, self.known, self.vectors = config, mmr, known, vectors

    def rerank(self, queries: Queries, candidates: Candidates, k: int, *, base: np.ndarray | None = None) -> Candidates:
        """At most k of the candidates, in page order; `scores` stay the fine scores. The trail notes rules where they are asked for.

        base (B, N) stands for the scores in what an item is worth, where something beside the ranker orders new users' pages.
        """
        wishes = queries.wishes or (None,) * len(queries)
        worth, why = self._worth(queries, candidates, wishes, candidates.scores if base is None else base)
        moved = base is not None or bool((why > 0).any())
        start = candidates
        if moved:
            order = np.argsort(-worth, axis=1, kind="stable")
            start = candidates.reordered(order, np.take_along_axis(candidates.scores, order, 1))
            worth, why = np.take_along_axis(worth, order, 1), np.take_along_axis(why, order, 1)
        lambdas = np.array([1 - w.diversity if w is not None and w.diversity is not None else self.mmr.relevance for w in wishes])
        caps = [w.caps if w is not None else None for w in wishes]
        page, reasons = self.mmr.rerank_with_reasons(start, k, worth=worth if moved else None, lambdas=lambdas, caps=caps)
        if moved:
            reasons = self._moved(candidates, start, page, why, reasons)
        filled = _Filled(page, reasons, np.where(page.items == UNKNOWN, 0, 1).astype(np.float32))
        if self.config.pins or any(w is not None and w.pins for w in wishes):
            filled = pinned(self.config.pins, self.known, queries, start, filled, k=k)
        if explores := self.config.explore.share > 0 or bool(self.config.explore.new_users):
            filled = self._explored(queries, start, filled, wishes)
        if queries.explain or explores:
            filled.page.trail = {**filled.page.trail, RULES: (filled.reasons.astype(np.int16), filled.chance)}
        return filled.page

    # ---- worth ----------------------------------------------------------------------------------------------------

    def _worth(
        self, queries: Queries, candidates: Candidates, wishes: Sequence[Wishes | None], base: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, N) what orders the candidates, -inf in empty slots, and the rule that weighs most on each (0: none)."""
        c, items = self.config, candidates.items
        factor, why = np.ones(items.shape), np.zeros(items.shape, np.int8)
        strongest = np.ones(items.shape)

        def weigh(by: np.ndarray, code: int) -> None:
            nonlocal factor
            by = np.where(items == UNKNOWN, 1.0, by)
            more = np.abs(np.log(np.maximum(by, 1e-9))) > np.abs(np.log(np.maximum(strongest, 1e-9)))
            strongest[more], why[more] = by[more], code
            factor = factor * by

        for boost in c.boosts:
            weigh(np.where(self.known.passes(queries, Condition(boost.column, boost.texts), items), boost.factor, 1.0), BOOSTED)
        for wanted in dict.fromkeys(pair for w in wishes if w is not None for pair in w.boosts):
            mine = np.array([w is not None and wanted in w.boosts for w in wishes])[:, None]
            weigh(np.where(mine & self.known.passes(queries, wanted[0], items), wanted[1], 1.0), BOOSTED)
        if c.novelty.weight > 0 or any(w is not None and w.novelty is not None for w in wishes):
            weigh(self._novelty(queries, items, wishes), SEEN)
        if c.unwanted > 0 and self.vectors is not None and any(w is not None and w.unwanted for w in wishes):
            weigh(self._unwanted(items, wishes), UNWANTED)
        if c.new_items.factor > 1:
            weigh(c.new_items.factors(self.known.shown(items)), NEW)
        return np.where(items == UNKNOWN, -np.inf, lifted(base, factor)).astype(np.float32), why

    def _novelty(self, queries: Queries, items: np.ndarray, wishes: Sequence[Wishes | None]) -> np.ndarray:
        """(B, N) 1 - weight * 0.5 ** (hours since the user last had it / half-life); without a time, no hours have passed."""
        own = (self.config.novelty.weight, self.config.novelty.half_life_h)
        asked = np.array([w.novelty if w is not None and w.novelty is not None else own for w in wishes], float).reshape(-1, 2)
        age_h = np.nan_to_num(np.maximum(queries.at[:, None] - queries.history_times, 0)) / 3600
        lost = asked[:, :1] * 0.5 ** (age_h / asked[:, 1:])  # (B, L)
        out = np.ones(items.shape)
        for slot in range(queries.history.shape[1]):
            same = (items == queries.history[:, slot, None]) & (items != UNKNOWN)
            out = np.where(same, np.minimum(out, 1 - lost[:, slot, None]), out)
        return out

    def _unwanted(self, items: np.ndarray, wishes: Sequence[Wishes | None]) -> np.ndarray:
        """(B, N) 1 - unwanted * the largest cosine to what the user does not want, where that is above 0."""
        assert self.vectors is not None  # noqa: S101 - asked above
        out = np.ones(items.shape)
        for b, wish in enumerate(wishes):
            if wish is not None and wish.unwanted:
                disliked = unit(np.asarray(self.vectors[np.array(wish.unwanted)], np.float32))
                own = unit(np.asarray(self.vectors[np.maximum(items[b], 0)], np.float32))
                out[b] = 1 - self.config.unwanted * np.clip((own @ disliked.T).max(1), 0, 1)
        return out

    @staticmethod
    def _moved(fine: Candidates, start: Candidates, page: Candidates, why: np.ndarray, reasons: np.ndarray) -> np.ndarray:
        """What moved each item: its weight, where it stands on that side of its fine place; else what diversity says."""
        out = reasons.copy()
        for b in range(len(page)):
            place = {int(item): n for n, item in enumerate(fine.items[b]) if item != UNKNOWN}
            rule = {int(item): int(code) for item, code in zip(start.items[b], why[b], strict=True) if item != UNKNOWN}
            for n, item in enumerate(page.items[b].tolist()):
                code = rule.get(item, 0)
                if code and reasons[b, n] != diversity.RELAXED:
                    up = code in (BOOSTED, NEW)
                    out[b, n] = code if (n < place[item]) == up and n != place[item] else reasons[b, n]
        return out

    # ---- exploration -------------------------------------------------------------------------------------

    def _explored(self, queries: Queries, start: Candidates, before: _Filled, wishes: Sequence[Wishes | None]) -> _Filled:
        """Each place from `first_place` on that has no pin goes, with probability `share`, to one of the candidates that are not
        on the page, each as likely as the other. The page is the query's own: others of its batch may ask for deeper ones.

        The draw hangs on the user and the instant alone, so every process draws alike. chance: of M candidates beside the page each
        stands at such a place with probability share / M, who stood there stays with 1 - share; and both times the probability that
        a candidate is left, where there are fewer than places. Where there are caps, a place takes only candidates that break none
        that held before; who they are hangs on the places above, so the probabilities are then those given what stands above: their
        product is that of the page.
        """
        c, page = self.config.explore, before.page
        reasons, chance = before.reasons.copy(), before.chance.copy()
        slots = np.tile(np.arange(page.width), (len(page), 1))
        for b in range(len(page)):
            own = min(int(queries.k[b]), int((page.items[b] != UNKNOWN).sum()))
            on_page, behind = set(page.items[b, :own].tolist()), {int(item): n for n, item in enumerate(page.items[b]) if n >= own}
            rest = [n for n, item in enumerate(start.items[b].tolist()) if item not in on_page and item != UNKNOWN]
            places = [n for n in range(c.first_place - 1, own) if reasons[b, n] != PINNED]
            drawable, rng = len(rest), np.random.default_rng(id_hash(f"{queries.user_ids[b]}\0{float(queries.at[b])!r}"))
            share, standing = self._share(start, b), page.items[b, :own].copy()
            mmr = self.mmr.under(w.caps if (w := wishes[b]) is not None else None)
            for number, place in enumerate(places):
                drawn, one = rng.random() < share, rng.random()
                if mmr.config.caps:
                    fit = mmr.fit(standing, place, start.items[b, rest])
                    open_ = [n for n, ok in zip(rest, fit.tolist(), strict=True) if ok]
                    given, drawable = (share if open_ else 0.0), len(open_)
                else:
                    open_, given = rest, share * _fewer(drawable, number, share)
                chance[b, place] = 1 - given
                if drawn and open_:
                    chance[b, place], reasons[b, place] = given / drawable, EXPLORED
                    chosen = open_[int(one * len(open_))]
                    rest.remove(chosen)
                    item = int(start.items[b, chosen])
                    if item in behind:  # so that no item stands twice
                        slots[b, behind[item]] = place
                    slots[b, place], standing[place] = page.width + chosen, item
        return _Filled(_page_of(_beside(page, start), slots), reasons, chance)

    def _share(self, start: Candidates, b: int) -> float:
        """The probability with which a place of this query is explored."""
        c = self.config.explore
        new = start.cold is not None and bool(start.cold[b, 0])
        return c.share if c.new_users is None or not new else c.new_users


def unmoved(page: Candidates) -> _Filled:
    """A page on which nothing was done yet."""
    return _Filled(page, np.zeros(page.items.shape, np.int8), np.where(page.items == UNKNOWN, 0, 1).astype(np.float32))


def pinned(pins: Sequence[PinConfig], known: Known, queries: Queries, start: Candidates, before: _Filled, *, k: int) -> _Filled:
    """Pins at their places; an item that no channel recalled comes with a score of 0. The page stays as long as it can be."""
    page, reasons, chance = before
    B, wishes = len(page), queries.wishes or (None,) * len(page)
    always = [(known.row(p.item_id), p.place) for p in pins]
    wanted = [[*(w.pins if (w := wishes[b]) is not None else ()), *always] for b in range(B)]
    rows = np.full((B, max(map(len, wanted), default=0)), UNKNOWN, np.int32)
    for b, asked in enumerate(wanted):
        rows[b, : len(asked)] = [row for row, _ in asked]
    may = (rows != UNKNOWN) & known.may(queries, rows) & ~among(rows, queries.exclude)
    strangers = np.where(may & ~among(rows, start.items), rows, UNKNOWN)
    wide = _with(start, strangers)
    slots, out_why, out_chance = np.full((B, k), UNKNOWN, np.int64), np.zeros((B, k), np.int8), np.zeros((B, k), np.float32)
    empty = wide.width - 1  # the last slot of `_with` is empty
    for b in range(B):
        at = {int(item): n for n, item in reversed(list(enumerate(wide.items[b].tolist()))) if item != UNKNOWN}
        fixed: dict[int, int] = {}
        for (row, place), ok in zip(wanted[b], may[b, : len(wanted[b])].tolist(), strict=True):
            if ok and place <= k and place - 1 not in fixed and row not in fixed.values():
                fixed[place - 1] = row
        others = [n for n, item in enumerate(page.items[b].tolist()) if item != UNKNOWN and item not in fixed.values()]
        length = min(k, len(others) + len(fixed))
        places = sorted(p for p in fixed)
        # A pin behind the end of a short page moves up to its end.
        taken = {min(p, length - 1 - (len(places) - 1 - i)): fixed[p] for i, p in enumerate(places)}
        rest = iter(others)
        for n in range(length):
            if n in taken:
                slots[b, n], out_why[b, n], out_chance[b, n] = at[taken[n]], PINNED, 1.0
            else:
                m = next(rest)
                slots[b, n], out_why[b, n], out_chance[b, n] = at[int(page.items[b, m])], reasons[b, m], chance[b, m]
    slots = np.where(slots == UNKNOWN, empty, slots)
    return _Filled(_page_of(wide, slots), out_why, out_chance)


def lifted(scores: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Scores times a factor; one below 0 (a rung without the ranker) is lifted by a boost all the same."""
    scores = scores.astype(np.float64)
    out: np.ndarray = np.where(scores >= 0, scores * factor, scores / np.maximum(factor, 1e-9))
    return out


def _page_of(candidates: Candidates, slots: np.ndarray) -> Candidates:
    return candidates.reordered(slots, np.take_along_axis(candidates.scores, slots, 1), stage="rerank")


def _fewer(most: int, n: int, share: float) -> float:
    """The probability that of n draws, each made with probability `share`, fewer than `most` were made."""
    return 1.0 if n < most else sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(most))


def _with(candidates: Candidates, rows: np.ndarray) -> Candidates:
    """The candidates, behind them items (B, P) that nothing recalled, with score 0, and one empty slot."""
    more = np.concatenate([rows, np.full((len(rows), 1), UNKNOWN, np.int32)], 1).astype(np.int32)
    C = len(candidates.channels)
    scores = np.where(more == UNKNOWN, -np.inf, 0).astype(np.float32)
    nothing = {name: (np.zeros(more.shape, r.dtype), np.zeros(more.shape, s.dtype)) for name, (r, s) in candidates.trail.items()}
    unknown, unranked = np.full((*more.shape, C), np.nan, np.float32), np.zeros((*more.shape, C), np.int16)
    strangers = Candidates(more, scores, candidates.channels, unknown, unranked, nothing, merged=scores)
    return _beside(candidates, strangers)


def _beside(one: Candidates, other: Candidates) -> Candidates:
    """The candidates of both, (B, N + M), those of `one` first."""

    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b], 1)

    return replace(
        one,
        items=both(one.items, other.items),
        scores=both(one.scores, other.scores),
        channel_scores=both(one.channel_scores, other.channel_scores),
        channel_ranks=both(one.channel_ranks, other.channel_ranks),
        trail={name: (both(r, other.trail[name][0]), both(s, other.trail[name][1])) for name, (r, s) in one.trail.items()},
        merged=None if one.merged is None or other.merged is None else both(one.merged, other.merged),
    )
