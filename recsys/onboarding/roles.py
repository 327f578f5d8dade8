"""Which column of a log is the user, the item, the time, the event, the answer: by name, by values, and by the tables beside it.

Every choice carries its reason, because the reason is what a person checks. What is not recognised is never a feature: a
column that is known only after the click would teach the model the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from recsys.errors import DataError
from recsys.onboarding.look import Column, TimeUnit, normal, tokens

USER = ("userid uid user usr customerid custid customer clientid client visitorid visitor memberid member accountid account buyerid buyer "
        "reviewerid reviewer authoruserid personid person subscriberid subscriber playerid player deviceid username sessionid session")  # fmt: skip
ITEM = ("itemid iid item productid product pid sku asin parentasin movieid movie videoid video articleid article newsid news trackid "
        "track songid song artistid isbn bookid book gameid game appid app adid ad businessid listingid offerid contentid content postid "
        "courseid course recipeid jobid podcastid showid docid documentid stockcode poi poiid locationid placeid goodsid ware")  # fmt: skip
TIME = ("timestamp time timems timestampms ts eventtime eventtimestamp datetime date createdat created unixtime unixreviewtime reviewtime "
        "reviewdate occurredat clickedat playedat purchasedat orderdate invoicedate when sortts")  # fmt: skip
EVENT = "event eventtype eventname behavior behaviour behaviortype action actiontype type interaction interactiontype activity verb"
SESSION = "session sessionid visit visitid"
RATING = "rating ratings stars star score overall grade reviewscore rate"
AMOUNT = "quantity qty plays playcount count weight price amount revenue value listens hours"
ANSWER = ("isclick click clicked label converted conversion purchased bought ispurchase isclicked target y response liked islike like "
          "longview finished isread islongview")  # fmt: skip
AFTER = {"play", "watch", "watched", "dwell", "stay", "like", "liked", "comment", "share", "shared", "forward", "follow", "hate", "dislike",
         "purchase", "purchased", "bought", "revenue", "gmv", "converted", "conversion", "click", "clicks", "clicked", "view", "views", "read",
         "finish", "finished", "completion", "progress", "ratio", "enter", "rating", "review", "summary", "text", "helpful", "vote", "votes",
         "verified", "cart", "order", "quantity", "response", "feedback", "skip", "skipped", "reward", "outcome"}  # fmt: skip
"""Words in the names of columns that are known only after the answer."""
BEFORE = {"tab", "device", "platform", "os", "browser", "channel", "country", "city", "region", "province", "language", "lang", "locale",
          "app", "version", "network", "carrier", "page", "surface", "slot", "placement", "hour", "weekday", "dayofweek", "season",
          "entry", "scene", "daypart", "weather", "companion", "mood"}  # fmt: skip
"""Words in the names of columns that are known of the moment before it is answered."""
SHOWN = {"impression", "impressions", "exposure", "expose", "exposed", "show", "shown", "display", "displayed", "imp"}
"""Events that are an exposure, not an answer."""
MOST_EVENTS = 30


@dataclass(frozen=True)
class Choice:
    """A column in a role, and why."""

    column: str
    reason: str


@dataclass
class Roles:
    """The roles of a log's columns. `rest` says of every column without one why it was left out, or that it may be context."""

    user: Choice
    item: Choice
    time: Choice | None = None
    unit: TimeUnit | None = None
    event: Choice | None = None
    events: list[str] = field(default_factory=list)
    session: Choice | None = None
    value: Choice | None = None
    rating: Choice | None = None
    answers: list[Choice] = field(default_factory=list)
    """0/1 columns that say what the user did, the one closest to a click first."""
    context: dict[str, str] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)


def roles(columns: Mapping[str, Column], *, user: Choice | None = None, item: Choice | None = None) -> Roles:
    """Roles of a log's columns. `user` and `item` are known where a table beside the log holds the ids of a column.

    DataError where no two columns can be a user and an item.
    """
    free = dict(columns)
    for known in (user, item):
        if known is not None:
            free.pop(known.column)
    time = _time(free)
    if time is not None:
        free.pop(time.column)
    user = user or _taken(free, _by_name(free, USER, "user"))
    item = item or _taken(free, _by_name(free, ITEM, "item"))
    user, item = _by_values(free, user, item, columns)
    out = Roles(user, item, time, columns[time.column].unit if time else None)
    _answers(out, free)
    out.event, out.events = _event(free)
    if out.event is not None:
        free.pop(out.event.column)
    out.session = _taken(free, _by_name(free, SESSION, "visit"))
    out.value = _taken(free, next((c for c in (_by_name(free, AMOUNT, "number"),) if c and free[c.column].numbers is not None), None))
    for name, column in free.items():
        kept, why = _context(column)
        (out.context if kept else out.rest)[name] = why
    return out


def _by_name(free: Mapping[str, Column], known: str, role: str) -> Choice | None:
    """The column whose name stands first in the list of names; else one with the role's word in its name."""
    order = known.split()
    named = {normal(name): name for name in reversed(list(free)) if _usable(free[name])}
    exact = next((named[word] for word in order if word in named), None)
    if exact is not None:
        return Choice(exact, f"its name says {role}; {_counted(free[exact])}")
    near = next((name for name, column in free.items() if _usable(column) and role in tokens(name) and "id" in tokens(name)), None)
    return Choice(near, f"its name says {role}; {_counted(free[near])}") if near is not None else None


def _usable(column: Column) -> bool:
    return len(column.present) > 0 and not column.is_list


def _counted(column: Column) -> str:
    return f"{column.distinct:,} different in {len(column.cells):,} rows"


def _taken(free: dict[str, Column], choice: Choice | None) -> Choice | None:
    if choice is not None:
        free.pop(choice.column)
    return choice


def _time(free: Mapping[str, Column]) -> Choice | None:
    """A column whose values are times: by a name of one first, then the one that tells more instants apart."""
    timely = {name: column for name, column in free.items() if _usable(column) and column.unit is not None and column.distinct > 1}
    if not timely:
        return None
    order = TIME.split()

    def fit(name: str) -> tuple[bool, int, int]:
        known = normal(name)
        like = known in order or bool({"time", "timestamp", "date", "ts"} & set(tokens(name)))
        return like, timely[name].distinct, -order.index(known) if known in order else -len(order)

    best = max(timely, key=fit)
    # Large ids can look like seconds: numbers need the name of a time, or to come in order, or not to repeat as ids do.
    if not fit(best)[0] and timely[best].unit != "iso" and _is_named_id(best):
        return None
    span = timely[best].seconds
    first, last = (np.datetime64(int(np.nanmin(span)), "s"), np.datetime64(int(np.nanmax(span)), "s"))
    return Choice(best, f"values such as {timely[best].examples(1)} run from {str(first)[:10]} to {str(last)[:10]}")


def _is_named_id(name: str) -> bool:
    return normal(name) in USER.split() + ITEM.split() or "id" in tokens(name)


def _by_values(free: dict[str, Column], user: Choice | None, item: Choice | None, columns: Mapping[str, Column]) -> tuple[Choice, Choice]:
    """Fill in what names did not tell: the columns with the most different values that come again, the first of them the user."""
    if user is not None and item is not None:
        return user, item
    ids = {
        name: column
        for name, column in free.items()
        if _usable(column) and (column.numbers is None or column.whole) and column.words < 8 and not _counter(column)
        and not _says_answer(name)
    }  # fmt: skip
    wanted = (user is None) + (item is None)
    ranked = sorted(ids, key=lambda name: -ids[name].distinct)[:wanted]
    if len(ranked) < wanted:
        shown = ", ".join(list(columns)[:20])
        lacking = "a user and an item" if wanted == 2 and not ranked else "a user" if user is None and item is not None else "an item"
        raise DataError(
            f"No column of the log can be {lacking}: its columns are {shown}. Expected two columns of ids, such as user_id and item_id; "
            "rename them so, or write the configuration by hand (configs/base.yaml explains every key)."
        )
    ranked.sort(key=list(columns).index)
    why = (
        "no name tells: {} of the two columns with the most values; "
        if wanted == 2
        else "no name tells: the remaining column with the most values; {}"
    )
    for place, name in zip(("the first", "the second"), ranked, strict=False):
        choice = Choice(
            name, why.format(place if wanted == 2 else "") + _counted(free.pop(name)) + (" (swap if wrong)" if wanted == 2 else "")
        )
        if user is None:
            user = choice
        else:
            item = choice
    assert user is not None  # noqa: S101 - `wanted` columns were found
    assert item is not None  # noqa: S101
    return user, item


def _counter(column: Column) -> bool:
    """A row number: whole, every value once, ascending."""
    numbers = column.numbers if column.whole and column.distinct == len(column.cells) > 1 else None
    return numbers is not None and bool(np.all(np.diff(numbers) > 0))


def _says_answer(name: str) -> bool:
    return normal(name) in (RATING + " " + AMOUNT + " " + ANSWER).split()


def _answers(out: Roles, free: dict[str, Column]) -> None:
    """Ratings and 0/1 columns that say what the user did."""
    order = ANSWER.split()
    flags = [name for name, c in free.items() if c.flag and (normal(name) in order or _after(name)) and tokens(name)[-1:] != ["rand"]]
    flags.sort(key=lambda name: order.index(normal(name)) if normal(name) in order else len(order))
    for name in flags:
        out.answers.append(Choice(name, f"0/1, {free.pop(name).rate:.1%} are 1"))
    rating = _by_name({n: c for n, c in free.items() if c.numbers is not None and c.distinct <= 101}, RATING, "rating")
    if rating is None:  # by values: a handful of grades on a short scale
        rating = next(
            (
                Choice(name, f"no name tells, but it holds {c.distinct} grades from {c.numbers.min():g} to {c.numbers.max():g}")
                for name, c in free.items()
                if c.numbers is not None and 3 <= c.distinct <= 11 and c.numbers.min() >= 0 and c.numbers.max() in (5, 10) and c.repeats > 5
                and not _before(name)
            ),
            None,
        )  # fmt: skip
    out.rating = _taken(free, rating)


def _event(free: Mapping[str, Column]) -> tuple[Choice | None, list[str]]:
    for word in EVENT.split():
        for name, column in free.items():
            if normal(name) == word and _usable(column) and column.distinct <= MOST_EVENTS:
                counts = column.texts.value_counts()
                shown = ", ".join(f"{kind} {n / len(column.texts):.0%}" for kind, n in counts.head(6).items())
                return Choice(name, shown), [str(kind) for kind in counts.index]
    return None, []


def _after(name: str) -> bool:
    words = set(tokens(name))
    return bool(words & AFTER) or bool({word.removeprefix("is") for word in words} & AFTER)


def _before(name: str) -> bool:
    return bool(set(tokens(name)) & BEFORE) or normal(name) in BEFORE


def _context(column: Column) -> tuple[bool, str]:
    """Whether a column of the log is known before the answer, and what to say of it."""
    name = column.name
    if not len(column.present):
        return False, "empty"
    if column.distinct == 1:
        return False, f"holds one value ({column.examples(1)})"
    if column.local_date:
        return False, f"a date such as {column.examples(1)}, which is not read: write it as 2024-05-31 or in seconds, then give it as time"
    if _after(name):
        return False, "known only after the answer: a label at best, never a feature"
    if column.is_list or column.distinct > 1000 or column.words > 3:
        return False, "not recognised, and too many values to guess" if not _counter(column) else "numbers the rows"
    if column.unit is not None or "date" in tokens(name):
        return False, "a second time"
    if _before(name):
        return True, f"known before the answer; {column.distinct} values: {column.examples()}"
    return False, f"may be context, if it is known before the answer ({column.distinct} values: {column.examples()})"
