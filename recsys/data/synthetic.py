"""Made-up logs with a known answer: for tests, benchmarks and first steps. Every one is a function of its seed."""

from __future__ import annotations

import numpy as np

from recsys.core import Vocabulary
from recsys.data.interactions import Interactions

BEGIN_S = 1_700_000_000.0
"""Unix second at which the made-up logs begin."""


def checkerboard(n_users: int = 20, n_items: int = 20, events_per_user: int = 8, seed: int = 0) -> Interactions:
    """Users of a parity take distinct items of that parity only: whatever such a user has not seen yet is the right answer.

    (n_users · events_per_user) events, one a minute, users taking turns. events_per_user may not exceed half of n_items.
    """
    if events_per_user > n_items // 2:
        raise ValueError(f"events_per_user {events_per_user} exceeds the {n_items // 2} items of a parity")
    rng = np.random.default_rng(seed)
    # A user's items: the first columns of a shuffle of the items of the user's parity.
    picks = rng.random((n_users, n_items // 2)).argsort(1)[:, :events_per_user] * 2 + (np.arange(n_users) % 2)[:, None]
    user = np.tile(np.arange(n_users), events_per_user)
    return Interactions.of(
        user, picks.T.reshape(-1), BEGIN_S + 60.0 * np.arange(len(user)), users=named("u", n_users), items=named("i", n_items)
    )


def zipf(
    n_users: int,
    n_items: int,
    n_events: int,
    *,
    max_per_user: int = 500,
    exponent: float = 1.0,
    clusters: int = 0,
    days: float = 30.0,
    seed: int = 0,
) -> Interactions:
    """A log whose items follow Zipf's law with this exponent and whose users' activity is log-normal, at most max_per_user.

    Exactly n_events events, uniform over `days`. With clusters > 0, four of five events of a user stay in the user's own cluster of
    items (item row modulo clusters), so that there is something to learn, and smaller rows are more popular; without, popularity is
    spread over the rows.
    """
    if n_events > n_users * max_per_user:
        raise ValueError(f"{n_events} events do not fit {n_users} users with at most {max_per_user} each")
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users, dtype=np.int32), _activity(rng, n_users, n_events, max_per_user))
    item = zipf_items(rng, n_items, n_events, exponent)
    if clusters:
        own = rng.random(n_events) < 0.8
        home = (user * np.int64(2_654_435_761) % clusters).astype(np.int32)
        item[own] = np.minimum(item[own] // clusters * clusters + home[own], n_items - 1)
    else:
        item = rng.permutation(n_items).astype(np.int32)[item]
    order = rng.permutation(n_events)
    time = np.sort(rng.random(n_events)) * days * 86_400 + BEGIN_S
    return Interactions.of(user[order], item[order], time, users=named("u", n_users), items=named("i", n_items))


def _activity(rng: np.random.Generator, n_users: int, n_events: int, most: int) -> np.ndarray:
    """(n_users,) events per user, log-normal, at most `most`, summing to n_events."""
    weight = rng.lognormal(0.0, 1.0, n_users)
    low, high = 0.0, float(most) / weight.min() * n_events
    for _ in range(100):  # bisect the scale: clipping at `most` takes events away
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(weight * scale, most).sum() < n_events else (low, scale)
    events = np.minimum(weight * low, most).astype(np.int64)
    while (lack := n_events - int(events.sum())) > 0:
        room = np.flatnonzero(events < most)
        events[rng.choice(room, min(lack, len(room)), replace=False)] += 1
    return events


def zipf_items(rng: np.random.Generator, n_items: int, n: int, exponent: float = 1.0) -> np.ndarray:
    """(n,) int32 item ranks, 0 the most popular: P(rank r) is proportional to (r + 1) ** -exponent."""
    cumulative = np.cumsum(np.arange(1, n_items + 1, dtype=np.float64) ** -exponent)
    rank = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
    return np.asarray(np.minimum(rank, n_items - 1), np.int32)


def planted(
    n_users: int = 200, n_items: int = 100, n_events: int = 20_000, *, kinds: int = 4, noise: float = 0.1, seed: int = 0
) -> Interactions:
    """An impression log whose clicks hang on a pair: user kind and item kind (row modulo `kinds`) decide by a table that neither
    knows alone. Every row and column of the table has as many yes as no, so that no model without interactions beats chance.

    label "click"; context "kind_user" and "kind_item" (ints) and "clicks_given_pair" (the noiseless answer, for checks). `noise` of the
    clicks are flipped: the best reachable accuracy is 1 - noise. `kinds` must be even.
    """
    if kinds % 2:
        raise ValueError(f"kinds must be even, got {kinds}")
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, n_users, n_events), rng.integers(0, n_items, n_events)
    kind_user, kind_item = user % kinds, item % kinds
    answer = (kind_user + kind_item) % kinds < kinds // 2
    click = answer ^ (rng.random(n_events) < noise)
    return Interactions.of(
        user,
        item,
        BEGIN_S + 10.0 * np.arange(n_events),
        users=named("u", n_users),
        items=named("i", n_items),
        labels={"click": click},
        context={"kind_user": kind_user, "kind_item": kind_item, "clicks_given_pair": answer},
        impressions=True,
    )


def named(prefix: str, n: int) -> Vocabulary:
    """The vocabulary prefix0, prefix1, …"""
    return Vocabulary([f"{prefix}{i}" for i in range(n)])
