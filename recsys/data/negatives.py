"""The items that a positive stands against in protocol ncf, where a file gives them.

Either the layout of the NCF paper's *.test.negative files (`(user,positive)<tab>negative<tab>negative…`), or a table of one
row per user with a list of items, as `data.history` is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from pydantic import Field

from recsys.core import UNKNOWN, Vocabulary, canonical_id
from recsys.data.cleaning import Account
from recsys.data.interactions import CSR
from recsys.data.paths import Resolver
from recsys.data.sources import HistoryConfig
from recsys.data.tables import past_rows, read_history
from recsys.errors import DataError

_NCF = re.compile(r"\(\s*([^,()]+?)\s*,\s*([^()]+?)\s*\)")


class NegativesConfig(HistoryConfig):
    path: str
    """The negatives of each user: a *.test.negative file of the NCF paper, or one row per user with a list of items."""
    items: str = "negatives"
    """Column with the item ids: a list, or text cut at `separator`."""
    user: str = Field("user_id")
    """Column of the user id."""


def read_negatives(config: NegativesConfig, resolve: Resolver, users: Vocabulary, items: Vocabulary) -> CSR:
    """Each user's given items as rows; ids that the log does not know are left out. DataError where no line serves."""
    path = resolve(config.path)
    if is_ncf(path):
        return _ncf(path, users, items)
    try:
        past = read_history(config, resolve, Account())
    except DataError as error:
        raise DataError(f"evaluate.given, read as data.history is: {error}") from error
    user_rows, item_rows = users.rows(past.users.ids), items.rows(past.items.ids)
    if not (user_rows != UNKNOWN).any():
        raise DataError(f"evaluate.given: no user of '{path}' is in the log. Check its columns '{config.user}' and '{config.items}'.")
    known = user_rows != UNKNOWN
    owner = np.repeat(np.arange(len(past.lengths)), past.lengths)
    rows = item_rows[past.items.codes]
    keep = known[owner] & (rows != UNKNOWN)
    lengths = np.bincount(owner[keep], minlength=len(past.lengths))[known]
    kept = past._replace(items=past.items._replace(codes=rows[keep]), lengths=lengths)
    return past_rows(kept, user_rows[known], np.arange(len(items), dtype=np.int32), len(users))


def is_ncf(path: str | Path) -> bool:
    """Whether a text file begins as a *.test.negative file does."""
    if "://" in str(path) or not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(1) == b"("


def _ncf(path: str | Path, users: Vocabulary, items: Vocabulary) -> CSR:
    lists: dict[int, np.ndarray] = {}
    for n, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        head, *rest = line.rstrip().split("\t")
        found = _NCF.fullmatch(head.strip())
        if found is None or not rest:
            raise DataError(
                f"evaluate.given: line {n} of '{path}' is '{line[:60]}'. Expected (user,positive), a tab, and negatives with tabs between."
            )
        user = users.row(canonical_id(found[1]))
        if user != UNKNOWN:
            rows = items.rows([canonical_id(i) for i in rest])
            lists[user] = rows[rows != UNKNOWN]
    if not lists:
        raise DataError(f"evaluate.given: no user of '{path}' is in the log. Are the ids those of the log, not the paper's own numbering?")
    indptr = np.zeros(len(users) + 1, np.int64)
    np.cumsum([len(lists.get(u, ())) for u in range(len(users))], out=indptr[1:])
    return CSR(indptr, np.concatenate([lists[u] for u in sorted(lists)]).astype(np.int32))
