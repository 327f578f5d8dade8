"""The whole configuration: every part's section under one name, and how a file becomes it.

A section's class stands above the code that it configures; here they are only put together, and checked against each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_validator,
)

from recsys.config_faults import Fault, flatten, nearest, redact, shown, tag_of
from recsys.config_file import Loaded, read_as
from recsys.config_manual import template
from recsys.core import FrozenConfig
from recsys.data.columns import FROM_TIME, ColumnConfig
from recsys.data.event_names import unknown
from recsys.data.negatives import NegativesConfig
from recsys.data.sources import DataConfig, InteractionsConfig, LabelConfig, TableConfig
from recsys.data.sources import HistoryConfig as DataHistoryConfig
from recsys.data.split import SplitConfig
from recsys.errors import ConfigError
from recsys.evidence import EVIDENCE
from recsys.features.aggregates import faults
from recsys.features.declaration import FeaturesConfig, HistoryConfig
from recsys.features.store import StoreConfig
from recsys.ingest_config import IngestConfig
from recsys.models.ctr import DeepFMConfig, LogisticRegressionConfig
from recsys.models.two_tower import TwoTowerConfig
from recsys.places import Places
from recsys.recall.bpr import BPRConfig
from recsys.recall.cold_start import ColdStartConfig
from recsys.recall.column_vector import ColumnVectorConfig
from recsys.recall.content import ContentConfig
from recsys.recall.ease import EASEConfig
from recsys.recall.ials import IALSConfig
from recsys.recall.markov import MarkovConfig
from recsys.recall.merge import MergeConfig
from recsys.recall.neighbors import ItemCFConfig
from recsys.recall.popular import PopularConfig
from recsys.recall.popular_segment import SegmentPopularConfig
from recsys.recall.realtime import RealtimeConfig
from recsys.recall.trending import TrendingConfig
from recsys.recall.user_cf import UserCFConfig
from recsys.recall.vector import VectorConfig
from recsys.rerank.diversity import MMRConfig
from recsys.rerank.rules import RulesConfig, unfit
from recsys.retrain_config import RetrainConfig
from recsys.serve_config import ServeConfig
from recsys.training import TrainingConfig

ChannelConfig = Annotated[
    ItemCFConfig
    | UserCFConfig
    | EASEConfig
    | IALSConfig
    | BPRConfig
    | MarkovConfig
    | ContentConfig
    | PopularConfig
    | SegmentPopularConfig
    | TrendingConfig
    | RealtimeConfig
    | VectorConfig
    | ColumnVectorConfig,
    Field(discriminator="type"),
]
CHANNELS = tuple(tag for member in flatten(ChannelConfig) if (tag := tag_of(member)) is not None)
"""The types of channels."""
RankerConfig = Annotated[DeepFMConfig | LogisticRegressionConfig, Field(discriminator="type")]
Protocol = Literal["next_item", "top_n", "time", "ncf", "ctr"]
PLACES = {"history": "features.history"}
"""Short names of sections, and where they live."""


class ExamplesConfig(FrozenConfig):
    """Which moments and which negatives the rankers learn from."""

    window_events: PositiveInt = 5
    """Leave-one-out splits: the last so many training positives of each user are the fine ranker's window."""
    window_share: float = Field(default=0.15, gt=0, lt=1)
    """Other splits: the newest share of the training log is the fine ranker's window."""
    recalled: NonNegativeInt = 40
    """Negatives per positive, drawn from the funnel's own candidates of that moment: what the stage will have to tell apart."""
    exposed: bool = True
    """Also learn from what was shown and passed over, where the log has impressions."""
    uniform: NonNegativeInt = 0
    """Negatives per positive drawn uniformly from the catalogue."""
    popularity: NonNegativeInt = 0
    """Negatives per positive drawn in proportion to how often an item is a positive."""
    max_moments: PositiveInt = 60_000
    """At most so many moments of the window are used, drawn at random."""
    strangers: float = Field(default=0.1, ge=0, lt=1)
    """Share of the moments of training at which the user is made a stranger: an unseen id and at most three events. What is
    never met in training is guessed in service, and new users are met there every day."""


def _default_channels() -> dict[str, ChannelConfig]:
    found = (VectorConfig(), ItemCFConfig(), MarkovConfig(), RealtimeConfig(), PopularConfig())
    return {config.type: config for config in found}


class RecallConfig(FrozenConfig):
    """Which channels find candidates, and how their lists become one."""

    channels: dict[str, ChannelConfig] = Field(default_factory=_default_channels)
    """Name -> channel. The name is used in reports and in an item's `sources`; where it is a type, `type` may be left out.
    null takes a channel away that a file below this one brought."""
    merge: MergeConfig = MergeConfig()
    """How the channels' lists become one."""
    exclude_seen: bool = True
    """Never recommend what the user has in the log already, or has had since: the newest features.history.length events, and the newest
    features.history.seen items of those before them."""
    not_interested: tuple[str, ...] | None = None
    """The name that data.refusals had: what is written here counts as written there."""

    @field_validator("channels", mode="before")
    @classmethod
    def _named_by_type(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {name: channel for name, channel in given.items() if channel is not None}
        return {
            name: {"type": name, **channel} if name in CHANNELS and isinstance(channel, Mapping) and "type" not in channel else channel
            for name, channel in kept.items()
        }

    @field_validator("channels")
    @classmethod
    def _at_least_one(cls, channels: dict[str, ChannelConfig]) -> dict[str, ChannelConfig]:
        if not channels:
            raise ValueError(f"needs at least one channel: {', '.join(CHANNELS)}")
        return channels


class TwoTowerSection(FrozenConfig):
    """The two-tower model: recall by vectors, and the coarse rank."""

    model: TwoTowerConfig = TwoTowerConfig(temperature=0.05)
    """What it is made of."""
    features: tuple[str, ...] | None = None
    """Names of the features it sees. null: all of users, items and context."""
    training: TrainingConfig = TrainingConfig(
        epochs=20, batch_size=1024, optimizer="adam", learning_rate=0.003, embedding_learning_rate=0.05
    )
    """How it learns."""
    refit: bool = True
    """Fit it anew on everything, for as many epochs as were best, before publishing. Off: it never sees the newest events."""


class CoarseRankConfig(FrozenConfig):
    """The first cut of the merged candidates: two-tower cosine, and what the channels together say."""

    keep: PositiveInt = 300
    """Candidates that go on to the fine rank."""
    merged: NonNegativeFloat = 0.5
    """Weight of the merged recall's score, as a share of the query's best, beside the cosine; 0: the cosine alone."""


class FineRankConfig(FrozenConfig):
    """The ranker that sees every feature."""

    model: RankerConfig = DeepFMConfig()
    """What scores a pair of user and item."""
    features: tuple[str, ...] | None = None
    """Names of the features it sees. null: all, with every channel's score and rank."""
    keep: PositiveInt = 100
    """Candidates that go on to the re-rank."""
    training: TrainingConfig = TrainingConfig(
        epochs=10, batch_size=1024, optimizer="adam", learning_rate=0.001, embedding_learning_rate=0.003
    )
    """How it learns."""


class PrepareConfig(FrozenConfig):
    """How values of declared aggregates are computed for training."""

    on_ray: bool | None = None
    """By key on Ray Data, which holds a part of the log's counters at a time. null: where a cluster is given, or they would take more
    than 4 GiB in one process. Either gives the same values."""


class EvaluateConfig(FrozenConfig):
    """The offline report."""

    protocol: Protocol | None = None
    """next_item, top_n, time, ncf or ctr. null: the one that fits the split (leave-one-out: next_item, by time: time, else top_n)."""
    ks: tuple[PositiveInt, ...] = (5, 10, 20)
    """Lengths of list that metrics are taken at."""
    max_users: PositiveInt | None = None
    """Users judged at most, drawn at random. null: all."""
    negatives: PositiveInt = 99
    """Protocol ncf: items drawn that the positive stands against."""
    given: NegativesConfig | None = None
    """Protocol ncf: a file that gives them instead, so that figures can be compared with others' on the same lists."""
    seeds: PositiveInt = 3
    """Protocol top_n: splits at random, of as many seeds from `split.seed` on; the report is their mean."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Protocol ctr: the probability from which precision, recall and F1 count a row as a yes."""
    on_ray: bool | None = None
    """Fit channels and judge users as tasks on Ray. null: where a cluster is given, or the log is large."""


class Config(Places):
    """One recommender, from its log to its HTTP address."""

    seed: NonNegativeInt = 1
    """Of everything drawn at random: equal seeds give equal bundles."""
    redis_url: str | None = Field(default=None, repr=False)
    """Redis or Valkey of the feature store, such as rediss://:${REDIS_PASSWORD}@host:6379/0; of a cluster any of its nodes, such as
    rediss+cluster://:${REDIS_PASSWORD}@host1:6379,host2:6379. null: an embedded Valkey."""
    fetch: Literal["ml-100k"] | None = None
    """A public data set to bring before anything else. `{data}` in a path of the data section is the folder it lies in."""
    data: DataConfig
    """The log of events, and what is known of users and items."""
    split: SplitConfig = SplitConfig()
    """What is held out to tune on and to judge by."""
    features: FeaturesConfig = FeaturesConfig()
    """How columns become inputs of models."""
    prepare: PrepareConfig = PrepareConfig()
    """How aggregates are computed for training."""
    examples: ExamplesConfig = ExamplesConfig()
    """What the rankers learn from."""
    recall: RecallConfig = RecallConfig()
    """Stage 1: a few thousand candidates out of the catalogue."""
    cold_start: ColdStartConfig = ColdStartConfig()
    """Who leads the page of a user without a history."""
    two_tower: TwoTowerSection = TwoTowerSection()
    """The model of the channel two_tower and of the coarse rank."""
    coarse_rank: CoarseRankConfig = CoarseRankConfig()
    """Stage 2."""
    fine_rank: FineRankConfig = FineRankConfig()
    """Stage 3."""
    rerank: MMRConfig = MMRConfig()
    """Stage 4: the page as a whole."""
    rules: RulesConfig = RulesConfig()
    """What editors want of every page, in stage 4: boosts, pins, blocks, novelty, a start for new items, exploration."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the report is made."""
    store: StoreConfig = StoreConfig()
    """The feature store: what users did, live."""
    ingest: IngestConfig = IngestConfig()
    """What reads the event log."""
    retrain: RetrainConfig = RetrainConfig()
    """Going on from the serving version with what happened since."""
    serve: ServeConfig = ServeConfig()
    """The live service."""

    _base: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="before")
    @classmethod
    def _one_declaration_of_refusals(cls, given: Any) -> Any:
        """`recall.not_interested` of configurations and bundles from before data.refusals."""
        recall, data = (given.get(part) if isinstance(given, Mapping) else None for part in ("recall", "data"))
        names = recall.get("not_interested") if isinstance(recall, Mapping) else getattr(recall, "not_interested", None)
        if names is None or data is None:
            return given
        if isinstance(data, Mapping) and "refusals" not in data:
            return {**given, "data": {**data, "refusals": names}}
        if isinstance(data, DataConfig) and "refusals" not in data.model_fields_set:
            return {**given, "data": data.model_copy(update={"refusals": tuple(names)})}
        return given

    @field_serializer("redis_url", when_used="json")
    def _masked(self, value: str | None) -> str | None:
        return redact(value) if value else value

    @property
    def history(self) -> HistoryConfig:
        """Which events enter a user's history and how many, which refuse an item, and how many items that fell off it are excluded."""
        history = self.features.history.refusing(self.data.refusals)
        return history if self.recall.exclude_seen else history.model_copy(update={"seen": 0})

    @property
    def base(self) -> Path:
        """The folder that relative paths of the data section start from: that of the file they were written in."""
        return self._base

    @property
    def fetched(self) -> Path | None:
        """Where `fetch` lies: in the workdir, or in the user's cache where the workdir is a URI."""
        if self.fetch is None:
            return None
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayfunnel" / "data"
        return (cache if "://" in self.root else Path(self.place("data"))) / self.fetch

    def document(self) -> dict[str, Any]:
        """What a bundle keeps of this: JSON-able, passwords masked, and `Config.model_validate` reads it back."""
        found: dict[str, Any] = json.loads(json.dumps(written(self), default=str))
        for name in ("redis_url", "registry", "workdir"):
            if isinstance(found.get(name), str):
                found[name] = redact(found[name])
        return found

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(dotted path, sentence) of each pair of sections that do not fit together."""
        if self.fine_rank.keep > self.coarse_rank.keep:
            yield "fine_rank.keep", f"is {self.fine_rank.keep}, more than the {self.coarse_rank.keep} that coarse_rank.keep lets through"
        if self.coarse_rank.keep > self.recall.merge.limit:
            yield (
                "coarse_rank.keep",
                f"is {self.coarse_rank.keep}, more than the {self.recall.merge.limit} that recall.merge.limit lets through",
            )
        for part in ("quotas", "weights", "minimum_share"):
            for name in getattr(self.recall.merge, part):
                if name not in self.recall.channels:
                    yield f"recall.merge.{part}.{name}", f"names no channel; channels are {', '.join(self.recall.channels)}"
        items = self.data.items.columns if self.data.items is not None else {}
        for index, cap in enumerate(self.rerank.caps):
            if cap.column not in {"item_id", *items}:
                yield (
                    f"rerank.caps.{index}.column",
                    f"names '{cap.column}', which no item column declares; known: {', '.join(items) or 'none'}",
                )
        for path, sentence in unfit(self.rules, {name: str(c.kind) for name, c in items.items()}):
            yield f"rules.{path}", sentence
        tables = {"user": self.data.users, "item": self.data.items}
        kinds = {side: {n: str(c.kind) for n, c in t.columns.items()} if t is not None else {} for side, t in tables.items()}
        kinds["context"] = {n: str(c.kind) for n, c in self.data.interactions.context.items() if c.kind not in FROM_TIME}
        for name, sentence in faults(self.features.aggregates, kinds, self.data.refused):
            yield f"features.aggregates.{name}", sentence
        yield from self._event_faults()
        for name in self.two_tower.features or ():
            if name in self.features.aggregates:
                yield "two_tower.features", f"uses '{name}', an aggregate: those are inputs of the fine ranker only"
        known = [*self._feature_names(), *self.features.aggregates]
        for section, names in (("two_tower", self.two_tower.features), ("fine_rank", self.fine_rank.features)):
            for name in names or ():
                if name not in known:
                    near = nearest(name, known)
                    meant = f"did you mean '{near}'?" if near else f"known: {', '.join(known)}"
                    yield f"{section}.features", f"uses feature '{name}', which no column declares; {meant}"

    def _event_faults(self) -> Iterator[tuple[str, str]]:
        """What is said of event types in several places."""
        old, known = self.recall.not_interested, self.data.event_names
        if old is not None and set(old) != set(self.data.refusals):
            refusals = ", ".join(self.data.refusals) or "none"
            yield "recall.not_interested", f"is the old name of data.refusals, which says otherwise ({refusals}); leave it out"
        for name in self.features.history.events or ():
            if name in self.data.refusals:
                yield "features.history.events", f"holds '{name}', which data.refusals names: a refusal is no member of a history"
        named = {"features.history.events": self.features.history.events or ()}
        named |= {f"features.aggregates.{name}.events": a.events or () for name, a in self.features.aggregates.items()}
        for path, names in named.items():
            for name in names:
                if known is not None and name not in known:
                    yield path, f"holds '{name}', which {unknown(name, known)}"

    def _feature_names(self) -> list[str]:
        tables = (self.data.users, self.data.items)
        declared = [name for table in tables if table is not None for name in table.columns]
        return ["user_id", "item_id", "history", "recent", EVIDENCE, *declared, *self.data.interactions.context]


def _filled(value: Any, folder: str) -> Any:
    """`{data}` in every string replaced by the folder."""
    if isinstance(value, Mapping):
        return {key: _filled(child, folder) for key, child in value.items()}
    if isinstance(value, list):
        return [_filled(child, folder) for child in value]
    return value.replace("{data}", folder) if isinstance(value, str) else value


def written(model: BaseModel) -> dict[str, Any]:
    """The values that were given, and every `type`: what is left out keeps meaning the default when it is read again. Options that
    are secret by their names are masked."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return written(value)
        if isinstance(value, Mapping):
            return {str(key): plain(child) for key, child in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(child) for child in value]
        return value

    given = model.model_fields_set | ({"type"} & type(model).model_fields.keys())
    return {info.alias or name: plain(shown(model, name)) for name, info in type(model).model_fields.items() if name in given}


def manual() -> str:
    """`configs/base.yaml`: every key with its default and its documentation; the data section as an example to take over."""
    number = ColumnConfig.model_construct(kind="number")
    example = DataConfig.model_construct(
        interactions=InteractionsConfig.model_construct(path="log.csv", user="user_id", item="item_id", time="time"),
        labels={"click": LabelConfig.model_construct(column="is_click")},
        items=TableConfig.model_construct(path="items.csv", id="item_id", columns={"price": number}),
        users=TableConfig.model_construct(path="users.csv", id="user_id", columns={"age": number}),
        history=DataHistoryConfig.model_construct(path="before.parquet"),
    )
    return MANUAL_HEADER + template(Config.model_construct(data=example), "data")


MANUAL_HEADER = """\
# Every key with its default and what it does. A configuration of your own says `extends: base.yaml` and only what differs:
# a mapping is merged key by key, anything else replaces; null takes a default away. (Without `extends`, these hold too.)
#
# extends: path of one file, relative to the file that says so.
# ${NAME} and ${NAME:-default} take a value from the environment; for passwords.
# --set dotted.path=value, on the command line, goes over all files.
#
# This file is written by `python -m recsys.config`, from the documentation of the classes that read it.

"""


def read(files: Sequence[Path], settings: Sequence[str] = ()) -> Loaded[Config]:
    """The configuration of these files (later ones win) and `path=value` settings, or every fault in it."""
    loaded = read_as(Config, files, settings, places=PLACES, as_written=("data",), defaults=manual())
    if loaded.config is None:
        return loaded
    found = [Fault(loaded.tree.at(path.split(".")), path, sentence) for path, sentence in loaded.config.contradictions()]
    config = loaded.config
    if config.fetched is not None:
        config = config.model_copy(update={"data": DataConfig.model_validate(_filled(written(config.data), str(config.fetched)))})
    log = config.data.interactions
    written_in = Path(loaded.tree.at(("data", "interactions", "train" if log.in_parts else "path")).file)
    config._base = written_in.parent.absolute() if written_in.is_file() else Path.cwd()
    return Loaded(None if found else config, (*loaded.faults, *found), loaded.tree)


def load(files: Sequence[Path], settings: Sequence[str] = ()) -> Config:
    """The configuration of these files and settings. ConfigError with all faults at once."""
    loaded = read(files, settings)
    if loaded.config is None or loaded.faults:
        raise ConfigError([str(fault) for fault in loaded.faults])
    return loaded.config


if __name__ == "__main__":
    sys.stdout.write(manual())
