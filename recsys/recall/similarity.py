"""How alike two rows of an interaction matrix are: weightings as in text search, then cosine, Pearson or the dot product.

What is compared are items by their users, or users by their items; both channels share these few lines.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import numpy as np
from scipy import sparse

Weighting = Literal["none", "iuf", "tf_idf", "bm25"]
Kind = Literal["cosine", "pearson", "dot"]


class Terms(NamedTuple):
    """What a weighting knows of a collection: the (T,) documents of each term, how many documents there are, their mean length."""

    size: np.ndarray
    documents: int
    mean_length: float

    @classmethod
    def of(cls, events: sparse.csr_matrix) -> Self:
        """Of a (terms, documents) matrix."""
        documents = events.shape[1]
        return cls(np.diff(events.indptr), documents, float(events.data.sum(dtype=np.float64)) / max(documents, 1))


def weigh(events: sparse.csr_matrix, weighting: Weighting, terms: Terms | None = None) -> sparse.csr_matrix:
    """Weigh a (terms, documents) matrix before it is compared (constants of BM25 as in Lucene: 1.2, 0.75).

    Comparing items, a user is a term and an item a document; comparing users, the other way round. `terms` are those of the
    matrix itself, or of the one that new documents are compared with.
    """
    terms = terms or Terms.of(events)
    repeats = np.diff(events.indptr)
    data = events.data
    if weighting == "iuf":  # the similarity sums over terms, so each of its two factors carries the root
        data = data * np.repeat(np.sqrt(1 / np.log1p(np.maximum(terms.size, 1))), repeats)
    elif weighting != "none":
        rarity = np.repeat(np.log(np.maximum(terms.documents, 1)) - np.log1p(terms.size) + 1, repeats)
        if weighting == "tf_idf":
            data = np.sqrt(data) * np.maximum(rarity, 0)
        else:
            length = np.bincount(events.indices, data, minlength=events.shape[1])
            norm = 0.25 + 0.75 * length / max(terms.mean_length, 1e-12)
            data = data * 2.2 / (data + 1.2 * norm[events.indices]) * np.maximum(rarity, 0)
    return sparse.csr_matrix((data.astype(np.float32), events.indices, events.indptr), shape=events.shape)


def kind_of(similarity: Literal["cosine", "pearson"], weighting: Weighting) -> Kind:
    """What compares two weighted rows. ValueError for pearson of BM25 weights, which are made for a dot product."""
    if weighting != "bm25":
        return similarity
    if similarity == "pearson":
        raise ValueError("similarity: pearson does not go with weighting: bm25, which takes the dot product. Change one of them")
    return "dot"


class Sizes(NamedTuple):
    """Of n rows, what turns their dot products into similarities: (n,) float32 lengths, and shares by which a dot exceeds chance.

    cosine: length |a|. pearson, over all m columns: length sqrt(|a|^2 - sum(a)^2 / m), share sum(a) / sqrt(m). dot: 1.
    """

    length: np.ndarray
    share: np.ndarray | None

    @classmethod
    def of(cls, rows: sparse.csr_matrix, kind: Kind) -> Self:
        """Of the rows of an (n, m) csr."""
        n, m = rows.shape
        if kind == "dot":
            return cls(np.ones(n, np.float32), None)
        row = np.repeat(np.arange(n), np.diff(rows.indptr))
        squares = np.bincount(row, rows.data.astype(np.float64) ** 2, minlength=n)
        if kind == "cosine":
            return cls(np.sqrt(squares).astype(np.float32), None)
        sums = np.bincount(row, rows.data, minlength=n)
        spread = squares - sums**2 / max(m, 1)
        # What all columns have alike has no spread; rounding must not give it one.
        spread = np.where(spread > 1e-9 * squares, spread, 0)
        return cls(np.sqrt(spread).astype(np.float32), (sums / np.sqrt(max(m, 1))).astype(np.float32))


def similarities(product: sparse.csr_matrix, left: Sizes, right: Sizes, shrink: float) -> np.ndarray:
    """(nnz,) float32 similarities in place of the dot products of `left` and `right` rows: (dot - chance) / (|a| |b| + shrink)."""
    row, column = np.repeat(np.arange(product.shape[0]), np.diff(product.indptr)), product.indices
    data = product.data
    if left.share is not None and right.share is not None:
        more = data - left.share[row] * right.share[column]
        data = np.where(more > 1e-6 * data, more, 0)  # rounding must not make a neighbour of what has no correlation
    length = left.length[row] * right.length[column] + np.float32(shrink)
    found: np.ndarray = np.divide(data, length, out=np.zeros(len(data), np.float32), where=length > 0)
    return found
