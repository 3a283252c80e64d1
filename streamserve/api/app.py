"""The ASGI application: routes, and what happens before and after each of them.

Owns the route table and the shape of every failure. Knows nothing of what the routes do. Starlette matches paths; answers
are written straight to ASGI, because wrappers around `send` would be paid for on every token.
"""

from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send

from streamserve.api import results
from streamserve.api.admin import Admin
from streamserve.api.anthropic import Messages, anthropic_error_body
from streamserve.api.auth import Door
from streamserve.api.batch_runner import BatchRunner
from streamserve.api.batch_store import open_batches
from streamserve.api.batches import Batches
from streamserve.api.embeddings import Embeddings
from streamserve.api.encoders import EncoderModel
from streamserve.api.fields import why_unserved
from streamserve.api.files import Files
from streamserve.api.form_check import FormCheck
from streamserve.api.gate import run_lifespan
from streamserve.api.kinds import Kinds
from streamserve.api.live import LiveView
from streamserve.api.native import Native
from streamserve.api.openai import Completions
from streamserve.api.openapi import OpenApi
from streamserve.api.page_config import PageConfig
from streamserve.api.playground import Playground, static_folder
from streamserve.api.prefixes import Prefixes
from streamserve.api.response_socket import ResponseSockets
from streamserve.api.response_store import MemoryStore, ResponseStore
from streamserve.api.responses import Responses
from streamserve.api.routes import Answer, Key, RouteSpec
from streamserve.api.schema import ChatRequest, CompletionRequest, ControlRequest
from streamserve.api.scoring import Scoring
from streamserve.api.service import MIB, Meter, Service
from streamserve.api.uploads import Uploads
from streamserve.api.wire import BoundedSend, ClientLeft, Exchange, Turnstile, unforeseen
from streamserve.api.ws import Sockets
from streamserve.config import ServerConfig
from streamserve.engine.client import EngineClient
from streamserve.errors import (
    AuthenticationFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    SlowReader,
    StreamServeError,
    error_body,
)
from streamserve.media.family import Family
from streamserve.media.fetch import Fetcher
from streamserve.media.loader import Loader
from streamserve.text.model import TextModel

log = structlog.get_logger(__name__)

EXCHANGE = "streamserve.exchange"  # where a request's Exchange stands in its scope
ANTHROPIC = "/v1/messages"  # paths whose clients expect errors in Anthropic's shape
PAGE_FILES = "/static/"  # the only open route whose path has a parameter


class Endpoint:
    """A route's answer in the form that Starlette's router calls without wrapping it.

    The admin key is asked for here, where the route is known: a path may lead to a route without being the route's own text
    (Starlette's patterns let a line's end follow it).
    """

    def __init__(self, answer: Answer, admin_door: Door | None = None) -> None:
        self._answer = answer
        self._admin_door = admin_door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._admin_door is not None:
            self._admin_door.check_key(scope, is_admin=True)
        await self._answer(scope[EXCHANGE])


class Api:
    """The application. `resume_batches` is for the start; `close_idle_sockets`, `stop_batches` and `settled` for the shutdown."""

    def __init__(self, service: Service, store: ResponseStore, uploads: Uploads, page: Playground) -> None:
        self._service = service
        self._limit_s = service.config.write_timeout_s
        self._turnstile = Turnstile()
        completions = Completions(service)
        self._responses = Responses(service, completions, store)
        self._batches = BatchRunner(service, self, open_batches(service.config.batch_folder, uploads))
        kept = [*Files(service, uploads).routes(), *Batches(service, uploads, self._batches).routes()]
        self._router, routes = _router(service, completions, self._responses, kept, page)
        # Most requests are for a path that is a route's own text: these need no search.
        self._plain = {
            (route.method, route.path): _endpoint(service, route) for route in reversed(routes) if "{" not in route.path
        }
        # Looked up before the router is asked: a path that does not exist needs the key as well, so that it cannot be probed.
        self._open = frozenset(route.path for route in routes if route.key is Key.NONE)

    def close_idle_sockets(self) -> None:
        """From now on a WebSocket without live requests closes, with code 1001, and batches ask no more lines."""
        self._service.closing.set()
        self._batches.close()

    async def resume_batches(self) -> None:
        """Once the engine runs: go on with batches that are kept in a folder."""
        await self._batches.resume()

    async def stop_batches(self) -> None:
        """Before requests are broken off: a line that has not been answered stays unanswered."""
        await self._batches.stop()

    async def settled(self) -> None:
        """Behind the engine's end: until what no connection waits for is kept."""
        self._service.streams.close()
        await self._responses.settled()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # tells Starlette's router to raise, not to answer, when a method is not allowed
        if scope["type"] == "http":
            await self._http(scope, receive, BoundedSend(send, self._limit_s))
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, BoundedSend(send, self._limit_s))
        else:
            await run_lifespan(receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: BoundedSend) -> None:
        door = self._service.door
        exchange = scope[EXCHANGE] = Exchange(scope, receive, send, door.cors_headers(scope), self._turnstile)
        try:
            if scope["method"] == "OPTIONS":
                await exchange.start(204, door.preflight_headers(scope))
                await exchange.end()
                return
            path = scope["path"]
            door.check_origin(scope)
            if path not in self._open and not path.startswith(PAGE_FILES):
                door.check_key(scope)
            await self._plain.get((scope["method"], path), self._router)(scope, receive, send)
        except ClientLeft:
            log.debug("client_left", path=scope["path"])
        except SlowReader as error:
            log.info("client_cut", path=scope["path"], reason=str(error))
        except (StreamServeError, HTTPException) as error:
            await self._refuse(exchange, error)
        except Exception as bug:
            await self._refuse(exchange, unforeseen(bug, path=scope["path"]))

    async def _refuse(self, exchange: Exchange, error: StreamServeError | HTTPException) -> None:
        """Say what went wrong; after a started answer, breaking it off is all that is left to say."""
        if exchange.has_started:
            return
        try:
            if isinstance(error, StreamServeError):
                is_key = isinstance(error, AuthenticationFailed)
                headers = [(b"www-authenticate", b"Bearer")] if is_key else []
            else:
                error, headers = _own(error, exchange.scope)
            body = None
            if exchange.scope["path"].startswith(ANTHROPIC):
                body = anthropic_error_body(error)
                headers = [*headers, (b"request-id", body["request_id"].encode())]
            await exchange.answer_error(error, headers, body)
        except SlowReader:
            log.info("client_cut", path=exchange.scope["path"])

    async def _websocket(self, scope: Scope, receive: Receive, send: BoundedSend) -> None:
        try:
            await self._router(scope, receive, send)
        except SlowReader as error:
            log.info("client_cut", path=scope["path"], reason=str(error))
        except StreamServeError as error:
            await _refuse_socket(scope, send, error)
        except HTTPException:
            await _refuse_socket(
                scope, send, NotFound(f"there is no WebSocket at {scope['path'][:200]}; /v1/ws and /v1/responses are")
            )


async def _refuse_socket(scope: Scope, send: BoundedSend, error: StreamServeError) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
        return
    body = orjson.dumps(error_body(error))
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": head})
    await send({"type": "websocket.http.response.body", "body": body})


def _own(error: HTTPException, scope: Scope) -> tuple[StreamServeError, list[tuple[bytes, bytes]]]:
    method, path = scope["method"], scope["path"][:200]
    why = why_unserved(method, path)
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        refusal = MethodNotAllowed(f"{method} is not allowed on {path}; {why or f'allowed is {allowed}'}")
        return refusal, [(b"allow", allowed.encode())]
    if why is not None:
        return NotFound(f"there is no {method} {path} here; {why}"), []
    return NotFound(f"there is no {method} {path} here; GET /v1/models shows the model, README.md the routes"), []


def _endpoint(service: Service, route: RouteSpec) -> Endpoint:
    return Endpoint(route.answer, service.door if route.key is Key.ADMIN else None)


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


async def _not_a_page(exchange: Exchange) -> None:
    raise InvalidRequest("this is a WebSocket; open it with an upgrade request", param="upgrade")


def _router(
    service: Service, completions: Completions, responses: Responses, kept: list[RouteSpec], playground: Playground
) -> tuple[Router, list[RouteSpec]]:
    streams = service.streams
    native, admin, messages = Native(service, completions.forms), Admin(service), Messages(service, completions)
    embeddings, view = Embeddings(service), LiveView(service)
    routes = [
        RouteSpec(
            "POST",
            "/v1/chat/completions",
            streams.again(completions.chat),
            ChatRequest,
            results.ChatCompletion,
            results.ChatChunk,
            example={"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
        ),
        RouteSpec("POST", "/v1/chat/completions/control", completions.control, ControlRequest, dict[str, Any], errors=(404,)),
        RouteSpec(
            "POST",
            "/v1/completions",
            streams.again(completions.completion),
            CompletionRequest,
            results.TextCompletion,
            results.TextCompletion,
            example={"prompt": "Once upon a time", "max_tokens": 32},
        ),
        *messages.routes(),
        *responses.routes(),
        *kept,
        RouteSpec("GET", "/v1/streams/{id}", streams.read),
        RouteSpec("DELETE", "/v1/streams/{id}", streams.stop),
        *native.routes(),
        *admin.routes(),
        *embeddings.routes(),
        *Scoring(service).routes(),
        *Prefixes(service, completions.forms).routes(),
        *FormCheck(service, completions.forms).routes(),
        *view.routes(),
        *PageConfig(service, completions.forms).routes(),
        RouteSpec("GET", "/", playground.page, key=Key.NONE, is_shown=False),
        RouteSpec("GET", "/docs", playground.docs, key=Key.NONE, is_shown=False),
        RouteSpec("GET", "/static/{name:path}", playground.file, key=Key.NONE, is_shown=False),
        RouteSpec("GET", "/v1/ws", _not_a_page, is_shown=False),
        RouteSpec("GET", "/v1/responses", _not_a_page, is_shown=False),
    ]
    openapi = OpenApi(routes, needs_key=service.door.needs_key)
    routes.append(RouteSpec("GET", "/openapi.json", openapi.show, result=dict[str, Any], key=Key.NONE))
    table = [Route(route.path, _endpoint(service, route), methods=[route.method]) for route in routes]
    sockets = [
        WebSocketRoute("/v1/ws", Sockets(service, Kinds(completions, responses, messages, embeddings, service.owner_with), view)),
        WebSocketRoute("/v1/responses", ResponseSockets(service, responses)),
    ]
    return Router([*table, *sockets], redirect_slashes=False, default=_nowhere), routes


def create_app(
    client: EngineClient,
    text: TextModel,
    config: ServerConfig,
    *,
    model_name: str,
    aliases: tuple[str, ...] = (),
    sampling_defaults: str = "model",
    metrics: Meter | None = None,
    settings: Mapping[str, Any] | None = None,
    response_store: ResponseStore | None = None,
    encoder: EncoderModel | None = None,
    family: Family | None = None,
    fetcher: Fetcher | None = None,
    page: Playground | None = None,
) -> Api:
    """The HTTP and WebSocket side of one served model. `settings` are shown by /server_info, without secrets.

    `response_store` keeps responses of /v1/responses; without one they are kept in memory. `family`: how the model takes
    pictures; None: it takes none. `fetcher` is for tests. `page`: the playground, where it was read already.
    `sampling_defaults`: "model" takes what a request leaves out from the model's files, "openai" from OpenAI's defaults.
    """
    uploads, max_bytes = Uploads(), config.max_body_mb * MIB
    return Api(
        Service(
            client,
            text,
            config,
            model_name=model_name,
            aliases=aliases,
            sampling_defaults=sampling_defaults,
            meter=metrics,
            settings=settings,
            encoder=encoder,
            family=family,
            loader=Loader(fetcher or Fetcher(config.media_hosts, max_bytes), uploads.contents, max_bytes),
        ),
        MemoryStore() if response_store is None else response_store,
        uploads,
        page or Playground(None if config.disable_playground else static_folder()),
    )
