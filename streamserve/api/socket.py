"""One open WebSocket, whatever is said over it: who may open it, frames in, frames out by turns, its key, its closing.

One writer sends; every request has at most one frame waiting for it, so the socket's time is shared by turns and a slow socket
makes deltas merge instead of piling up frames. Owns sockets. Knows nothing of what is in a frame, but for the key in one.
"""

from collections import deque
from typing import Any, Protocol

import orjson
import structlog
from anyio import Event, create_task_group, move_on_after
from anyio.abc import TaskGroup
from starlette.types import Receive, Scope

from streamserve.api.auth import given_key
from streamserve.api.schema import load_object
from streamserve.api.service import Service
from streamserve.api.wire import BoundedSend, one_error
from streamserve.errors import AuthenticationFailed, InvalidRequest, RequestTooLarge, SlowReader, StreamServeError

log = structlog.get_logger(__name__)

MAX_REQUESTS = 256
AUTH_WAIT_S = 10.0
CLOSE_POLICY, CLOSE_GOING_AWAY = 1008, 1001


class Lane:
    """One request's place in the outbox: at most one frame of it waits."""

    __slots__ = ("frame", "is_free")

    def __init__(self) -> None:
        self.frame: str | None = None
        self.is_free = Event()


class Outbox:
    """Frames that wait for the socket, by turns."""

    def __init__(self, send: BoundedSend) -> None:
        self._send = send
        self._turns: deque[Lane] = deque()
        self._work = Event()
        self._farewell: tuple[int, str] | None = None

    async def put(self, lane: Lane, frame: bytes) -> None:
        """Queue a frame behind everyone else's. Waits while the lane's last frame has not left."""
        while lane.frame is not None:
            if lane.is_free.is_set():
                lane.is_free = Event()
            await lane.is_free.wait()
        lane.frame = frame.decode()
        self._turns.append(lane)
        self._work.set()

    def close(self, code: int, reason: str) -> None:
        """Close the socket behind the frames that wait now."""
        self._farewell = (code, reason)
        self._work.set()

    async def run(self) -> None:
        """Write until the socket was closed. Raises SlowReader."""
        while True:
            while self._turns:
                lane = self._turns.popleft()
                assert lane.frame is not None
                await self._send({"type": "websocket.send", "text": lane.frame})
                lane.frame = None
                lane.is_free.set()
            if self._farewell is not None:
                code, reason = self._farewell
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                return
            self._work = Event()
            await self._work.wait()


class Talk(Protocol):
    """What is said over a link."""

    @property
    def num_live(self) -> int:
        """Requests that keep the socket open when the server shuts down."""
        ...

    async def take(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        """Answer a frame that is none of the link's own, errors included. What takes time is a task."""
        ...

    def cancel_all(self) -> None:
        """The client has left: end what runs, before the next plan."""
        ...

    def error(self, error: StreamServeError) -> bytes:
        """The frame that tells of an error which belongs to no request."""
        ...


class Link:
    """One open socket. `key`: what its client opened it with; None while one is needed and none has come."""

    def __init__(self, service: Service, receive: Receive, send: BoundedSend, key: bytes | None, *, takes_bytes: bool) -> None:
        self._service = service
        self._receive = receive
        self._takes_bytes = takes_bytes
        self._ended = Event()  # replaced whenever somebody waits for the next request to end
        self._replies = Lane()  # for everything that belongs to no live request
        self.outbox = Outbox(send)
        self.key = key

    async def serve(self, talk: Talk) -> None:
        """Until it closes. Nothing of its requests lives on."""
        try:
            with one_error():
                async with create_task_group() as tasks:
                    tasks.start_soon(self._write, tasks)
                    tasks.start_soon(self._close_when_idle, talk)
                    if self.key is not None or await self._authenticate(talk):
                        await self._read(talk, tasks)
                        tasks.cancel_scope.cancel()
        except SlowReader as error:
            log.info("socket_cut", reason=str(error), requests=talk.num_live)
        finally:
            talk.cancel_all()

    async def reply(self, frame: bytes) -> None:
        """Send a frame that belongs to no live request."""
        await self.outbox.put(self._replies, frame)

    def note_end(self) -> None:
        """A request has ended: `num_live` is less than it was."""
        self._ended.set()

    async def _write(self, tasks: TaskGroup) -> None:
        await self.outbox.run()
        tasks.cancel_scope.cancel()

    async def _close_when_idle(self, talk: Talk) -> None:
        await self._service.closing.wait()
        while talk.num_live:
            self._ended = Event()
            await self._ended.wait()
        self.outbox.close(CLOSE_GOING_AWAY, "the server is shutting down")

    async def _next(self, talk: Talk) -> dict[str, Any] | None:
        """The next frame that is a JSON object, or None when the client has left. Others are answered with an error."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                talk.cancel_all()  # here, not in the clean-up: before the next plan
                return None
            try:
                return self._parse(message)
            except StreamServeError as error:
                await self.reply(talk.error(error))

    def _parse(self, message: Any) -> dict[str, Any]:
        frame: str | bytes | None = message.get("text")
        if frame is None and self._takes_bytes:
            frame = message.get("bytes")
        if frame is None:
            raise InvalidRequest("the frame is binary; text frames with one JSON object each are expected", param="frame")
        limit = self._service.max_body_bytes
        size = len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode())
        if size > limit:
            raise RequestTooLarge(f"the frame has {size} bytes; at most {limit} are allowed (--max-body-mb)", param="frame")
        return load_object(frame)

    async def _authenticate(self, talk: Talk) -> bool:
        error = AuthenticationFailed('the first frame must be {"type": "auth", "api_key": KEY} with the server\'s key')
        with move_on_after(AUTH_WAIT_S):
            frame = await self._next(talk)
            if frame is not None and await self._takes_key(frame):
                return True
        await self.reply(talk.error(error))
        self.outbox.close(CLOSE_POLICY, "missing or wrong API key")
        return False

    async def _takes_key(self, frame: dict[str, Any]) -> bool:
        """Whether it is a frame with a key that opens the door. That one is the socket's from then on."""
        key = frame.get("api_key")
        if frame.get("type") != "auth" or not isinstance(key, str) or not self._service.door.is_key(key.encode()):
            return False
        self.key = key.encode()
        await self.reply(orjson.dumps({"type": "auth.ok"}))
        return True

    async def _read(self, talk: Talk, tasks: TaskGroup) -> None:
        while (frame := await self._next(talk)) is not None:
            if frame.get("type") != "auth":
                await talk.take(frame, tasks)
            elif not await self._takes_key(frame):
                await self.reply(talk.error(AuthenticationFailed("the API key is wrong", param="api_key")))


async def opened(service: Service, scope: Scope, receive: Receive, send: BoundedSend, *, takes_bytes: bool = False) -> Link:
    """The link of a socket that asks to be opened. Raises AuthenticationFailed where it may not be."""
    assert (await receive())["type"] == "websocket.connect"
    door, key = service.door, given_key(scope)
    if not door.allows_origin(scope):
        raise AuthenticationFailed("pages of this origin may not open a socket here (--cors-origins)", param="origin")
    if key is not None:
        door.check_key(scope)
    await send({"type": "websocket.accept"})
    return Link(service, receive, send, key if key is not None or door.needs_key else b"", takes_bytes=takes_bytes)
