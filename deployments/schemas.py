"""The bodies of the HTTP API: what a request may hold, and what an answer holds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic_core import PydanticCustomError

from deployments.resilience import Reason
from deployments.resilience import Rung as Degradation
from recsys.core import canonical_id
from recsys.data.event_names import unclean
from recsys.features.live_items import LONGEST_TITLE
from recsys.recall.cold_start import Rung

EXCLUDE = 1_000
"""Most ids of one `exclude`."""


def _outside_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("wrong_type", "expected a string or an integer")
    found = canonical_id(value)
    if not found:
        raise PydanticCustomError("empty_id", "an id must not be empty")
    if "\0" in found:
        raise PydanticCustomError("invalid_value", "an id must not hold a NUL character")
    return found


def _scalars(value: Any) -> Any:
    """Raw feature values: numbers, strings, booleans, null, or lists of them."""
    if not isinstance(value, dict):
        raise PydanticCustomError("wrong_type", "expected an object")
    for name, one in value.items():
        for x in one if isinstance(one, list) else (one,):
            if isinstance(x, dict | list):
                raise PydanticCustomError(
                    "wrong_type", "'{name}' must be a number, a string, a boolean, null, or a list of these", {"name": name}
                )
            if isinstance(x, int) and abs(x) > 2**53:
                raise PydanticCustomError("wrong_type", "'{name}' is a number beyond 2^53; send it as a string", {"name": name})
    return value


def _event_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.strip()
    if (why := unclean(name)) is not None:
        raise PydanticCustomError("invalid_value", "the name {why}", {"why": why})
    return name


def _number(value: Any) -> Any:
    """True is no 1 here: a client that sends it means something else."""
    if isinstance(value, bool):
        raise PydanticCustomError("wrong_type", "expected a number")
    return value


Id = Annotated[str, BeforeValidator(_outside_id, json_schema_input_type=str | int)]
Scalars = Annotated[dict[str, Any], BeforeValidator(_scalars)]


class Body(BaseModel):
    """Base of the request bodies: a field that is not known is a fault, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class BoostBody(Body):
    """One boost of a request."""

    filter: dict[str, Any] = Field(min_length=1, max_length=1, examples=[{"genres": ["Comedy"]}])
    """Which items, by one column, as in the request's own filter."""
    factor: float = Field(gt=0, le=1_000)
    """What their score is multiplied with: 2 doubles it, 0.5 halves it."""


class PinBody(Body):
    """One pin of a request."""

    item_id: Id
    """The item."""
    place: int = Field(ge=1, strict=True)
    """1 is the first of the page."""


class CapBody(Body):
    """One cap of a request."""

    column: str = Field(min_length=1, max_length=256, examples=["genres"])
    """Item column whose values are capped."""
    at_most: int = Field(ge=1, strict=True)
    """Items that may share a value within the window. Items without a value are free."""
    window: int = Field(default=10, ge=1, strict=True)
    """Places in a row within which the cap holds; at or above k: on the whole page."""


class NoveltyBody(Body):
    """How much what the user had lately loses, for one request."""

    weight: Annotated[float, BeforeValidator(_number)] = Field(ge=0, le=1)
    """How much of its score an item loses right after the user had it. 0: nothing."""
    half_life_h: Annotated[float, BeforeValidator(_number)] | None = Field(default=None, gt=0, le=1e6)
    """Hours in which half of that is forgotten; as configured if absent."""


class PageBody(Body):
    """What every request for a page says: for whom, in which circumstances, and how it is to be answered."""

    user_id: Id
    """The user, known or not. 196 and "196" are one user."""
    context: Scalars = Field(default_factory=dict)
    """Raw values of context columns, as device or page. A name that nothing reads is taken, and listed as `ignored` with `explain`."""
    features: Scalars = Field(default_factory=dict)
    """Raw values of declared user columns; they override what is known of the user. An undeclared name is refused."""
    request_id: Id | None = None
    """Echoed in the answer; made up if absent."""
    variant: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """What the request is a part of, such as an arm of an experiment: echoed, and logged with the page. As configured if absent."""
    timeout_ms: float | None = Field(default=None, gt=0)
    """A sooner deadline than the service's own."""


class RecommendBody(PageBody):
    """POST /v1/recommend."""

    k: int = Field(default=10, strict=True)
    """How many items, 1 to 1,000."""
    exclude: list[Id] = Field(default_factory=list)
    """Items that must not come back; unknown ids are ignored."""
    filter: dict[str, Any] = Field(default_factory=dict, examples=[{"genres": ["Comedy", "Drama"], "price": {"min": 5, "max": 20}}])
    """What items must hold, by item column: a value or a list (at least one of them), or an object with any, all, none and, for
    numbers, min and max. All columns must hold. An undeclared column is refused; a value that no item has lets nothing pass."""
    diversity: float | None = Field(default=None, ge=0, le=1)
    """0 keeps the order of relevance, 1 only avoids items that are alike; as configured if absent."""
    boosts: list[BoostBody] = Field(default_factory=list, max_length=16)
    """Items whose scores are multiplied, to move them up or down."""
    pins: list[PinBody] = Field(default_factory=list, max_length=50)
    """Items at fixed places, if they may be shown to this user; before the pins of the configuration."""
    caps: list[CapBody] = Field(default_factory=list, max_length=8)
    """At most so many items of one value of a column among so many places in a row: each in place of the configured caps of its column.
    A cap that would leave places empty gives way, and `explain` says so."""
    novelty: NoveltyBody | None = None
    """What the user had lately stands lower, where the service shows it again at all (recall.exclude_seen); as configured if absent."""
    explain: bool = False
    """Add each item's rank and score at every stage, which rule moved it, and with what probability it stands where it does."""


class RankBody(PageBody):
    """POST /v1/rank."""

    item_ids: list[Id]
    """The items to score, at most 1,000; unknown ones are left out of the answer."""
    explain: bool = False
    """Add each item's rank and score at every stage."""


class EventBody(Body):
    """One event of POST /v1/events, which takes one or a list."""

    user_id: Id
    """Who."""
    item_id: Id
    """What; an item that no bundle knows yet is kept all the same."""
    event: Annotated[str, Field(min_length=1, max_length=64), BeforeValidator(_event_name)]
    """view, click, like, share, purchase, rating, impression, dislike, or a name of your own; one of data.events where that is declared."""
    event_id: Id | None = None
    """Makes a retry harmless; made from user, item, event and time if absent."""
    time: Annotated[str | int | float | None, BeforeValidator(_number)] = None
    """ISO 8601 or Unix milliseconds; now if absent."""
    value: Annotated[float | None, BeforeValidator(_number)] = None
    """A rating, a price, seconds watched."""
    request_id: Id | None = None
    """The recommendation that the event answers."""
    context: Scalars = Field(default_factory=dict)
    """Anything else worth keeping in the log."""


class ItemBody(Body):
    """One item of PUT /v1/items, which takes one or a list."""

    item_id: Id
    """The item, known or not."""
    columns: dict[str, Any] = Field(default_factory=dict, examples=[{"price": 9.5, "genres": ["Comedy", "Drama"]}])
    """Values of declared item columns. One that is left out keeps its value; null takes it away."""
    title: Annotated[str, Field(max_length=LONGEST_TITLE)] | None = None
    """What answers show beside the id."""


class UserBody(Body):
    """One user of PUT /v1/users, which takes one or a list."""

    user_id: Id
    """The user, known or not."""
    columns: dict[str, Any] = Field(default_factory=dict)
    """Values of declared user columns. One that is left out keeps its value; null takes it away."""


class HeldItem(BaseModel):
    """The answer of GET /v1/items/{id}."""

    item_id: str
    known: Literal["production", "live"]
    """Whether the version that answers was trained with it, or it came later."""
    model_version: str
    deleted: bool
    blocked: bool
    """By the rules that are in force."""
    title: str | None
    columns: dict[str, Any]
    """Declared columns, by the version and by what was told since; null where there is no value."""
    changed_ms: int | None
    """When it was last told of, in Unix milliseconds; null: not since the log of items began."""
    shown: int | None
    """Times shown so far, of an item that came later; null: not counted."""


class HeldUser(BaseModel):
    """The answer of GET /v1/users/{id}."""

    user_id: str
    known: Literal["production", "live"]
    """Whether the version that answers was trained with the user's events, or the user came later."""
    model_version: str
    profile: dict[str, Any]
    """What PUT /v1/users told."""
    trained_events: int
    """Newest events of the training log that the version brings along."""
    live_events: int
    """Recent events in the store."""
    newest_event_ms: int | None
    has_counters: bool
    """Whether the consumers have counted anything for this user."""


class Ruled(BaseModel):
    """The answer of /v1/rules: what this replica obeys."""

    number: int
    """How often rules were told; with every PUT and DELETE one more."""
    live: dict[str, Any] | None
    """The document that was told; null where there is none, or it was taken back."""
    since_ms: int | None
    """When it was told, in Unix milliseconds."""
    configuration: dict[str, Any]
    """The rules that the service was started with."""
    in_force: dict[str, Any]
    """What comes of both."""
    origin: dict[str, str]
    """Each part of it by its dotted path: live or configuration."""
    not_in_force: list[str]
    """Sentences: what the version that answers cannot obey, or a document that this release cannot read."""
    staleness_s: float | None
    """Seconds since this replica last looked."""


class RulesKept(BaseModel):
    """The answer of PUT and DELETE of /v1/rules, once it is on disk; every replica obeys within two looks (serve.items_poll_s)."""

    number: int
    """What GET shows where it is in force."""
    live: dict[str, Any] | None
    """The document as it was taken."""
    notes: list[str]
    """Sentences on what is odd and was taken all the same, such as the pin of an item that nobody knows yet."""


class Item(BaseModel):
    """One item of a page."""

    item_id: str
    score: float
    sources: list[str]
    title: str | None = None
    explain: dict[str, Any] | None = None


class Fallback(BaseModel):
    """A stage that something lesser stood in for."""

    stage: str
    rung: Degradation
    reason: Reason


class PinLeftOut(BaseModel):
    """A pin that the page does not have, and why."""

    item_id: str
    place: int
    reason: str


class Page(BaseModel):
    """The answer of /v1/recommend and /v1/rank."""

    request_id: str
    items: list[Item]
    model_version: str
    variant: str
    degraded: list[Fallback]
    timings_ms: dict[str, float]
    ignored: list[str] | None = None
    """With `explain`: names of the request's context that nothing reads."""
    cold_start: Rung | None = None
    """Of a user without a history: what the page leans on beside the models (interests, segment, content, popular)."""
    pins_left_out: list[PinLeftOut] | None = None
    """With `explain`: the pins, of the request and of the rules, that the page does not have."""


class Rejected(BaseModel):
    """An event that was not taken, and why."""

    index: int
    code: str
    message: str


class Kept(BaseModel):
    """The answer of PUT and DELETE of items and users; what it counts as accepted is on disk."""

    accepted: int
    rejected: list[Rejected]
    position: int | None = None


class Accepted(BaseModel):
    """The answer of /v1/events; what it counts as accepted is on disk."""

    accepted: int
    duplicates: int
    rejected: list[Rejected]


class Fault(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None = None
    request_id: str


class FaultAnswer(BaseModel):
    """The body of every 4xx and 5xx."""

    error: Fault


RECOMMEND = TypeAdapter(RecommendBody)
RANK = TypeAdapter(RankBody)
ITEM = TypeAdapter(ItemBody)
USER = TypeAdapter(UserBody)
