"""The configuration of a data set that nobody has described: the lines of YAML, each with the reason beside it.

A wrong guess costs one edit: what was left out stands in a comment, as the line that would take it in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from recsys.data import grouplens
from recsys.data.formats import format_of
from recsys.data.sources import FileConfig
from recsys.errors import DataError
from recsys.features.fitting import RESERVED
from recsys.onboarding.joins import Joined, join
from recsys.onboarding.kinds import Held, TableRoles, kinds
from recsys.onboarding.look import Column, columns_of
from recsys.onboarding.roles import Choice, Roles, roles
from recsys.onboarding.sample import Sample, sample
from recsys.onboarding.split import Answers, answers, name_of, split, yaml

_COMMENT_AT = 64


@dataclass(frozen=True)
class Finding:
    """One line of the report: a file's column, the role it was given (or "left out"), and why."""

    file: str
    column: str
    role: str
    reason: str


@dataclass
class Draft:
    """A configuration as text, what it rests on, and how much of each file was read."""

    text: str = ""
    findings: list[Finding] = field(default_factory=list)
    read: list[str] = field(default_factory=list)


def draft(paths: Sequence[Path], *, name: str, folder: Path) -> Draft:
    """Look at a log and at most two tables beside it; `folder` is where the configuration will lie, for paths in it.

    DataError says what is wrong with a file and what to do.
    """
    if not 1 <= len(paths) <= 3:
        raise DataError(f"Got {len(paths)} files. Expected the log, then at most one table of items and one of users.")
    samples = [sample(path) for path in paths]
    log = samples[0]
    frame = _log_frame(log)
    columns = columns_of(frame)
    if len(columns) < 2:
        raise DataError(f"'{log.path}' has one column ('{next(iter(columns))}'). Expected at least a user and an item in each row.")
    tables = join(columns, samples[1:])
    known: dict[str, Choice] = {
        table.side: Choice(
            table.log_column, f"{table.share:.0%} of its {columns[table.log_column].distinct:,} ids are in {table.sample.path.name}"
        )
        for table in tables
        if table.log_column is not None and table.share >= 0.3
    }
    if len({choice.column for choice in known.values()}) < len(known):  # both tables hold the ids of one column: names decide
        known = {}
    found = roles(columns, user=known.get("user"), item=known.get("item"))
    writing = _Writing(folder, name, samples, log.headless and log.form == "csv")
    writing.log(log, columns, found)
    for table in tables:
        writing.table(table)
    writing.end(frame, columns, found)
    return writing.out


def _log_frame(log: Sample) -> pd.DataFrame:
    if log.form != "movielens":
        return log.frame
    if log.frame.shape[1] != len(grouplens.LOG):
        raise DataError(
            f"'{log.path}' has {log.frame.shape[1]} columns. A log of GroupLens has {len(grouplens.LOG)}: {', '.join(grouplens.LOG)}. "
            "If it is a plain table, give it another ending, such as .csv."
        )
    return log.frame.set_axis(grouplens.LOG, axis=1)


class _Writing:
    """The draft as it grows: lines of YAML, and findings."""

    def __init__(self, folder: Path, name: str, samples: Sequence[Sample], headless: bool) -> None:
        self.folder, self.headless = folder, headless
        self.out = Draft()
        self.lines: list[str] = []
        self.used: set[str] = set(RESERVED) | {"positive"}
        self.answers = Answers()
        for one in samples:
            marks = [f"cut at {one.delimiter!r}"] * (one.delimiter is not None) + [one.encoding] * (one.form != "parquet")
            sentence = f"{one.path.name}: {len(one.frame):,} rows ({', '.join([one.read, *marks])}{', no header' if one.headless else ''})"
            self.out.read.append(sentence)
        files = " ".join(one.path.name for one in samples)
        self.lines += [
            f"# Written by `rayfunnel init {files}`. Each line says why; correct what is wrong.",
            *(f"# {s}" for s in self.out.read),
        ]
        self.lines += [f"name: {name}", "data:"]
        self.names: dict[str, str] = {}

    # ---- lines ------------------------------------------------------------------------------------------------------

    def line(self, indent: int, text: str, reason: str = "") -> None:
        head = " " * indent + text
        self.lines.append(f"{head:<{_COMMENT_AT}} # {_plain(reason)}" if reason else head)

    def aside(self, indent: int, text: str, reason: str) -> None:
        head = _plain("# " + " " * indent + text)
        self.lines.append(f"{head:<{_COMMENT_AT}} # {_plain(reason)}")

    def note(self, file: Path, column: str, role: str, reason: str) -> None:
        self.out.findings.append(Finding(file.name, column, role, reason))

    def column(self, name: str) -> str:
        """A column of the log as the configuration calls it."""
        return yaml(self.names.get(name, name))

    def file(self, one: Sample, indent: int, role: str) -> None:
        path = one.path.absolute()
        inside = path.is_relative_to(self.folder.absolute())
        written = os.path.relpath(path, self.folder.absolute()) if inside else str(path)
        self.line(indent, f"path: {yaml(written) if '/' not in written else json.dumps(written, ensure_ascii=False)}", one.read)
        if one.form != format_of(one.path, FileConfig()):
            self.line(indent, f"format: {one.form}", "the file's name does not tell it")
        default = "\t" if one.path.name.removesuffix(".gz").endswith(".tsv") else ","
        if one.form == "csv" and one.delimiter != default:
            self.line(indent, f"delimiter: {json.dumps(one.delimiter)}", "what cuts every line into as many cells")
        if one.form != "parquet" and one.encoding != "utf-8":
            self.line(indent, f"encoding: {one.encoding}", "it is not UTF-8; check a name with an accent")
        if one.headless and one.form == "csv":
            names = list(self.names.values()) if role == "log" else [str(name) for name in one.frame.columns]
            self.line(indent, f"names: [{', '.join(yaml(n) for n in names)}]", "the first line is a row: there is no header")

    # ---- the log ----------------------------------------------------------------------------------------------------

    def log(self, one: Sample, columns: dict[str, Column], found: Roles) -> None:
        if self.headless:
            self.names = _invented(columns, found)
        self.line(2, "interactions:")
        self.file(one, 4, "log")
        given = [("user", found.user), ("item", found.item), ("time", found.time)]
        for role, choice in given:
            if choice is not None:
                self.line(4, f"{role}: {self.column(choice.column)}", choice.reason)
                self.note(one.path, choice.column, role, choice.reason)
        if found.time is None:
            self.aside(4, "time: ...", "no column holds times that can be read: the order of the log counts")
        elif found.unit is not None and not columns[found.time.column].is_stamp:
            first = columns[found.time.column].examples(1)
            self.line(4, f"time_unit: {found.unit}", f"{first} is {np.datetime64(int(columns[found.time.column].seconds[0]), 's')} UTC")
        self._events(one, found)
        if found.session is not None:
            self.line(4, f"session: {self.column(found.session.column)}", found.session.reason)
            self.note(one.path, found.session.column, "session", found.session.reason)
        self._context(one, found)
        self.answers = answers(found, columns)
        self._labels(one)

    def _events(self, one: Sample, found: Roles) -> None:
        if found.event is not None:
            self.line(4, f"event: {{column: {self.column(found.event.column)}}}", found.event.reason)
            self.note(one.path, found.event.column, "event type", found.event.reason)
        elif found.rating is not None and not found.answers and one.form == "csv":
            self.line(4, "event: {default: rating}", "the rows are ratings")
        value = found.rating or found.value
        if value is not None:
            self.line(4, f"value: {self.column(value.column)}", value.reason)
            self.note(one.path, value.column, "value", value.reason)

    def _context(self, one: Sample, found: Roles) -> None:
        lines: list[tuple[str, str, str]] = []
        for column, reason in found.context.items():
            name = self.feature(self.names.get(column, column), "context")
            source = self.names.get(column, column)
            lines.append((f"{name}: category" if name == source else f"{name}: {{kind: category, column: {yaml(source)}}}", reason, column))
        if lines:
            self.line(4, "context:")
            for text, reason, column in lines:
                self.line(6, text, reason)
                self.note(one.path, column, "context", reason)
        if found.time is not None:
            self.aside(4 if lines else 2, "  hour: {kind: hour, timezone: UTC}", "if habits follow the clock; the zone of the users")
        for column, reason in found.rest.items():
            self.note(one.path, column, "left out", reason)
            if reason.startswith("may be context"):
                source = self.names.get(column, column)
                self.aside(
                    4 if lines else 2,
                    f"  {name_of(source)}: {{kind: category, column: {yaml(source)}}}",
                    reason + ("" if lines else "; goes under context:"),
                )
            else:
                self.aside(4, f"left out: {source_of(self.names, column)}", reason)

    def _labels(self, one: Sample) -> None:
        told = self.answers
        if told.labels:
            self.line(2, "labels:")
            for name, value, reason in told.labels:
                for old, new in self.names.items():
                    value = value.replace(f"column: {old}", f"column: {new}")
                self.line(4, f"{name}: {value}", reason)
                self.note(one.path, re.findall(r'column: "?([^",}]+)', value)[0], f"label {name}", reason)
        for column, reason in told.rest.items():
            self.aside(2, f"left out: {source_of(self.names, column)}", reason)
            self.note(one.path, column, "left out", reason)
        if told.impressions:
            self.line(2, "impressions: true", told.impressions)

    # ---- tables -----------------------------------------------------------------------------------------------------

    def table(self, joined: Joined) -> None:
        found = kinds(joined.columns, joined.key, joined.share, joined.side)
        side, path = joined.side, joined.sample.path
        self.line(2, f"{side}s:", joined.reason)
        self.file(joined.sample, 4, f"{side}s")
        self.line(4, f"id: {yaml(found.id)}", found.reason)
        self.note(path, found.id, f"{side} id", found.reason)
        if found.title is not None:
            self.line(4, f"title: {yaml(found.title)}", "its name; shown beside an item in answers")
            self.note(path, found.title, "title", "its name; shown beside an item in answers")
        self._features(found, joined)

    def _features(self, found: TableRoles, joined: Joined) -> None:
        path = joined.sample.path
        types = joined.sample.types or {}
        if found.features:
            self.line(4, "columns:")
        for column, held in found.features.items():
            name = self.feature(column, joined.side)
            parameters = dict(held.parameters) | ({"column": column} if name != column else {})
            reason = held.reason + (f"; typed {types[column]}" if column in types else "")
            self.line(6, f"{yaml(name)}: {_kind(held, parameters)}", reason)
            self.note(path, column, f"{joined.side} {held.kind}", held.reason)
        for column, reason in found.rest.items():
            if column != found.title:
                self.aside(4, f"left out: {column}", reason)
                self.note(path, column, "left out", reason)

    def feature(self, column: str, side: str) -> str:
        """A free feature name for a column: a feature's name is a file's name in the bundle, and unique over all tables."""
        name = name_of(column)
        if name in self.used:
            name = f"{side}_{name}"
        while name in self.used:
            name += "_2"
        self.used.add(name)
        return name

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def end(self, frame: pd.DataFrame, columns: dict[str, Column], found: Roles) -> None:
        seconds = None
        if found.time is not None:
            column = columns[found.time.column]
            seconds = np.full(len(frame), np.nan)
            seconds[frame.index.get_indexer(column.present.index)] = column.seconds
        how, why = split(frame[found.user.column], seconds, whole="whole file" in self.out.read[0])
        self.line(0, f"split: {how}", why)
        if self.answers.history is not None:
            kept, reason = self.answers.history
            self.line(0, f"features: {{history: {{events: [{', '.join(map(yaml, kept))}]}}}}", reason)
        self.out.text = "\n".join(self.lines) + "\n"


def source_of(names: dict[str, str], column: str) -> str:
    """A column of the log as the configuration calls it."""
    return names.get(column, column)


def _invented(columns: Iterable[str], found: Roles) -> dict[str, str]:
    """Names for the columns of a file without a header, by their roles."""
    given = {found.user.column: "user_id", found.item.column: "item_id"}
    for choice, name in ((found.time, "timestamp"), (found.rating, "rating"), (found.event, "event"), (found.value, "value")):
        if choice is not None:
            given.setdefault(choice.column, name)
    return {column: given.get(column, column) for column in columns}


def _kind(held: Held, parameters: dict[str, object]) -> str:
    if not parameters:
        return held.kind
    inside = "".join(f", {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in parameters.items())
    return f"{{kind: {held.kind}{inside}}}"


def _plain(reason: str) -> str:
    """A reason on one line of a comment."""
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f\x85\u2028\u2029]", " ", reason)
