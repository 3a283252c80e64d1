"""Clients that can misbehave: raw HTTP/1.1, HTTP/2 on the h2 library, WebSocket on wsproto's frames. Plain asyncio."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions


def chat_body(max_tokens: int = 4000, **fields: object) -> dict[str, Any]:
    """A request that goes on for long."""
    return {"messages": [{"role": "user", "content": "go on"}], "max_tokens": max_tokens, "ignore_eos": True, **fields}


async def post_h1(
    port: int, path: str, body: dict[str, Any], *, window: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a POST over its own connection. `window` makes the kernel's receive buffer small, and ours too."""
    sock = socket.socket()
    if window is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=window or 65536)
    data = json.dumps(body).encode()
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(data), data))
    return reader, writer


async def read_events(reader: asyncio.StreamReader, count: int) -> list[dict[str, Any]]:
    """The next events of an SSE answer, whatever the chunked coding around them."""
    events: list[dict[str, Any]] = []
    while len(events) < count:
        line = await reader.readline()
        assert line, "the stream ended early"
        if line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
    return events


class H2Client:
    """One HTTP/2 connection, prior knowledge, without TLS. Windows are only updated for streams in `reads`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.received: dict[int, bytearray] = {}
        self.status: dict[int, str] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.reads: set[int] = set()

    def flush(self) -> None:
        self._writer.write(self.connection.data_to_send())

    def post(self, path: str, body: dict[str, Any], *, reads: bool = True, headers: dict[str, str] | None = None) -> int:
        """Start a request; the result is its stream id."""
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x"), *(headers or {}).items()]
        self.connection.send_headers(stream, head)
        self.connection.send_data(stream, json.dumps(body).encode(), end_stream=True)
        self.received[stream] = bytearray()
        if reads:
            self.reads.add(stream)
        self.flush()
        return stream

    async def run(self) -> None:
        """Take in frames until the connection ends."""
        while data := await self._reader.read(65536):
            for event in self.connection.receive_data(data):
                self._take(event)
            self.flush()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self.status[event.stream_id] = str(dict(event.headers)[":status"])  # type: ignore[index]
        elif isinstance(event, h2.events.DataReceived):
            self.received[event.stream_id] += event.data
            # The connection's window stays open for the others; the stream's own one only where it is read.
            if not event.flow_controlled_length:
                return
            self.connection.increment_flow_control_window(event.flow_controlled_length)
            if event.stream_id in self.reads:
                with suppress(h2.exceptions.StreamClosedError):  # its end came with the same bytes
                    self.connection.increment_flow_control_window(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.reset.add(event.stream_id)

    def num_events(self, stream: int) -> int:
        """SSE events that have arrived on a stream."""
        return self.received[stream].count(b"data: {")


@asynccontextmanager
async def h2_client(port: int) -> AsyncIterator[H2Client]:
    """A connection that takes in frames in the background."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = H2Client(reader, writer)
    client.connection.initiate_connection()
    client.flush()
    task = asyncio.create_task(client.run())
    try:
        yield client
        assert not task.done() or task.exception() is None, task.exception()
    finally:
        task.cancel()
        writer.close()


async def until(condition: Any, *, within_s: float = 10.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (what is waited for lies outside: the kernel, the server)
            await asyncio.sleep(0.005)
