"""`rayfunnel retrain`: new events to a promoted version that goes on from the serving one, or a sentence why not.

What a version has taken lies in its own bundle (`taken.json`), so it is published together with it or not at all: a run that
is killed anywhere has taken nothing, and the next one takes the same events again. A refused version is not published; its
events count as new until they are in a version. A file from elsewhere stands in place of the workdir's own event log, for the
histories and counters of the version as well; which events are new is known of each apart (`cluster.taken`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape

from cluster import evaluation
from cluster.registry import Registry
from cluster.registry_url import open_registry
from cluster.steps import fetch, prepare
from cluster.taken import NOTHING, Positions, Taken, marks, taken_in
from cluster.trainers import say, trainer
from cluster.workdir import NOT_LEARNT_FROM, Passing, state, state_key
from recsys import impressions, packing
from recsys.config import Config
from recsys.continued import Continued
from recsys.core import Vocabulary
from recsys.data import event_files, live_log
from recsys.data.sources import IMPRESSION
from recsys.data.split import SplitConfig
from recsys.errors import DataError, RetrainRefusedError
from recsys.exposures import Pages
from recsys.funnel import Funnel
from recsys.prepared import Prepared
from recsys.recipe import Recipe
from recsys.requests import Past
from recsys.rolling import Newest, Verdict, compared


class Retrained(NamedTuple):
    """What a run came to. version: None where there was nothing to take; seconds: of the whole run; verdict: None without a judgement."""

    version: str | None
    promoted: bool
    new_events: int
    warm: bool
    verdict: Verdict | None
    seconds: float
    sentence: str


class Serving(NamedTuple):
    """The version to follow: its bundle, (E,) bool rows of the log that it has not seen, and the pages that the service logged."""

    version: str
    folder: Path
    fresh: np.ndarray
    pages: Pages | None = None


def retrain(
    config: Config,
    console: Console,
    *,
    since: str = "last",
    events: str | None = None,
    promote: bool = True,
    anew: bool = False,
) -> Retrained:
    """Take the events that the version `since` (last: the serving one) has not; fit, judge, publish and promote.

    `events` is a folder or file in place of the workdir's own. Raises RetrainRefusedError where the gate does not hold (nothing
    is published then) and BundleError where nothing is serving yet.
    """
    began = time.perf_counter()
    registry = open_registry(config.place("registry"))
    serving = registry.resolve("production" if since == "last" else since)
    held = live_log.read(events or config.place("events"))
    taken = _taken(registry, serving)
    new = _new(config, held, taken, own=events is None)
    now = taken.and_now(held, own=events is None)
    done = partial(_done, began, console)
    if not len(new):
        return done(
            None, promoted=False, new=0, warm=False, verdict=None, sentence=f"Nothing new since {serving}: 0 new events. Nothing to do."
        )
    if len(new) < config.retrain.min_events:
        few = f"{len(new):,} new events since {serving}: fewer than the {config.retrain.min_events:,} of retrain.min_events. Nothing to do."
        return done(None, promoted=False, new=len(new), warm=False, verdict=None, sentence=few)
    if (same := _published(registry, serving, now)) is not None:
        if promote:
            registry.promote(same)
        sentence = f"{same} has taken these {len(new):,} events already" + (" and is production now" if promote else "")
        return done(same, promoted=promote, new=len(new), warm=False, verdict=None, sentence=sentence)

    passing = Passing(config)
    passing.sweep()
    fetch(config, console)
    config, cut = _with_live(config, held, new, passing)
    folder = registry.local_copy(serving)
    prepared, data_key = prepare(config, console, split=cut, like=None if anew else folder / "features")
    passing.mark(state(config, "data", data_key))
    to_follow = Serving(serving, folder, _fresh(prepared, new, folder), _pages(config, prepared, held))
    steps, warm, why = _steps(config, prepared, data_key, to_follow, console, passing=passing, anew=anew)
    console.print(
        f"{len(new):,} new events since {serving}; " + ("going on from its weights" if warm else f"fitting anew: {why}"), highlight=False
    )
    verdict = _judged(config, steps, to_follow, console)
    if not verdict.passed:
        raise RetrainRefusedError(
            f"The retrained version is not published and {serving} stays: {verdict.sentence()}. The gate wants a difference of at least "
            f"{config.retrain.gate.at_least:g} standard errors. Look at the new events, or change retrain.gate."
        )
    version = _publish(registry, steps, now, verdict, console, since=serving, more={"events": len(held), "warm": warm})
    passing.clear()
    if promote:
        registry.promote(version)
    sentence = f"{version}{' is production' if promote else ' is published, not promoted'}: {verdict.sentence()}"
    return done(version, promoted=promote, new=len(new), warm=warm, verdict=verdict, sentence=sentence)


def _done(
    began: float, console: Console, version: str | None, *, promoted: bool, new: int, warm: bool, verdict: Verdict | None, sentence: str
) -> Retrained:
    seconds = time.perf_counter() - began
    console.print(f"{escape(sentence)} ({seconds:.1f} s)", highlight=False)
    return Retrained(version, promoted, new, warm, verdict, seconds, sentence)


# ---- which events -----------------------------------------------------------------------------------------------------


def taken_by(registry: Registry, version: str) -> Positions:
    """Up to where a version's states hold the log that it was made from; nothing for one that `train` made."""
    return _taken(registry, version).positions


def _taken(registry: Registry, version: str) -> Taken:
    return taken_in(registry.local_copy(version, contents=False)) or NOTHING


def _new(config: Config, held: pa.Table, taken: Taken, *, own: bool) -> pa.Table:
    """What was taken neither from the own log nor from a file: a file may be a copy of the log, or of a part of it."""
    if own:
        held, known = held.filter(pa.array(taken.behind(held))), taken.elsewhere
    else:
        log = event_files.read(config.place("events")) if taken.log else held.slice(0, 0)
        known = np.union1d(taken.elsewhere, marks(log.filter(pa.array(~taken.behind(log)))))
    return held.filter(pa.array(~np.isin(marks(held), known))) if len(known) else held


def _published(registry: Registry, serving: str, now: Taken) -> str | None:
    """The newest version that went on from the serving one with exactly these events."""
    for version in reversed(registry.versions()):
        if registry.manifest(version).parent_version == serving and _taken(registry, version).equals(now):
            return version
    return None


def _with_live(config: Config, held: pa.Table, new: pa.Table, passing: Passing) -> tuple[Config, SplitConfig]:
    """The configuration whose log goes on with these events, frozen in a file of the state; and the cuts among the new ones."""
    digest = state_key(*(held[name].to_pylist() for name in ("partition", "position", "event_id")))
    folder = passing.mark(state(config, "data", f"live-{digest}"))
    file = folder / "events.parquet"
    if not file.exists():
        unfinished = folder / ".unfinished"
        pq.write_table(held, unfinished)
        unfinished.replace(file)
    times = np.sort(new["time_ms"].to_numpy()) / 1000
    how = config.retrain
    valid_from, test_from = (
        float(times[min(int(len(times) * share), len(times) - 1)]) for share in (1 - how.held_out - how.valid, 1 - how.held_out)
    )
    if not times[0] <= valid_from < test_from:
        raise DataError(
            f"The {len(times):,} new events cannot be cut by time: they span {times[-1] - times[0]:.0f} s, too many at one instant. "
            "Wait for more."
        )
    data = config.data.model_copy(update={"interactions": config.data.interactions.model_copy(update={"live": str(file)})})
    return config.model_copy(update={"data": data}), SplitConfig(by="time", valid_from=valid_from, test_from=test_from)


def _fresh(prepared: Prepared, new: pa.Table, serving: Path) -> np.ndarray:
    """(E,) bool: rows of the log that the serving version has not seen. One that it had from the log itself is not fresh."""
    log = prepared.log
    users = log.users.rows(new["user_id"].to_pylist())
    items = log.items.rows(new["item_id"].to_pylist())
    keys = {*zip(users.tolist(), items.tolist(), new["time_ms"].to_pylist(), strict=True)}
    oldest = float(pc.min(new["time_ms"]).as_py()) / 1000
    at = np.flatnonzero(log.time >= oldest - 1)
    out = np.zeros(len(log), bool)
    times = np.round(log.time[at] * 1000).astype(np.int64)
    out[at] = [key in keys for key in zip(log.user[at].tolist(), log.item[at].tolist(), times.tolist(), strict=True)]
    out &= ~_known_to(prepared, serving, out)
    return out


def _known_to(prepared: Prepared, serving: Path, candidates: np.ndarray) -> np.ndarray:
    """(E,) bool: candidates that stand in the histories that the serving version was trained with."""
    held, log = Past.load(serving / "past"), prepared.log
    users, items = Vocabulary.load(serving, "users"), Vocabulary.load(serving, "items")
    owner = np.repeat(np.arange(len(held.indptr) - 1), np.diff(held.indptr))
    had = {*zip(users.outside(owner), items.outside(held.items), np.asarray(held.times).tolist(), strict=True)}
    rows = np.flatnonzero(candidates)
    keys = zip(log.users.outside(log.user[rows]), log.items.outside(log.item[rows]), log.time[rows].tolist(), strict=True)
    out = np.zeros(len(log), bool)
    out[rows] = [key in had for key in keys]
    return out


def _pages(config: Config, prepared: Prepared, held: pa.Table) -> Pages | None:
    """The logged pages, joined with the events of their requests that came before the held-out part; None where none was logged."""
    root = f"{config.root}/impressions"
    if not impressions.files(root)[1]:
        return None
    test = prepared.log.time[prepared.split.test]
    known = held.filter(pc.less(held["time_ms"], int(1000 * test.min(initial=np.inf)) if len(test) else 1 << 62))
    window_s, refusals = 3600 * config.retrain.click_window_h, config.data.refusals
    labelled, _ = impressions.joined(impressions.read(root), known, window_s=window_s, refusals=refusals)
    rows = held.filter(pc.equal(held["event"], IMPRESSION)) if config.data.impressions else held.slice(0, 0)
    own = set(zip(*(rows[name].to_pylist() for name in ("request_id", "user_id", "item_id")), strict=True))
    return Pages.of(labelled, prepared.log, without=own)


# ---- fit, judge, publish ----------------------------------------------------------------------------------------------


def _steps(
    config: Config, prepared: Prepared, data_key: str, serving: Serving, console: Console, *, passing: Passing, anew: bool
) -> tuple[Recipe, bool, str]:
    """The recipe in force: it goes on from the serving version where that can be; else it begins anew, and why."""
    fresh = serving.fresh
    document = {k: v for k, v in config.document().items() if k not in NOT_LEARNT_FROM}
    tell = partial(say, console)
    far = evaluation.on_ray(config, prepared)[0]

    def places(*more: str) -> tuple[Path, str]:
        key = state_key(data_key, document, config.retrain.model_dump(mode="json"), *more)
        storage = f"{config.root}/runs/{key}" if "://" in config.root else str(passing.mark(state(config, "runs", key)))
        return passing.mark(state(config, "examples", key)), storage

    examples, storage = places(serving.version)
    warm = Continued(
        config,
        prepared,
        examples,
        trainer(console, storage, in_process=not far),
        tell,
        start=serving.folder,
        fresh=fresh,
        pages=serving.pages,
    )
    why = "--anew" if anew else warm.hindrance()
    if why is None and not (prepared.split.train & fresh & prepared.log.positive).any():
        why = "none of the new events before the held-out ones is a positive"
    if why is None:
        new = ", ".join(f"{n:,} of {table}" for table, n in warm.newcomers().items())
        tell(f"tables grow by {new}" if new else "every id is known already")
        return warm, True, ""
    examples, storage = places()
    return Recipe(config, prepared, examples, trainer(console, storage, in_process=not far), tell), False, why


def _judged(config: Config, steps: Recipe, serving: Serving, console: Console) -> Verdict:
    gate = config.retrain.gate
    newest = Newest.of(
        steps.prepared,
        among=serving.fresh,
        history=config.history,
        k=int(gate.metric.rpartition("@")[2]),
        again=not config.recall.exclude_seen,
        most=gate.users,
        seed=config.seed,
    )
    judged = steps.judged()
    with console.status(f"judging both versions by {len(newest):,} users"):
        return compared(newest, newest.asked(judged), newest.asked(Funnel.load(serving.folder)), gate)


def _publish(
    registry: Registry, steps: Recipe, taken: Taken, verdict: Verdict, console: Console, *, since: str, more: Mapping[str, Any]
) -> str:
    final = steps.final()
    metrics = {verdict.metric: verdict.new, f"serving {verdict.metric}": verdict.serving, "users": verdict.users, "protocol": "rolling"}

    def fill(folder: Path) -> dict[str, Any]:
        fields = packing.pack(final, folder, tower=steps.final_tower, ranker=steps.ranker)
        taken.write(folder, {**more, "since": since})
        return fields

    with console.status("writing the bundle"):
        version: str = registry.publish(fill, metrics=metrics, parent_version=since)
    return version
