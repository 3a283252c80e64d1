"""One HTTP exchange, straight on ASGI: read a body within a limit, write an answer or an error within a time.

Owns the limits on body size and on how long a client may leave a write blocked. Knows nothing of routes, models or text.
"""

import re
from asyncio import Lock, Task, TimerHandle, get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from math import ceil
from time import monotonic
from types import TracebackType, coroutine
from typing import Any

import orjson
import structlog
from anyio import CancelScope, Event, create_task_group, fail_after, move_on_after
from starlette.types import Message, Receive, Scope, Send

from streamserve.errors import InvalidRequest, QueueFull, RequestTooLarge, SlowReader, StreamServeError, error_body

log = structlog.get_logger(__name__)

JSON = b"application/json"
RESUMABLE = b"x-streamserve-resumable"  # the header that asks for a stream to come back to, as "resumable" in a body does
WARNING = b"x-streamserve-warning"  # the header that says which fields of a request have no effect here
LARGE_BODY = 64 * 1024  # bytes: as JSON some 0.2 ms
MAX_PART_BYTES = 64 * 1024  # of a body that are sent at once
LINGER_S = 5.0  # how long an upload that nobody wants is read on, so that the client gets to see why

Headers = Sequence[tuple[bytes, bytes]]
_NO_HEADER_TEXT = re.compile(rb"[^ -~]")
PutPart = Callable[[bytes], bool]  # see h1.DirectStream.put
PUT_PART = "streamserve.put_part"  # where it stands in scope["extensions"], for transports that have one
WhenLeft = Callable[[Callable[[], object] | None], object]  # see h1.TellingStream
WHEN_LEFT = "streamserve.when_left"  # likewise


class ClientLeft(Exception):
    """The client closed the connection; nobody is there to answer."""


class BoundedSend:
    """An ASGI `send` that raises SlowReader when the client leaves it blocked for longer than `limit_s`.

    A send that goes through at once, as nearly all do, costs no timer: 18 us per event leave no room for one.
    """

    __slots__ = ("_limit_s", "_send")

    def __init__(self, send: Send, limit_s: float) -> None:
        self._send = send
        self._limit_s = limit_s

    async def __call__(self, message: Message) -> None:
        sending = self._send(message).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            return
        try:
            with fail_after(self._limit_s):
                await _rest(sending, waits_for)
        except TimeoutError:
            raise SlowReader(f"the client has read nothing for {self._limit_s:g} s") from None


@coroutine
def _rest(steps: Generator[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, None]:
    """Await the rest of something that was already started and now waits for `waits_for`."""
    try:
        while True:
            try:
                value = yield waits_for
            except BaseException as error:
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(value)
    except StopIteration:
        return


def header_text(text: str) -> bytes:
    """A text as a header's value, which may hold names that clients chose: a line's end in them must not end the header."""
    return _NO_HEADER_TEXT.sub(b"?", text.encode("ascii", "replace"))


class Turnstile:
    """Lets one through at a time. The next follows when the event loop has had as long for others as the last one took, up to the
    end of its task's turn. So many large bodies that come together are read one by one, and the engine has its turns between."""

    def __init__(self) -> None:
        self._lock = Lock()

    async def enter(self) -> None:
        """What the caller does from here to its next await is its turn."""
        await self._lock.acquire()
        began_s = monotonic()
        loop = get_running_loop()
        loop.call_soon(lambda: loop.call_later(monotonic() - began_s, self._lock.release))


class Exchange:
    """A request and its answer. `headers` go on every answer, errors included; large bodies go through `turnstile`."""

    __slots__ = (
        "_has_whole_body",
        "_put_part",
        "_turnstile",
        "digest",
        "has_come",
        "has_ended",
        "has_started",
        "headers",
        "receive",
        "scope",
        "send",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: BoundedSend, headers: Headers, turnstile: Turnstile | None = None
    ) -> None:
        self._turnstile = turnstile
        self.scope = scope
        self.receive = receive
        self.send = send
        self.headers = headers
        self.has_started = False
        self.has_ended = False
        self.has_come = False  # the whole request, its body included
        self.digest = b""  # of the body, where it may be sent again to go on with a stream
        self._has_whole_body = scope["method"] in ("GET", "HEAD")
        self._put_part: PutPart = _put_nothing

    def header(self, name: bytes) -> bytes | None:
        """The first request header of that (lower-case) name."""
        return header_of(self.scope, name)

    async def body(self, max_bytes: int) -> bytes:
        """The whole request body. Raises RequestTooLarge, or ClientLeft when the client does not finish it."""
        self._check_announced(max_bytes)
        parts, size = [], 0
        while not self._has_whole_body:
            parts.append(await self._part(max_bytes, size))
            size += len(parts[-1])
        if self._turnstile is not None and size > LARGE_BODY:
            await self._turnstile.enter()
        body = b"".join(parts)
        if b'"resumable"' in body or self.header(RESUMABLE) is not None:
            self.digest = digest_of(body)
        return body

    async def parts(self, max_bytes: int) -> AsyncIterator[bytes]:
        """The request body as it arrives. Raises like body()."""
        self._check_announced(max_bytes)
        size = 0
        while not self._has_whole_body:
            part = await self._part(max_bytes, size)
            size += len(part)
            yield part

    def _check_announced(self, max_bytes: int) -> None:
        if self.header(b"content-encoding") not in (None, b"identity"):
            raise InvalidRequest("compressed bodies are not supported; send the body as it is", param="content-encoding")
        announced = self.header(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > max_bytes:
            raise _too_large(int(announced), max_bytes)

    async def _part(self, max_bytes: int, num_read: int) -> bytes:
        """The next part of the body, of which so much was read."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")
        if num_read + len(part) > max_bytes:
            raise _too_large(num_read + len(part), max_bytes)
        self._has_whole_body = self.has_come = not message.get("more_body", False)
        return part

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers."""
        self.has_started = True
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})
        self._put_part = self.scope.get("extensions", {}).get(PUT_PART, _put_nothing)

    def put(self, body: bytes) -> Awaitable[None] | None:
        """Send a part of the answer's body. None: it is on its way; else what is returned has to be awaited."""
        if self._put_part(body):
            return None
        if len(body) > MAX_PART_BYTES:
            return self._put_long(body, len(body))
        return self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def _put_long(self, body: bytes, end: int) -> None:
        """All up to `end`, in parts: a client that reads slowly has the time that is allowed for every one of them."""
        for start in range(0, end, MAX_PART_BYTES):
            part = body[start : min(start + MAX_PART_BYTES, end)]
            await self.send({"type": "http.response.body", "body": part, "more_body": True})

    async def write(self, body: bytes) -> None:
        """Send a part of the answer's body, and wait while the client takes nothing."""
        waits_for = self.put(body)
        if waits_for is not None:
            await waits_for

    async def end(self, body: bytes = b"") -> None:
        """Send the last part of the answer's body."""
        if len(body) > MAX_PART_BYTES:
            last = (len(body) - 1) // MAX_PART_BYTES * MAX_PART_BYTES
            await self._put_long(body, last)
            body = body[last:]
        self.has_ended = True
        await self.send({"type": "http.response.body", "body": body})

    async def answer(self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
        """Send a complete answer."""
        length = str(len(body)).encode()
        head = [(b"content-type", content_type), (b"content-length", length), *headers]
        if self._has_whole_body:
            await self.start(status, head)
            await self.end(body)
            return
        # An upload is under way. A server that closes now resets the connection, and the client never sees the answer.
        async with create_task_group() as tasks:
            finished = Event()
            tasks.start_soon(self._discard_body, finished)
            await self.start(status, head)
            await self.write(body)
            with move_on_after(LINGER_S):
                await finished.wait()
            await self.end()
            tasks.cancel_scope.cancel()

    async def _discard_body(self, finished: Event) -> None:
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                finished.set()
                return

    async def answer_json(self, value: Any, status: int = 200, headers: Headers = ()) -> None:
        """Send a complete JSON answer."""
        await self.answer(status, orjson.dumps(value), headers=headers)

    async def answer_error(self, error: StreamServeError, headers: Headers = (), body: dict[str, Any] | None = None) -> None:
        """Send an error with its status, its body (OpenAI's shape without one) and, when the queue is full, the time to come
        back."""
        if isinstance(error, QueueFull):
            headers = [*headers, (b"retry-after", str(ceil(error.retry_after_s)).encode())]
        await self.answer_json(error_body(error) if body is None else body, error.status, headers)


def _put_nothing(part: bytes) -> bool:
    """For transports without a shortcut."""
    return False


def digest_of(data: bytes) -> bytes:
    """Tells data apart without keeping it."""
    return blake2b(data, digest_size=16).digest()


def _too_large(size: int, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has {size} bytes; at most {max_bytes} are allowed (--max-body-mb)", param="body")


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that (lower-case) name."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def unforeseen(failure: Exception, **fields: object) -> StreamServeError:
    """What a client is told of a failure that is a bug of ours; the log gets all of it."""
    log.error("request_failed", exc_info=failure, **fields)
    return StreamServeError("the server failed while it served this request; its log says more")


@contextmanager
def one_error() -> Iterator[None]:
    """Raise the error itself where a task group would raise a group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


class Presence:
    """See leaving_noticed. Two plain tasks at most: a task group costs a request more than all that is done in it."""

    __slots__ = ("_abort", "_beside", "_exchange", "_failure", "_has_left", "_scope", "_timer", "_watch", "_when_left")

    def __init__(self, exchange: Exchange, abort: Callable[[], object]) -> None:
        self._exchange = exchange
        self._abort = abort
        self._has_left = False
        self._when_left: WhenLeft | None = None  # the transport, which tells of itself once it has nothing more to read
        self._watch: Task[None] | None = None  # where it does not
        self._timer: TimerHandle | None = None
        self._beside: Task[None] | None = None
        self._failure: BaseException | None = None

    def start_after(self, delay_s: float, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run something beside the body from then on, if it lasts so long; it ends with the body, which a failure of it ends.
        One thing only."""

        def start() -> None:
            self._beside = get_running_loop().create_task(run())
            self._beside.add_done_callback(self._note_end)

        self._timer = get_running_loop().call_later(delay_s, start)

    def _note_end(self, beside: Task[None]) -> None:
        if not beside.cancelled() and (failure := beside.exception()) is not None:
            self._failure = failure
            self._scope.cancel()

    async def _watch_client(self) -> None:
        receive = self._exchange.receive
        while (await receive())["type"] != "http.disconnect":
            pass
        self._note_leaving()

    def _note_leaving(self) -> None:
        if not self._exchange.has_ended:
            self._has_left = True
            self._abort()
            self._scope.cancel()

    async def __aenter__(self) -> "Presence":
        self._scope = CancelScope()
        self._scope.__enter__()
        if self._exchange.has_come:
            self._when_left = self._exchange.scope.get("extensions", {}).get(WHEN_LEFT)
        if self._when_left is None:
            self._watch = get_running_loop().create_task(self._watch_client())
        else:
            self._when_left(self._note_leaving)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._when_left is not None:
            self._when_left(None)
        if self._watch is not None:
            self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._beside is not None:
            self._beside.cancel()
        if self._scope.__exit__(kind, error, trace) or error is None:
            if self._failure is not None:
                raise self._failure
            if self._has_left:
                raise ClientLeft
            return True
        return None


def leaving_noticed(exchange: Exchange, abort: Callable[[], object]) -> Presence:
    """Watch, while the body runs, for the client to leave: then `abort` is called at once and the body is cancelled.

    Raises ClientLeft in that case. An ASGI application is not told otherwise that its client has left: its sends just become
    silent.
    """
    return Presence(exchange, abort)
