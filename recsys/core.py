"""The currency of the funnel: queries and candidates as arrays, vocabularies, and what a stage must offer.

Outside, ids are strings of the user's own (`196` and `"196"` are one id). Inside, they are rows of a Vocabulary.
A batch is the only shape inside: `Queries` is a list of queries held as arrays, because arrays cross a process
boundary ten times faster than a list of objects and every stage works on the whole batch anyway.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from recsys.allowed import Allowed, Condition, Filter

UNKNOWN = -1
"""The row of an id that a vocabulary does not know, and of an empty slot."""

_RECENT_IDS = 100_000


class FrozenConfig(BaseModel):
    """Base of every configuration class: immutable, and a key that it does not know is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def canonical_id(value: Any) -> str:
    """The one spelling of an outside id: 196, 196.0 and "196" are the same user."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


LONGEST_TEXT = 1_024
"""Bytes of an id, or of another text that counters are kept by."""


def fits_a_key(text: str) -> bool:
    """Whether counters can be kept by a text: at most LONGEST_TEXT bytes, and no NUL, which parts the texts of a stored key."""
    if "\0" in text or len(text) > LONGEST_TEXT:
        return False
    return 4 * len(text) <= LONGEST_TEXT or len(text.encode("utf-8", "replace")) <= LONGEST_TEXT  # a character takes four bytes at most


def id_hash(text: str) -> int:
    """A stable 64-bit hash of an id (BLAKE2b, 8 bytes): the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Vocabulary:
    """Ids to rows and back: row r is the r-th id. Held as Arrow and sorted hashes, memory-mapped when loaded.

    A dict of a million strings costs ~150 MB in every replica; this costs 12 MB once per host.
    """

    def __init__(self, ids: Iterable[str] | pa.Array, *, hashes: np.ndarray | None = None, order: np.ndarray | None = None) -> None:
        array = ids if isinstance(ids, pa.Array) else pa.array(list(ids), pa.string())
        self.ids: pa.Array = array
        if hashes is None or order is None:
            keys = np.fromiter((id_hash(x) for x in array.to_pylist()), np.uint64, len(array))
            order = np.argsort(keys, kind="stable").astype(np.int32)
            hashes = keys[order]
        self._hashes, self._order = hashes, order
        self._recent: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, outside_id: str) -> int:
        """The row of one canonical id, or UNKNOWN."""
        known = self._recent.get(outside_id)
        if known is None:
            known = self._search(outside_id)
            if len(self._recent) >= _RECENT_IDS:
                self._recent = {}  # bounded: a full table starts afresh rather than tracking ages
            self._recent[outside_id] = known
        return known

    def _search(self, outside_id: str) -> int:
        key = np.uint64(id_hash(outside_id))
        at = int(np.searchsorted(self._hashes, key))
        while at < len(self._hashes) and self._hashes[at] == key:
            row = int(self._order[at])
            if self.ids[row].as_py() == outside_id:
                return row
            at += 1
        return UNKNOWN

    def rows(self, outside_ids: Sequence[str] | np.ndarray | pa.Array) -> np.ndarray:
        """(n,) ids -> (n,) int32 rows, UNKNOWN where an id is not in the vocabulary."""
        if len(outside_ids) < 2_000 and not isinstance(outside_ids, pa.Array):
            return np.fromiter((self.row(x) for x in outside_ids), np.int32, len(outside_ids))
        found = pc.index_in(pa.array(outside_ids, pa.string()), value_set=self.ids)
        rows: np.ndarray = pc.fill_null(found, UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32)
        return rows

    def outside(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """(n,) known rows -> their n ids."""
        found: list[str] = self.ids.take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return found

    def save(self, folder: Path, name: str) -> None:
        """Write `{name}.arrow`, `{name}.hashes.npy` and `{name}.order.npy`; all three can be memory-mapped."""
        save_arrow(folder / f"{name}.arrow", pa.table({"id": self.ids}))
        np.save(folder / f"{name}.hashes.npy", self._hashes)
        np.save(folder / f"{name}.order.npy", self._order)

    @classmethod
    def load(cls, folder: Path, name: str) -> Self:
        """Read what `save` wrote, memory-mapped."""
        ids = load_arrow(folder / f"{name}.arrow").column("id").combine_chunks()
        return cls(
            ids, hashes=np.load(folder / f"{name}.hashes.npy", mmap_mode="r"), order=np.load(folder / f"{name}.order.npy", mmap_mode="r")
        )


def save_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as one Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def load_arrow(path: Path) -> pa.Table:
    """Read an Arrow IPC file without copying it into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Wishes(NamedTuple):
    """What one request asks of its page (see rerank.rules). pins: (item row, place from 1); unwanted: rows the user does not want;
    caps: (column, at most, window); novelty: (weight, half-life in hours)."""

    diversity: float | None = None
    boosts: tuple[tuple[Condition, float], ...] = ()
    pins: tuple[tuple[int, int], ...] = ()
    unwanted: tuple[int, ...] = ()
    caps: tuple[tuple[str, int, int], ...] = ()
    novelty: tuple[float, float] | None = None


@dataclass(slots=True)
class Query:
    """One request, before it joins a batch. Rows are those of the bundle that will answer it.

    `items`, `times` and `events` are the user's history, oldest first; `times` are Unix seconds, NaN where the log
    had none. `exclude` are item rows that must not come back (asked for, or already seen); `filter` says which may.
    """

    user_id: str
    user: int = UNKNOWN
    k: int = 10
    at: float = field(default_factory=time.time)
    items: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    times: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))
    context: Mapping[str, Any] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    exclude: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    explain: bool = False
    filter: Filter | None = None
    state: bytes = b""
    """What the store holds of the user's aggregates."""
    wishes: Wishes | None = None


@dataclass(slots=True)
class Queries:
    """B queries as arrays. Item rows are int32, UNKNOWN (-1) in empty slots.

    user_ids B strings; users (B,); k (B,); at (B,) Unix seconds; history (B, L) item rows, newest LAST, padded on the
    left; history_times (B, L) Unix seconds (NaN: unknown or empty); exclude (B, E) padded on the right;
    contexts and profiles: B mappings of raw values (a profile overrides the bundle's user columns);
    explain: whether any query asks for the stages' ranks and scores. filters: what each query may be answered with, None where
    no query asks; logged (B,): whose ranked values are asked for, for the log of impressions; `allowed` are the same as bitmaps over the items of one bundle, made where they are needed (`Funnel.recall`)
    and, like `memo`, never sent anywhere. states: B packed states of users' aggregates, or none; positions (B,): the log
    positions of offline moments, None in service. `memo` keeps what stages of one process derive from
    the batch (encoded features, user vectors) so that it is computed once; it never crosses a process boundary.
    """

    user_ids: list[str]
    users: np.ndarray
    k: np.ndarray
    at: np.ndarray
    history: np.ndarray
    history_times: np.ndarray
    exclude: np.ndarray
    contexts: list[Mapping[str, Any]]
    profiles: list[Mapping[str, Any]]
    explain: bool = False
    filters: tuple[Filter | None, ...] | None = None
    allowed: Allowed | None = field(default=None, repr=False, compare=False)
    states: tuple[bytes, ...] = field(default=(), repr=False)
    positions: np.ndarray | None = None
    wishes: tuple[Wishes | None, ...] | None = None
    logged: np.ndarray | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"memo": {}, "allowed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def bare(self) -> Queries:
        """Who asks, when and in which context: without histories, exclusions and what was derived."""
        none = np.empty((len(self), 0), np.int32)
        return replace(self, history=none, history_times=none.astype(np.float64), exclude=none, memo={}, allowed=None)

    @classmethod
    def of(cls, queries: Sequence[Query], *, history_length: int) -> Self:
        """Batch queries; each history keeps its newest `history_length` events."""
        B = len(queries)
        L = min(history_length, max((len(q.items) for q in queries), default=0))
        E = max((len(q.exclude) for q in queries), default=0)
        history, times = np.full((B, L), UNKNOWN, np.int32), np.full((B, L), np.nan)
        exclude = np.full((B, E), UNKNOWN, np.int32)
        for b, q in enumerate(queries):
            n = min(L, len(q.items))
            if n:
                history[b, L - n :], times[b, L - n :] = q.items[-n:], q.times[-n:]
            exclude[b, : len(q.exclude)] = q.exclude
        return cls(
            user_ids=[q.user_id for q in queries],
            users=np.fromiter((q.user for q in queries), np.int32, B),
            k=np.fromiter((q.k for q in queries), np.int32, B),
            at=np.fromiter((q.at for q in queries), np.float64, B),
            history=history,
            history_times=times,
            exclude=exclude,
            contexts=[q.context for q in queries],
            profiles=[q.profile for q in queries],
            explain=any(q.explain for q in queries),
            states=tuple(q.state for q in queries) if any(q.state for q in queries) else (),
            filters=tuple(q.filter for q in queries) if any(q.filter for q in queries) else None,
            wishes=tuple(q.wishes for q in queries) if any(q.wishes for q in queries) else None,
        )

    def bar(self, scores: np.ndarray, value: float = -np.inf) -> None:
        """Write `value` into (B, I) scores wherever an item is excluded or not allowed: all a channel of dense scores must do."""
        row, slot = np.nonzero((self.exclude >= 0) & (self.exclude < scores.shape[1]))
        scores[row, self.exclude[row, slot]] = value
        if self.allowed is not None:
            self.allowed.bar(scores, value)

    def take(self, rows: np.ndarray | Sequence[int]) -> Self:
        """The queries at these positions, in this order."""
        at = np.asarray(rows, np.int64)
        return replace(
            self,
            user_ids=[self.user_ids[i] for i in at],
            users=self.users[at],
            k=self.k[at],
            at=self.at[at],
            history=self.history[at],
            history_times=self.history_times[at],
            exclude=self.exclude[at],
            contexts=[self.contexts[i] for i in at],
            profiles=[self.profiles[i] for i in at],
            states=tuple(self.states[i] for i in at) if self.states else (),
            positions=None if self.positions is None else self.positions[at],
            filters=None if self.filters is None else tuple(self.filters[i] for i in at),
            allowed=None if self.allowed is None else self.allowed[at],
            wishes=None if self.wishes is None else tuple(self.wishes[i] for i in at),
            logged=None if self.logged is None else self.logged[at],
            memo={},
        )


class Used(NamedTuple):
    """The aggregates that the fine ranker saw of R queries of a batch: `rows` (R,) their places in it, items (R, N), fields of
    the queries (R, ...) and of the pairs (R, N, W), after scaling; and the item snapshot that they are of: its instant, and per
    partition of the event log the entries counted in it (None: there was none)."""

    rows: np.ndarray
    items: np.ndarray
    query_fields: Mapping[str, np.ndarray]
    pair_fields: Mapping[str, np.ndarray]
    snapshot_s: float | None
    snapshot_counted: tuple[int, ...] | None

    def take(self, at: np.ndarray) -> Used:
        """What was seen of the queries at these places of the batch, which begins anew with them."""
        place = {int(row): n for n, row in enumerate(self.rows)}
        held = [(new, place[int(old)]) for new, old in enumerate(at) if int(old) in place]
        rows, mine = (np.array([pair[side] for pair in held], np.int64) for side in (0, 1))
        return self._replace(
            rows=rows,
            items=self.items[mine],
            query_fields={n: x[mine] for n, x in self.query_fields.items()},
            pair_fields={n: x[mine] for n, x in self.pair_fields.items()},
        )

    def where(self, wanted: np.ndarray | None) -> Used | None:
        """Of a whole batch, what was seen of the queries that are `wanted` (B,) bool, at their places. None: of none of them."""
        if wanted is None or not wanted.any():
            return None
        rows = np.flatnonzero(wanted)
        return self.take(rows)._replace(rows=rows)


@dataclass(slots=True)
class Candidates:
    """B lists of at most N candidates, best first; empty slots (item -1, score -inf) stand at the end of a row.

    items (B, N) int32; scores (B, N) float32; channel_scores (B, N, C) float32, NaN where channel c did not recall the
    item; channel_ranks (B, N, C) int16, 1 for that channel's first, 0 where it did not recall the item.
    `trail` holds, per stage passed, the (B, N) ranks (int16, 1 is first) and scores of the items still here; it is kept
    only for queries that ask to be explained. `stage` names the stage whose order this is; `lost` the channels that failed;
    `merged` (B, N) float32 keeps the scores of the merged recall (None: nothing recalled these items). `cold` (B, 2) int16 says on
    which rung each new user stands and which channel leads there (see recall.cold_start; None: nobody is new). `used`: what the fine
    ranker saw, for the log of impressions; a fine stage of its own sends it back of `queries.logged` alone.
    """

    items: np.ndarray
    scores: np.ndarray
    channels: tuple[str, ...]
    channel_scores: np.ndarray
    channel_ranks: np.ndarray
    trail: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    stage: str = "recall"
    lost: tuple[str, ...] = ()
    merged: np.ndarray | None = None
    cold: np.ndarray | None = None
    used: Used | None = field(default=None, repr=False, compare=False)

    NO_SCORE: ClassVar[np.float32] = np.float32(-np.inf)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def width(self) -> int:
        """N, the slots per query."""
        return int(self.items.shape[1])

    @classmethod
    def empty(cls, B: int, channels: tuple[str, ...] = ()) -> Self:
        """B lists without a candidate."""
        C = len(channels)
        return cls(
            np.empty((B, 0), np.int32),
            np.empty((B, 0), np.float32),
            channels,
            np.empty((B, 0, C), np.float32),
            np.empty((B, 0, C), np.int16),
        )

    @classmethod
    def given(cls, items: np.ndarray, channels: tuple[str, ...]) -> Self:
        """(B, N) items in this order, all with score 0, that none of the C channels recalled."""
        scores = np.where(items == UNKNOWN, cls.NO_SCORE, 0).astype(np.float32)
        of_channels = (*items.shape, len(channels))
        return cls(items, scores, channels, np.full(of_channels, np.nan, np.float32), np.zeros(of_channels, np.int16))

    def ranked(
        self,
        scores: np.ndarray,
        keep: int,
        *,
        stage: str,
        explain: bool = False,
        by: np.ndarray | None = None,
        cut: np.ndarray | None = None,
    ) -> Self:
        """Re-order by (B, N) `scores`, or by `by` where it is given, and keep the best `keep`; ties go to who stood first.

        `cut` (B, N) says who is kept, where that is not the order. With `explain`, note the trail.
        """
        scores = np.where(self.items == UNKNOWN, self.NO_SCORE, scores).astype(np.float32, copy=False)
        worth = scores if by is None else np.where(self.items == UNKNOWN, self.NO_SCORE, by)
        if cut is not None and keep < self.width:
            last = np.argsort(-np.where(self.items == UNKNOWN, self.NO_SCORE, cut), axis=1, kind="stable")[:, keep:]
            worth = worth.copy()
            np.put_along_axis(worth, last, np.nan, 1)  # NaN sorts behind all, empty slots too
        order = np.argsort(-worth, axis=1, kind="stable")[:, :keep]  # (B, keep)
        out = self.reordered(order, np.take_along_axis(scores, order, 1), stage=stage)
        if explain:
            out.noted()
        return out

    def noted(self) -> None:
        """Write this stage's ranks and scores into the trail."""
        ranks = np.broadcast_to(np.arange(1, self.width + 1, dtype=np.int16), self.items.shape)
        self.trail[self.stage] = (ranks, self.scores)

    def reordered(self, order: np.ndarray, scores: np.ndarray, *, stage: str | None = None) -> Self:
        """Take slots (B, M) in this order with these (B, M) scores; everything known of an item moves with it."""
        rows = np.arange(len(self.items))[:, None]
        return replace(
            self,
            items=self.items[rows, order],
            scores=scores,
            channel_scores=self.channel_scores[rows, order],
            channel_ranks=self.channel_ranks[rows, order],
            trail={k: (r[rows, order], s[rows, order]) for k, (r, s) in self.trail.items()},
            stage=stage or self.stage,
            merged=None if self.merged is None else self.merged[rows, order],
        )

    def take(self, rows: np.ndarray | Sequence[int]) -> Self:
        """The lists of these queries, in this order."""
        at = np.asarray(rows, np.int64)
        return replace(
            self,
            items=self.items[at],
            scores=self.scores[at],
            channel_scores=self.channel_scores[at],
            channel_ranks=self.channel_ranks[at],
            trail={k: (r[at], s[at]) for k, (r, s) in self.trail.items()},
            merged=None if self.merged is None else self.merged[at],
            cold=None if self.cold is None else self.cold[at],
            used=None if self.used is None else self.used.take(at),
        )

    def sources(self, b: int, n: int) -> list[str]:
        """The channels that recalled the item in slot n of query b."""
        return [name for name, rank in zip(self.channels, self.channel_ranks[b, n], strict=True) if rank > 0]


def top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) scores -> ((B, k) int32 columns, (B, k) float32 scores), best first; -inf is never returned as an item.

    Ties go to the smaller column, so an answer does not depend on the batch it came in. k may exceed N.
    """
    B, N = scores.shape
    k = min(k, N)
    if k == 0:
        return np.empty((B, 0), np.int32), np.empty((B, 0), np.float32)
    if k < N:
        part = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        floor = np.take_along_axis(scores, part, 1).min(1, keepdims=True)
        # argpartition breaks ties at the k-th score at will: give those places to the smallest columns instead.
        tied = (scores == floor).sum(1) > 1
        if tied.any():
            for b in np.flatnonzero(tied):
                part[b] = np.argsort(-scores[b], kind="stable")[:k]
        part.sort(axis=1)
    else:
        part = np.broadcast_to(np.arange(N), (B, N))
    best = np.take_along_axis(scores, part, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    items = np.take_along_axis(part, order, 1).astype(np.int32)
    values = np.take_along_axis(best, order, 1).astype(np.float32)
    items[~np.isfinite(values)] = UNKNOWN
    values[items == UNKNOWN] = -np.inf
    return items, values


@runtime_checkable
class Recaller(Protocol):
    """A recall channel. `name` is its name in config, reports and provenance."""

    name: str

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """At most k items a query: ((B, k') int32 items, (B, k') float32 scores), best first, padded with -1 / -inf.

        Never returns an item of `queries.exclude`, nor one that `queries.allowed` does not allow, and gives k where k others
        have a score: both are left out inside the search. An unknown user or empty history gives an empty row, unless the
        channel has an answer without them (popular does). Equal inputs give equal answers in any batch.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write everything `load` needs: .npy, Arrow IPC, safetensors or JSON, never pickle."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """A coarse or fine ranking stage."""

    def score(self, queries: Queries, candidates: Candidates) -> np.ndarray:
        """(B, N) float32, higher is better; what stands in empty slots is ignored."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """The last stage: it sees the whole page."""

    def rerank(self, queries: Queries, candidates: Candidates, k: int) -> Candidates:
        """At most k of the candidates, in page order; `scores` stay the fine scores."""
        ...
