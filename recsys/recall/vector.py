"""Nearest items to a user's vector by inner product, over Faiss: exact, IVF or HNSW, whichever fits the size.

An approximate index is tuned when it is built: its effort is raised until the asked share of the exact answer comes
back. What is excluded or filtered out never costs places: k items come back whenever k others exist.
HNSW and IVF want vectors of one length (the two-tower's are): with inner product, long vectors attract everything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import faiss
import numpy as np
from pydantic import Field, PositiveInt

from recsys.allowed import Allowed, Mask
from recsys.core import UNKNOWN, FrozenConfig, Queries
from recsys.errors import BundleError, ConfigError
from recsys.features.catalogue import Catalogue
from recsys.recall.exact import best_of, exact_search
from recsys.recall.order import among
from recsys.recall.taste import RowVectors

log = logging.getLogger(__name__)

SEARCH: Any = faiss  # its type stubs lack the search parameters

GPU_DEEPEST = 2_048
"""Faiss on a GPU gives at most this many items a query; deeper ones are searched exactly on the CPU."""
OVER_FETCH = 512
"""Up to this many excluded items, an approximate search asks for more and drops them; above, it filters as it walks."""
EXACT_SHARE = 0.05
"""A filter that lets fewer items through than this share, or than `flat_below`, is answered by comparing with all of them: a walk
would meet mostly items that it may not return."""


IndexKind = Literal["auto", "flat", "ivf", "hnsw"]
RecallGoal = Annotated[
    float,
    Field(
        gt=0, le=1, description="Share of the exact 100 nearest that an approximate index must find; its effort is raised until it does."
    ),
]


PROBES = 16
"""Queries kept beside an approximate index with their exact answers, to ask it again when it is loaded (some milliseconds)."""
PROBE_SLACK = 0.02
"""How much less of them a loaded index may find than when it was saved: other processors round otherwise."""


class EncodesUsers(Protocol):
    """What turns queries into vectors in the space of the items: the funnel, with its two-tower."""

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, d) float32; a row of NaN says that nothing is known of that user."""
        ...


class VectorConfig(FrozenConfig):
    type: Literal["two_tower"] = "two_tower"
    """Items whose vectors lie nearest to the user's, by the model of the section two_tower."""
    kind: IndexKind = "auto"
    """`flat` compares with every item; `hnsw` walks a graph; `ivf` looks into the nearest clusters. `auto` chooses by size."""
    flat_below: PositiveInt = 10_000
    """`auto` is exact below this many items: fast enough, and nothing is lost."""
    ivf_from: PositiveInt = 2_000_000
    """`auto` takes IVF from this many items on, because HNSW's graph adds 270 bytes an item to its vectors."""
    recall_goal: RecallGoal = 0.98
    hnsw_links: PositiveInt = 32
    """Links of an item on HNSW's ground level are twice this. More: better recall, more memory."""
    ef_construction: PositiveInt = 100
    """Candidates looked at when an item enters HNSW's graph. More: better graph, slower build."""
    ef_search: PositiveInt = 64
    """Candidates HNSW keeps in a search at least; tuned upwards."""
    lists: PositiveInt | None = None
    """IVF's clusters; null: 4 * sqrt(items)."""
    probes: PositiveInt = 8
    """Clusters that IVF looks into at least; tuned upwards."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes a GPU where faiss-gpu and a device are present (flat and IVF), else the CPU."""
    threads: PositiveInt | None = None
    """Threads of one Faiss search; null: all. Exact search on the CPU uses the process's BLAS threads."""
    seed: int = 1
    """Of IVF's clustering."""

    def build(self) -> VectorIndex:
        """An empty index; `fit` fills it."""
        return VectorIndex(self)

    def load(self, folder: Path, funnel: EncodesUsers) -> VectorRecaller:
        """The channel of a saved index; the funnel encodes the users."""
        return VectorRecaller(self.type, funnel.user_vectors, VectorIndex.load(folder, self))


class VectorIndex:
    """Item vectors under an index. Row r of the vectors is item row r."""

    def __init__(self, config: VectorConfig) -> None:
        self.config = config
        self.kind = config.kind
        self.effort = 0
        """ef_search of HNSW, probes of IVF, as tuned."""
        self.measured_recall = 1.0
        """Share of the exact 100 nearest found when it was built."""
        self.probes: tuple[np.ndarray, np.ndarray] | None = None
        """((P, d) queries, (P, k) int32 exact answers), of an approximate index."""
        self.index: Any = None
        """The index in host memory; on a GPU host, its copy there is searched."""
        self._searched: Any = None
        self.on_gpu = False

    def __len__(self) -> int:
        return 0 if self.index is None else int(self.index.ntotal)

    # Building.

    def fit(self, vectors: np.ndarray, queries: np.ndarray | None = None) -> Self:
        """Index (n_items, d) vectors; `queries` (q, d) are typical user vectors to tune on (rows of NaN say nothing); absent: items."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        n, d = vectors.shape
        gpu = _gpu_wanted(self.config.device)
        self.kind = self._choose(n, gpu)
        if self.kind == "hnsw":
            self.index = faiss.IndexHNSWFlat(d, self.config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = self.config.ef_construction
            self.effort = self.config.ef_search
        elif self.kind == "ivf":
            lists = min(self.config.lists or int(4 * np.sqrt(n)), max(n, 1))
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.cp.seed, self.index.cp.min_points_per_centroid = self.config.seed, 1
            self.index.train(vectors)
            self.index.make_direct_map()  # so that `similar` finds an item's vector
            self.effort = min(self.config.probes, lists)
        else:
            self.index = faiss.IndexFlatIP(d)
        self.index.add(vectors)
        self._place(gpu)
        if self.kind != "flat":
            asked = np.empty((0, d), np.float32) if queries is None else queries[np.isfinite(queries).all(1)][:256]
            if not len(asked):
                asked = vectors[np.sort(np.random.default_rng(self.config.seed).choice(n, min(n, 256), replace=False))]
            self._tune(vectors, np.ascontiguousarray(asked, np.float32))
        return self

    def _choose(self, n: int, gpu: bool) -> Literal["flat", "ivf", "hnsw"]:
        c = self.config
        if c.kind != "auto":
            if c.kind == "hnsw" and gpu:
                raise ConfigError("recall index kind 'hnsw' has no GPU version. Use kind: flat or ivf there, or device: cpu.")
            chosen, reason = c.kind, "as configured"
        elif n < c.flat_below:
            chosen, reason = "flat", f"flat below {c.flat_below:,}"
        elif n >= c.ivf_from:
            chosen, reason = "ivf", f"ivf from {c.ivf_from:,}"
        elif gpu:
            chosen, reason = "flat", f"on a GPU flat below {c.ivf_from:,}"
        else:
            chosen, reason = "hnsw", f"flat below {c.flat_below:,}, ivf from {c.ivf_from:,}"
        log.info("faiss index=%s device=%s (items=%s; %s)", chosen, "gpu" if gpu else "cpu", f"{n:,}", reason)
        return chosen

    def _place(self, gpu: bool) -> None:
        self.on_gpu = gpu
        self._searched = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index) if gpu else self.index

    def _tune(self, vectors: np.ndarray, queries: np.ndarray) -> None:
        """Double the effort until the recall goal holds on `queries`; past the size of the index there is no more to gain."""
        k = min(100, len(vectors))
        truth, _ = exact_search(vectors, queries, k)
        most = int(self.index.nlist) if self.kind == "ivf" else len(vectors)
        while True:
            found, _ = self._faiss_search(queries, k)
            self.measured_recall = float(among(found, truth).sum() / truth.size)
            if self.measured_recall >= self.config.recall_goal or self.effort >= most:
                break
            self.effort = min(self.effort * 2, most)
        self.probes = queries[:PROBES].copy(), truth[:PROBES].copy()
        goal = self.config.recall_goal
        log.info("faiss index=%s effort=%d recall@%d=%.4f (goal %.2f)", self.kind, self.effort, k, self.measured_recall, goal)
        if self.measured_recall < goal:
            log.warning(
                "faiss index=%s misses its recall goal at any effort: raise hnsw_links or ef_construction, or take kind: flat", self.kind
            )

    def probed(self) -> float:
        """Share of the probes' exact answers that the index finds as it is now; 1 where there are none."""
        if self.probes is None:
            return 1.0
        queries, truth = self.probes
        found, _ = self._faiss_search(queries, truth.shape[1])
        return float(among(found, truth).sum() / truth.size)

    # Searching.

    def recall_vectors(
        self, vectors: np.ndarray, exclude: np.ndarray, k: int, allowed: Allowed | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, d) user vectors, (B, E) excluded item rows (-1: empty slot) -> ((B, k') items, (B, k') scores), best first.

        k' = min(k, n_items); a row is short (-1, -inf) only where fewer items are left, of those that are `allowed`. A row with
        NaN answers nothing.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        B, k = len(vectors), min(k, len(self))
        if not B or not k:
            return np.empty((B, 0), np.int32), np.empty((B, 0), np.float32)
        known = np.isfinite(vectors).all(1)
        if not known.all():
            items, scores = np.full((B, k), UNKNOWN, np.int32), np.full((B, k), -np.inf, np.float32)
            if known.any():
                items[known], scores[known] = self.recall_vectors(
                    vectors[known], exclude[known], k, None if allowed is None else allowed[known]
                )
            return items, scores
        if self.kind == "flat" and not self.on_gpu:
            return exact_search(self.vectors(), vectors, k, exclude, allowed)
        if allowed is None:
            return self._excluding(vectors, exclude, k)
        items, scores = np.full((B, k), UNKNOWN, np.int32), np.full((B, k), -np.inf, np.float32)
        for mask, rows in allowed.groups():
            one = self._excluding if mask is None else self._among(mask)
            items[rows], scores[rows] = one(vectors[rows], exclude[rows], k)
        return items, scores

    def _among(self, mask: Mask) -> Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
        """How to search among the items of one filter: all of them, where they are few, else by a walk that returns no others."""
        few = len(mask.rows) < max(self.config.flat_below, EXACT_SHARE * len(self))
        if few or self.on_gpu:

            def search(vectors: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
                return self._compared(mask, vectors, exclude, k)
        else:

            def search(vectors: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
                return self._walked(mask, vectors, exclude, k)

        return search

    def _compared(self, mask: Mask, vectors: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact search among the rows of a filter."""
        items, scores = np.full((len(vectors), k), UNKNOWN, np.int32), np.full((len(vectors), k), -np.inf, np.float32)
        if not len(mask.rows):
            return items, scores
        place = np.searchsorted(mask.rows, exclude)
        listed = (exclude >= 0) & (place < len(mask.rows)) & (mask.rows[np.minimum(place, len(mask.rows) - 1)] == exclude)
        at, best = exact_search(self.rows(mask.rows), vectors, k, np.where(listed, place, UNKNOWN))
        width = at.shape[1]
        items[:, :width] = np.where(at == UNKNOWN, UNKNOWN, mask.rows[np.maximum(at, 0)])
        scores[:, :width] = best
        return items, scores

    def _walked(self, mask: Mask, vectors: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A search of the index that returns items of the filter only; where it ends before k are found, the exact answer."""
        # The walk sees as many items as without a filter and may return a share of them: its effort grows by that share.
        most = int(self.index.nlist) if self.kind == "ivf" else len(self)
        effort = min(int(np.ceil(self.effort * len(self) / len(mask.rows))), most)
        items, scores = np.full((len(vectors), k), UNKNOWN, np.int32), np.full((len(vectors), k), -np.inf, np.float32)
        for b, out in enumerate(exclude):
            ids = out[out >= 0].astype(np.int64)
            selector = SEARCH.IDSelectorBitmap(mask.bits)
            if len(ids):
                selector = SEARCH.IDSelectorAnd(selector, SEARCH.IDSelectorNot(SEARCH.IDSelectorBatch(ids)))
            items[b], scores[b] = (
                x[0] for x in _without(*self._faiss_search(vectors[b : b + 1], k, selector, effort), exclude[b : b + 1], k)
            )
            left = len(mask.rows) - int(mask.items[np.unique(ids[ids < len(self)])].sum())
            if (items[b] >= 0).sum() < min(k, left):
                items[b], scores[b] = (x[0] for x in self._compared(mask, vectors[b : b + 1], exclude[b : b + 1], k))
        return items, scores

    def _excluding(self, vectors: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        B = len(vectors)
        n_excluded = (exclude >= 0).sum(1)
        if not n_excluded.any():
            items, scores = self._faiss_search(vectors, k)
            if (items >= 0).all() and (scores[:, 1:] < scores[:, :-1]).all():  # whole, and without ties to put in order
                return items, scores
        items, scores = np.full((B, k), UNKNOWN, np.int32), np.full((B, k), -np.inf, np.float32)
        light = np.flatnonzero(n_excluded <= (GPU_DEEPEST - k if self.on_gpu else OVER_FETCH))
        if light.size:
            answer = self._faiss_search(vectors[light], min(k + int(n_excluded[light].max()), len(self)))
            items[light], scores[light] = _without(*answer, exclude[light], k)
        for b in np.flatnonzero(n_excluded > OVER_FETCH) if not self.on_gpu else ():
            items[b], scores[b] = self._selected(vectors[b : b + 1], exclude[b : b + 1], k)
        # A graph walk or a few clusters can end before k are found: those rows get the exact answer.
        found = (items >= 0).sum(1)
        short = np.array([b for b in np.flatnonzero(found < k) if found[b] < min(k, self._left(exclude[b]))], np.int64)
        if short.size:
            log.debug("faiss index=%s answered %d of %d queries short; searched exactly", self.kind, short.size, B)
        if self.kind == "ivf" and not self.on_gpu:
            for b in short:
                items[b], scores[b] = self._selected(vectors[b : b + 1], exclude[b : b + 1], k, effort=int(self.index.nlist))
        elif short.size:
            items[short], scores[short] = exact_search(self.vectors(), vectors[short], k, exclude[short])
        return items, scores

    def _left(self, exclude: np.ndarray) -> int:
        """How many items an (E,) exclusion leaves; it may name one twice."""
        return len(self) - len(np.unique(exclude[(exclude >= 0) & (exclude < len(self))]))

    def _selected(self, vector: np.ndarray, exclude: np.ndarray, k: int, effort: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(k,) items and scores of one query, filtered inside the search."""
        ids = exclude[exclude >= 0].astype(np.int64)
        items, scores = _without(*self._faiss_search(vector, k, faiss.IDSelectorNot(faiss.IDSelectorBatch(ids)), effort), exclude, k)
        return items[0], scores[0]

    def _faiss_search(self, vectors: np.ndarray, k: int, selector: Any = None, effort: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        if self.config.threads is not None:
            faiss.omp_set_num_threads(self.config.threads)  # OpenMP keeps this number per calling thread
        if self.kind == "hnsw":
            params = SEARCH.SearchParametersHNSW(efSearch=max(effort or self.effort, k), sel=selector)
        elif self.kind == "ivf":
            params = SEARCH.SearchParametersIVF(nprobe=effort or self.effort, sel=selector)
        else:
            params = None
        scores, items = self._searched.search(vectors, k, params=params)
        return items.astype(np.int32), np.where(items < 0, -np.inf, scores).astype(np.float32)

    def vectors(self) -> np.ndarray:
        """The (n_items, d) float32 vectors under the index; a view without a copy where it is flat or HNSW."""
        if self.kind == "ivf":
            return np.asarray(self.index.reconstruct_n(0, len(self)))
        flat = self.index if self.kind == "flat" else SEARCH.downcast_index(self.index.storage)
        return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)

    def rows(self, items: np.ndarray) -> np.ndarray:
        """The (n, d) vectors of (n,) known item rows."""
        if self.kind == "ivf":
            return np.stack([self.index.reconstruct(int(i)) for i in items]) if len(items) else np.empty((0, int(self.index.d)), np.float32)
        found: np.ndarray = self.vectors()[items]
        return found

    def similar(self, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) item rows -> their ((B, k') nearest other items, (B, k') inner products); an unknown item answers nothing."""
        known = (items >= 0) & (items < len(self))
        d = int(self.index.d)
        vectors = np.full((len(items), d), np.nan, np.float32)
        for b in np.flatnonzero(known):
            vectors[b] = self.index.reconstruct(int(items[b]))
        return self.recall_vectors(vectors, np.where(known, items, UNKNOWN).astype(np.int32)[:, None], k)

    # Keeping.

    def save(self, folder: Path) -> None:
        """Write `index.faiss` (with the vectors), `index.json` (kind, effort, measured recall, shape) and the probes."""
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self.index, str(folder / "index.faiss"))
        facts = {
            "kind": self.kind,
            "effort": self.effort,
            "measured_recall": self.measured_recall,
            "probed": self.probed(),
            "items": len(self),
            "dim": int(self.index.d),
        }
        (folder / "index.json").write_text(json.dumps(facts))
        if self.probes is not None:
            for name, array in zip(("probes", "probes_exact"), self.probes, strict=True):
                np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, config: VectorConfig) -> Self:
        """Read what `save` wrote; HNSW and IVF stay memory-mapped on the CPU.

        BundleError where the files do not match, or the index finds less of its probes than when it was saved. An index that
        missed its goal when it was built is told and served: its bundle was published knowing that.
        """
        facts = json.loads((folder / "index.json").read_text())
        self = cls(config)
        self.kind, self.effort, self.measured_recall = facts["kind"], int(facts["effort"]), float(facts["measured_recall"])
        gpu = self.kind != "hnsw" and _gpu_wanted(config.device)
        try:
            # A mapped flat index has unaligned vectors, with which numpy does not use BLAS: 40 times slower.
            self.index = faiss.read_index(str(folder / "index.faiss"), 0 if gpu or self.kind == "flat" else faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as e:
            raise BundleError(f"Faiss cannot read '{folder / 'index.faiss'}': {e}. Rebuild the index from vectors.npy.") from e
        if (len(self), int(self.index.d)) != (facts["items"], facts["dim"]):
            raise BundleError(
                f"'{folder / 'index.faiss'}' holds {len(self)} x {self.index.d} vectors, index.json says {facts['items']} x {facts['dim']}. "
                "Rebuild the bundle."
            )
        self._place(gpu)
        if (folder / "probes.npy").exists():
            self.probes = np.load(folder / "probes.npy"), np.load(folder / "probes_exact.npy")
            now, then = self.probed(), float(facts["probed"])
            if now < then - PROBE_SLACK:
                raise BundleError(
                    f"The index in '{folder}' finds {now:.3f} of its probes' nearest items, {then:.3f} when it was saved. "
                    "It or Faiss has changed: publish again, or promote another version."
                )
        if self.measured_recall < config.recall_goal:
            log.warning("faiss index=%s in '%s' has recall %.4f, goal %.2f", self.kind, folder, self.measured_recall, config.recall_goal)
        return self


class VectorRecaller:
    """A recall channel from any model that turns queries into vectors in the space of an index.

    `encode` gives (B, d) float32; a row of NaN says that the model knows nothing of that user, who then gets no items.
    """

    def __init__(self, name: str, encode: Callable[[Queries], np.ndarray], index: VectorIndex) -> None:
        self.name = name
        self.encode = encode
        self.index = index

    def recall(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items whose vectors have the largest inner product with the user's."""
        return self.nearest(self.encode(queries), queries, k)

    def user_vectors(self, queries: Queries, vectors: RowVectors | None = None) -> np.ndarray:  # noqa: ARG002  the model knows its items
        """(B, d) float32."""
        return self.encode(queries)

    def nearest(self, vectors: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k items nearest to given (B, d) vectors."""
        return self.index.recall_vectors(vectors, queries.exclude, k, queries.allowed)

    def item_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n, d) vectors of (n,) item rows."""
        return self.index.rows(rows)

    def vectors_of(self, items: Catalogue, towered: np.ndarray | None) -> np.ndarray | None:  # noqa: ARG002  one shape for all
        """(n, d) vectors of items that came later: what the item tower makes of them."""
        return towered

    def save(self, folder: Path) -> None:
        """Write the index; the model has its own folder."""
        self.index.save(folder)


def _without(items: np.ndarray, scores: np.ndarray, exclude: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Drop excluded items from Faiss's answer and keep k, ties to the smaller row; pads where Faiss gave fewer."""
    order = np.argsort(items, axis=1)
    items = np.take_along_axis(items, order, 1)
    scores = np.where(among(items, exclude), np.float32(-np.inf), np.take_along_axis(scores, order, 1))
    return best_of(items, scores, k)


def _gpu_wanted(device: str) -> bool:
    """Whether to search on a GPU: where faiss is a GPU build and sees a device, unless the CPU is asked for."""
    present = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if device == "gpu" and not present:
        raise ConfigError("recall index device is 'gpu', but faiss sees no GPU here. Install faiss-gpu on a GPU host, or use device: auto.")
    return device != "cpu" and present
