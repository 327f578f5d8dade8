"""A recipe that goes on from a published version: its models are the base, and learn from what came since.

The published version has never seen the new events, so they serve it as a window: the two-tower as it was published, its tables
grown, is the base from which the ranker's new examples are drawn, and nothing has to be fitted to that end. Then both models
go on: the two-tower from the new positives and a sample of the old ones, the ranker from the new examples.

    time   ────────── old ──────────┤ new: window ──┤ valid ──┤ test ──┤
    base   known                     asked           asked
    judged known, learnt             known, learnt   known, learnt   asked of both versions
    final  known, learnt             ...and the test: what is published
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from recsys.batches import Examples, save_start
from recsys.config import Config
from recsys.errors import TrainingError
from recsys.examples import Columns
from recsys.export import save_model
from recsys.exposures import Pages, beside, page_examples
from recsys.features.schema import FeatureSpace, Field
from recsys.funnel import Funnel
from recsys.growing import State, difference, grown, new_ids
from recsys.lessons import lessons
from recsys.recipe import MOST_VALIDATED, Cut, Recipe
from recsys.retrain_config import RetrainConfig
from recsys.training import ModelConfig, TrainingConfig


@dataclass
class Continued(Recipe):
    """`start` is the bundle that it goes on from; `fresh` (E,) bool are the rows that it has not seen."""

    start: Path = field(default_factory=Path)
    fresh: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    pages: Pages | None = None
    """Pages that the service logged since, of users of the log."""

    def _with_pages(self, funnel: Funnel, train: Columns, valid: Columns) -> tuple[Columns, Columns]:
        """Pages of the window beside its moments, and of the validation part: what was shown and passed over teaches the most."""
        log, split = self.prepared.log, self.prepared.split
        new = log.time[split.train & self.fresh]
        if self.pages is None or not self.config.examples.exposed or not len(new):
            return train, valid
        ends = [float(new.min()), *(float(log.time[mask].min(initial=np.inf)) for mask in (split.valid, split.test))]
        out = []
        for columns, start, end, most in zip(
            (train, valid), ends, ends[1:], (self.config.examples.max_moments or len(self.pages), MOST_VALIDATED), strict=False
        ):
            pages = self.pages.between(start, end, most=most, seed=self.config.seed)
            first = int(columns["moment"].max(initial=-1)) + 1 if columns else 0
            more = page_examples(funnel, self.moments, pages, first=first)
            out.append(beside(columns, more) if columns else more)
            if more:
                self.say(f"{len(pages):,} pages of the service: {len(more['label']):,} pairs, {int(more['label'].sum()):,} of them taken")
        return out[0], out[1]

    @property
    def how(self) -> RetrainConfig:
        """The configuration of it."""
        return self.config.retrain

    @cached_property
    def space(self) -> FeatureSpace:
        """The encoders of the version that it goes on from."""
        return FeatureSpace.load(self.start / "features")

    def hindrance(self) -> str | None:
        """Why the weights cannot be taken over; None where they can."""
        before = list(Config.model_validate(json.loads((self.start / "config.json").read_text())).recall.channels)
        if before != (now := list(self.config.recall.channels)):
            return f"the serving version recalls by {', '.join(before)}, this configuration by {', '.join(now)}"
        evident = self._evidence(len(self.config.recall.channels))
        for folder, fields, model in (
            ("two_tower", self._fields(self.config.two_tower.features), self.config.two_tower.model),
            ("fine_rank", (*self.prepared.ranked_fields(self.config.fine_rank.features), *evident), self.config.fine_rank.model),
        ):
            if not (self.start / folder / "model.json").exists():
                return f"the serving version has no {folder}"
            if reason := difference(self.start / folder, fields, model):
                return f"{folder}: {reason}"
            if isinstance(found := grown(self.start / folder, self.space.tables, self.prepared.space.tables, fields), str):
                return f"{folder}: {found}"
        return None

    def newcomers(self) -> dict[str, int]:
        """How many values each table has that the old version did not know."""
        old, new = self.space.tables, self.prepared.space.tables
        return {name: n for name in new if name in old and (n := new_ids(old[name], new[name]))}

    @cached_property
    def cut(self) -> Cut:
        """The window is what is new in train; base is all that the old version may have known."""
        log, split = self.prepared.log, self.prepared.split
        exposed, window_s = self.config.examples.exposed, 3600 * self.config.retrain.click_window_h
        learn = log.positive | (log.impressions and exposed)
        base_mask = split.train & ~self.fresh
        return Cut(
            base=np.flatnonzero(base_mask & log.positive),
            window=np.flatnonzero(split.train & self.fresh & learn),
            valid=np.flatnonzero(split.valid & learn),
            base_mask=base_mask,
            judged_mask=split.train | split.valid,
            lessons=lessons(log, split.parts * 2 + self.fresh, exposed=exposed, window_s=window_s),
        )

    @cached_property
    def base_tower(self) -> Path:
        """The two-tower as it was published, with tables for the new ids."""
        folder = self.folder / "models" / "two_tower_base"
        if not (folder / "model.json").exists():
            fields = self._fields(self.config.two_tower.features)
            description = json.loads((self.start / "two_tower" / "model.json").read_text()) | {"fields": [asdict(f) for f in fields]}
            save_model(folder, self._weights("two_tower", fields), description)
        return folder

    def _refitted(self, name: str, mask: np.ndarray) -> Path:
        """Gone on with: the new positives of `mask`, and old ones beside them."""
        positive = mask & self.prepared.log.positive
        fresh, old = np.flatnonzero(positive & self.fresh), np.flatnonzero(positive & ~self.fresh)
        replayed = min(len(old), int(self.how.replay * len(fresh)))
        drawn = np.random.default_rng(self.config.seed).choice(old, replayed, replace=False)
        rows = np.sort(np.concatenate([fresh, drawn]))
        training = self.config.two_tower.training.model_copy(update={"patience": 0})
        return self._tower(f"two_tower_{name}", rows, self._sample(rows)[:256], training)

    def _trained(self, folder: Path, model: ModelConfig, training: TrainingConfig, name: str) -> Path:
        """From the old weights, for a few epochs at a share of the learning rates: a fresh optimiser's first steps are its largest."""
        opened = Examples(folder)
        if opened.start is None:
            save_start(folder, self._weights("fine_rank" if name == "fine_rank" else "two_tower", opened.fields))
        share, of_tables = self.how.learning_rate, training.embedding_learning_rate
        gentle = training.model_copy(
            update={
                "epochs": min(self.how.epochs, training.epochs),
                "learning_rate": share * training.learning_rate,
                "embedding_learning_rate": None if of_tables is None else share * of_tables,
            }
        )
        return self.train(folder, model, gentle, name=name)

    def _weights(self, kind: str, fields: tuple[Field, ...]) -> State:
        found = grown(self.start / kind, self.space.tables, self.prepared.space.tables, fields)
        if isinstance(found, str):
            raise TrainingError(f"The {kind} cannot go on from '{self.start}': {found}. Fit anew.")
        return found
