"""The HTTP edge: routes, body limits, request ids, and the one shape of every error.

A FastAPI app declares all routes and their documents. In front of it stands a short cut for the three hot routes, which
hands their raw bytes to the service: FastAPI's own road costs more than the gateway's whole work on a request.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deployments.resilience import Seldom
from deployments.schemas import (
    Accepted,
    EventBody,
    FaultAnswer,
    HeldItem,
    HeldUser,
    ItemBody,
    Kept,
    Page,
    RankBody,
    RecommendBody,
    Ruled,
    RulesKept,
    UserBody,
)
from deployments.service import Service
from recsys.errors import RequestError, StoreUnavailableError
from recsys.rerank.live_rules import LiveRules
from recsys.serve_config import LimitsConfig

log = logging.getLogger(__name__)

JSON = b"application/json"
DRAIN_BYTES = 64 * 2**20
"""How much of a refused body is read and thrown away, so that its sender can hear the answer."""


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes
    retry_after_s: int | None = None


_seldom = Seldom()
Handler = Callable[[bytes, str], Awaitable[Reply]]


class Edge:
    """The ASGI application of a gateway."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._hot: dict[str, Handler] = {"/v1/recommend": self._recommend, "/v1/rank": self._rank, "/v1/events": self._events}
        self.api = documented(self._hot, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        handler = self._hot.get(path)
        if handler is None:
            await self.api(scope, receive, send)
            return
        request_id = _request_id(scope)
        try:
            raw = await read_body(scope, receive, _limit(path, self._service.config.limits))
        except RequestError as error:
            await _send(send, refused(error, request_id), request_id)
            return
        await _send(send, await answered(handler, raw, request_id), request_id)

    async def _recommend(self, raw: bytes, request_id: str) -> Reply:
        return Reply(200, await self._service.recommend(raw, request_id))

    async def _rank(self, raw: bytes, request_id: str) -> Reply:
        return Reply(200, await self._service.rank(raw, request_id))

    async def _events(self, raw: bytes, request_id: str) -> Reply:
        try:
            return Reply(202, await self._service.events(raw))
        except StoreUnavailableError as error:
            _seldom.warn("events", "Events are refused.", error)
            text = "Events cannot be stored at the moment, so none was taken. Send them again later."
            return _fault(503, "store_unavailable", text, None, request_id, retry_after_s=1)


async def answered(handler: Handler, raw: bytes, request_id: str) -> Reply:
    """What the handler answers; every fault becomes the one shape of errors, and none a stack trace."""
    try:
        return await handler(raw, request_id)
    except RequestError as error:
        return refused(error, request_id)
    except StoreUnavailableError as error:
        _seldom.warn("store", "A request needs the store.", error)
        return _fault(503, "store_unavailable", "The store does not answer at the moment. Try again.", None, request_id, retry_after_s=1)
    except Exception:  # a RayfunnelError too: its text is for the operator, and may name paths and addresses
        log.exception("A request met a fault of ours.")
        return _fault(503, "unavailable", "The service met a fault. Try again; its log has the details.", None, request_id, retry_after_s=1)


def refused(error: RequestError, request_id: str) -> Reply:
    """A client's fault as a 4xx."""
    return _fault(error.status, error.code, str(error), error.field, request_id, retry_after_s=1 if error.status == 503 else None)


def _fault(status: int, code: str, message: str, field: str | None, request_id: str, *, retry_after_s: int | None = None) -> Reply:
    error: dict[str, Any] = {"code": code, "message": message, "request_id": request_id}
    if field is not None:
        error["field"] = field
    return Reply(status, orjson.dumps({"error": error}), retry_after_s)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request's body. Raises RequestError (413) past `limit`, having read the rest so that the sender hears of it."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("disconnected", "The client left before its request was complete.", status=400)
        part: bytes = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        more = message.get("more_body", False)
        if size > DRAIN_BYTES:
            break
    if size > limit:
        declared = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        raise RequestError(
            "body_too_large", f"The body has {declared or size} bytes; at most {limit} are taken. Send it in parts.", status=413
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _limit(path: str, limits: LimitsConfig) -> int:
    """Bytes that a POST to this path may have."""
    return limits.batch_bytes if path == "/v1/events" else limits.body_bytes


def _path(scope: Scope) -> str:
    """The path below the application's route prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: bytes = value[:256]
            return given.decode("latin-1")
    return uuid.uuid4().hex


async def _send(send: Send, reply: Reply, request_id: str) -> None:
    headers = [
        (b"content-type", JSON),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", request_id.encode("latin-1", "replace")),
    ]
    if reply.retry_after_s is not None:
        headers.append((b"retry-after", str(reply.retry_after_s).encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


# ---- the declared API ---------------------------------------------------------------------------------------------


def documented(hot: dict[str, Handler], service: Service) -> FastAPI:
    """All routes, declared: what /docs shows and what answers everything but the hot routes."""
    api = FastAPI(title="Rayfunnel", description="From a log of events to a ranked page of items.", version="1")

    async def passed(request: Request) -> Response:
        path = _path(request.scope)
        return await _with_body(request, hot[path], _limit(path, service.config.limits))

    def post(path: str, body: Any, answer: type, status: int, summary: str) -> None:
        api.post(path, response_model=answer, status_code=status, summary=summary, **_takes(body))(passed)

    post("/v1/recommend", RecommendBody, Page, 200, "A page of items for a user")
    post("/v1/rank", RankBody, Page, 200, "Given items, ranked for a user")
    post("/v1/events", EventBody | list[EventBody], Accepted, 202, "What users did; taken when it is on disk")

    _catalogue(api, service)
    _rules(api, service)

    @api.get("/v1/items/{item_id:path}/similar", responses={404: {"model": FaultAnswer}}, summary="An item's neighbours")
    async def similar(item_id: str, request: Request, k: int = 10) -> Response:
        return await _without_body(request, lambda request_id: service.similar(item_id, k, request_id))

    @api.get("/v1/users/{user_id:path}/similar", responses={404: {"model": FaultAnswer}}, summary="A user's neighbours, as of now")
    async def similar_users(user_id: str, request: Request, k: int = 10) -> Response:
        return await _without_body(request, lambda request_id: service.similar_users(user_id, k, request_id))

    def held(path: str, answer: type, look: Callable[[str], Awaitable[bytes]], summary: str) -> None:
        async def handler(one_id: str, request: Request) -> Response:
            return await _without_body(request, lambda _: look(one_id))

        api.get(path, response_model=answer, responses={404: {"model": FaultAnswer}}, summary=summary, operation_id=f"GET{path}")(handler)

    # After /similar, which they would match too.
    held("/v1/items/{one_id:path}", HeldItem, service.lookups.item, "What the service holds of an item")
    held("/v1/users/{one_id:path}", HeldUser, service.lookups.user, "What the service holds of a user")

    @api.get("/healthz", summary="The process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": FaultAnswer}}, summary="A version is loaded, and every stage holds it")
    async def readyz(request: Request) -> Response:
        async def ready(_: str) -> bytes:
            return orjson.dumps({"status": "ready", "version": await service.check_ready()})

        return await _without_body(request, ready)

    @api.get(
        "/v1/ingest", responses={503: {"model": FaultAnswer}}, summary="How far the consumers of events are: lag, dead letters, Parquet"
    )
    async def ingest(request: Request) -> Response:
        async def status(_: str) -> bytes:
            return orjson.dumps(await service.ingest(), option=orjson.OPT_NON_STR_KEYS)

        return await _without_body(request, status)

    @api.get("/v1/version", summary="What is served, what is held, what was refused and why")
    async def version() -> dict[str, Any]:
        return await service.version()

    _one_shape_of_errors(api)
    return api


def _catalogue(api: FastAPI, service: Service) -> None:
    """PUT and DELETE of items and users: bodies are read by the service, which checks them against the declared columns."""

    limit = service.config.limits.batch_bytes

    def route(method: str, path: str, body: Any, work: Callable[[bytes], Awaitable[bytes]], summary: str) -> None:
        async def handler(raw: bytes, request_id: str) -> Reply:  # noqa: ARG001  one shape for all handlers
            return Reply(200, await work(raw))

        async def kept(request: Request) -> Response:
            return await _with_body(request, handler, limit)

        takes = _takes(body | list[body])
        api.add_api_route(path, kept, methods=[method], response_model=Kept, summary=summary, operation_id=f"{method}{path}", **takes)

    changes = service.catalogue
    route("PUT", "/v1/items", ItemBody, changes.put_items, "New or changed items; can be recommended within a second")
    route(
        "DELETE", "/v1/items", str | ItemBody, changes.delete_items, "Items that must not be shown again: ids, or objects with an item_id"
    )
    route("PUT", "/v1/users", UserBody, changes.put_users, "What is known of users, from the next request on")
    route("DELETE", "/v1/users", str | UserBody, changes.delete_users, "Profiles to forget: ids, or objects with a user_id")

    def one(path: str, work: Callable[[bytes], Awaitable[bytes]], summary: str) -> None:
        async def deleted(one_id: str, request: Request) -> Response:
            return await _without_body(request, lambda _: work(orjson.dumps(one_id)))

        api.add_api_route(path, deleted, methods=["DELETE"], response_model=Kept, responses={422: {"model": FaultAnswer}}, summary=summary)

    one("/v1/items/{one_id:path}", changes.delete_items, "An item that must not be shown again")
    one("/v1/users/{one_id:path}", changes.delete_users, "A profile to forget")


def _rules(api: FastAPI, service: Service) -> None:
    """What is in force on every page, and how it is changed without a restart."""
    rules = service.rules
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": FaultAnswer} for code in (404, 503)}

    @api.get(
        "/v1/rules", response_model=Ruled, responses=refusals, summary="The rules of pages that are in force, and where each comes from"
    )
    async def show(request: Request) -> Response:
        return await _without_body(request, lambda _: rules.show())

    async def handler(raw: bytes, request_id: str) -> Reply:  # noqa: ARG001  one shape for all handlers
        return Reply(200, await rules.put(raw))

    async def put(request: Request) -> Response:
        return await _with_body(request, handler, service.config.limits.body_bytes)

    summary = "Rules over those of the configuration: in force within a second, on every replica, until they are told anew or taken back"
    api.put("/v1/rules", response_model=RulesKept, summary=summary, **_takes(LiveRules))(put)

    @api.delete("/v1/rules", response_model=RulesKept, responses=refusals, summary="Take them back: the configuration's stand alone")
    async def clear(request: Request) -> Response:
        return await _without_body(request, lambda _: rules.delete())


async def _with_body(request: Request, handler: Handler, limit: int) -> Response:
    request_id = _request_id(request.scope)
    try:
        raw = await read_body(request.scope, request.receive, limit)
    except RequestError as error:
        return _response(refused(error, request_id), request_id)
    return _response(await answered(handler, raw, request_id), request_id)


async def _without_body(request: Request, work: Callable[[str], Awaitable[bytes]]) -> Response:
    """What `work` answers to the request of this id."""
    request_id = _request_id(request.scope)

    async def handler(_: bytes, request_id: str) -> Reply:
        return Reply(200, await work(request_id))

    return _response(await answered(handler, b"", request_id), request_id)


def _takes(body: Any) -> dict[str, Any]:
    """How a route documents the body that it reads by itself, and what may go wrong with it."""
    schema = TypeAdapter(body).json_schema(ref_template="#/components/schemas/{model}")
    return {
        "responses": {c: {"model": FaultAnswer} for c in (400, 413, 422, 503)},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _flat(schema)}}}},
    }


def _one_shape_of_errors(api: FastAPI) -> None:
    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        text = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}. See /docs for what there is."
        return _response(_fault(error.status_code, code, text, None, _request_id(request.scope)), _request_id(request.scope))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = str(first["loc"][-1])
        reply = _fault(
            422,
            "wrong_type",
            f"'{where}': {first['msg'].lower()}, got {str(first.get('input'))[:60]!r}.",
            where,
            _request_id(request.scope),
        )
        return _response(reply, _request_id(request.scope))


def _response(reply: Reply, request_id: str) -> Response:
    headers = {"x-request-id": request_id}
    if reply.retry_after_s is not None:
        headers["retry-after"] = str(reply.retry_after_s)
    return Response(reply.body, reply.status, headers=headers, media_type="application/json")


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without definitions of its own: OpenAPI knows no $defs below a request body."""
    known = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inlined(known[node["$ref"].rsplit("/", 1)[-1]])
            return {k: inlined(v) for k, v in node.items()}
        return [inlined(v) for v in node] if isinstance(node, list) else node

    flat: dict[str, Any] = inlined(schema)
    return flat
