"""The door while the model loads: says that the server lives and is not ready, then hands over to the application.

Owns which application answers. Knows nothing of the application.
"""

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from streamserve.errors import EngineStopped, error_body

LOADING = EngineStopped("the model is loading; ask again when GET /ready answers 200")


class Gate:
    """An ASGI application that answers for another one until that one exists."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def open(self, app: ASGIApp) -> None:
        """From now on `app` answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None and scope["type"] != "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013, "reason": str(LOADING)})
        else:
            await run_lifespan(receive, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        is_health = scope["path"] == "/health"
        body = orjson.dumps({"status": "starting"} if is_health else error_body(LOADING))
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"access-control-allow-origin", b"*"),
            (b"retry-after", b"2"),
        ]
        await send({"type": "http.response.start", "status": 200 if is_health else LOADING.status, "headers": head})
        await send({"type": "http.response.body", "body": body})


async def run_lifespan(receive: Receive, send: Send) -> None:
    """Agree to start and to stop: nothing here depends on it."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
