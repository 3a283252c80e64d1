"""The door while the model loads: shows the page, says how far the start is, then hands over to the application.

Behind a proxy that serves all this below a prefix and passes it on, the prefix is taken off here; what comes without it is served
as well, as from a proxy that takes it off.

Owns which application answers. Knows nothing of the application.
"""

from collections.abc import Callable, Mapping

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from streamserve.api.playground import Playground
from streamserve.api.wire import BoundedSend, Exchange
from streamserve.errors import EngineStopped, StreamServeError, error_body

PAGE_WAIT_S = 60.0  # for who reads no file of the page
FILES = "/static/"
LOADING = EngineStopped("the model is loading; ask again when GET /ready answers 200")


class Gate:
    """An ASGI application that answers for another one until that one exists. `progress` tells how far it is."""

    def __init__(
        self,
        page: Playground | None = None,
        progress: Callable[[], Mapping[str, object] | None] = lambda: None,
        root_path: str = "",
    ) -> None:
        self._app: ASGIApp | None = None
        self._page = Playground(None) if page is None else page
        self._progress = progress
        self._root = "/" + root_path.strip("/") if root_path.strip("/") else ""

    def open(self, app: ASGIApp) -> None:
        """From now on `app` answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._root and scope["type"] in ("http", "websocket"):
            if scope["path"] == self._root and scope["type"] == "http":
                await _to_folder(self._root, send)
                return
            scope = self._below_root(scope)
        if self._app is not None and scope["type"] != "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": str(LOADING)})
        else:
            await run_lifespan(receive, send)

    def _below_root(self, scope: Scope) -> Scope:
        path = scope["path"]
        if not path.startswith(self._root + "/"):
            return scope
        raw = scope.get("raw_path")
        root = self._root.encode()
        shorter = {"raw_path": raw.removeprefix(root)} if raw else {}
        return {**scope, "path": path.removeprefix(self._root), **shorter}

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith(FILES)):
            await self._show_page(scope, receive, send)
            return
        is_health = path == "/health"
        progress = self._progress()
        more = {} if progress is None else {"progress": progress}
        body = orjson.dumps({"status": "starting", **more} if is_health else {**error_body(LOADING), **more})
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"access-control-allow-origin", b"*"),
            (b"retry-after", b"2"),
        ]
        await send({"type": "http.response.start", "status": 200 if is_health else LOADING.status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def _show_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, BoundedSend(send, PAGE_WAIT_S), ())
        try:
            if scope["path"] == "/":
                await self._page.page(exchange)
            else:
                scope["path_params"] = {"name": scope["path"].removeprefix(FILES)}
                await self._page.file(exchange)
        except StreamServeError as error:
            if not exchange.has_started:
                await exchange.answer_error(error)


async def _to_folder(root: str, send: Send) -> None:
    """A page's relative addresses are right only below the prefix, not at it."""
    head = [(b"location", root.encode() + b"/"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 308, "headers": head})
    await send({"type": "http.response.body", "body": b""})


async def run_lifespan(receive: Receive, send: Send) -> None:
    """Agree to start and to stop: nothing here depends on it."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
