"""Which split and which positives suit a log that nobody has described: decided from its rows, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from recsys.onboarding.look import Column
from recsys.onboarding.roles import SHOWN, Roles

LABELS = 3
RAREST = 0.005
"""Answers rarer than this teach little and are left to the user."""
AGAINST = ("hate", "dislike", "skip", "unlike", "unfollow", "report")


@dataclass
class Answers:
    """Labels as (name, YAML value, reason), whether rows without one are exposed negatives, and events of the history."""

    labels: list[tuple[str, str, str]] = field(default_factory=list)
    impressions: str | None = None
    history: tuple[list[str], str] | None = None
    rest: dict[str, str] = field(default_factory=dict)


def threshold(column: Column) -> tuple[float, float] | None:
    """(at_least, share of rows that reach it): three quarters of the scale, or the grade that cuts the log most evenly."""
    numbers = column.numbers
    if numbers is None:
        return None
    grades = np.unique(numbers)
    if len(grades) < 2:
        return None
    bar = float(grades[np.searchsorted(grades, 0.75 * grades[-1])]) if grades[-1] > 0 else float(grades[-1])
    share = float((numbers >= bar).mean())
    if not 0.05 <= share <= 0.95:
        shares = np.array([(numbers >= grade).mean() for grade in grades[1:]])
        at = int(np.abs(shares - 0.5).argmin())
        bar, share = float(grades[1 + at]), float(shares[at])
    return bar, share


def split(user: pd.Series, seconds: np.ndarray | None, *, whole: bool) -> tuple[str, str]:
    """(YAML value, reason). `user` (n,) and `seconds` (n,) are the sample's rows in file order; seconds None: no times."""
    per_user = user.value_counts()
    enough = float((per_user >= 3).mean())
    if seconds is None:
        if enough < 0.3:
            return "{by: random}", f"no time, and {1 - enough:.0%} of users have fewer than 3 rows: rows go anywhere"
        return "{by: random, per_user: true}", "no time: a part of each user's rows is held out"
    if not whole:
        return "{by: time}", "the last tenth in time is the test, as in production"
    order = np.argsort(seconds, kind="stable")
    rows = user.to_numpy()[order]
    cut = int(0.9 * len(rows))
    known = float(np.isin(rows[cut:].astype(str), np.unique(rows[:cut].astype(str))).mean()) if cut and cut < len(rows) else 1.0
    if known < 0.3 <= enough:
        return (
            "{by: leave_one_out}",
            f"only {known:.0%} of the last tenth are by users seen before: each user's last row is the test instead",
        )
    return "{by: time}", f"the last tenth in time is the test, as in production; {known:.0%} of it by users seen before"


def answers(roles: Roles, columns: Mapping[str, Column]) -> Answers:
    """What counts as a positive, and what is an exposure."""
    out = Answers()
    for choice in roles.answers:
        rate = columns[choice.column].rate
        name = choice.column.removeprefix("is_")
        if rate in (0.0, 1.0):
            out.rest[choice.column] = f"is {rate:g} in every row: it tells nothing" + (", and every row is a positive" if rate else "")
        elif len(out.labels) == LABELS or (out.labels and rate < RAREST) or any(word in choice.column for word in AGAINST):
            out.rest[choice.column] = f"known only after the answer ({choice.reason}): may be one more label, never a feature"
        else:
            out.labels.append((name, f"{{column: {yaml(choice.column)}}}", choice.reason))
    if out.labels:
        out.impressions = f"rows without {out.labels[0][0]} were shown and passed over"
    elif shown := [kind for kind in roles.events if kind.lower() in SHOWN]:
        _by_events(roles, shown, out)
    elif roles.rating is not None and (found := threshold(columns[roles.rating.column])) is not None:
        bar, share = found
        said = f"{share:.0%} of the rows reach {bar:g}; take labels out to count every row as a positive"
        out.labels.append(("like", f"{{column: {yaml(roles.rating.column)}, at_least: {bar:g}}}", said))
    views = [kind for kind in roles.events if kind.lower() == "view"]
    if views and roles.event is not None and out.history is None:
        share = float(columns[roles.event.column].texts.eq(views[0]).mean())
        if share > 0.5:
            kept = [kind for kind in roles.events if kind.lower() != "impression"]
            out.history = (kept, f"{share:.0%} of the rows are views, which a history leaves out by default")
    return out


def _by_events(roles: Roles, shown: list[str], out: Answers) -> None:
    assert roles.event is not None  # noqa: S101 - it gave the events
    done = [kind for kind in roles.events if kind not in shown]
    if not done:
        return
    out.impressions = f"events {', '.join(shown)} are exposures"
    if shown != ["impression"]:  # only that name is known to mean it
        out.labels.append(
            (
                name_of(done[0]),
                f"{{column: {yaml(roles.event.column)}, equals: {yaml(done[0])}}}",
                "the most frequent answer; others may be added",
            )
        )
        out.history = (done, f"what was only shown ({', '.join(shown)}) is no part of a history")


def name_of(text: str) -> str:
    """A column's or value's name as that of a feature or label: letters, digits and underscores."""
    safe = "".join(c if c.isalnum() or c == "_" else "_" for c in text).strip("_")
    return safe or "column"


def yaml(text: str) -> str:
    """A scalar as YAML writes it: bare where that is safe, in double quotes elsewhere."""
    import json

    bare = text.replace("_", "").replace("-", "").replace(".", "").isalnum() and text.isascii() and text[0].isalpha()
    special = text.lower() in {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
    return text if bare and not special else json.dumps(text, ensure_ascii=False)
