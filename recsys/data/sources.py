"""Where a data set lies and what its columns mean: the `data:` section of a configuration.

A format brings the column names of its kind along, so `{path: ml-100k.inter}` is a whole declaration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from recsys.core import FrozenConfig
from recsys.data.columns import FROM_TIME, ColumnConfig
from recsys.data.event_names import unclean
from recsys.data.leaks import future_faults, refused_columns

Format = Literal["auto", "csv", "parquet", "recbole", "movielens", "kuairand"]
TimeUnit = Literal["s", "ms", "us", "ns", "iso"]
Scalar = str | int | float | bool

LARGEST_VALUE = 3.4028234663852886e38
"""Values are kept as float32."""
IMPRESSION = "impression"
"""The event that is an exposure and never a positive."""
AGAINST = ("dislike", "hide", "not_interested")
"""Events that refuse an item, where `data.refusals` says nothing else: never positives either."""


def is_positive(event: str, refusals: Sequence[str] = AGAINST) -> bool:
    """Whether an event of this type is a positive where no label says what is one."""
    return event != IMPRESSION and event not in refusals


class EventConfig(FrozenConfig):
    column: str | None = None
    """Column with the event type: view, click, like, share, purchase, rating, impression or a name of your own."""
    default: str = "click"
    """Event type of rows that have none. In a log of impressions without `column`, rows that are no positive are impressions."""


class LabelConfig(FrozenConfig):
    column: str
    """Column of the log that the label is read from."""
    at_least: float | None = None
    """The label is 1 where the column is a number of at least this."""
    equals: Scalar | None = None
    """The label is 1 where the column equals this. With neither, it is 1 where the column is above 0 or true."""

    @model_validator(mode="after")
    def _one_test(self) -> Self:
        if self.at_least is not None and self.equals is not None:
            raise ValueError("a label takes at_least or equals, not both")
        return self


class FileConfig(FrozenConfig):
    format: Format = "auto"
    """csv, parquet, recbole (.inter, .user, .item), movielens (u.data, ratings.dat, ...), kuairand; auto goes by the file's name."""
    delimiter: str | None = Field(default=None, min_length=1)
    """What stands between the columns of a text file (default: a comma, a tab in .tsv; recbole and movielens know theirs)."""
    encoding: str = "utf-8"
    """Encoding of a text file, such as utf-8, latin-1 or gb18030."""
    names: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the columns, in order, of a text file without a header (default: its first line names them)."""

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"names one column twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return names


class LogColumns(NamedTuple):
    """The columns of a log after a format has filled in what the configuration left open."""

    user: str
    item: str
    time: str | None
    time_unit: TimeUnit
    value: str | None
    event: EventConfig
    optional: frozenset[str]
    """Columns that the format guessed: they may be absent."""


_FORMAT_COLUMNS: dict[str, dict[str, Any]] = {
    "csv": {"user": "user_id", "item": "item_id"},
    "parquet": {"user": "user_id", "item": "item_id"},
    "recbole": {"user": "user_id", "item": "item_id", "time": "timestamp", "value": "rating"},
    "movielens": {"user": "user_id", "item": "item_id", "time": "timestamp", "value": "rating"},
    "kuairand": {"user": "user_id", "item": "video_id", "time": "time_ms", "time_unit": "ms"},
}


class InteractionsConfig(FileConfig):
    path: str | tuple[str, ...] | None = None
    """The log: one file, or several that follow each other. Relative to the configuration; ${NAME:-default} is filled in
    from the environment."""
    train: str | None = None
    """Instead of `path`, a log already cut in parts: the file to learn from."""
    valid: str | None = None
    """The part to tune on."""
    test: str | None = None
    """The part to judge by."""
    live: str | None = None
    """Events that came in live, which follow the log: the folder `events` of a workdir, or Parquet of its columns (see
    recsys/data/event_files.py). `rayfunnel retrain` fills it in by itself. An event that the log holds already is dropped."""
    user: str | None = None
    """Column of the user id (default: user_id)."""
    item: str | None = None
    """Column of the item id (default: item_id; kuairand: video_id)."""
    time: str | None = None
    """Column of the time (default: none, or the format's own). Without a time, the order of the log counts."""
    time_unit: TimeUnit | None = None
    """s, ms, us or ns since 1970, or iso for text such as 2024-05-31T12:00:00Z (default: s; kuairand: ms)."""
    event: EventConfig = EventConfig()
    """The event type, by column or for all rows."""
    value: str | None = None
    """Column of a number that goes with the event, such as a rating or a price (recbole, movielens: rating)."""
    min_value: float | None = None
    """Rows with a smaller value are dropped, and counted; live events are refused."""
    max_value: float | None = None
    """Rows with a larger value are dropped, and counted; live events are refused."""
    session: str | None = None
    """Column of the visit (default: derived, a visit ends with `session_gap_min` minutes of silence)."""
    session_gap_min: PositiveFloat = 30.0
    """Minutes without an event after which a new visit begins."""
    context: dict[str, ColumnConfig] = Field(default_factory=dict)
    """What was known of the moment before it was answered: feature name -> column (tab, device, hour, ...)."""
    after: tuple[str, ...] = ()
    """Columns that are known only after the item was shown (play time, ...): never inputs, refused by name (kuairand knows its own)."""

    @model_validator(mode="after")
    def _path_or_parts(self) -> Self:
        parts = [name for name in ("train", "valid", "test") if getattr(self, name) is not None]
        if bool(self.path) == bool(parts):
            raise ValueError("give either 'path' (one log) or 'train' with 'valid' and/or 'test' (a log in parts)")
        if parts and (self.train is None or len(parts) == 1):
            raise ValueError(f"a log in parts needs 'train' and at least one of 'valid' and 'test', got {', '.join(parts)}")
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value:g} is above max_value {self.max_value:g}")
        return self

    def files(self) -> Iterator[tuple[str, int]]:
        """(path, part) of every file in log order; part is 0 train, 1 valid, 2 test, and 0 for a log in one piece."""
        whole = (self.path,) if isinstance(self.path, str) else self.path or ()
        yield from ((path, 0) for path in whole)
        yield from ((path, part) for part, path in enumerate((self.train, self.valid, self.test)) if path is not None)

    @property
    def in_parts(self) -> bool:
        """Whether the log comes cut into train, valid and test files."""
        return self.train is not None

    def out_of_range(self, value: float) -> str | None:
        """Why a row with this value is dropped, as the end of a sentence; None where it is not. Live events go by the same rule."""
        if self.min_value is not None and value < self.min_value:
            return f"lies below {self.min_value:g} (data.interactions.min_value)"
        if self.max_value is not None and value > self.max_value:
            return f"lies above {self.max_value:g} (data.interactions.max_value)"
        return "is beyond what a value may be, 3.4e38" if abs(value) > LARGEST_VALUE else None

    def columns(self, form: str) -> LogColumns:
        """The columns in force for files of this format."""
        own = _FORMAT_COLUMNS[form]
        event = self.event
        if form in ("recbole", "movielens") and "default" not in event.model_fields_set:
            event = EventConfig(column=event.column, default="rating")
        return LogColumns(
            user=self.user or own["user"],
            item=self.item or own["item"],
            time=self.time or own.get("time"),
            time_unit=self.time_unit or own.get("time_unit", "s"),
            value=self.value or own.get("value"),
            event=event,
            optional=frozenset(own[name] for name in ("time", "value") if getattr(self, name) is None and name in own),
        )


class TableConfig(FileConfig):
    path: str | tuple[str, ...]
    """The table: one file, or several of the same columns. Relative to the configuration."""
    id: str | None = None
    """Column of the id (default: item_id or user_id; kuairand: video_id or user_id)."""
    columns: dict[str, ColumnConfig] = Field(default_factory=dict)
    """Feature name -> what it holds: `category: id` or `price: {kind: number, scale: log}`."""
    title: str | None = None
    """Column shown beside an item in answers (default: the feature called title, where there is one)."""

    @field_validator("columns")
    @classmethod
    def _clock_belongs_to_the_moment(cls, columns: dict[str, ColumnConfig]) -> dict[str, ColumnConfig]:
        for name, column in columns.items():
            if column.kind in FROM_TIME:
                raise ValueError(f"'{name}': kind {column.kind} is read from the time of an event; declare it in interactions.context")
        return columns


class HistoryConfig(FileConfig):
    path: str
    """What each user did before the log begins, untimed: one row per user."""
    user: str = "user_id"
    """Column of the user id."""
    items: str = "items"
    """Column with the item ids, oldest first: a list, or text cut at `separator`."""
    separator: str = " "
    """What stands between two ids where the column is text."""


class DataConfig(FrozenConfig):
    interactions: InteractionsConfig
    """The log of events."""
    labels: dict[str, LabelConfig] = Field(default_factory=dict)
    """What rankers learn: name -> column and test. The first one says what counts as a positive; with none, every row
    does but impressions and refusals. A refusal never is one, whatever its value."""
    refusals: tuple[str, ...] = AGAINST
    """Event types by which a user refuses an item. A refusal is never learnt from as a positive and is no member of a history; from
    then on the item is taken out of the user's history, triggers nothing and is not shown to that user again, and what is like it
    stands lower (see rules.unwanted). How many are kept and for how long: features.history.refused and refused_days."""
    events: tuple[str, ...] | None = None
    """Names of all event types. POST /v1/events refuses any other, so that a misspelt one is noticed; `impression` and the
    refusals may always come. null: any name of printable characters is taken."""
    impressions: bool = False
    """Whether the log holds what was shown: rows without a positive label are then exposed negatives."""
    items: TableConfig | None = None
    """The catalogue. Items that are not in the log yet belong to it all the same."""
    users: TableConfig | None = None
    """What is known of users."""
    history: HistoryConfig | None = None
    """Seeds each user's sequence with what came before the log."""

    @field_validator("labels")
    @classmethod
    def _positive_is_taken(cls, labels: dict[str, LabelConfig]) -> dict[str, LabelConfig]:
        if "positive" in labels:
            raise ValueError("'positive' is the name of the first label's role; call the label something else")
        return labels

    @field_validator("refusals", "events")
    @classmethod
    def _clean_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if (why := unclean(name)) is not None:
                raise ValueError(f"{name!r} {why}")
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"names one type twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return names

    @property
    def leaves_out_impressions(self) -> bool:
        """Whether an impression that comes in live is no event of this log, in neither road: it holds none and names no events."""
        return not self.impressions and self.interactions.event.column is None

    @property
    def event_names(self) -> tuple[str, ...] | None:
        """Every name that an event may have; None: any clean one."""
        return None if self.events is None else tuple(dict.fromkeys((*self.events, IMPRESSION, *self.refusals)))

    @property
    def refused(self) -> dict[str, str]:
        """Columns of the log that cannot be inputs, and why."""
        log, labels = self.interactions, {rule.column: name for name, rule in self.labels.items()}
        return refused_columns(log.format, log.after, labels)

    @model_validator(mode="after")
    def _answers_are_no_inputs(self) -> Self:
        labels = {rule.column: name for name, rule in self.labels.items()}
        for fault in future_faults(self.items.format, self.items.columns) if self.items is not None else ():
            raise ValueError(fault)
        for name, column in self.interactions.context.items():
            source = column.source(name)
            if source in labels and column.kind not in FROM_TIME:
                raise ValueError(
                    f"interactions.context.{name} reads column '{source}', which is label '{labels[source]}': the answer would be an input"
                )
            if source in self.refused and column.kind not in FROM_TIME:
                raise ValueError(
                    f"interactions.context.{name} reads column '{source}', {self.refused[source]}; as an input it would leak the answer"
                )
        return self
