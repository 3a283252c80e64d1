"""Many requests over one WebSocket, at /v1/ws. One JSON object per text frame.

    client -> server
    {"type": "auth", "api_key": K}                        first frame, where a key is needed and no header could carry it
    {"type": "chat.create", "id": I, "request": {…}}       body of POST /v1/chat/completions; always answered in chunks
    {"type": "completion.create", …}                       of POST /v1/completions
    {"type": "response.create", …}                         of POST /v1/responses; its events are the chunks
    {"type": "message.create", …}                          of POST /v1/messages; its events are the chunks
    {"type": "embedding.create", …}                        of POST /v1/embeddings; answered by one result
        a further field "timeout_s": N                     how long after this frame the request may take
    {"type": "stream.resume", "id": I, "stream": S, "after": N}    goes on with a stream that survived its socket: ws_streams.py
    {"type": "cancel", "id": I}                           ends it: a last chunk says finish_reason "abort", then done
    {"type": "control", "id": I, "action": "end_reasoning"}  the answer begins with the next token
    {"type": "engine.subscribe", "interval_ms": N}        the engine at work, again and again; once more: another interval
    {"type": "engine.unsubscribe"}                         no more of that
    {"type": "ping"}                                       any further fields come back

    server -> client
    {"type": "chunk", "id": I, "chunk": {…}}               the object an SSE event would carry; with "n" where it is resumable
    {"type": "stream", "id": I, "stream": S}               what a resumable answer is called
    {"type": "result", "id": I, "result": {…}}             an answer that comes in one piece
    {"type": "progress", "id": I, "progress": {…}}         of a long prompt, where return_progress is true
    {"type": "warning", "id": I, "warnings": […]}          fields of the request that have no effect
    {"type": "done", "id": I, "usage": {…}}                the request is over; its id is free again
    {"type": "error", "id": I, "error": {…}}               the request is over, or never began; the socket lives
    {"type": "error", "id": null, "error": {…}}            a frame that names no request
    {"type": "engine", "engine": {…}}                      what GET /engine/steps answers, of steps that were not told yet
    {"type": "engine.ok", "subscribed": B}                 the answer to both of the above
    {"type": "auth.ok"}   {"type": "pong"}   {"type": "control.ok", "id": I, "action": A, "ended": N}

An id is a string of 1 to 128 characters, chosen by the client, unique among its live requests on this socket. A second
request under a live id is answered with an error whose code is "duplicate_id"; the first one goes on. The same holds for
code "unknown_id", the answer to a cancel that came too late. The server closes with 1008 after a wrong or missing key,
with 1001 when it shuts down and the socket is idle, and cuts a client that reads nothing for write_timeout_s.

Owns a socket's live requests. Frames and their turns are socket.py's. Knows nothing of what is in a body.
"""

from asyncio import TimerHandle, get_running_loop
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf
from typing import Any, ClassVar

import orjson
from anyio import CancelScope, current_time
from anyio.abc import TaskGroup
from starlette.types import Receive, Scope

from streamserve.api.chunks import usage_json
from streamserve.api.kinds import Kinds, Spoken
from streamserve.api.live import LiveView, Watcher
from streamserve.api.openai import DONE, END_REASONING, warning_headers
from streamserve.api.resume import Kept
from streamserve.api.schema import show
from streamserve.api.service import MAX_DEADLINE_S, Service
from streamserve.api.socket import MAX_REQUESTS, Lane, Link, Outbox, opened
from streamserve.api.stream import Progress, Run, Usage
from streamserve.api.wire import BoundedSend, unforeseen
from streamserve.api.ws_streams import RESUME, SocketStreams
from streamserve.errors import DeadlineExceeded, InvalidRequest, QueueFull, StreamServeError, error_body

MAX_ID_CHARS = 128
SUBSCRIBE, UNSUBSCRIBE = "engine.subscribe", "engine.unsubscribe"
INTERVAL_MS, MIN_INTERVAL_MS, MAX_INTERVAL_MS = 250, 50, 10_000


class DuplicateId(InvalidRequest):
    """The id belongs to a live request of this socket, which goes on."""

    code: ClassVar[str] = "duplicate_id"


class UnknownId(InvalidRequest):
    """No live request of this socket has the id."""

    code: ClassVar[str] = "unknown_id"


class Sockets:
    """The route /v1/ws."""

    def __init__(self, service: Service, kinds: Kinds, view: LiveView) -> None:
        self._service = service
        self._kinds = kinds
        self._view = view

    async def __call__(self, scope: Scope, receive: Receive, send: BoundedSend) -> None:
        """Serve one socket until either side closes it."""
        link = await opened(self._service, scope, receive, send)
        await link.serve(Socket(self._service, self._kinds, link, self._view, scope))


class Ticket:
    """One live request. `scope` holds it until its run has started, or to its end where it has none. `is_kept`: it survives the
    socket."""

    __slots__ = ("_timeout_s", "has_run", "id", "is_cancelled", "is_kept", "lane", "run", "scope")

    def __init__(self, id: str, timeout_s: float | None, *, has_run: bool) -> None:
        self.id = id
        self.has_run = has_run
        self.lane = Lane()
        self.run: Run | None = None
        self.is_cancelled = False
        self.is_kept = False
        self.scope = CancelScope(deadline=inf if timeout_s is None else current_time() + timeout_s)
        self._timeout_s = timeout_s

    def give(self, run: Run) -> None:
        """The request was checked, and this is its run."""
        self.run = run
        if self.is_cancelled:
            run.abort()

    def cancel(self) -> None:
        """End it now, or as soon as it has begun: then it says so."""
        self.is_cancelled = True
        if self.run is not None:
            self.run.abort()
        elif not self.has_run:
            self.scope.cancel()

    def watch(self, run: Run) -> TimerHandle | None:
        """From here on the run itself is ended when its time is over."""
        if self._timeout_s is None:
            return None
        left_s, self.scope.deadline = self.scope.deadline - current_time(), inf
        return get_running_loop().call_later(left_s, run.expire, self._timeout_s)

    @property
    def error(self) -> StreamServeError | None:
        """Why nothing was answered, where the time was over before the answer had begun."""
        if self.is_cancelled or not self.scope.cancelled_caught:
            return None
        return DeadlineExceeded(f"the answer was not complete after {self._timeout_s:g} s; allow it more time, or ask for less")


class Frames:
    """The `Events` of one request: each is a chunk in a frame."""

    __slots__ = ("_head", "_lane", "_outbox")

    def __init__(self, outbox: Outbox, ticket: Ticket) -> None:
        self._outbox = outbox
        self._lane = ticket.lane
        self._head = b'{"type":"chunk","id":%b,"chunk":' % orjson.dumps(ticket.id)

    def events(self, *events: bytes) -> Awaitable[None]:
        """See Events."""
        return self._put(events)

    def named(self, *events: tuple[bytes, bytes]) -> Awaitable[None]:
        """See Events. The name stands in the data as well."""
        return self._put([data for _, data in events])

    def comment(self, text: bytes) -> None:
        """See Events. What there is to tell beside chunks has frames of its own."""

    async def end(self, *events: bytes) -> None:
        """See Events."""
        await self._put([event for event in events if event != DONE])

    async def _put(self, events: Sequence[bytes]) -> None:
        for event in events:
            await self._outbox.put(self._lane, b"%b%b}" % (self._head, event))


class Socket:
    """One open socket. A Talk."""

    def __init__(self, service: Service, kinds: Kinds, link: Link, view: LiveView, scope: Scope) -> None:
        self._service = service
        self._kinds = kinds
        self._link = link
        self._live: dict[str, Ticket] = {}
        self._streams = SocketStreams(service.streams, link.outbox)
        self._watcher = Watcher(
            view,
            partial(link.outbox.put, Lane()),
            lambda: {ticket.run.call.id: ticket.id for ticket in self._live.values() if ticket.run is not None},
            lambda: service.door.may_see_texts(scope, link.key),
        )

    @property
    def num_live(self) -> int:
        """See Talk."""
        return len(self._live)

    def cancel_all(self) -> None:
        """See Talk."""
        for ticket in self._live.values():
            if not ticket.is_kept:
                ticket.cancel()

    def error(self, error: StreamServeError) -> bytes:
        """See Talk."""
        return _error(None, error)

    # ---- frames in -----------------------------------------------------------------------------------------------

    async def take(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        """See Talk."""
        try:
            await self._take(frame, tasks)
        except StreamServeError as error:
            id = frame.get("id")
            await self._link.reply(_error(id if isinstance(id, str) else None, error))

    async def _take(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        kind = frame.get("type")
        if kind == "ping":
            await self._link.reply(orjson.dumps({**frame, "type": "pong"}))
        elif kind == "cancel":
            check_fields(frame, "type", "id")
            self._named(frame).cancel()
        elif kind == RESUME:
            self._resume(frame, tasks)
        elif kind == "control":
            await self._control(frame)
        elif kind == SUBSCRIBE:
            check_fields(frame, "type", "interval_ms")
            self._watcher.start(checked_interval(frame), tasks)
            await self._link.reply(orjson.dumps({"type": "engine.ok", "subscribed": True}))
        elif kind == UNSUBSCRIBE:
            check_fields(frame, "type")
            self._watcher.stop()
            await self._link.reply(orjson.dumps({"type": "engine.ok", "subscribed": False}))
        elif isinstance(kind, str) and kind in self._kinds.names:
            self._create(kind, frame, tasks)
        else:
            allowed = ", ".join([*self._kinds.names, RESUME, "cancel", "control", SUBSCRIBE, UNSUBSCRIBE, "ping", "auth"])
            raise InvalidRequest(f"type is {show(kind)}; allowed is {allowed}", param="type")

    async def _control(self, frame: dict[str, Any]) -> None:
        check_fields(frame, "type", "id", "action")
        ticket, action = self._named(frame), frame.get("action")
        if action != END_REASONING:
            raise InvalidRequest(f'action is {show(action)}; allowed is "{END_REASONING}"', param="action")
        ended = 0 if ticket.run is None else ticket.run.end_thought()
        told = {"type": "control.ok", "id": ticket.id, "action": action, "ended": ended}
        await self._link.reply(orjson.dumps(told))

    def _named(self, frame: dict[str, Any]) -> Ticket:
        id = checked_id(frame)
        if id not in self._live:
            raise UnknownId(f"no live request has the id {show(id)}; it may have ended already", param="id")
        return self._live[id]

    def _free_id(self, frame: dict[str, Any]) -> str:
        id = checked_id(frame)
        if id in self._live:
            raise DuplicateId(f"the id {show(id)} belongs to a live request; choose another", param="id")
        if len(self._live) >= MAX_REQUESTS:
            raise QueueFull(f"{MAX_REQUESTS} requests are live on this socket; wait for one to end", retry_after_s=1.0)
        return id

    def _create(self, kind: str, frame: dict[str, Any], tasks: TaskGroup) -> None:
        id = self._free_id(frame)
        request = frame.get("request")
        if not isinstance(request, dict):
            raise InvalidRequest(f"request is {show(request)}; an object is expected, as in the body of a POST", param="request")
        check_fields(frame, "type", "id", "request", "timeout_s")
        ticket = self._live[id] = Ticket(id, checked_timeout(frame), has_run=kind in self._kinds.spoken)
        answer = self._speak if ticket.has_run else self._answer
        tasks.start_soon(self._serve, ticket, partial(answer, ticket, kind, request))

    def _resume(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        id = self._free_id(frame)
        check_fields(frame, "type", "id", "stream", "after")
        kept, after = self._streams.find(frame, self._link.key)
        ticket = self._live[id] = Ticket(id, None, has_run=True)
        ticket.is_kept = True
        ticket.run = kept.runs[0] if kept.runs else None
        tasks.start_soon(self._serve, ticket, partial(self._read_on, ticket, kept, after))

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _serve(self, ticket: Ticket, answer: Callable[[], Awaitable[dict[str, Any] | None]]) -> None:
        """`answer` sends it and gives its usage, or None where an error was sent."""
        error: StreamServeError | None = None
        usage: dict[str, Any] | None = {}
        try:
            with ticket.scope:
                usage = await answer()
        except StreamServeError as refused:
            error = refused
        except Exception as bug:
            error = unforeseen(bug, id=ticket.id)
        error = error or ticket.error
        if error is not None:
            await self._link.outbox.put(ticket.lane, _error(ticket.id, error))
        elif usage is not None:
            await self._put(ticket.lane, {"type": "done", "id": ticket.id, "usage": usage})
        del self._live[ticket.id]  # no sooner: its client takes it for live until then, and the socket may close after it
        self._link.note_end()

    async def _answer(self, ticket: Ticket, kind: str, request: dict[str, Any]) -> dict[str, Any]:
        whole = await self._kinds.whole[kind](request)
        await self._warn(ticket, whole.warnings)
        await self._link.outbox.put(
            ticket.lane, b'{"type":"result","id":%b,"result":%b}' % (orjson.dumps(ticket.id), whole.answer)
        )
        return whole.usage

    async def _speak(self, ticket: Ticket, kind: str, request: dict[str, Any]) -> dict[str, Any] | None:
        spoken = await self._kinds.spoken[kind](request, self._link.key or b"")
        run = spoken.run
        if spoken.is_resumable:
            return await self._keep(ticket, spoken)

        def tell(progress: Progress) -> Awaitable[None]:
            return self._put(ticket.lane, {"type": "progress", "id": ticket.id, "progress": progress.as_json()})

        if run.call.wants_progress:
            run.on_progress = tell
        ticket.give(run)
        with self._service.live(run):
            await run.start()
            timer = ticket.watch(run)
            try:
                await self._warn(ticket, spoken.warnings)
                await spoken.write(Frames(self._link.outbox, ticket))
            finally:
                if timer is not None:
                    timer.cancel()
        return usage_json(run.usage)

    async def _keep(self, ticket: Ticket, spoken: Spoken) -> dict[str, Any] | None:
        ticket.give(spoken.run)
        kept = await self._streams.begin(spoken.run, spoken.write, warning_headers(spoken.warnings), self._link.key)
        ticket.is_kept = True
        timer = ticket.watch(spoken.run)
        if timer is not None and kept.task is not None:
            kept.task.add_done_callback(lambda _: timer.cancel())
        await self._warn(ticket, spoken.warnings)
        return await self._read_on(ticket, kept, 0)

    async def _read_on(self, ticket: Ticket, kept: Kept, after: int) -> dict[str, Any] | None:
        usage: Usage | None = await self._streams.read(ticket, kept, after)
        return None if usage is None else usage_json(usage)

    async def _warn(self, ticket: Ticket, warnings: Sequence[str]) -> None:
        if warnings:
            await self._put(ticket.lane, {"type": "warning", "id": ticket.id, "warnings": warnings})

    async def _put(self, lane: Lane, frame: dict[str, Any]) -> None:
        await self._link.outbox.put(lane, orjson.dumps(frame))


def _error(id: str | None, error: StreamServeError) -> bytes:
    return orjson.dumps({"type": "error", "id": id, "error": error_body(error)["error"]})


def checked_id(frame: dict[str, Any]) -> str:
    """The id of a frame that must have one."""
    id = frame.get("id")
    if not isinstance(id, str) or not 0 < len(id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"id is {show(id)}; a string of 1 to {MAX_ID_CHARS} characters is expected", param="id")
    return id


def checked_timeout(frame: dict[str, Any]) -> float | None:
    """The seconds that a request may take, where it says so."""
    timeout_s = frame.get("timeout_s")
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_DEADLINE_S:
        raise InvalidRequest(
            f"timeout_s is {show(timeout_s)}; allowed is above 0 up to {MAX_DEADLINE_S:g} seconds", param="timeout_s"
        )
    return float(timeout_s)


def checked_interval(frame: dict[str, Any]) -> float:
    """How often a socket wants to be told of the engine, in seconds."""
    interval_ms = frame.get("interval_ms")
    if interval_ms is None:
        return INTERVAL_MS / 1000
    is_number = isinstance(interval_ms, int | float) and not isinstance(interval_ms, bool)
    if not is_number or not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
        raise InvalidRequest(
            f"interval_ms is {show(interval_ms)}; allowed is {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}", param="interval_ms"
        )
    return float(interval_ms) / 1000


def check_fields(frame: dict[str, Any], *names: str) -> None:
    """Raises InvalidRequest when a frame has others."""
    unknown = frame.keys() - set(names)
    if unknown:
        hint = "fields of the body belong into request" if "request" in names else f"allowed is {', '.join(names)}"
        raise InvalidRequest(f"unknown field {show(min(unknown))}; {hint}", param=min(unknown)[:256])
