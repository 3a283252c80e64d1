"""Many requests over one WebSocket, at /v1/ws. One JSON object per text frame.

    client -> server
    {"type": "auth", "api_key": K}                        first frame, where a key is needed and no header could carry it
    {"type": "chat.create", "id": I, "request": {…}}       body of POST /v1/chat/completions; always answered in chunks
    {"type": "completion.create", "id": I, "request": {…}} body of POST /v1/completions
    {"type": "cancel", "id": I}                           ends it: a last chunk says finish_reason "abort", then done
    {"type": "ping"}                                      any further fields come back

    server -> client
    {"type": "chunk", "id": I, "chunk": {…}}               the object an SSE event would carry
    {"type": "done", "id": I, "usage": {…}}                the request is over; its id is free again
    {"type": "error", "id": I, "error": {…}}               the request is over, or never began; the socket lives
    {"type": "error", "id": null, "error": {…}}            a frame that names no request
    {"type": "auth.ok"}   {"type": "pong"}

An id is a string of 1 to 128 characters, chosen by the client, unique among its live requests on this socket. A second
request under a live id is answered with an error whose code is "duplicate_id"; the first one goes on. The same holds for
code "unknown_id", the answer to a cancel that came too late. The server closes with 1008 after a wrong or missing key,
with 1001 when it shuts down and the socket is idle, and cuts a client that reads nothing for write_timeout_s.

One writer sends; every request has at most one frame waiting for it, so the socket's time is shared by turns and a slow
socket makes deltas merge instead of piling up frames. Owns sockets. Knows nothing of what is in a body.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import orjson
import structlog
from anyio import Event, create_task_group, move_on_after
from anyio.abc import TaskGroup
from starlette.types import Receive, Scope

from streamserve.api.auth import given_key
from streamserve.api.chunks import usage_json
from streamserve.api.openai import Completions, Job
from streamserve.api.schema import load_object, show
from streamserve.api.service import Service
from streamserve.api.stream import Piece, Run
from streamserve.api.wire import BoundedSend, one_error, unforeseen
from streamserve.errors import (
    AuthenticationFailed,
    InvalidRequest,
    QueueFull,
    RequestTooLarge,
    SlowReader,
    StreamServeError,
    error_body,
)

log = structlog.get_logger(__name__)

MakeJob = Callable[..., Awaitable[Job]]

MAX_REQUESTS = 256
MAX_ID_CHARS = 128
AUTH_WAIT_S = 10.0
CLOSE_POLICY, CLOSE_GOING_AWAY = 1008, 1001


class DuplicateId(InvalidRequest):
    """The id belongs to a live request of this socket, which goes on."""

    code: ClassVar[str] = "duplicate_id"


class UnknownId(InvalidRequest):
    """No live request of this socket has the id."""

    code: ClassVar[str] = "unknown_id"


class Sockets:
    """The route /v1/ws."""

    def __init__(self, service: Service, completions: Completions) -> None:
        self._service = service
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: BoundedSend) -> None:
        """Serve one socket until either side closes it."""
        assert (await receive())["type"] == "websocket.connect"
        door = self._service.door
        has_header = given_key(scope) is not None
        if not door.allows_origin(scope):
            raise AuthenticationFailed("pages of this origin may not open a socket here (--cors-origins)", param="origin")
        if has_header:
            door.check_key(scope)
        await send({"type": "websocket.accept"})
        await Socket(self._service, self._completions, receive, send).serve(is_trusted=has_header or not door.needs_key)


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


class Ticket:
    """One live request."""

    __slots__ = ("id", "is_cancelled", "lane", "run")

    def __init__(self, id: str) -> None:
        self.id = id
        self.lane = Lane()
        self.run: Run | None = None
        self.is_cancelled = False

    def give(self, run: Run) -> None:
        """The request was checked, and this is its run."""
        self.run = run
        if self.is_cancelled:
            run.abort()

    def cancel(self) -> None:
        """End it now, or as soon as it has begun."""
        self.is_cancelled = True
        if self.run is not None:
            self.run.abort()


class Socket:
    """One open socket."""

    def __init__(self, service: Service, completions: Completions, receive: Receive, send: BoundedSend) -> None:
        self._service = service
        self._jobs = {"chat.create": completions.chat_job, "completion.create": completions.completion_job}
        self._receive = receive
        self._outbox = Outbox(send)
        self._replies = Lane()  # for everything that belongs to no live request
        self._live: dict[str, Ticket] = {}
        self._ended = Event()  # replaced whenever somebody waits for the next request to end

    async def serve(self, *, is_trusted: bool) -> None:
        """Until it closes. Nothing of its requests lives on."""
        try:
            with one_error():
                async with create_task_group() as tasks:
                    tasks.start_soon(self._write, tasks)
                    tasks.start_soon(self._close_when_idle)
                    if is_trusted or await self._authenticate():
                        await self._read(tasks)
                        tasks.cancel_scope.cancel()
        except SlowReader as error:
            log.info("socket_cut", reason=str(error), requests=len(self._live))
        finally:
            self._abort_all()

    def _abort_all(self) -> None:
        for ticket in self._live.values():
            ticket.cancel()

    async def _write(self, tasks: TaskGroup) -> None:
        await self._outbox.run()
        tasks.cancel_scope.cancel()

    async def _close_when_idle(self) -> None:
        await self._service.closing.wait()
        while self._live:
            self._ended = Event()
            await self._ended.wait()
        self._outbox.close(CLOSE_GOING_AWAY, "the server is shutting down")

    # ---- frames in -----------------------------------------------------------------------------------------------

    async def _next(self) -> dict[str, Any] | None:
        """The next frame that is a JSON object, or None when the client has left. Others are answered with an error."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._abort_all()  # here, not in the clean-up: before the next plan
                return None
            try:
                return self._parse(message.get("text"))
            except StreamServeError as error:
                await self._put_error(self._replies, None, error)

    def _parse(self, text: str | None) -> dict[str, Any]:
        if text is None:
            raise InvalidRequest("the frame is binary; text frames with one JSON object each are expected", param="frame")
        limit = self._service.max_frame_bytes
        size = len(text) if text.isascii() else len(text.encode())
        if size > limit:
            raise RequestTooLarge(f"the frame has {size} bytes; at most {limit} are allowed (--max-frame-mb)", param="frame")
        return load_object(text)

    async def _authenticate(self) -> bool:
        error = AuthenticationFailed('the first frame must be {"type": "auth", "api_key": KEY} with the server\'s key')
        with move_on_after(AUTH_WAIT_S):
            frame = await self._next()
            if frame is not None and self._is_key(frame):
                await self._put(self._replies, {"type": "auth.ok"})
                return True
        await self._put_error(self._replies, None, error)
        self._outbox.close(CLOSE_POLICY, "missing or wrong API key")
        return False

    def _is_key(self, frame: dict[str, Any]) -> bool:
        key = frame.get("api_key")
        return frame.get("type") == "auth" and isinstance(key, str) and self._service.door.is_key(key.encode())

    async def _read(self, tasks: TaskGroup) -> None:
        while (frame := await self._next()) is not None:
            try:
                await self._take(frame, tasks)
            except StreamServeError as error:
                id = frame.get("id")
                await self._put_error(self._replies, id if isinstance(id, str) else None, error)

    async def _take(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        kind = frame.get("type")
        if kind == "ping":
            await self._put(self._replies, {**frame, "type": "pong"})
        elif kind == "cancel":
            self._named(frame).cancel()
        elif kind == "auth":
            if not self._is_key(frame):
                raise AuthenticationFailed("the API key is wrong", param="api_key")
            await self._put(self._replies, {"type": "auth.ok"})
        elif isinstance(kind, str) and kind in self._jobs:
            self._create(frame, self._jobs[kind], tasks)
        else:
            allowed = ", ".join([*self._jobs, "cancel", "ping", "auth"])
            raise InvalidRequest(f"type is {show(kind)}; allowed is {allowed}", param="type")

    def _named(self, frame: dict[str, Any]) -> Ticket:
        id = checked_id(frame)
        if id not in self._live:
            raise UnknownId(f"no live request has the id {show(id)}; it may have ended already", param="id")
        return self._live[id]

    def _create(self, frame: dict[str, Any], make_job: MakeJob, tasks: TaskGroup) -> None:
        id = checked_id(frame)
        if id in self._live:
            raise DuplicateId(f"the id {show(id)} belongs to a live request; choose another", param="id")
        if len(self._live) >= MAX_REQUESTS:
            raise QueueFull(f"{MAX_REQUESTS} requests are live on this socket; wait for one to end", retry_after_s=1.0)
        request = frame.get("request")
        if not isinstance(request, dict):
            raise InvalidRequest(f"request is {show(request)}; an object is expected, as in the body of a POST", param="request")
        unknown = frame.keys() - {"type", "id", "request"}
        if unknown:
            name = min(unknown)
            raise InvalidRequest(f"unknown field {show(name)}; fields of the body belong into request", param=name[:256])
        ticket = self._live[id] = Ticket(id)
        tasks.start_soon(self._serve, ticket, make_job, request)

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _serve(self, ticket: Ticket, make_job: MakeJob, request: dict[str, Any]) -> None:
        error: StreamServeError | None = None
        try:
            job = await make_job(request, is_socket=True)
            ticket.give(job.run)
            with self._service.live(job.run):
                await self._run(ticket, job)
        except StreamServeError as refused:
            error = refused
        except Exception as bug:
            error = unforeseen(bug, id=ticket.id)
        del self._live[ticket.id]
        self._ended.set()
        if error is not None:
            await self._put_error(ticket.lane, ticket.id, error)
        else:
            await self._put(ticket.lane, {"type": "done", "id": ticket.id, "usage": usage_json(job.run.usage)})

    async def _run(self, ticket: Ticket, job: Job) -> None:
        head = b'{"type":"chunk","id":%b,"chunk":' % orjson.dumps(ticket.id)

        async def put_chunks(chunks: list[bytes]) -> None:
            for chunk in chunks:
                await self._outbox.put(ticket.lane, b"%b%b}" % (head, chunk))

        async def emit(piece: Piece) -> None:
            await put_chunks(job.shape.chunks(piece))

        await job.run.start()
        await put_chunks(job.shape.opening())
        await job.run.deliver(emit)
        await put_chunks(job.shape.closing())

    async def _put(self, lane: Lane, frame: dict[str, Any]) -> None:
        await self._outbox.put(lane, orjson.dumps(frame))

    async def _put_error(self, lane: Lane, id: str | None, error: StreamServeError) -> None:
        await self._put(lane, {"type": "error", "id": id, "error": error_body(error)["error"]})


def checked_id(frame: dict[str, Any]) -> str:
    """The id of a frame that must have one."""
    id = frame.get("id")
    if not isinstance(id, str) or not 0 < len(id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"id is {show(id)}; a string of 1 to {MAX_ID_CHARS} characters is expected", param="id")
    return id
