"""Two versions asked the same: the users of the newest events, each as the service knew them just before.

Everything goes by outside ids, as a request does, so versions with other vocabularies, features or models can be compared. Each
user's state holds what was done until then: a version that was trained long ago sees it as a service would have. An item that a
version does not know is one that it misses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from recsys.core import UNKNOWN, Vocabulary
from recsys.data.interactions import Interactions, group
from recsys.errors import DataError
from recsys.features.asof import AsOf
from recsys.features.declaration import HistoryConfig
from recsys.features.inputs import Live, LogSource
from recsys.features.refusals import Refusals
from recsys.features.store import StoredEvent
from recsys.funnel import Funnel, FunnelRequest
from recsys.metrics import Relevant, at_k
from recsys.prepared import Prepared
from recsys.retrain_config import GateConfig
from recsys.significance import paired_t

CHUNK = 64


@dataclass(frozen=True)
class Newest:
    """B requests, and the rows (of `items`) that each user took from then on and had not had before."""

    requests: list[FunnelRequest]
    wanted: Relevant
    items: Vocabulary
    log: Interactions
    told: np.ndarray

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def of(cls, prepared: Prepared, *, among: np.ndarray, history: HistoryConfig, k: int, again: bool, most: int, seed: int) -> Newest:
        """From the test rows `among` (E,) bool of a log with times. `again`: items had before count as sought. DataError where nothing is sought."""
        log, told = prepared.log, prepared.told
        refusals = Refusals.of(log, history)
        test = prepared.split.test & log.positive & among
        rows = np.flatnonzero(test)
        users, first = np.unique(log.user[rows], return_index=True)
        if len(users) > most:
            chosen = np.sort(np.random.default_rng(seed).choice(len(users), most, replace=False))
            users, first = users[chosen], first[chosen]
        indptr, order = group(log.user, log.n_users)
        requests, wanted = [], []
        names = log.users.outside(users)
        refused = refusals.before(users, rows[first], log.time[rows[first]])
        for user, name, at, against in zip(users.tolist(), names, rows[first].tolist(), refused, strict=True):
            own = order[indptr[user] : indptr[user + 1]]  # in log order
            before = own[(log.time[own] < log.time[at]) & told[own]]
            sought = log.item[own[test[own]]]
            had = log.item[before]
            if log.past is not None:
                had = np.concatenate([had, log.past.items[log.past.indptr[user] : log.past.indptr[user + 1]]])
            sought = np.setdiff1d(sought, against if again else np.concatenate([had, against]))
            if not len(sought):
                continue
            newest = before[-history.length :]
            items = log.items.outside(log.item[newest])
            events = [
                StoredEvent(item, log.event_names[log.event[row]], round(float(log.time[row]) * 1000), None, "")
                for item, row in zip(items, newest.tolist(), strict=True)
            ]
            seen = () if again else tuple(log.items.outside(np.unique(had)))
            context = {column: values[at] for column, values in log.context.items()}
            time_ms = round(float(log.time[at]) * 1000)
            hides = dict.fromkeys(log.items.outside(against), time_ms)
            requests.append(FunnelRequest(name, k, float(log.time[at]), events, hides, context=context, exclude=seen))
            wanted.append(sought)
        if not requests:
            raise DataError("The newest events hold no positive that its user had not had before, so there is nothing to judge by.")
        return cls(requests, Relevant.of(wanted), log.items, log, told)

    def asked(self, funnel: Funnel) -> np.ndarray:
        """(B, k) rows of `items` that a funnel answers with, -1 behind a short page."""
        funnel = self._counting(funnel)
        out = np.full((len(self), max(r.k for r in self.requests)), UNKNOWN, np.int32)
        for start in range(0, len(self), CHUNK):
            queries = funnel.queries(self.requests[start : start + CHUNK])
            for b, page in enumerate(funnel.page(queries, funnel.recommend(queries)), start):
                out[b, : len(page)] = self.items.rows([item.item_id for item in page])
        return out

    def _counting(self, funnel: Funnel) -> Funnel:
        """The funnel with its aggregates as of each request: what consumers would have counted until then."""
        if funnel.live is None or funnel.users is self.log.users:
            return funnel
        log = replace(
            self.log,
            users=funnel.users,
            items=funnel.items,
            user=funnel.users.rows(self.log.users.outside(np.arange(self.log.n_users)))[self.log.user],
            item=funnel.items.rows(self.log.items.outside(np.arange(self.log.n_items)))[self.log.item],
        )
        inputs = funnel.live.inputs
        asof = AsOf(inputs.plan, log, inputs.columns, self.told, offset_s=inputs.config.utc_offset_s)
        return replace(funnel, live=Live(inputs, LogSource(inputs, asof), funnel.items))


class Verdict(NamedTuple):
    """The gate's: means of both over the same users, the paired difference and its standard error."""

    metric: str
    new: float
    serving: float
    difference: float
    error: float
    users: int
    passed: bool

    def sentence(self) -> str:
        """For a person."""
        return (
            f"{self.metric} {self.new:.4f}, the serving version's {self.serving:.4f} on the same {self.users:,} users "
            f"(difference {self.difference:+.4f}, standard error {self.error:.4f})"
        )


def compared(newest: Newest, new: np.ndarray, serving: np.ndarray, gate: GateConfig) -> Verdict:
    """What the gate says to two versions' answers (B, k)."""
    k = int(gate.metric.rpartition("@")[2])
    values = [at_k(answers, newest.wanted, (k,))[gate.metric] for answers in (new, serving)]
    told = paired_t(*values)
    d = values[0] - values[1]
    error = float(d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else 0.0
    mean = told.difference
    return Verdict(gate.metric, float(values[0].mean()), float(values[1].mean()), mean, error, len(d), mean >= gate.at_least * error)
