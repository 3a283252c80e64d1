"""Corrections to hypercorn 0.18, installed by one explicit call: what a client does not read must make `send` wait, and
what has nothing to wait for must cost little.

    HTTP/2   StreamBuffer.pop(0), as called while a stream's window is exhausted, lets the pusher go on: `send` never waits
             and the buffer grows without end. Here it waits until the buffer was really emptied.
    HTTP/2   an answer that the application breaks off leaves the stream open for ever. Here it is reset.
    HTTP/2   a connection that closes leaves pushers waiting. Here they are let go.
    TCP      closing a connection waits for a client that reads nothing. Here it waits `patience_s`, then cuts.
    TCP      requests that come at once are all read in the same turn of the event loop, while the engine waits. Here one
             connection is read in each turn.
    HTTP/1.1 a part of a streamed answer passes six coroutines and two state machines, which have nothing to add to it, on
             its way to the socket. Here the scope's extensions hold a function, PUT_PART, that puts it there in one step.

Owns the queue of connections that have something to say. Knows nothing of the application. Remove each part when hypercorn has
it.
"""

from asyncio import AbstractEventLoop, Future, StreamReader, get_running_loop, timeout
from collections import deque
from contextlib import suppress
from functools import partial
from typing import Any

import h2.exceptions
import h11
import hypercorn.asyncio.run
import hypercorn.protocol
import hypercorn.protocol.h2
from h2.errors import ErrorCodes
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

from streamserve.api.wire import PUT_PART

RESUME_BYTES = 16 * 1024  # asyncio's and uvloop's low-water mark: with no more than this buffered, writing is not paused


class BlockingBuffer(StreamBuffer):
    """A stream's outgoing bytes; `push` waits while more than the high-water mark is in it."""

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class ResettingH2(H2Protocol):
    """HTTP/2 whose streams end when their application ends."""

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, StreamClosed):
            await self._reset_unfinished(event.stream_id)
        await super().stream_send(event)

    async def _reset_unfinished(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        if buffer is None or buffer._complete:
            return
        try:
            self.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            return  # the client reset it, or left, at the same moment
        await self._flush()
        await self._window_updated(stream_id)  # the sending task meets the closed stream and drops its buffer

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in self.stream_buffers.values():
                await buffer.close()


class PartWriter:
    """Puts parts of one chunked HTTP/1.1 answer on the wire without waiting."""

    __slots__ = ("_is_chunked", "_protocol", "_server", "_stream", "_transport")

    def __init__(self, protocol: H11Protocol, stream: HTTPStream, server: "CuttingTCPServer") -> None:
        self._protocol = protocol
        self._stream = stream
        self._server = server
        self._transport = server.writer.transport
        self._is_chunked: bool | None = None  # known when the head of the answer is sent

    def __call__(self, part: bytes) -> bool:
        """Whether `part` was taken. If not it has to go through `send`: it would have to wait, or the answer does not run.

        To h11 a part of a chunked body changes nothing, so its state stays right without having seen it.
        """
        protocol, stream, transport = self._protocol, self._stream, self._transport
        if (
            not part
            or protocol.stream is not stream
            or stream.closed
            or protocol.connection.our_state is not h11.SEND_BODY
            or transport.is_closing()
            or transport.get_write_buffer_size() > RESUME_BYTES
            or self._server.send_lock.locked()
        ):
            return False
        if self._is_chunked is None:
            self._is_chunked = self._find_out()
        if self._is_chunked:
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return self._is_chunked

    def _find_out(self) -> bool:
        """h11's rule: chunks where the client knows them and the length was not announced."""
        connection = self._protocol.connection
        has_length = any(name.lower() == b"content-length" for name, _ in self._stream.response["headers"])
        return (
            isinstance(connection, h11.Connection)
            and (connection.their_http_version or b"") >= b"1.1"
            and self._stream.scope["method"] != "HEAD"
            and self._stream.response["status"] == 200
            and not has_length
        )


class DirectH11(H11Protocol):
    """HTTP/1.1 whose applications find a PartWriter in their scope."""

    def __init__(self, *connection: Any) -> None:
        super().__init__(*connection)
        server = self.send.__self__  # type: ignore[attr-defined]
        assert isinstance(server, CuttingTCPServer), "a connection sends through its server's protocol_send"
        self._tcp = server

    async def _create_stream(self, request: h11.Request) -> None:
        await super()._create_stream(request)
        if isinstance(self.stream, HTTPStream):
            extensions: dict[str, Any] = self.stream.scope["extensions"]
            extensions[PUT_PART] = PartWriter(self, self.stream, self._tcp)


class Intake:
    """Lets connections that have something to say go on one by one, one in each turn of the event loop: sixty requests at once
    are tens of milliseconds of work, and others are streaming."""

    def __init__(self) -> None:
        self._waiting: deque[Future[None]] = deque()

    async def turn(self) -> None:
        """Wait for one's turn."""
        loop = get_running_loop()
        waiter = loop.create_future()
        self._waiting.append(waiter)
        if len(self._waiting) == 1:
            loop.call_soon(self._admit, loop)
        await waiter

    def _admit(self, loop: AbstractEventLoop) -> None:
        waiter = self._waiting.popleft()
        if not waiter.done():
            waiter.set_result(None)
        if self._waiting:
            loop.call_soon(self._admit, loop)


class TurnReader:
    """A connection's reader, of which every read waits for a turn once there is something."""

    def __init__(self, reader: StreamReader, intake: Intake) -> None:
        self._reader = reader
        self._intake = intake
        self.at_eof = reader.at_eof

    async def read(self, n: int = -1) -> bytes:
        """See asyncio.StreamReader."""
        data = await self._reader.read(n)
        await self._intake.turn()
        return data


class CuttingTCPServer(TCPServer):
    """A connection that is cut when the client takes nothing for `patience_s` while there is something to take."""

    def __init__(self, *connection: Any, patience_s: float, intake: Intake) -> None:
        super().__init__(*connection)
        self._patience_s = patience_s
        self._intake = intake

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                self.writer.write(event.data)
                if self.writer.transport.get_write_buffer_size() <= RESUME_BYTES:
                    await self.writer.drain()  # raises where the connection is lost; has nothing to wait for
                    return
                async with timeout(self._patience_s):
                    await self.writer.drain()
            except (ConnectionError, RuntimeError):
                await self.protocol.handle(Closed())
            except TimeoutError:
                self.writer.transport.abort()
                await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        self.reader = TurnReader(self.reader, self._intake)  # type: ignore[assignment]
        await super()._read_data()
        self.writer.close()  # the client is gone; hypercorn would keep its side until a sleeping ping task wakes

    async def _close(self) -> None:
        with suppress(TimeoutError):  # hypercorn may swallow the cancellation, and then nothing is raised
            async with timeout(self._patience_s) as limit:
                await super()._close()
        if limit.expired():
            self.writer.transport.abort()


def install_flow_control(write_timeout_s: float = 30.0) -> None:
    """Make hypercorn use the classes above, in this process, from the next connection on.

    Connections get a second more than the application gives a blocked send, so that the application says why.
    """
    hypercorn.protocol.h2.StreamBuffer = BlockingBuffer  # type: ignore[misc]
    hypercorn.protocol.H2Protocol = ResettingH2  # type: ignore[attr-defined]
    hypercorn.protocol.H11Protocol = DirectH11  # type: ignore[attr-defined,assignment]
    hypercorn.asyncio.run.TCPServer = partial(  # type: ignore[attr-defined,assignment]
        CuttingTCPServer, patience_s=write_timeout_s + 1.0, intake=Intake()
    )
