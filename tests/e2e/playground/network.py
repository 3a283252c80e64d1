"""A network between a browser and a server, which can be cut, healed, made slow or made to swallow everything."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PART = 4096


class Network:
    """Passes connections on to a port on this machine, in a thread of its own: beside playwright no event loop can be run."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.port = 0
        self.delay_s = 0.0  # of each part of an answer
        self.strips = b""  # a prefix that is taken off the path of each request
        self._is_cut = False
        self._swallows = False
        self._passing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def cut(self) -> None:
        """Break every connection, and let none through any more."""
        self._is_cut = True
        self._call(self._break_all())

    def drop(self) -> None:
        """Break every connection once; new ones are let through."""
        self._call(self._break_all())

    def swallow(self) -> None:
        """Connections stay, and nothing passes in either direction."""
        self._swallows = True

    def heal(self) -> None:
        """As in the beginning. What was swallowed does not come back."""
        self._is_cut = self._swallows = False

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self.cut()
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, action: object) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(10)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _break_all(self) -> None:
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._is_cut:
            writer.transport.abort()
            return
        self._passing.add(task)
        up_writer = None
        try:
            with suppress(OSError, asyncio.CancelledError):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.server_port)
                there = asyncio.ensure_future(self._pass_on(reader, up_writer, delays=False))
                back = asyncio.ensure_future(self._pass_on(up_reader, writer, delays=True))
                try:
                    await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    there.cancel()
                    back.cancel()
        finally:
            self._passing.discard(task)
            writer.transport.abort()
            if up_writer is not None:
                up_writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delays: bool) -> None:
        with suppress(OSError):
            while part := await reader.read(PART):
                if self.strips and not delays:
                    part = _stripped(part, self.strips)
                if delays and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if not self._swallows:
                    writer.write(part)
                    await writer.drain()


def _stripped(part: bytes, prefix: bytes) -> bytes:
    """A part of what a client sends, as a proxy passes it on that serves the server below a prefix."""
    for method in (b"GET ", b"POST ", b"DELETE "):
        if part.startswith(method + prefix + b"/"):
            return method + part.removeprefix(method + prefix)
    return part


@contextmanager
def network_to(url: str) -> Iterator[Network]:
    """A network in front of the server at this address."""
    network = Network(int(url.rstrip("/").rpartition(":")[2]))
    network.start()
    try:
        yield network
    finally:
        network.stop()
