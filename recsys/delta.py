"""What changed in the catalogue since a bundle was made, beside it: new items, changed ones, deleted ones.

A bundle's arrays never change. An item that is new or changed gets a slot in small arrays beside them: its encoded columns,
its vectors, its row of the ranker. Outside, items keep their rows: those of the bundle are 0 … n - 1, and a new item has row
n + its number in the item log, which is the same in every process. `at` says where a row's values lie: a row below n in the
bundle, any other in slot at - n. Channels that know the bundle's items alone go on untouched; those that compare vectors
search the slots beside their index, exactly, and leave out of the index what a slot has replaced.

A snapshot is never changed: `changed` makes the next one, and whoever holds one goes on with it to the end of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch

from recsys.allowed import Allowed, Filter, Mask
from recsys.core import UNKNOWN, Queries, Recaller, Vocabulary
from recsys.export import RankerEngine
from recsys.features.catalogue import LISTED, Catalogue
from recsys.features.filters import Filters
from recsys.features.inputs import Live
from recsys.features.keys import text_of
from recsys.features.live_items import ItemRecord
from recsys.features.schema import FeatureSpace
from recsys.models.two_tower import TwoTower
from recsys.recall.exact import best_of, exact_search
from recsys.recall.taste import RowVectors, unit

MOST_MASKS = 256
"""Filters whose bitmaps a snapshot keeps."""
FEW = 64
"""Slots that were replaced and not yet cleared away, before all slots are made anew."""


@runtime_checkable
class Comparing(Protocol):
    """A channel that compares vectors of users and items, and so can compare with items that came later."""

    def user_vectors(self, queries: Queries, vectors: RowVectors | None = None) -> np.ndarray: ...
    def nearest(self, vectors: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]: ...
    def item_vectors(self, rows: np.ndarray) -> np.ndarray: ...
    def vectors_of(self, items: Catalogue, towered: np.ndarray | None) -> np.ndarray | None: ...


class LiveVocabulary(Vocabulary):
    """The items of a bundle, and behind them those that came later. Its length stays that of the bundle."""

    later: Mapping[str, int]
    names: Mapping[int, str]

    @classmethod
    def over(cls, items: Vocabulary, later: Mapping[str, int]) -> LiveVocabulary:
        """A bundle's vocabulary with those (id -> row) behind it. One that has grown before is changed in place: many hold it."""
        self = items if isinstance(items, LiveVocabulary) else cls(items.ids, hashes=items._hashes, order=items._order)
        # Whoever has a row must find its name: other threads read this meanwhile.
        self.names = {row: item_id for item_id, row in later.items()}
        self.later = later
        return self

    def row(self, outside_id: str) -> int:
        """The row of one canonical id, or UNKNOWN."""
        known = super().row(outside_id)
        return known if known != UNKNOWN or not self.later else self.later.get(outside_id, UNKNOWN)

    def rows(self, outside_ids: Sequence[str] | np.ndarray | pa.Array) -> np.ndarray:
        """(n,) ids -> (n,) int32 rows, UNKNOWN where an id is neither of the bundle nor came later."""
        found, later = super().rows(outside_ids), self.later
        for i in np.flatnonzero(found == UNKNOWN).tolist() if later else ():
            asked = outside_ids[i]
            found[i] = later.get(asked.as_py() if isinstance(asked, pa.Scalar) else str(asked), UNKNOWN)
        return found

    def outside(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """(n,) known rows -> their n ids."""
        asked = np.asarray(rows, np.int64)
        if not self.names or not (beyond := asked >= len(self)).any():
            return super().outside(asked)
        found = super().outside(np.where(beyond, 0, asked)) if len(self) else [""] * len(asked)
        for i in np.flatnonzero(beyond).tolist():
            found[i] = self.names[int(asked[i])]
        return found


class Grown:
    """Arrays by item row: those of the bundle, and behind them the slots'. What nobody knows is zeros."""

    def __init__(self, base: Callable[[np.ndarray], np.ndarray], later: np.ndarray, at: np.ndarray, n: int) -> None:
        self._base, self._later, self._at, self._n = base, later, at, n
        self.shape, self.ndim = (len(at), *later.shape[1:]), later.ndim

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, rows: Any) -> np.ndarray:
        asked = np.asarray(rows)
        at = self._at[np.clip(asked, 0, len(self._at) - 1)]
        at = np.where((asked >= 0) & (asked < len(self._at)), at, UNKNOWN)
        flat = at.ravel()
        out = np.zeros((len(flat), *self._later.shape[1:]), self._later.dtype)
        inside, beside = (flat >= 0) & (flat < self._n), flat >= self._n
        out[inside] = self._base(flat[inside])
        out[beside] = self._later[flat[beside] - self._n]
        return out.reshape(*asked.shape, *self._later.shape[1:])


class Gathered:
    """The rows of an array that a batch will ask for, gathered at once: asking row by row costs more than the rows do."""

    def __init__(self, vectors: RowVectors, rows: np.ndarray) -> None:
        self.shape = vectors.shape
        self._rows = np.unique(rows[(rows >= 0) & (rows < len(vectors))])
        self._vectors = vectors[self._rows]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._vectors[np.searchsorted(self._rows, rows)]
        return found


class Segment(NamedTuple):
    """The values of some slots: [start, start + catalogue.n)."""

    start: int
    catalogue: Catalogue
    filters: Filters
    told: tuple[tuple[int, ItemRecord], ...]


@dataclass(frozen=True)
class Parts:
    """What of a loaded bundle makes the slots of an item; what its process did not load is None."""

    items: Vocabulary
    space: FeatureSpace
    item_columns: Mapping[str, np.ndarray]
    catalogue: Catalogue
    filters: Filters
    channels: Mapping[str, Recaller]
    tower: TwoTower | None = None
    ranker: RankerEngine | None = None
    live: Live | None = None

    def rows_of(self, record: ItemRecord) -> int:
        """The item's row: of the bundle, or behind it."""
        known = Vocabulary.row(self.items, record.item_id)
        return known if known != UNKNOWN else len(self.items) + record.number


def _empty() -> np.ndarray:
    return np.empty(0, np.int32)


@dataclass(frozen=True, eq=False)
class Delta:
    """One snapshot; n rows of the bundle, m rows told of in all, D slots.

    at (m,) int32 as above, -1 for a row nobody told of; gone (m,) bool: deleted; slots (D,) int32 the row of each slot, -1 where
    a newer one replaced it; vectors (D, d); ranked (D, …) rows of the ranker; near: channel -> ((D, d') vectors, (D,) bool which
    have one); columns: field -> (D, …) encoded; titles (D,).
    """

    n: int
    at: np.ndarray
    gone: np.ndarray
    slots: np.ndarray = field(default_factory=_empty)
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    vectors: np.ndarray | None = None
    ranked: torch.Tensor | None = None
    near: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    titles: tuple[str | None, ...] = ()
    segments: tuple[Segment, ...] = ()
    told: Mapping[int, ItemRecord] = field(default_factory=dict)
    masks: dict[Filter, tuple[Mask, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def nothing(cls, n: int) -> Delta:
        """The catalogue as the bundle has it."""
        return cls(n, np.arange(n, dtype=np.int32), np.zeros(n, bool))

    # ---- the next snapshot ----------------------------------------------------------------------------------------

    def changed(self, parts: Parts, records: Iterable[ItemRecord]) -> Delta:
        """The snapshot after these records; of several of one item the last counts."""
        newest = {parts.rows_of(r): r for r in records}
        told = {**self.told, **newest}
        if (self.slots < 0).sum() + len(newest) > FEW + len(told):
            return Delta.nothing(self.n)._with(parts, told, told)
        return self._with(parts, newest, told)

    def _with(self, parts: Parts, newest: Mapping[int, ItemRecord], told: Mapping[int, ItemRecord]) -> Delta:
        m = max([len(self.at), *(row + 1 for row in newest)])
        at, gone = np.full(m, UNKNOWN, np.int32), np.zeros(m, bool)
        at[: len(self.at)], gone[: len(self.gone)] = self.at, self.gone
        for row, record in newest.items():
            gone[row] = record.columns is None
        fresh = [(row, record) for row, record in newest.items() if record.columns is not None]
        D = len(self.slots)
        rows = np.array([row for row, _ in fresh], np.int32)
        slots = np.concatenate([self.slots, rows])
        replaced = at[rows] - self.n
        slots[replaced[replaced >= 0]] = UNKNOWN
        at[rows] = self.n + np.arange(D, D + len(rows), dtype=np.int32)
        out = replace(self, at=at, gone=gone, slots=slots, told=told, masks={})
        return out._filled(parts, fresh) if fresh else out

    def _filled(self, parts: Parts, fresh: Sequence[tuple[int, ItemRecord]]) -> Delta:
        """With the arrays of the newest slots behind the others'."""
        columns = encoded(parts, fresh)
        segments = self._segments(parts, fresh)
        catalogue = _values(parts, fresh)
        vectors = parts.tower.item_vectors(columns) if parts.tower is not None else None
        near = dict(self.near)
        for name, channel in parts.channels.items():
            found = channel.vectors_of(catalogue, vectors) if isinstance(channel, Comparing) else None
            if found is not None:
                has = ~np.isnan(found).any(1)
                found = np.where(has[:, None], found, 0).astype(np.float32)
                before, had = near.get(name, (found[:0], has[:0]))
                near[name] = np.concatenate([before, found]), np.concatenate([had, has])
        ranked = parts.ranker.rows_of(columns) if parts.ranker is not None else None
        return replace(
            self,
            columns={name: np.concatenate([self.columns[name], new]) if name in self.columns else new for name, new in columns.items()},
            vectors=vectors if self.vectors is None or vectors is None else np.concatenate([self.vectors, vectors]),
            ranked=ranked if self.ranked is None or ranked is None else torch.cat([self.ranked, ranked]),
            near=near,
            titles=(*self.titles, *(r.title or (str(t) if (t := (r.columns or {}).get("title")) else None) for _, r in fresh)),
            segments=segments,
        )

    def _segments(self, parts: Parts, fresh: Sequence[tuple[int, ItemRecord]]) -> tuple[Segment, ...]:
        """The values of the slots, in segments each at least twice as large as the next: few to ask, and rarely made again."""
        kept, new = list(self.segments), tuple(fresh)
        while kept and kept[-1].catalogue.n < 2 * len(new):
            new = (*kept.pop().told, *new)
        start = len(self.slots) - len(new)
        catalogue, last = _values(parts, new), {row: slot for slot, (row, _) in enumerate(new)}
        # Of slots of one item the last holds the id: a filter by id finds one.
        ids = [r.item_id if last[row] == slot else f"\0{slot}" for slot, (row, r) in enumerate(new)]
        return (*kept, Segment(start, catalogue, Filters(catalogue, Vocabulary(ids)), new))

    # ---- what stages ask ------------------------------------------------------------------------------------------

    @property
    def later(self) -> dict[str, int]:
        """Id -> row of every item that the bundle does not have, deleted ones too: a history may hold them."""
        return {record.item_id: row for row, record in self.told.items() if row >= self.n}

    def absent(self, items: np.ndarray) -> np.ndarray:
        """Which item rows, of any shape, must not be shown: deleted, or told of elsewhere and not yet here. Not -1."""
        known = (items >= 0) & (items < len(self.at))
        row = np.where(known, items, 0)
        hidden: np.ndarray = (items >= 0) & (~known | self.gone[row] | (self.at[row] < 0))
        return hidden

    def storage(self, items: np.ndarray) -> np.ndarray:
        """Item rows of any shape -> where their values lie; 0 for what nobody knows, whose values mean nothing."""
        known = (items >= 0) & (items < len(self.at))
        lies: np.ndarray = np.maximum(self.at[np.where(known, items, 0)], 0)
        return lies

    def grown(self, base: np.ndarray, later: np.ndarray) -> Grown:
        """A (n, …) array of the bundle with (D, …) rows of the slots."""
        return Grown(lambda rows: base[rows], later, self.at, self.n)

    def item_ids(self) -> np.ndarray | None:
        """(m - n,) int32 rows of the table item_id, 0 where nobody told of the row; None where all rows are the bundle's."""
        at = self.at[self.n :]
        if not (at >= 0).any():
            return None
        found: np.ndarray = np.where(at >= 0, self.columns["item_id"][np.maximum(at - self.n, 0)], 0)
        return found

    def title(self, row: int, before: str | None) -> str | None:
        """The title that an item was given with its slot, else `before`, the bundle's; one that came anew has none of before."""
        slot = int(self.at[row]) - self.n
        if slot < 0:
            return before
        return self.titles[slot] or (None if self.told[row].anew else before)

    def mask(self, wanted: Filter, parts: Parts) -> tuple[Mask, np.ndarray]:
        """A filter as the bundle's (n,) bitmap and as a (D,) one of the slots; () lets all pass. What is gone does not pass."""
        if wanted not in self.masks:
            ok = [s.filters.mask(wanted).items if wanted else np.ones(s.catalogue.n, bool) for s in self.segments]
            slots = np.concatenate([*ok, np.empty(0, bool)])
            alive = self.slots >= 0
            alive[alive] = ~self.gone[self.slots[alive]]
            slots &= alive
            items = parts.filters.mask(wanted).items.copy() if wanted else np.ones(self.n, bool)
            moved = (self.slots >= 0) & (self.slots < self.n)
            items[self.slots[moved]] = slots[moved]
            if len(self.masks) < MOST_MASKS:
                self.masks[wanted] = Mask(items & ~self.gone[: self.n]), slots
            else:
                return Mask(items & ~self.gone[: self.n]), slots
        return self.masks[wanted]

    def allowed(self, queries: Queries, parts: Parts) -> tuple[Allowed | None, Allowed]:
        """What a batch may be answered with: of the bundle (None: all of it) and of the slots."""
        filters = [f or () for f in queries.filters] if queries.filters is not None else [()] * len(queries)
        distinct = {f: i for i, f in enumerate(dict.fromkeys(filters))}
        of = np.fromiter((distinct[f] for f in filters), np.int32, len(filters))
        found = [self.mask(f, parts) for f in distinct]
        beside = Allowed(tuple(Mask(slots) for _, slots in found), of)
        if not self.gone[: self.n].any():
            of = np.where([bool(f) for f in filters], of, UNKNOWN).astype(np.int32)
            if queries.filters is None:
                return None, beside
        return Allowed(tuple(mask for mask, _ in found), of), beside

    # ---- recall ---------------------------------------------------------------------------------------------------

    def recall(self, name: str, channel: Recaller, queries: Queries, beside: Allowed, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The channel's answer over the bundle's items and the slots: what an index over all of them would give."""
        if name not in self.near or not isinstance(channel, Comparing):
            return channel.recall(queries, k)
        own = Grown(channel.item_vectors, self.near[name][0], self.at, self.n)
        vectors = channel.user_vectors(queries, Gathered(own, queries.history))
        narrowed = replace(queries, allowed=self._unmoved(queries))
        return _joined(channel.nearest(vectors, narrowed, k), self._nearest(name, vectors, self._excluded(queries), beside, k), k)

    def _excluded(self, queries: Queries) -> np.ndarray:
        """(B, E') slots that must not come back, once a batch: of a long history few lie in slots."""
        if "slots" not in queries.memo:
            out = self._slots_of(queries.exclude)
            queries.memo["slots"] = -np.sort(-out, axis=1)[:, : int((out >= 0).sum(1).max(initial=0))]
        slots: np.ndarray = queries.memo["slots"]
        return slots

    def _slots_of(self, rows: np.ndarray) -> np.ndarray:
        """Item rows of any shape -> their slots, -1 for those of the bundle and for what is gone."""
        lies = np.where(self.absent(rows) | (rows < 0), UNKNOWN, self.storage(rows) - self.n)
        slots: np.ndarray = np.maximum(lies, UNKNOWN)
        return slots

    def _unmoved(self, queries: Queries) -> Allowed | None:
        """The allowed items of the bundle without those whose values lie in a slot."""
        moved = self.slots[(self.slots >= 0) & (self.slots < self.n)]
        if not len(moved):
            return queries.allowed
        stay = np.ones(self.n, bool)
        stay[moved] = False
        if queries.allowed is None:
            return Allowed((Mask(stay),), np.zeros(len(queries), np.int32))
        masks, of = queries.allowed.masks, queries.allowed.of
        return Allowed((*(Mask(m.items & stay) for m in masks), Mask(stay)), np.where(of < 0, len(masks), of).astype(np.int32))

    def _nearest(self, name: str, vectors: np.ndarray, out: np.ndarray, beside: Allowed, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the slots, without those of `out` (B, E)."""
        near, has = self.near[name]
        B, k = len(vectors), min(k, len(near))
        items, scores = np.full((B, k), UNKNOWN, np.int32), np.full((B, k), -np.inf, np.float32)
        known = np.isfinite(vectors).all(1)
        if known.any() and k:
            allowed = Allowed(tuple(Mask(m.items & has) for m in beside.masks), beside.of)[known]
            slot, scores[known] = exact_search(near, vectors[known], k, out[known], allowed)
            items[known] = np.where(slot >= 0, self.slots[np.maximum(slot, 0)], UNKNOWN)
        return items, scores

    def similar(self, name: str, channel: Recaller, row: int, parts: Parts, k: int) -> tuple[np.ndarray, np.ndarray]:
        """((k',) items, (k',) scores) nearest to one item, by a channel; empty where it knows no neighbours of it."""
        none = Queries.of([], history_length=0)
        if name in self.near and isinstance(channel, Comparing):
            own = Grown(channel.item_vectors, self.near[name][0], self.at, self.n)[np.array([row])]
            one = replace(none, user_ids=[""], exclude=np.array([[row]], np.int32))
            allowed, beside = self.allowed(one, parts)
            one = replace(one, allowed=allowed)
            one = replace(one, allowed=self._unmoved(one))
            items, scores = _joined(
                channel.nearest(unit(own), one, k), self._nearest(name, unit(own), self._slots_of(one.exclude), beside, k), k
            )
            return items[0], scores[0]
        if not hasattr(channel, "similar") or row >= self.n:
            return none.users, np.empty(0, np.float32)
        # Its list knows nothing of deletions, so it is asked for as many more.
        items, scores = channel.similar(np.array([row], np.int32), min(k + int(self.gone[: self.n].sum()), self.n))
        kept = (items[0] >= 0) & ~self.absent(items[0])
        return items[0][kept][:k], scores[0][kept][:k]


def _joined(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of two lists without a common item; ties to the smaller row, as in one index."""
    items, scores = np.concatenate([one[0], other[0]], 1), np.concatenate([one[1], other[1]], 1)
    order = np.argsort(items, axis=1, kind="stable")
    return best_of(np.take_along_axis(items, order, 1), np.take_along_axis(scores, order, 1), min(k, items.shape[1]))


# ---- the values of a record -------------------------------------------------------------------------------------------


def encoded(parts: Parts, fresh: Sequence[tuple[int, ItemRecord]]) -> dict[str, np.ndarray]:
    """Field -> (n, …) encoded columns of records; what a record does not say is as the bundle has it, or missing.

    Of an item that came anew all of it is missing: the bundle's was forgotten with its deletion.
    """
    space, n = parts.space, len(parts.items)
    frame: dict[str, list[Any]] = {"item_id": [r.item_id for _, r in fresh]}
    frame |= {name: [(r.columns or {}).get(name) for _, r in fresh] for name in space.encoders["item"]}
    out = space.encode("item", frame)
    reads_of = {name: [name] for name in out}
    if parts.live is not None:
        for name in (set(parts.item_columns) - set(out)) & set(parts.live.inputs.plan.crosses):
            out[name] = _crossed(parts.live, space, name, fresh, n)
            reads_of[name] = list(parts.live.inputs.plan.crosses[name].parts)
    for slot, (row, record) in enumerate(fresh):
        if row < n and not record.anew:
            for name, reads in reads_of.items():
                if not set(reads) & set(record.columns or {}):
                    out[name][slot] = parts.item_columns[name][row]
    return out


def _crossed(live: Live, space: FeatureSpace, name: str, fresh: Sequence[tuple[int, ItemRecord]], n: int) -> np.ndarray:
    """The concat of item columns `name`, as `AggregateInputs.item_columns` makes it; `n` rows are the bundle's."""

    def text(part: str, row: int, record: ItemRecord) -> str:
        given = record.columns or {}
        if part in given or record.anew or row >= n:
            return " ".join(text_of(space.columns["item"][part], [given.get(part)])[0])
        return " ".join(live.inputs.columns.texts["item"][part].at(row))

    parts = live.inputs.plan.crosses[name].parts
    return live.inputs.joined(name, [[text(part, row, record) for part in parts] for row, record in fresh])


def _values(parts: Parts, fresh: Sequence[tuple[int, ItemRecord]]) -> Catalogue:
    """What filters and content read of records."""
    held = parts.catalogue
    frame = {name: [value_of(held, name, row, r) for row, r in fresh] for name in held.columns}
    return Catalogue.of(held.columns, frame, len(fresh))


def value_of(held: Catalogue, name: str, row: int, record: ItemRecord) -> Any:
    """A record's value of a column, else the bundle's, if the item did not come anew."""
    given = record.columns or {}
    if name in given or row >= held.n or record.anew:
        return given.get(name)
    if name in held.values:
        v = held.values[name]
        texts = v.known.outside(v.codes[v.indptr[row] : v.indptr[row + 1]])
        kind = held.columns[name].kind
        one = kind in ("id", "category") and kind in LISTED
        return (texts[0] if texts else None) if one else " ".join(texts) if kind == "text" else texts
    array = held.numbers[name] if name in held.numbers else held.vectors[name]
    return array[row].tolist()
