"""TCP connections as hypercorn 0.18 keeps them, corrected; h2.py installs it.

    closing           waits for a client that reads nothing. Here it waits `patience_s`, then cuts.
    requests          that come at once are all read in the same turn of the event loop, while the engine waits. Here one
                      connection is read in each turn.
    keep-alive        two tasks and a timer begin and end around every request. Here one task looks after a connection from its
                      first request to its end.

Owns the queue of connections that have something to say. Knows nothing of HTTP, nor of the application.
"""

from asyncio import AbstractEventLoop, Future, StreamReader, Task, get_running_loop, shield, timeout
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData

RESUME_BYTES = 16 * 1024  # asyncio's and uvloop's low-water mark: with no more than this buffered, writing is not paused


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


class IdleTime:
    """How long a connection has had no request, in place of a task for every such time. See AsyncioSingleTask."""

    def __init__(self) -> None:
        self.since_s: float | None = None  # None: it has one
        self._watch: Task[None] | None = None

    async def restart(self, task_group: Any, watch: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """From now on it has none."""
        self.since_s = get_running_loop().time()
        if self._watch is None or self._watch.done():
            self._watch = task_group._task_group.create_task(watch())

    async def stop(self) -> None:
        """It has one, or has ended."""
        self.since_s = None

    def end(self) -> None:
        """It has ended."""
        if self._watch is not None:
            self._watch.cancel()


class CuttingTCPServer(TCPServer):
    """A connection that is cut when the client takes nothing for `patience_s` while there is something to take."""

    def __init__(self, *connection: Any, patience_s: float, intake: Intake) -> None:
        super().__init__(*connection)
        self._patience_s = patience_s
        self._intake = intake
        self.idle_task: IdleTime = IdleTime()  # type: ignore[assignment]

    def put(self, data: bytes) -> bool:
        """Whether `data` is on its way to the client. If not it has to go through `protocol_send`, which may wait."""
        transport = self.writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > RESUME_BYTES or self.send_lock.locked():
            return False
        transport.write(data)
        return True

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
        self.idle_task.end()

    async def _idle_timeout(self) -> None:
        """Close the connection when it has had no request for long, or the server stops while it has none."""
        idle, limit_s = self.idle_task, self.config.keep_alive_timeout
        rest_s = limit_s
        while rest_s > 0:
            with suppress(TimeoutError):
                async with timeout(rest_s):
                    await self.context.terminated.wait()
                    break
            rest_s = limit_s if idle.since_s is None else idle.since_s + limit_s - self.loop.time()
        if idle.since_s is not None:
            await shield(self._initiate_server_close())

    async def _close(self) -> None:
        with suppress(TimeoutError):  # hypercorn may swallow the cancellation, and then nothing is raised
            async with timeout(self._patience_s) as limit:
                await super()._close()
        if limit.expired():
            self.writer.transport.abort()
