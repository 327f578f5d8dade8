"""From a prepared data set to a funnel: which rows of the log each part learns from, and in which order.

    base      everything of train before the window   channels and two-tower are first fitted here
    window    the newest part of train                the fine ranker learns from moments that those have not seen
    valid     the split's                             early stopping of the fine ranker
    test      the split's                             judged on the funnel refitted: by time on train + valid, as production
                                                      would be; else on train alone, as the published protocols have it

For production the channels and the two-tower are refitted once more on everything; the fine ranker stays.
How a model is trained is handed in: on Ray by `cluster.trainers`, in this process by tests and by the search.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recsys import blending, channels, cold_weights, examples
from recsys.config import ChannelConfig, Config
from recsys.core import Recaller, id_hash
from recsys.data.interactions import Interactions
from recsys.errors import DataError
from recsys.evidence import EVIDENCE, evidence_field
from recsys.export import RankerEngine
from recsys.features.declaration import HistoryConfig
from recsys.features.generate import Histories
from recsys.features.refusals import Refusals
from recsys.features.schema import Field
from recsys.funnel import Funnel
from recsys.held_out import HeldOut, after_training, before_first
from recsys.lessons import Lessons, lessons
from recsys.models.two_tower import TwoTower
from recsys.moments import Moments
from recsys.prepared import Prepared
from recsys.recall.cold_start import ColdStartConfig
from recsys.recall.merge import MergeConfig
from recsys.recall.popular import PopularConfig
from recsys.recall.vector import VectorConfig
from recsys.requests import Past
from recsys.training import ModelConfig, TrainingConfig

log = logging.getLogger(__name__)
MOST_VALIDATED = 4_000
"""Moments that early stopping looks at, drawn at random: enough for a standard error of NDCG@10 near .003."""

NOTHING_TO_RANK = (
    "The fine ranker has nothing to learn from: of the {n:,} rows in its window, the newest part of train, none is an item that recall "
    "finds and that the user had not had before. If users take items again, set recall.exclude_seen: false. If the log is small, "
    "enlarge examples.window_share (or examples.window_events), or give more data."
)


class Trainer(Protocol):
    """Trains one model on an examples folder and returns the folder of the saved model (model.safetensors, model.json)."""

    def __call__(self, examples_folder: Path, model: ModelConfig, training: TrainingConfig, /, *, name: str) -> Path: ...


@dataclass(frozen=True)
class Cut:
    """Log positions, ascending: of positives in base, of rows in window and valid, and masks (E,) of what is known when."""

    base: np.ndarray
    window: np.ndarray
    valid: np.ndarray
    base_mask: np.ndarray
    judged_mask: np.ndarray
    """What the judged funnel learns from: by time all that is known when the test begins, else train."""
    lessons: Lessons
    """Which rows of window and valid are moments of the ranker, and which of these were taken."""


def cut(prepared: Prepared, config: Config) -> Cut:
    """Decide the window of the fine ranker: the last positives of each user, or the newest share of train."""
    log_, split = prepared.log, prepared.split
    train = np.flatnonzero(split.train)
    if split.by == "leave_one_out":
        in_window = _last_of_each_user(log_, split.train & log_.positive, config.examples.window_events)
    elif split.by == "random":  # the newest share would be users whom base does not know at all
        in_window = np.zeros(len(log_), bool)
        n = len(train) - int(len(train) * (1 - config.examples.window_share))
        in_window[np.random.default_rng(config.seed).choice(train, n, replace=False)] = True
    else:
        in_window = np.zeros(len(log_), bool)
        in_window[train[int(len(train) * (1 - config.examples.window_share)) :]] = True
    base_mask = split.train & ~in_window
    learn = log_.positive | (log_.impressions and config.examples.exposed)
    return Cut(
        base=np.flatnonzero(base_mask & log_.positive),
        window=np.flatnonzero(in_window & learn),
        valid=np.flatnonzero(split.valid & learn),
        base_mask=base_mask,
        judged_mask=split.train | split.valid if split.by == "time" else split.train,
        lessons=lessons(log_, split.parts * 2 + in_window, exposed=config.examples.exposed, window_s=3600 * config.retrain.click_window_h),
    )


def _last_of_each_user(log_: Interactions, mask: np.ndarray, n: int) -> np.ndarray:
    """(E,) bool: the last n rows of the mask of each user that keeps at least as many before them."""
    positions = np.flatnonzero(mask)
    user = log_.user[positions]
    order = np.argsort(user, kind="stable")
    counts = np.bincount(user, minlength=log_.n_users)
    ends = np.cumsum(counts)
    from_end = np.repeat(ends, counts) - 1 - np.arange(len(order))  # 0 for a user's newest
    chosen = order[(from_end < n) & (np.repeat(counts, counts) >= 2 * n)]
    out = np.zeros(len(log_), bool)
    out[positions[chosen]] = True
    return out


Bar = Callable[[str, int | None], AbstractContextManager[examples.Counted]]
"""Shows a step by its name and how many there are to do (None: nobody knows); gives what is told of those done."""


def unseen(name: str, total: int | None) -> AbstractContextManager[examples.Counted]:  # noqa: ARG001 - the shape of a bar
    """A bar that nobody looks at."""
    return nullcontext(examples.uncounted)


@dataclass
class Recipe:
    """The steps, each computed when first asked for. `folder` is where examples and trained models are kept."""

    config: Config
    prepared: Prepared
    folder: Path
    train: Trainer
    say: Callable[[str], None] = log.info
    bar: Bar = unseen

    @cached_property
    def cut(self) -> Cut:
        """Which rows serve which purpose."""
        return cut(self.prepared, self.config)

    @cached_property
    def moments(self) -> Moments:
        """Users' states along the log."""
        return self.prepared.moments(self.config)

    # ---- two-tower ------------------------------------------------------------------------------------------------

    @cached_property
    def base_tower(self) -> Path:
        """The two-tower fitted on base, early-stopped on the positives of the window."""
        window = self.cut.window[self.prepared.log.positive[self.cut.window]]
        return self._tower("two_tower", self.cut.base, self._sample(window), self.config.two_tower.training)

    @cached_property
    def judged_tower(self) -> Path:
        """The two-tower that the test judges: fitted anew on all that the judged funnel may know."""
        return self._refitted("judged", self.cut.judged_mask)

    @cached_property
    def final_tower(self) -> Path:
        """The two-tower for production: fitted anew on the whole log."""
        return self._refitted("final", np.ones(len(self.prepared.log), bool))

    def _refitted(self, name: str, mask: np.ndarray) -> Path:
        """Fitted on all positives of `mask`, for as many epochs as were best on base."""
        if not self.config.two_tower.refit:
            return self.base_tower
        rows = np.flatnonzero(mask & self.prepared.log.positive)
        epochs = _best_epochs(self.base_tower)
        training = self.config.two_tower.training.model_copy(update={"epochs": epochs, "patience": 0})
        return self._tower(f"two_tower_{name}", rows, self._sample(rows)[:256], training)

    def _tower(self, name: str, train: np.ndarray, valid: np.ndarray, training: TrainingConfig) -> Path:
        folder = self.folder / "examples" / name
        if not examples.are_written(folder):
            popularity = np.bincount(self.prepared.log.item[train], minlength=self.prepared.log.n_items).astype(np.float64)
            fields = self._fields(self.config.two_tower.features)
            self.say(f"{name}: {len(train):,} positives")
            with self.bar(f"examples of {name}", len(train) + len(valid)) as tell:
                about = partial(examples.two_tower_examples, self.prepared, self.moments, popularity=popularity, progress=tell)
                learnt, judged = about(train, dice=self._dice(name)), about(valid)
            examples.write(
                folder,
                task="two_tower",
                fields=fields,
                labels=(),
                train=learnt,
                valid=judged,
                items={f.name: self.prepared.item_columns[f.name] for f in fields if f.side == "item"},
                granule=training.granule,
                seed=self.config.seed,
            )
        return self._trained(folder, self.config.two_tower.model, training, name)

    def _trained(self, folder: Path, model: ModelConfig, training: TrainingConfig, name: str) -> Path:
        return self.train(folder, model, training, name=name)

    # ---- fine ranker ----------------------------------------------------------------------------------------------

    @cached_property
    def ranker(self) -> Path:
        """The fine ranker, from what the base funnel would have shown in the window."""
        training, folder = self.config.fine_rank.training, self.folder / "examples" / "fine_rank"
        if not examples.are_written(folder):
            funnel = self.funnel(self.cut.base_mask, self.base_tower, None)
            taught = self.cut.lessons
            window, valid = (rows[taught.rows[rows]] for rows in (self.cut.window, self.cut.valid))
            window, held = _thinned(window, self.config.examples.max_moments, self.config.seed), self._sample(valid)
            with self.bar("examples of fine_rank", len(window) + len(held)) as tell:
                train, valid = (
                    examples.ranker_examples(
                        funnel,
                        self.moments,
                        at,
                        self.config.examples,
                        taken=taught.taken,
                        seed=self.config.seed + i,
                        dice=dice,
                        progress=tell,
                    )
                    for i, (at, dice) in enumerate(((window, self._dice("fine_rank")), (held, None)))
                )
            train, valid = self._with_pages(funnel, train, valid)
            if not len(train.get("label", ())):
                raise DataError(NOTHING_TO_RANK.format(n=len(window)))
            self.say(f"fine_rank: {len(train['label']):,} pairs of {len(window):,} moments")
            fields = (*self.prepared.ranked_fields(self.config.fine_rank.features), *self._evidence(len(funnel.channels)))
            examples.write(
                folder,
                task="ranker",
                fields=fields,
                labels=("label",),
                train=train,
                valid=valid,
                granule=training.granule,
                seed=self.config.seed,
            )
        return self._trained(folder, self.config.fine_rank.model, training, "fine_rank")

    def _dice(self, name: str) -> examples.Dice | None:
        share = self.config.examples.strangers
        return examples.Dice(share, np.random.default_rng([self.config.seed, id_hash(name) & 0xFFFFFFFF])) if share else None

    def _with_pages(self, funnel: Funnel, train: examples.Columns, valid: examples.Columns) -> tuple[examples.Columns, examples.Columns]:  # noqa: ARG002
        """What else the ranker learns from; nothing where no service has logged a page."""
        return train, valid

    def _evidence(self, n_channels: int) -> tuple[Field, ...]:
        wanted = self.config.fine_rank.features
        return (evidence_field(n_channels),) if wanted is None or EVIDENCE in wanted else ()

    def _fields(self, names: tuple[str, ...] | None) -> tuple[Field, ...]:
        space = self.prepared.space
        return space.fields if names is None else space.select([n for n in names if n != EVIDENCE])

    def _sample(self, rows: np.ndarray) -> np.ndarray:
        return _thinned(rows, MOST_VALIDATED, self.config.seed)

    # ---- the funnel -----------------------------------------------------------------------------------------------

    @cached_property
    def merging(self) -> MergeConfig:
        """The merge in force. Where it is learnt, then from the base funnel: before any example is drawn through it."""
        given = self.config.recall.merge
        if not given.learn:
            return given
        cut = self.cut
        by_tower = any(isinstance(channel, VectorConfig) for channel in self.config.recall.channels.values())
        tower = self.base_tower if by_tower else None  # a merge of other channels trains no network
        with self.bar("settings of the merge", None) as tell:
            found = blending.blend(
                lambda: self.funnel(cut.base_mask, tower, None, merge=given),
                lambda most: blending.questions(
                    self.prepared, self.moments, cut.base_mask, np.concatenate([cut.window, cut.valid]), most=most, seed=self.config.seed
                ),
                given,
                self.folder,
                seed=self.config.seed,
                progress=tell,
            )
        for sentence in blending.told(found):
            self.say(sentence)
        return found.config(given)

    @cached_property
    def cold_start(self) -> ColdStartConfig:
        """The ladder in force. Where its weights are learnt, then with the ranker, on validation data that nothing has learnt from."""
        given, split = self.config.cold_start, self.prepared.split
        if not given.learn or not given.below or not given.ladder or split.by not in cold_weights.SPLITS:
            return given
        # Channels know all of train: what was popular before the window is not what production would lead by.
        fresh = self.funnel(split.train, self.base_tower, self.ranker, cold_start=given)
        asked = blending.questions(self.prepared, self.moments, split.train, self.cut.valid, most=cold_weights.MOST, seed=self.config.seed)
        found = cold_weights.learn(fresh, asked, given, seed=self.config.seed)
        for one in found:
            self.say(one.told())
        return cold_weights.taken(found, given)

    def judged(self) -> Funnel:
        """The funnel that the test judges."""
        mask = self.cut.judged_mask
        return self.funnel(mask, self.judged_tower, self.ranker)

    def final(self) -> Funnel:
        """The funnel for production: refitted on the whole log."""
        mask = np.ones(len(self.prepared.log), bool)
        return self.funnel(mask, self.final_tower, self.ranker)

    def funnel(
        self,
        mask: np.ndarray,
        tower_folder: Path | None,
        ranker_folder: Path | None,
        *,
        configs: Mapping[str, ChannelConfig] | None = None,
        already: Mapping[str, Recaller] | None = None,
        merge: MergeConfig | None = None,
        cold_start: ColdStartConfig | None = None,
        around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> Funnel:
        """A funnel whose channels know the rows of `mask` (E,) and nothing else.

        Without a tower it has no coarse stage and no vector channel. `configs` stand in for the configured channels; those
        in `already` were fitted on the same rows; each fit runs inside `around(name)`. `merge` and `cold_start` stand in for those in force.
        """
        p, config = self.prepared, self.config
        if merge is None:
            merge = self.merging if tower_folder and configs is None else config.recall.merge
        if merge is not config.recall.merge:
            config = config.model_copy(update={"recall": config.recall.model_copy(update={"merge": merge})})
        if cold_start is None:
            cold_start = self.cold_start if ranker_folder and configs is None else config.cold_start
        if cold_start is not config.cold_start:
            config = config.model_copy(update={"cold_start": cold_start})
        known = p.log.where(mask)
        tower = TwoTower.load(tower_folder) if tower_folder else None
        vectors = tower.item_vectors(p.item_columns) if tower else None
        popular = PopularConfig().build().fit(known)
        funnel = Funnel(
            version="unpublished",
            config=config,
            space=p.space,
            users=p.log.users,
            items=p.log.items,
            user_columns=p.user_columns,
            item_columns=p.item_columns,
            catalogue=p.catalogue,
            past=past(known, p.told[mask], config.history),
            popular_items=popular.order,
            channels={},
            tower=tower,
            vectors=vectors,
            ranker=RankerEngine.load(ranker_folder, p.item_columns) if ranker_folder else None,
            reranker=config.rerank.build(vectors=vectors, columns=p.item_columns),
            titles=p.titles,
            live=p.live,
        )
        wanted = config.recall.channels if configs is None else configs
        funnel.channels = channels.fit(
            wanted, known, vectors=vectors, encode=funnel.user_vectors, items=p.catalogue, users=p.profiles, already=already, around=around
        )
        return funnel

    def held_out(self, protocol: str | None = None) -> HeldOut:
        """The test, as `protocol` asks it; absent: top_n for a split at random, else the state before the first test event."""
        whole = protocol == "top_n" if protocol else self.prepared.split.by == "random"
        ask = after_training if whole else before_first
        return ask(self.prepared, self.moments, most=self.config.evaluate.max_users, seed=self.config.seed)


def past(known: Interactions, told: np.ndarray, history: HistoryConfig) -> Past:
    """What a bundle keeps of each user: the newest events, every item ever had, and what was refused."""
    indptr, items, times = Histories(known, length=history.length, told=told).closing()
    had = known.where(told)
    users, rows = had.user.astype(np.int64), had.item.astype(np.int64)
    if known.past is not None:
        users = np.concatenate([users, np.repeat(np.arange(known.n_users), np.diff(known.past.indptr))])
        rows = np.concatenate([rows, known.past.items.astype(np.int64)])
    pairs = np.unique(users * max(known.n_items, 1) + rows)
    seen_indptr = np.zeros(known.n_users + 1, np.int64)
    np.cumsum(np.bincount(pairs // max(known.n_items, 1), minlength=known.n_users), out=seen_indptr[1:])
    seen = (pairs % max(known.n_items, 1)).astype(np.int32)
    return Past(indptr, items, times, seen_indptr, seen, *Refusals.of(known, history).closing())


def _thinned(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def _best_epochs(folder: Path) -> int:
    saved: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return int(saved["best_epoch"]) + 1
