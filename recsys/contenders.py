"""Who takes part in an evaluation, and what must be fitted for that: nothing is fitted that no row asks for.

A name is a stage (merged, coarse, fine, funnel), a configured channel, a baseline (Pop, ItemKNN, EASE, Markov), or a type of
channel, which then takes part with its defaults though it is not configured. The baselines stand beside whatever is asked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from pydantic import TypeAdapter

from recsys import channels
from recsys.baselines import NAMES, baselines
from recsys.config import CHANNELS, ChannelConfig, Config
from recsys.core import Recaller
from recsys.data.interactions import Interactions
from recsys.errors import ConfigError
from recsys.evaluate import Cost, Rows
from recsys.held_out import HeldOut
from recsys.judging import STAGES, Judge
from recsys.memory import PeakMemory
from recsys.recall.realtime import RealtimeConfig
from recsys.recall.vector import VectorConfig
from recsys.recipe import Recipe

log = logging.getLogger(__name__)
_CHANNEL: TypeAdapter[ChannelConfig] = TypeAdapter(ChannelConfig)
Fits = dict[str, tuple[Recaller, Cost] | ConfigError]
FitAll = Callable[[Mapping[str, ChannelConfig], Interactions], Fits]


@dataclass(frozen=True)
class Contenders:
    """channels: rows that are channels; stages: rows that are stages; fitted: all channels that these need; baselines."""

    channels: dict[str, ChannelConfig]
    stages: tuple[str, ...]
    fitted: dict[str, ChannelConfig]
    baselines: dict[str, ChannelConfig]

    @property
    def tower(self) -> bool:
        """Whether a row needs the two-tower."""
        return any(s in self.stages for s in STAGES[1:]) or any(isinstance(c, VectorConfig) for c in self.fitted.values())

    @property
    def ranker(self) -> bool:
        """Whether a row needs the fine ranker."""
        return "fine" in self.stages or "funnel" in self.stages


def contenders(config: Config, models: Sequence[str] | None, n_items: int) -> Contenders:
    """Whom `models` names (None: every configured channel and stage), with the baselines. ConfigError for a name nobody has."""
    configured, beside = config.recall.channels, baselines(n_items)
    if models is None:
        return Contenders(dict(configured), STAGES, dict(configured), beside)
    rows: dict[str, ChannelConfig] = {}
    for name in models:
        if name in configured:
            rows[name] = configured[name]
        elif name in CHANNELS:
            rows[name] = _CHANNEL.validate_python({"type": name})
            log.info("%s is not configured: it takes part with its defaults", name)
        elif name not in STAGES and name not in NAMES:
            known = ", ".join((*configured, *STAGES, *NAMES))
            more = ", ".join(c for c in CHANNELS if c not in configured)
            raise ConfigError(f"The report has no row '{name}'. Rows: {known}" + (f"; with defaults also {more}." if more else "."))
    stages = tuple(s for s in STAGES if s in models)
    fitted = dict(configured) if stages else {}
    fitted |= rows
    for leaning in [c for c in fitted.values() if isinstance(c, RealtimeConfig)]:
        if leaning.neighbors in configured:
            fitted.setdefault(leaning.neighbors, configured[leaning.neighbors])
    return Contenders(rows, stages, fitted, beside)


def fit_one(config: ChannelConfig, known: Interactions) -> tuple[Recaller, Cost]:
    """A channel that leans on nothing but the log, and what fitting it took."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        channel = cast(Recaller, cast(Any, config.build()).fit(known))  # it is one of those that `channels.alone` admits
        seconds = time.perf_counter() - start
    return channel, Cost(seconds, memory.mib)


def fit_here(configs: Mapping[str, ChannelConfig], known: Interactions, progress: Callable[[str], None] | None = None) -> Fits:
    """Each channel fitted in this process; a refusal stands in the place of the channel that it came from."""
    out: Fits = {}
    for name, config in configs.items():
        if progress is not None:
            progress(name)
        try:
            out[name] = fit_one(config, known)
        except ConfigError as refusal:
            out[name] = refusal
    return out


def assemble(steps: Recipe, who: Contenders, held_out: HeldOut, *, width: int, fit_all: FitAll = fit_here) -> tuple[Judge, Rows]:
    """Fit whoever takes part on what the test may know; equal configurations once. Raises what a configured channel refuses."""
    known = steps.prepared.log.where(steps.cut.judged_mask)
    wanted = {n: c for n, c in who.fitted.items() if channels.alone(c)}
    twin = {b: next((n for n, c in wanted.items() if c == config), None) for b, config in who.baselines.items()}
    fits = fit_all(wanted | {b: c for b, c in who.baselines.items() if twin[b] is None}, known)
    for name in wanted:
        if isinstance(refusal := fits[name], ConfigError):
            raise refusal
    done = {n: f for n, f in fits.items() if not isinstance(f, ConfigError)}
    costs = {n: cost for n, (_, cost) in done.items()}
    fitted = {n: channel for n, (channel, _) in done.items()}
    funnel = None
    if who.stages or any(n not in fitted for n in who.fitted):
        began = time.perf_counter()
        tower = steps.judged_tower if who.tower else None
        trained = Cost(time.perf_counter() - began, float("nan"))
        ranker = steps.ranker if who.ranker else None
        all_trained = Cost(time.perf_counter() - began, float("nan"))
        already = {n: c for n, c in fitted.items() if n in who.fitted}
        here: dict[str, Cost] = {}
        merge = steps.merging if who.stages else None
        funnel = steps.funnel(
            steps.cut.judged_mask, tower, ranker, configs=who.fitted, already=already, merge=merge, around=partial(_timed, here)
        )
        fitted |= funnel.channels
        costs |= here
        recalled = sum(costs[n].seconds for n in who.fitted if n in costs)  # without the training of the two-tower
        costs |= {
            n: Cost(trained.seconds + here[n].seconds, float("nan"))
            for n, c in who.fitted.items()
            if isinstance(c, VectorConfig) and n in here
        }
        costs |= {"merged": Cost(recalled + trained.seconds * who.tower, float("nan"))}
        costs |= {"coarse": costs["merged"], "fine": Cost(recalled + all_trained.seconds, float("nan"))}
        costs["funnel"] = costs["fine"]
        if set(funnel.channels) - set(steps.config.recall.channels):
            funnel.channels = {n: c for n, c in funnel.channels.items() if n in steps.config.recall.channels}
    # A channel sees what the service would tell it, a baseline everything: they are one row where that is the same.
    rows = {n: fitted[n] for n in who.channels if n in fitted}
    same = {b: n for b, n in twin.items() if n is not None and n in rows and held_out.whole is None}
    for b, n in twin.items():
        if b not in same and (n or b) in fitted:
            rows[b] = fitted[n or b]
            if n is not None:
                costs[b] = costs[n]
    kinds = dict.fromkeys(who.channels, "channel") | dict.fromkeys(STAGES, "stage") | dict.fromkeys(who.baselines, "baseline")
    skipped = {b: str(fits[b]) for b in who.baselines if isinstance(fits.get(b), ConfigError)}
    for name, why in skipped.items():
        log.warning("no row %s: %s", name, why)
    judge = Judge(
        rows, width, len(steps.prepared.log.items), frozenset(who.baselines), funnel if who.stages else None, _rankable(who, funnel)
    )
    return judge, Rows(kinds, costs, same, skipped)


@contextmanager
def _timed(costs: dict[str, Cost], name: str) -> Iterator[None]:
    """Note what the fit of a channel takes that leans on others."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
    costs[name] = Cost(seconds, memory.mib)


def _rankable(who: Contenders, funnel: object) -> tuple[str, ...]:
    return who.stages if funnel is not None else ()
