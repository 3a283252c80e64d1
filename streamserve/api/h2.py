"""Corrections to hypercorn 0.18, installed by one explicit call: what a client does not read must make `send` wait, and
what has nothing to wait for must cost little.

    HTTP/2   StreamBuffer.pop(0), as called while a stream's window is exhausted, lets the pusher go on: `send` never waits
             and the buffer grows without end. Here it waits until the buffer was really emptied.
    HTTP/2   an answer that the application breaks off leaves the stream open for ever. Here it is reset.
    HTTP/2   a connection that closes leaves pushers waiting. Here they are let go.

HTTP/1.1 is in h1.py, what connections have in common in connections.py.

Owns nothing. Knows nothing of the application. Remove each part when hypercorn has it.
"""

from functools import partial

import h2.exceptions
import hypercorn.asyncio.run
import hypercorn.protocol
import hypercorn.protocol.h2
from h2.errors import ErrorCodes
from hypercorn.events import Closed, Event
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer

from streamserve.api.connections import CuttingTCPServer, Intake
from streamserve.api.h1 import DirectH11, TellingStream


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


def install_flow_control(write_timeout_s: float = 30.0) -> None:
    """Make hypercorn use these classes, and those of h1.py and connections.py, in this process, from the next connection on.

    Connections get a second more than the application gives a blocked send, so that the application says why.
    """
    hypercorn.protocol.h2.StreamBuffer = BlockingBuffer  # type: ignore[misc]
    hypercorn.protocol.h2.HTTPStream = TellingStream  # type: ignore[attr-defined]
    hypercorn.protocol.H2Protocol = ResettingH2  # type: ignore[attr-defined]
    hypercorn.protocol.H11Protocol = DirectH11  # type: ignore[attr-defined,assignment]
    hypercorn.asyncio.run.TCPServer = partial(  # type: ignore[attr-defined,assignment]
        CuttingTCPServer, patience_s=write_timeout_s + 1.0, intake=Intake()
    )
