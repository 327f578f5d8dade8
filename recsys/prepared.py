"""A data set made ready: cleaned log, split, fitted features, encoded columns. What `prepare` writes and `train` reads.

Features are fitted on the training part alone; the columns of all users and items are encoded with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys.config import Config
from recsys.core import Vocabulary, load_arrow, save_arrow
from recsys.data.events import load
from recsys.data.interactions import CSR, POSITIVE, Interactions
from recsys.data.leaks import too_good
from recsys.data.split import Split, SplitConfig
from recsys.errors import DataError
from recsys.evidence import EVIDENCE
from recsys.features.asof import AsOf, Roads, in_process
from recsys.features.catalogue import Catalogue
from recsys.features.generate import told
from recsys.features.inputs import AggregateInputs, Live, LogSource
from recsys.features.refusals import Refusals
from recsys.features.schema import FeatureSpace, Field
from recsys.moments import Moments

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Prepared:
    """E events of U users and I items, ready for examples.

    catalogue and profiles hold the values of the item and user columns; titles (I,) strings or None; told (E,) bool: rows that
    enter a history; account: the lines of the cleaning; roads: where aggregates of many instants are computed.
    """

    log: Interactions
    split: Split
    space: FeatureSpace
    user_columns: dict[str, np.ndarray]
    item_columns: dict[str, np.ndarray]
    catalogue: Catalogue
    profiles: Catalogue
    titles: pa.Array | None
    told: np.ndarray
    account: list[tuple[str, int]]
    aggregates: AggregateInputs | None = None
    roads: Roads = in_process

    @cached_property
    def live(self) -> Live | None:
        """The declared aggregates as of any instant of the log; None where none is declared."""
        if self.aggregates is None:
            return None
        asof = AsOf(self.aggregates.plan, self.log, self.aggregates.columns, self.told, offset_s=self.space.config.utc_offset_s)
        return Live(self.aggregates, LogSource(self.aggregates, asof, self.roads(asof)), self.log.items)

    def ranked_fields(self, names: tuple[str, ...] | None) -> tuple[Field, ...]:
        """The fields that a fine ranker of these names sees, aggregates behind the others; None is all. Evidence is not among them."""
        counted = {f.name: f for f in self.aggregates.fields} if self.aggregates is not None else {}
        if names is None:
            return (*self.space.fields, *counted.values())
        plain = self.space.select([n for n in names if n != EVIDENCE and n not in counted])
        return (*plain, *(counted[n] for n in names if n in counted))

    def moments(self, config: Config) -> Moments:
        """Users' states along the log."""
        return Moments(self.log, self.told, config.history.length, config.recall.exclude_seen, Refusals.of(self.log, config.history))

    def save(self, folder: Path) -> None:
        """Write everything under an existing, empty folder."""
        log = self.log
        log.users.save(folder, "users")
        log.items.save(folder, "items")
        columns = {name: getattr(log, name) for name in ("user", "item", "time", "event", "value")} | {"told": self.told}
        columns |= {f"label:{k}": v for k, v in log.labels.items()} | {f"split:{k}": getattr(self.split, k) for k in _SPLITS}
        columns |= {"session": log.session} if log.session is not None else {}
        frame = {k: pa.array(v) for k, v in columns.items()} | {
            f"context:{k}": pa.array(v, from_pandas=True) for k, v in log.context.items()
        }
        save_arrow(folder / "log.arrow", pa.table(frame))
        if log.past is not None:
            np.save(folder / "past.indptr.npy", log.past.indptr)
            np.save(folder / "past.items.npy", log.past.items)
        if self.titles is not None:
            save_arrow(folder / "titles.arrow", pa.table({"title": self.titles}))
        self.space.save(folder / "features")
        if self.aggregates is not None:
            self.aggregates.save(folder / "aggregates")
        for side, encoded in (("user_columns", self.user_columns), ("item_columns", self.item_columns)):
            save_columns(folder / side, encoded)
        self.catalogue.save(folder / "catalogue")
        self.profiles.save(folder / "profiles")
        facts = {
            "event_names": log.event_names,
            "has_time": log.has_time,
            "impressions": log.impressions,
            "by": self.split.by,
            "account": self.account,
        }
        (folder / "prepared.json").write_text(json.dumps(facts, indent=1))

    @classmethod
    def load(cls, folder: Path, roads: Roads = in_process) -> Self:
        """Read what `save` wrote, memory-mapped where it can be."""
        facts = json.loads((folder / "prepared.json").read_text())
        table = load_arrow(folder / "log.arrow").combine_chunks()
        columns = {name: table.column(name).to_numpy() for name in table.column_names if not name.startswith("context:")}
        context = {
            n.removeprefix("context:"): table.column(n).to_pandas().to_numpy() for n in table.column_names if n.startswith("context:")
        }
        has_past = (folder / "past.items.npy").exists()
        log = Interactions(
            users=Vocabulary.load(folder, "users"),
            items=Vocabulary.load(folder, "items"),
            **{name: columns[name] for name in ("user", "item", "time", "event", "value")},
            event_names=tuple(facts["event_names"]),
            labels={n.removeprefix("label:"): v for n, v in columns.items() if n.startswith("label:")},
            context=context,
            session=columns.get("session"),
            has_time=facts["has_time"],
            impressions=facts["impressions"],
            past=CSR(np.load(folder / "past.indptr.npy"), np.load(folder / "past.items.npy")) if has_past else None,
        )
        titles = load_arrow(folder / "titles.arrow").column("title").combine_chunks() if (folder / "titles.arrow").exists() else None
        space = FeatureSpace.load(folder / "features")
        return cls(
            log,
            Split(columns["split:train"], columns["split:valid"], columns["split:test"], facts["by"]),
            space,
            load_columns(folder / "user_columns"),
            load_columns(folder / "item_columns"),
            Catalogue.load(folder / "catalogue"),
            Catalogue.load(folder / "profiles"),
            titles,
            columns["told"],
            [(k, v) for k, v in facts["account"]],
            AggregateInputs.load(folder / "aggregates", space) if (folder / "aggregates").exists() else None,
            roads,
        )


def prepare(config: Config, split: SplitConfig | None = None, like: Path | None = None, roads: Roads = in_process) -> Prepared:
    """Load, clean, split and encode the declared data set. `split` stands in for the configuration's own (a protocol's).

    `like` is the features folder of a version whose scales and widths are kept, so that its models can go on from there; its
    aggregates lie beside it. `roads`: see Prepared.

    Raises DataError where files cannot be read as declared or nothing is left to learn from.
    """
    how = split or config.split
    data = load(config.data, config.base, keep=how.keep)
    log = data.interactions
    parts = how.split(log, data.parts)
    train = log.where(parts.train)
    if not train.positive.any():
        raise DataError(
            f"The training part has {len(train):,} rows and no positive among them. Check data.labels ('{POSITIVE}' comes from the first one)."
        )
    tables = {"user": config.data.users, "item": config.data.items}
    declared = {side: table.columns if table is not None else {} for side, table in tables.items()} | {
        "context": config.data.interactions.context
    }
    if leaks := list(too_good(declared["context"], train.context, train.labels[POSITIVE])):
        raise DataError("\n".join(leaks))
    space = FeatureSpace.fit(config.features, declared, data.users, data.items, train)
    if like is not None:
        space = space.keeping(FeatureSpace.load(like))
    titles = _titles(config, data.items)
    enters, aggregates, joined = told(log, config.history), None, {}
    if config.features.aggregates:
        gap_s = config.data.interactions.session_gap_min * 60
        tables_ = (data.users, data.items)
        aggregates = AggregateInputs.fit(space, declared, *tables_, log, train=parts.train, told=enters, gap_s=gap_s, roads=roads)
        if like is not None and (like.parent / "aggregates").exists():
            aggregates.keeping(like.parent / "aggregates")
        joined = aggregates.item_columns(log.n_items)
    return Prepared(
        log,
        parts,
        space,
        space.encode("user", data.users),
        space.encode("item", data.items) | joined,
        Catalogue.of(declared["item"], data.items, log.n_items),
        Catalogue.of(declared["user"], data.users, log.n_users),
        titles,
        enters,
        data.account.rows(),
        aggregates,
        roads,
    )


def _titles(config: Config, items: pd.DataFrame) -> pa.Array | None:
    """The column shown beside an item: the declared one, else the feature called title."""
    declared = config.data.items
    if declared is None:
        return None
    name = declared.title or (declared.columns["title"].source("title") if "title" in declared.columns else None)
    for candidate in (name, "title"):
        if candidate is not None and candidate in items.columns:
            return pa.array([None if pd.isna(x) else str(x) for x in items[candidate]], pa.string())
    return None


def save_columns(folder: Path, columns: dict[str, np.ndarray]) -> None:
    """Write field -> array as `{field}.npy`, which can be memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)


def load_columns(folder: Path) -> dict[str, np.ndarray]:
    """Read what `save_columns` wrote, memory-mapped."""
    return {p.stem: np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.npy"))}
