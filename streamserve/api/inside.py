"""The application called from inside this process: requests and answers that go over no socket.

Owns how one call becomes ASGI messages and back. Whoever calls gets what a client over HTTP gets, errors included. Knows nothing
of routes or of what is in a body.
"""

from asyncio import Event, Queue, create_task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope

from streamserve.api.auth import OWNER
from streamserve.api.wire import JSON, Headers

MAX_WAITING_PARTS = 64  # of a streamed answer; then the application waits for its reader


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer whose body is still being written."""

    status: int
    headers: Headers
    parts: AsyncIterator[bytes]


class Inside:
    """Calls an application. `headers` go with every request, behind `content-type`."""

    def __init__(self, app: ASGIApp, headers: Headers = (), *, owner: str | None = None) -> None:
        """`owner`: in whose name calls are, without a key; see auth.OWNER."""
        self._app = app
        self._owner = {} if owner is None else {OWNER: owner}
        self._headers = [(b"content-type", JSON), *headers]

    async def ask(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> Reply:
        """The whole answer. Cancelling the call ends the request."""
        status, head, parts = 500, [], []

        async def send(message: Message) -> None:
            nonlocal status, head
            if message["type"] == "http.response.start":
                status, head = message["status"], list(message["headers"])
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self._app(self._scope(method, path, headers), _receive(body, Event()), send)
        return Reply(status, head, b"".join(parts))

    @asynccontextmanager
    async def reading(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> AsyncIterator[Reading]:
        """The answer as it comes. Leaving the block early ends the request, as a client does that hangs up."""
        left, messages = Event(), Queue[Message | None](MAX_WAITING_PARTS)

        async def send(message: Message) -> None:
            if not left.is_set():
                await messages.put(message)

        async def run() -> None:
            try:
                await self._app(self._scope(method, path, headers), _receive(body, left), send)
            finally:
                if not left.is_set():
                    await messages.put(None)

        async def parts() -> AsyncIterator[bytes]:
            while (message := await messages.get()) is not None:
                if part := message.get("body"):
                    yield part

        task = create_task(run())
        try:
            first = await messages.get()
            if first is None:
                await task  # raises what stopped it
                raise RuntimeError(f"{method} {path} was not answered")
            yield Reading(first["status"], list(first["headers"]), parts())
        finally:
            left.set()
            while not messages.empty():  # a send that waits goes on, and sees that nobody is here
                messages.get_nowait()
            await task

    def _scope(self, method: str, path: str, headers: Headers) -> Scope:
        plain, _, query = path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": plain,
            "raw_path": plain.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [*self._headers, *headers],
            "client": None,
            "server": None,
            "extensions": {},
            **self._owner,
        }


def _receive(body: bytes, left: Event) -> Receive:
    """The request's body, then nothing until the caller has left."""
    is_sent = False

    async def receive() -> Message:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    return receive
