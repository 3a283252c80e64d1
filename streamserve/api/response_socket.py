"""The Responses API over a WebSocket at /v1/responses, as the openai client's `responses.connect()` speaks it.

    client -> server
    {"type": "response.create", …, "stream_id": S}        body of POST /v1/responses; stream_id is optional
    {"type": "response.cancel", "stream_id": S}            ours: ends what runs on the stream, and what waits behind it
    {"type": "auth", "api_key": K}                        ours: first frame, where a key is needed and no header could carry it

    server -> client
    the events of a response, one per frame, with the stream_id of its response.create
    {"type": "error", "status": N, "error": {…}, …}        a frame that began no response; the socket lives
    {"type": "auth.ok"}

Responses of one stream_id (or of none) come one after the other, in the order they were asked for; those of different ones
side by side. A response with `store` false can be continued on the socket it was made on. `generate` false computes the input,
for the cache, and answers nothing: what continues it begins sooner. Back-pressure, limits and closing are those of /v1/ws.

Owns a socket's streams. Frames and their turns are socket.py's. Knows nothing of what is in a body.
"""

import re
from collections import deque
from math import inf
from typing import Any

import orjson
from anyio.abc import TaskGroup
from starlette.types import Receive, Scope

from streamserve.api.pictures import Caller
from streamserve.api.response_job import ResponseJob
from streamserve.api.response_store import MIB, MemoryStore
from streamserve.api.responses import Responses
from streamserve.api.schema import show
from streamserve.api.service import Service
from streamserve.api.socket import MAX_REQUESTS, Lane, Link, opened
from streamserve.api.stream import Piece
from streamserve.api.wire import BoundedSend, unforeseen
from streamserve.errors import InvalidRequest, QueueFull, StreamServeError, error_body

MAX_RECORD_BYTES = 32 * MIB  # of responses that live as long as their socket
STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")


class ResponseSockets:
    """The route."""

    def __init__(self, service: Service, responses: Responses) -> None:
        self._service = service
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: BoundedSend) -> None:
        """Serve one socket until either side closes it."""
        link = await opened(self._service, scope, receive, send, takes_bytes=True)
        await link.serve(ResponseSocket(self._service, self._responses, link))


class Stream:
    """One stream_id of a socket: what waits, and what runs."""

    __slots__ = ("is_cancelled", "job", "lane", "tail", "waiting")

    def __init__(self, id: str | None) -> None:
        self.lane = Lane()
        self.waiting: deque[dict[str, Any]] = deque()
        self.job: ResponseJob | None = None
        self.is_cancelled = False
        self.tail = b"" if id is None else b',"stream_id":%b' % orjson.dumps(id)

    def cancel(self) -> None:
        """End what runs, or as soon as it has begun; what waits never begins."""
        self.waiting.clear()
        self.is_cancelled = True
        if self.job is not None:
            self.job.run.abort()


class ResponseSocket:
    """One open socket. A Talk."""

    def __init__(self, service: Service, responses: Responses, link: Link) -> None:
        self._service = service
        self._responses = responses
        self._link = link
        self._streams: dict[str | None, Stream] = {}  # those on which something runs
        self._records = MemoryStore(MAX_RECORD_BYTES, inf)

    @property
    def num_live(self) -> int:
        """See Talk."""
        return len(self._streams)

    def cancel_all(self) -> None:
        """See Talk."""
        for stream in self._streams.values():
            stream.cancel()

    def error(self, error: StreamServeError) -> bytes:
        """See Talk."""
        return _error(b"", error)

    # ---- frames in -----------------------------------------------------------------------------------------------

    async def take(self, frame: dict[str, Any], tasks: TaskGroup) -> None:
        """See Talk."""
        tail = b""
        try:
            id = _stream_id(frame)
            tail = Stream(id).tail
            self._take(id, frame, tasks)
        except StreamServeError as error:
            await self._link.reply(_error(tail, error))

    def _take(self, id: str | None, frame: dict[str, Any], tasks: TaskGroup) -> None:
        kind = frame.pop("type", None)
        stream = self._streams.get(id)
        if kind == "response.create":
            if sum(1 + len(busy.waiting) for busy in self._streams.values()) >= MAX_REQUESTS:
                raise QueueFull(f"{MAX_REQUESTS} responses run or wait on this socket; wait for one to end", retry_after_s=1.0)
            if stream is None:
                stream = self._streams[id] = Stream(id)
                tasks.start_soon(self._serve, id, stream)
            stream.waiting.append(frame)
        elif kind == "response.cancel":
            if frame:
                raise InvalidRequest(f"unknown field {show(min(frame))}; allowed is stream_id", param=min(frame)[:256])
            if stream is None:
                raise InvalidRequest("nothing runs on this stream; it may have ended already", param="stream_id")
            stream.cancel()
        else:
            raise InvalidRequest(f"type is {show(kind)}; allowed is response.create, response.cancel, auth", param="type")

    # ---- responses -----------------------------------------------------------------------------------------------

    async def _serve(self, id: str | None, stream: Stream) -> None:
        while stream.waiting:
            frame = stream.waiting.popleft()
            stream.is_cancelled = False  # what was cancelled no longer waits: this came later
            error: StreamServeError | None = None
            try:
                await self._answer(stream, frame)
            except StreamServeError as refused:
                error = refused
            except Exception as bug:
                error = unforeseen(bug, stream=id)
            stream.job = None
            if error is not None:
                await self._link.outbox.put(stream.lane, _error(stream.tail, error))
        del self._streams[id]
        self._link.note_end()

    async def _answer(self, stream: Stream, frame: dict[str, Any]) -> None:
        only_reads, caller = _only_reads(frame), Caller(self._service.owner_with(self._link.key or b""))
        job = stream.job = await self._responses.job(frame, caller, records=self._records, only_reads=only_reads)
        if stream.is_cancelled:
            job.run.abort()

        async def put(events: list[bytes]) -> None:
            for event in events:
                await self._link.outbox.put(stream.lane, b"%b%b}" % (event[:-1], stream.tail))

        async def emit(piece: Piece) -> None:
            await put(job.chunks(piece))

        with self._service.live(job.run):
            await job.run.start()
            async with self._responses.under_way(job):
                await put(job.opening())
                last = await job.deliver(emit)
                if not job.request.store:
                    await self._records.put(await job.record())
                await put(last)


def _error(tail: bytes, error: StreamServeError) -> bytes:
    nested = error_body(error)["error"]
    flat = {name: nested[name] for name in ("code", "message", "param")}  # where the openai client's type has them
    event = {"type": "error", "status": error.status, "error": nested, **flat, "sequence_number": 0}
    return b"%b%b}" % (orjson.dumps(event)[:-1], tail)


def _stream_id(frame: dict[str, Any]) -> str | None:
    id = frame.pop("stream_id", None)
    if id is not None and not (isinstance(id, str) and STREAM_ID.fullmatch(id)):
        raise InvalidRequest(
            f"stream_id is {show(id)}; 1 to 256 letters, digits, '_', '.' and '-' are expected", param="stream_id"
        )
    return id


def _only_reads(frame: dict[str, Any]) -> bool:
    """Take what is a socket's own out of a body. Whether nothing is to be generated."""
    stream, background, generates = frame.pop("stream", None), frame.get("background"), frame.pop("generate", None)
    if stream is not None and stream is not True:
        raise InvalidRequest(f"stream is {show(stream)}; over a WebSocket every response is streamed", param="stream")
    if background:
        raise InvalidRequest("background is not supported over a WebSocket; use POST /v1/responses", param="background")
    if generates is not None and not isinstance(generates, bool):
        raise InvalidRequest(f"generate is {show(generates)}; allowed is true, false", param="generate")
    if frame.get("resumable"):
        raise InvalidRequest("resumable is not supported over a WebSocket: it is for server-sent events", param="resumable")
    if frame.get("return_progress"):
        raise InvalidRequest("return_progress is not supported on this socket; /v1/ws has it", param="return_progress")
    if frame.get("stream_options") is not None:
        frame["stream"] = True  # they are a stream's
    return generates is False
