"""The bodies of the HTTP API: what a request may hold, what an answer holds, and how a fault is put into a sentence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from deployments.resilience import Reason
from deployments.resilience import Rung as Degradation
from recsys.core import canonical_id
from recsys.data.event_names import unclean, unknown
from recsys.errors import RequestError
from recsys.features.store import NewEvent, event_identity
from recsys.recall.cold_start import Rung
from recsys.serve_config import LimitsConfig

EXCLUDE = 1_000
"""Most ids of one `exclude`."""
SECONDS = (1e8, 1e11)
"""Numbers that are Unix seconds of 1973 and later, and milliseconds of before: who sends one means seconds."""
DEEPEST = 32
"""Levels of lists and objects in one event, item or user: more than any field takes, and few enough to be walked and shown."""


def _outside_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PydanticCustomError("wrong_type", "expected a string or an integer")
    found = canonical_id(value)
    if not found:
        raise PydanticCustomError("empty_id", "an id must not be empty")
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
    title: Annotated[str, Field(max_length=1_000)] | None = None
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
EVENT = TypeAdapter(EventBody)


def parsed(adapter: TypeAdapter[Any], raw: bytes) -> Any:
    """A body from JSON bytes. Raises RequestError with the first fault."""
    try:
        return adapter.validate_json(raw)
    except ValidationError as error:
        raise fault(error) from None


def fault(error: ValidationError) -> RequestError:
    """A validation error as a code, a sentence and the field."""
    return _fault(error.errors(include_url=False, include_context=False)[0])


def faults(error: ValidationError) -> RequestError:
    """All that is wrong, one sentence after another, under the code and the field of the first."""
    found = [_fault(one) for one in error.errors(include_url=False, include_context=False)]
    return RequestError(found[0].code, " ".join(map(str, found)), field=found[0].field, status=found[0].status)


def _fault(first: ErrorDetails) -> RequestError:
    kind, where = first["type"], ".".join(str(part) for part in first["loc"] if part != "function-before")
    if kind == "json_invalid":
        return RequestError("malformed_json", f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", status=400)
    first["msg"] = first["msg"].removeprefix("Value error, ")
    if kind == "model_type":  # pydantic's own words name our classes
        first["msg"] = "expected an object"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == "missing":
        wrapped = isinstance(first["input"], dict) and [v for v in first["input"].values() if isinstance(v, list)]
        hint = " Several go as a plain list: [{...}, {...}]." if wrapped and len(first["input"]) == 1 else ""
        return RequestError("missing_field", f"'{where}' is required.{hint}", field=where)
    if kind == "extra_forbidden":
        return RequestError("unknown_field", f"'{where}' is not a field of this request. See /docs for those that are.", field=where)
    code = (
        kind
        if kind in {"empty_id", "wrong_type", "invalid_value"}
        else "invalid_value"
        if kind.startswith(("greater", "less", "string_too", "too_"))
        else "wrong_type"
    )
    subject = f"'{where}'" if where else "The body"
    return RequestError(code, f"{subject}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {shown}.", field=where or None)


def check_id(name: str, value: str, limits: LimitsConfig) -> None:
    """Raises RequestError where an id is longer than the service takes."""
    if len(value) > limits.id_bytes or len(value.encode()) > limits.id_bytes:
        raise RequestError("id_too_long", f"'{name}' has {len(value.encode())} bytes; at most {limits.id_bytes} are taken.", field=name)


def check_ids(name: str, values: Sequence[str], limits: LimitsConfig, most: int) -> None:
    """Raises RequestError where a list of ids is too long, or one of them is."""
    if len(values) > most:
        raise RequestError("too_many_items", f"'{name}' has {len(values)} ids; at most {most} are taken.", field=name)
    for value in values:
        check_id(name, value, limits)


def check_k(k: int, limits: LimitsConfig) -> None:
    """Raises RequestError where k is out of range."""
    if not 1 <= k <= limits.k:
        raise RequestError("k_out_of_range", f"'k' must be between 1 and {limits.k}, got {k}.", field="k")


def events_in(raw: bytes) -> Any:
    """The JSON of POST /v1/events. Text that is no UTF-8 is let through here, so that its event alone is rejected."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(raw.decode("utf-8", "surrogateescape"))  # keeps what is no UTF-8 as lone surrogates
        except (ValueError, RecursionError):
            raise RequestError("malformed_json", f"The body is not valid JSON: {error}.", status=400) from None


def check_text(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises RequestError where a parsed row holds text that is no UTF-8, or is nested too deep for what reads it next."""
    if depth > DEEPEST:
        subject = f"'{where}'" if where else "A list"
        raise RequestError(
            "wrong_type", f"{subject} is nested more than {DEEPEST} deep. Send values that are flat, or one list deep.", field=where or None
        )
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                subject = f"'{where}'" if where else "A name"
                raise RequestError(
                    "bad_utf8", f"{subject} holds bytes that are no UTF-8. Send text as UTF-8.", field=where or None
                ) from None
    elif isinstance(value, dict):
        for name, one in value.items():
            check_text(name)
            check_text(one, where or name[:64], depth + 1)
    elif isinstance(value, list):
        for one in value:
            check_text(one, where, depth + 1)


def check_size(row: Any, sent: int, limits: LimitsConfig) -> None:
    """Raises RequestError (413) where one row of a body of `sent` bytes is larger than a body of its own might be. After `check_text`."""
    if sent > limits.body_bytes and (size := len(json.dumps(row, ensure_ascii=False).encode())) > limits.body_bytes:
        raise RequestError("row_too_large", f"It has {size} bytes; at most {limits.body_bytes} are taken. Send less of it.", status=413)


def event_of(raw: Any, limits: LimitsConfig, now_s: float, *, sent: int = 0, known: Sequence[str] | None = None) -> NewEvent:
    """One event of a parsed body of `sent` bytes, of a type that is `known` (None: any). Raises RequestError with the reason for its
    rejection."""
    check_text(raw)
    check_size(raw, sent, limits)
    try:
        body = EVENT.validate_python(raw)
    except ValidationError as error:
        raise fault(error) from None
    for name, value in (("user_id", body.user_id), ("item_id", body.item_id), ("event_id", body.event_id), ("request_id", body.request_id)):
        if value is not None:
            check_id(name, value, limits)
    if known is not None and body.event not in known:
        text = f"'event' is '{body.event}', which {unknown(body.event, known)}"
        raise RequestError("unknown_event", text if text.endswith("?") else f"{text}.", field="event")
    if body.value is not None and not math.isfinite(body.value):
        raise RequestError("invalid_value", f"'value' must be a finite number, got {body.value}.", field="value")
    time_ms = _time_ms(body.time, now_s, limits.future_s)
    identity = body.event_id or event_identity(body.user_id, body.item_id, body.event, time_ms)
    return NewEvent(body.user_id, body.item_id, body.event, time_ms, body.value, identity, body.request_id, body.context)


def _time_ms(given: str | float | None, now_s: float, future_s: float) -> int:
    if given is None:
        return int(now_s * 1000)
    shown = repr(given)[:40]
    if isinstance(given, str):
        try:
            at = datetime.fromisoformat(given)
        except ValueError:
            raise RequestError(
                "bad_time", f"'time' must be ISO 8601, or Unix milliseconds as a number, got {shown}.", field="time"
            ) from None
        seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    else:
        try:
            seconds = given / 1000
        except OverflowError:  # an integer of hundreds of digits
            seconds = math.inf if given > 0 else -math.inf
        if math.isnan(seconds):
            raise RequestError("bad_time", "'time' must be ISO 8601 or Unix milliseconds, got nan.", field="time")
        if SECONDS[0] <= given < SECONDS[1]:
            text = f"'time' is {shown}, which looks like Unix seconds: as milliseconds it lies before 1974. Send milliseconds, or ISO 8601."
            raise RequestError("bad_time", text, field="time")
    if seconds > now_s + future_s:
        text = (
            f"'time' lies in the future: {shown}. At most {future_s:g} s ahead of our clock are taken; send ISO 8601 or Unix milliseconds."
        )
        raise RequestError("future_time", text, field="time")
    if seconds < 0:
        raise RequestError("bad_time", f"'time' lies before 1970: {shown}. Send ISO 8601 or Unix milliseconds.", field="time")
    return int(seconds * 1000)


def unix_now() -> float:
    """Unix seconds; one place, so that a test can stop the clock."""
    return time.time()
