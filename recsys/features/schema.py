"""The feature space: every declared column as a field of a model, fitted once, encoding logs and live queries alike.

A Field says how a model sees a feature; a FeatureSpace turns raw values into its rows. What serving encodes is what
training encoded, because both call the same encoders.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from recsys.core import Queries, Vocabulary
from recsys.data.columns import ColumnConfig, Combiner
from recsys.data.interactions import Interactions
from recsys.errors import BundleError, ConfigError, DataError
from recsys.features import fitting
from recsys.features.declaration import FeaturesConfig, IdConfig
from recsys.features.encoders import MISSING, Clock, Encoder, OneValue, Table
from recsys.features.fitting import Frame

Side = Literal["user", "item", "context", "candidate"]
Shape = Literal["one", "bag", "sequence", "dense"]


@dataclass(frozen=True)
class Field:
    """One feature as a model sees it.

    one: int32 (n,), looked up even where it is 0 (a learned "missing"); bag and sequence: int32 (n, W), 0 is padding and is
    skipped, a sequence stands newest last and is padded on the left; dense: float32 (n, W).
    """

    name: str
    side: Side
    """Whose it is. candidate: a dense fact of the (query, item) pair, such as the scores of the channels."""
    shape: Shape
    table: str
    """Embedding table; fields that share one name it alike (history and item_id). "" for dense."""
    size: int
    """Rows of that table: 0 missing or padding, then `hash_buckets` rows of unknown values, then the known ones. 0 for dense."""
    dim: int
    """Width of the embedding; 0 for dense."""
    width: int = 1
    """W: slots of a bag or sequence, columns of a dense field."""
    combiner: Combiner = "mean"
    """How a bag or sequence is pooled; none keeps (B, L, dim) for models that attend."""


class FeatureSpace:
    """The fitted encoders of user, item and context columns, of both ids and of the history."""

    def __init__(self, config: FeaturesConfig, columns: fitting.Declared, fitted: fitting.Fitted) -> None:
        self.config, self.columns = config, columns
        self.tables, self.encoders = fitted.tables, fitted.encoders
        self.user_rows = fitted.user_rows
        """(U,) int32: rows of table user_id by row of the user vocabulary."""
        self._item_rows = np.append(fitted.item_rows, np.int32(MISSING))  # the last slot answers for item -1
        self.account = fitted.account
        """Feature -> {rows, missing, out_of_range} of the training entities."""
        self.fields: tuple[Field, ...] = tuple(self._declare())
        self._by_name = {f.name: f for f in self.fields}

    @classmethod
    def fit(
        cls,
        config: FeaturesConfig,
        columns: Mapping[str, Mapping[str, ColumnConfig]],
        users: Frame,
        items: Frame,
        interactions: Interactions,
    ) -> Self:
        """Learn vocabularies and scales from the training interactions and the entities in them, and from nothing else.

        `columns` has the keys user, item and context; `users` and `items` hold raw values, one row per row of the two
        vocabularies. Raises ConfigError with all faults of the declaration, DataError for an absent column.
        """
        columns = {side: dict(columns.get(side, {})) for side in ("user", "item", "context")}
        fitting.check(config, columns, has_time=interactions.has_time)
        return cls(config, columns, fitting.fit(config, columns, users, items, interactions))

    def keeping(self, before: Self) -> Self:
        """These vocabularies with the scales, bins and widths of an earlier fit, so that its models' inputs mean the same.

        Of another declaration nothing is kept.
        """
        if self.schema_hash != before.schema_hash:
            return self
        encoders = {
            side: {
                name: fitting.restore(
                    fitting.build(column, self.tables.get(column.table or name)), fitting.state(before.encoders[side][name])
                )
                for name, column in named.items()
            }
            for side, named in self.columns.items()
        }
        fitted = fitting.Fitted(self.tables, encoders, self.user_rows, self.item_rows, self.account)
        return type(self)(self.config, self.columns, fitted)

    @property
    def item_rows(self) -> np.ndarray:
        """(I,) int32: rows of table item_id by row of the item vocabulary."""
        return self._item_rows[:-1]

    @property
    def schema_hash(self) -> str:
        """sha256 of what is declared: equal for two fits of one declaration, whatever their vocabularies."""
        declared = {
            side: [[name, column.model_dump(mode="json")] for name, column in named.items()] for side, named in self.columns.items()
        }
        # Without aggregates the hash is that of releases that had none: their bundles stay compatible.
        unused = None if self.config.aggregates else {"aggregates", "utc_offset_h", "lateness_s"}
        config = self.config.model_dump(mode="json", exclude=unused)
        return hashlib.sha256(json.dumps([config, declared], sort_keys=True).encode()).hexdigest()

    def _declare(self) -> Iterable[Field]:
        width, pool = self.config.history.length, self.config.history.combiner
        yield self._id_field("user_id", "user")
        yield from self._column_fields("user")
        items = self._id_field("item_id", "item")
        yield Field("history", "user", "sequence", "item_id", items.size, items.dim, width, pool)
        if recent := min(self.config.history.recent, width):
            yield Field("recent", "user", "sequence", "item_id", items.size, items.dim, recent, pool)
        yield items
        yield from self._column_fields("item")
        yield from self._column_fields("context")

    def _id_field(self, name: Literal["user_id", "item_id"], side: Side) -> Field:
        own: IdConfig = getattr(self.config, name)
        return Field(name, side, "one", name, self.tables[name].size, own.dim or self.config.dim)

    def _column_fields(self, side: Literal["user", "item", "context"]) -> Iterable[Field]:
        for name, column in self.columns[side].items():
            encoder, shape = self.encoders[side][name], fitting.SHAPES[column.kind]
            if shape == "dense":
                yield Field(name, side, "dense", "", 0, 0, encoder.width)
            else:
                table = column.table or name
                dim = fitting.dim_of(table, self.config, self.columns)
                yield Field(name, side, shape, table, encoder.size, dim, encoder.width, column.combiner)

    def select(self, names: Iterable[str]) -> tuple[Field, ...]:
        """The fields of these names, in this order; ConfigError names each unknown feature and the nearest known."""
        names, faults = list(names), []
        for name in names:
            if name not in self._by_name:
                near = difflib.get_close_matches(name, self._by_name, 1)
                hint = f"; did you mean '{near[0]}'?" if near else "."
                faults.append(f"Feature '{name}' is not declared. Known: {', '.join(self._by_name)}{hint}")
        if faults:
            raise ConfigError(faults)
        return tuple(self._by_name[name] for name in names)

    def encode(self, side: Literal["user", "item", "context"], frame: Frame) -> dict[str, np.ndarray]:
        """Raw values by name -> encoded arrays by name, of n rows each.

        user and item also give user_id or item_id: from the frame's raw ids of that name or, where it has none, row by row
        of the vocabulary. hour and weekday are read from the frame's `time` (Unix seconds). DataError for an absent column.
        """
        out: dict[str, np.ndarray] = {}
        if side != "context":
            out[f"{side}_id"] = self._ids(side, frame)
        for name, encoder in self.encoders[side].items():
            out[name] = encoder.encode(fitting.column_of(frame, "time" if isinstance(encoder, Clock) else name, side))
        return out

    def _ids(self, side: str, frame: Frame) -> np.ndarray:
        name, rows = f"{side}_id", self.user_rows if side == "user" else self.item_rows
        if name in frame:
            return OneValue(self.tables[name]).encode(frame[name])
        if self.encoders[side] and fitting.rows_of(frame) != len(rows):
            raise DataError(
                f"The {side} table has {fitting.rows_of(frame):,} rows and no column '{name}', but the fitted vocabulary has {len(rows):,}. "
                f"Give the ids as '{name}', or one row per row of the vocabulary."
            )
        return rows

    def history(self, items: np.ndarray, later: np.ndarray | None = None) -> np.ndarray:
        """(B, L) item rows of the vocabulary, -1 padded on the left -> (B, W) int32 rows of table item_id, W the declared length.

        later (m,): what the rows behind the vocabulary's have in the table; one that lies further still counts as missing.
        """
        W, n = self.config.history.length, len(self.item_rows)
        L = min(W, items.shape[1])
        out = np.zeros((len(items), W), np.int32)
        if L:
            newest = items[:, -L:]
            out[:, W - L :] = self._item_rows[np.where(newest < n, newest, -1)]
            if later is not None:
                row, slot = np.nonzero((newest >= n) & (newest < n + len(later)))
                out[row, W - L + slot] = later[newest[row, slot] - n]
        return out

    def encode_queries(
        self, queries: Queries, user_columns: Mapping[str, np.ndarray], later: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The user, context and history fields of B queries, (B,) or (B, W) each.

        User fields are gathered from `user_columns` (feature -> (U, …) encoded) and overridden by what a profile brings; an
        unknown user has missing values and, by the hash of the id, an unknown row of user_id. Context fields come from
        `queries.contexts`, hour and weekday from `queries.at`. Names and values nobody declared are ignored.
        """
        out = {"user_id": self._user_ids(queries, user_columns["user_id"])}
        absent = queries.users < 0
        for name, encoder in self.encoders["user"].items():
            out[name] = gathered(np.asarray(user_columns[name]), queries.users, absent, encoder.missing)
        override(out, self.encoders["user"], queries.profiles)
        out["history"] = self.history(queries.history, later)
        if recent := min(self.config.history.recent, self.config.history.length):
            out["recent"] = out["history"][:, -recent:]
        for name, encoder in self.encoders["context"].items():
            if isinstance(encoder, Clock):
                out[name] = encoder.encode(queries.at)
            else:
                missing = encoder.missing
                out[name] = np.repeat(missing[None], len(queries), axis=0)
        override(out, self.encoders["context"], queries.contexts)
        return out

    def _user_ids(self, queries: Queries, column: np.ndarray) -> np.ndarray:
        absent = queries.users < 0
        rows = gathered(np.asarray(column), queries.users, absent, np.array(MISSING, np.int32))
        for b in np.flatnonzero(absent):
            rows[b] = self.tables["user_id"].unknown(queries.user_ids[b])
        return rows

    def estranged(self, fields: dict[str, np.ndarray], queries: Queries, new: np.ndarray) -> dict[str, np.ndarray]:
        """`fields` of B queries with the ids of those in `new` (B,) encoded as ids that nobody has seen."""
        ids = fields["user_id"].copy()
        for b in np.flatnonzero(new):
            ids[b] = self.tables["user_id"].unknown(queries.user_ids[b])
        return fields | {"user_id": ids}

    def save(self, folder: Path) -> None:
        """Write `features.json`, the vocabularies (Arrow) and the id rows (.npy) into an existing or new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        stems = {name: f"table{i}" for i, name in enumerate(self.tables)}
        for name, table in self.tables.items():
            table.known.save(folder, stems[name])
        np.save(folder / "user_rows.npy", self.user_rows)
        np.save(folder / "item_rows.npy", self.item_rows)
        written = {
            "features": self.config.model_dump(mode="json"),
            "columns": {
                s: {n: c.model_dump(mode="json", exclude_unset=True) for n, c in named.items()} for s, named in self.columns.items()
            },
            "tables": {name: {"file": stems[name], "buckets": table.buckets} for name, table in self.tables.items()},
            "fitted": {s: {n: fitting.state(e) for n, e in named.items()} for s, named in self.encoders.items()},
            "account": self.account,
        }
        (folder / "features.json").write_text(json.dumps(written, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; vocabularies and id rows are memory-mapped. BundleError where the folder is damaged."""
        try:
            return cls._load(folder)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as fault:
            raise BundleError(
                f"The feature space in '{folder}' cannot be read ({fault}). Restore the bundle or publish it again."
            ) from fault

    @classmethod
    def _load(cls, folder: Path) -> Self:
        written = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        columns = {
            side: {name: ColumnConfig.model_validate(column) for name, column in named.items()}
            for side, named in written["columns"].items()
        }
        tables = {name: Table(Vocabulary.load(folder, t["file"]), t["buckets"]) for name, t in written["tables"].items()}
        encoders = {
            side: {n: fitting.restore(fitting.build(c, tables.get(c.table or n)), written["fitted"][side][n]) for n, c in named.items()}
            for side, named in columns.items()
        }
        user_rows, item_rows = np.load(folder / "user_rows.npy", mmap_mode="r"), np.load(folder / "item_rows.npy")
        fitted = fitting.Fitted(tables, encoders, user_rows, item_rows, written["account"])
        return cls(FeaturesConfig.model_validate(written["features"]), columns, fitted)


def gathered(column: np.ndarray, rows: np.ndarray, absent: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """column[rows] (B, …), and `missing` where a row is absent."""
    if not len(column):
        return np.repeat(missing[None], len(rows), axis=0)
    out: np.ndarray = column[rows]  # a negative row reads the last entry, replaced below
    if absent.any():
        out[absent] = missing
    return out


def override(out: Mapping[str, np.ndarray], encoders: Mapping[str, Encoder], given: Sequence[Mapping[str, Any]]) -> None:
    """Write into row b of each named (B, …) array what query b brings of its own."""
    brought: dict[str, tuple[list[int], list[Any]]] = {}
    for b, values in enumerate(given):
        for name, value in values.items():
            rows, raw = brought.setdefault(name, ([], []))
            rows.append(b)
            raw.append(value)
    for name, (rows, raw) in brought.items():
        encoder = encoders.get(name)
        if encoder is not None and not isinstance(encoder, Clock):  # the clock is the server's
            out[name][rows] = encoder.encode(raw)
