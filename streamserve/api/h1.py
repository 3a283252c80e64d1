"""HTTP/1.1 as hypercorn 0.18 speaks it, with fewer steps between an answer and the socket. h2.py installs it.

    a request         is looked at for an upgrade once, not header by header in three places
    a streamed part   passes six coroutines and two state machines, which have nothing to add to it. Here the scope's
                      extensions hold a function, PUT_PART, that puts it on the wire in one step
    head and end      are checked twice and written by themselves. Here headers are checked once, and what an answer writes in
                      one turn of the event loop goes out in as few writes as it can: head and body, last part and end mark
    who leaves        is told of by a message, for which a task has to wait. Here the scope's extensions hold a function,
                      WHEN_LEFT, that takes what is to be called then; over HTTP/2 too

Framing stays h11's: whether there are chunks, whether the connection goes on, what comes after what.

Owns how an answer becomes bytes. Knows nothing of the application.
"""

import re
from asyncio import get_running_loop
from collections.abc import Callable
from functools import lru_cache
from time import time
from typing import Any

import h11
from hypercorn.config import Config
from hypercorn.events import RawData
from hypercorn.protocol.events import Event, Request, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.typing import ASGISendEvent
from hypercorn.utils import suppress_body

from streamserve.api.connections import CuttingTCPServer
from streamserve.api.wire import PUT_PART, WHEN_LEFT

FRAMING = (b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"trailer")  # headers that mean something to h11
NO_HEADERS = h11.Response(status_code=200, headers=[]).headers
END = h11.EndOfMessage()
CHUNKED = b"\r\nTransfer-Encoding: chunked\r\n"  # as h11 writes it
# Lower-case names, and values without line ends where there are as many of these as headers: nothing that h11 would refuse.
_LINES = re.compile(rb"(?:[a-z0-9-]+: [^\0\r\n]*\r\n)*")


@lru_cache(maxsize=4)
def _common(config: Config, second: int) -> bytes:
    """The lines that every answer's head has in this second: the date, as a rule."""
    return b"".join([b"%b: %b\r\n" % header for header in config.response_headers("h11")])


class TellingStream(HTTPStream):
    """One exchange, over HTTP/1.1 or HTTP/2, whose application can have itself called when its client has left."""

    _left: Callable[[], object] | None = None

    def when_left(self, call: Callable[[], object] | None) -> None:
        """Call this when the client has left, or the exchange is over otherwise; at most one thing at a time. None: nothing."""
        self._left = call
        if self.closed and call is not None:
            get_running_loop().call_soon(self._note_end)

    async def handle(self, event: Event) -> None:
        """See HTTPStream."""
        if type(event) is StreamClosed:
            self._note_end()
        await super().handle(event)
        if type(event) is Request:
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[WHEN_LEFT] = self.when_left

    def _note_end(self) -> None:
        call, self._left = self._left, None
        if call is not None:
            call()


class DirectStream(TellingStream):
    """One exchange. What it is sent goes to the socket, and past hypercorn's own steps where they have nothing to add."""

    def __init__(self, protocol: "DirectH11") -> None:
        super().__init__(
            protocol.app,
            protocol.config,
            protocol.context,
            protocol.task_group,
            protocol.ssl,
            protocol.client,
            protocol.server,
            protocol.stream_send,
            STREAM_ID,
        )
        self._protocol = protocol
        self._tcp = protocol.tcp
        self._head = b""  # not sent yet
        self._has_body = True
        self._is_chunked = False

    def put(self, part: bytes) -> bool:
        """Whether a part of the answer's body was taken. If not it has to go through `send`: it would have to wait, or the answer
        does not run, or is not chunked.

        To h11 a part of a chunked body changes nothing, so its state stays right without having seen it.
        """
        if (
            not part
            or not self._is_chunked
            or self.closed
            or self.state is not ASGIHTTPState.RESPONSE
            or self._protocol.connection.our_state is not h11.SEND_BODY
        ):
            return False
        if not self._tcp.put(b"%b%x\r\n%b\r\n" % (self._head, len(part), part)):
            return False
        self._head = b""
        return True

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """See HTTPStream."""
        if message is None:  # the application has ended
            if self._head and not self.closed:
                await self._send_body(b"", is_last=False)
        elif message["type"] == "http.response.body" and self.state is ASGIHTTPState.RESPONSE and not self.closed:
            await self._send_body(bytes(message.get("body", b"")), is_last=not message.get("more_body", False))
            return
        elif message["type"] == "http.response.start" and self.state is ASGIHTTPState.REQUEST and self._start(message):
            return
        await super().app_send(message)

    def _start(self, message: Any) -> bool:
        """Whether the head could be made; it is sent with the body, if that comes in the same turn of the event loop."""
        lines, framing = [], []
        for name, value in message["headers"]:
            if name in FRAMING:
                framing.append((name, value))
            else:
                lines.append(b"%b: %b\r\n" % (name, value))
        block = b"".join(lines)
        if message.get("trailers", False) or not _LINES.fullmatch(block) or block.count(b"\n") != len(lines):
            return False
        head = self._protocol.head(message["status"], framing)
        self.response = message
        self.state = ASGIHTTPState.RESPONSE
        self._has_body = not suppress_body(self.scope["method"], message["status"])
        self._is_chunked = self._has_body and CHUNKED in head
        if head:  # there is none where the client broke the rules, and hears nothing any more
            self._head = b"%b%b%b\r\n" % (head[:-2], block, _common(self.config, int(time())))
            self._tcp.loop.call_soon(self._send_head)
        return True

    def _send_head(self) -> None:
        """The turn is over."""
        if self._head and not self.closed and self._tcp.put(self._head):
            self._head = b""

    async def _send_body(self, body: bytes, *, is_last: bool) -> None:
        data = b""
        if body and self._has_body:
            data = b"%x\r\n%b\r\n" % (len(body), body) if self._is_chunked else self._protocol.framed(h11.Data(data=body))
        if is_last:
            data += self._protocol.framed(END)
        data, self._head = self._head + data, b""
        if data and not self._tcp.put(data):
            await self._protocol.send(RawData(data=data))
        if is_last:
            self.state = ASGIHTTPState.CLOSED
            await self.send(StreamClosed(stream_id=STREAM_ID))


class DirectH11(H11Protocol):
    """One connection."""

    def __init__(self, *connection: Any) -> None:
        super().__init__(*connection)
        tcp = self.send.__self__  # type: ignore[attr-defined]
        assert isinstance(tcp, CuttingTCPServer), "a connection sends through its server's protocol_send"
        self.tcp = tcp
        self._headers: list[tuple[bytes, bytes]] = []  # of the request that has just come
        self._asks_for_upgrade = False

    def head(self, status: int, framing: list[tuple[bytes, bytes]]) -> bytes:
        """An answer's head, without those of its headers that mean nothing to h11."""
        if self.keep_alive_requests >= self.config.keep_alive_max_requests:
            framing.append((b"connection", b"close"))
        return self.framed(h11.Response(status_code=status, headers=framing or NO_HEADERS))

    def framed(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> bytes:
        """An event as bytes; none where the client broke the rules, and hears nothing any more."""
        try:
            return self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return b""

    async def _check_protocol(self, event: h11.Request) -> None:
        """See H11Protocol; the first look at a request."""
        self._headers = list(event.headers)
        self._asks_for_upgrade = any([name == b"upgrade" for name, _ in self._headers])
        if self._asks_for_upgrade or event.method == b"PRI":
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        if self._asks_for_upgrade:  # to a WebSocket, as a rule
            await super()._create_stream(request)
            return
        self.stream = stream = DirectStream(self)
        await stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=self._headers,
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        extensions: dict[str, Any] = stream.scope["extensions"]
        extensions[PUT_PART] = stream.put
        self.keep_alive_requests += 1
        await self.context.mark_request()
