"""An engine in this process: its parts, its application, and the background loop that both run on.

Owns the life of one engine: built in the caller's thread, run on the background loop (lang/loops.py) beside others, closed once:
when it is told to, when nobody can call it any more, or when the process ends. Callers go through the application, as clients of
the server do (`InProcess`); no socket is opened.
"""

import asyncio
import atexit
import gc
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any
from weakref import WeakSet, finalize

import orjson
import structlog

from streamserve.api.app import Api
from streamserve.api.inside import Inside
from streamserve.api.wire import WARNING, Headers
from streamserve.application import app_of, num_in_flight
from streamserve.build import Built, Display, build
from streamserve.config import Config
from streamserve.errors import EngineStopped, InvalidRequest
from streamserve.lang import loops
from streamserve.lang.streams import ELSEWHERE
from streamserve.lang.transport import decoded, events_of, failure_of
from streamserve.llm.settings import in_python
from streamserve.metrics import Metrics

log = structlog.get_logger(__name__)

CLOSED = "this engine was shut down"
SETTLE_S = 5.0  # for what is still to be kept when everything has ended
MAX_TOLD = 100  # different warnings


class Host:
    """One engine and its application. Blocks while the model loads; raises StartError."""

    def __init__(self, config: Config, display: Display | None = None) -> None:
        metrics = Metrics()
        built = build(config, metrics, display)
        self.max_in_flight = num_in_flight(config, built)
        self._lock = threading.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        try:
            app = loops.run(self._open(config, built, metrics))
        except BaseException:
            built.close()
            raise
        self._parts: tuple[Built, Api, Inside] | None = (built, app, Inside(app))
        self._pid = os.getpid()
        _LIVING.add(self)

    async def _open(self, config: Config, built: Built, metrics: Metrics) -> Api:
        app = app_of(config, built, metrics=metrics)
        self._tasks.append(asyncio.create_task(_run_part(built.engine.run)))
        if built.encoder is not None:
            self._tasks.append(asyncio.create_task(_run_part(built.encoder.embedder.run)))
        await app.resume_batches()
        return app

    @property
    def inside(self) -> Inside:
        """The application, for calls on the background loop. Raises EngineStopped behind `close`, and in a forked child."""
        if self._parts is None:
            raise EngineStopped(CLOSED)
        if self._pid != os.getpid():
            raise EngineStopped(ELSEWHERE)
        return self._parts[2]

    def close(self) -> None:
        """End every request, then the threads, and let go of what holds memory. A second call does nothing. Any thread but the
        background loop's."""
        with self._lock:
            parts, self._parts = self._parts, None
        if parts is None or self._pid != os.getpid():  # a forked child has none of the threads
            return
        built, app, _ = parts
        loops.run(self._end(built, app))
        self._tasks.clear()
        built.close()  # waits for the step under way
        release = built.release
        del parts, built, app, _
        gc.collect()  # they know each other
        release()

    async def _end(self, built: Built, app: Api) -> None:
        await app.stop_batches()
        built.engine.close(CLOSED)
        built.engine.abort_all()
        if built.encoder is not None:
            built.encoder.embedder.close()
        await asyncio.sleep(0)  # last deltas are on their way
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await app.settled()


async def _run_part(run: Callable[[], Awaitable[None]]) -> None:
    """The engine, or the embedder beside it. Its end by an error ends its requests with one."""
    try:
        await run()
    except Exception as error:
        log.critical("engine_stopped", exc_info=error)


class _Living:
    """Hosts that the end of the process closes."""

    def __init__(self) -> None:
        self._hosts: WeakSet[Host] = WeakSet()
        self._is_registered = False

    def add(self, host: Host) -> None:
        if not self._is_registered:
            self._is_registered = True
            # Before the executors are shut down, which steps are handed to; atexit's own functions are called behind that.
            register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
            register(self._close_all)
        self._hosts.add(host)

    def _close_all(self) -> None:
        for host in list(self._hosts):
            host.close()


_LIVING = _Living()


def _leave(host: Host) -> None:
    """Whichever thread the garbage collector runs in, possibly one of the engine's own, must not wait."""
    threading.Thread(target=host.close, name="streamserve-close", daemon=True).start()


class InProcess:
    """A Transport (lang/transport.py) into a host, which is closed when its last user is gone."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._told: set[bytes] = set()
        finalize(self, _leave, host).atexit = False  # the host sees to that itself

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """See Transport."""
        reply = await self._host.inside.ask(method, path, _content(body))
        if reply.status >= 400:
            raise _failure(reply.status, reply.body, reply.headers)
        self._tell(reply.headers)
        return decoded(reply.body)

    async def events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """See Transport."""
        async with self._host.inside.reading("POST", path, _content(body)) as reading:
            if reading.status >= 400:
                content = b"".join([part async for part in reading.parts])
                raise _failure(reading.status, content, reading.headers)
            self._tell(reading.headers)
            async with aclosing(events_of(reading.parts)) as events:
                async for event in events:
                    yield event

    def _tell(self, headers: Headers) -> None:
        """Which fields of a request had no effect, once each."""
        for name, value in headers:
            if name == WARNING and value not in self._told and len(self._told) < MAX_TOLD:
                self._told.add(value)
                log.warning("fields_without_effect", why=value.decode())

    async def aclose(self) -> None:
        """See Transport. The engine goes on: others may use it."""


def _content(body: Any) -> bytes:
    """A body as JSON. Numbers and arrays of numpy are what they hold, and keys may be token ids."""
    try:
        return b"" if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise InvalidRequest(f"the request holds what JSON has no form for: {error}") from None


def _failure(status: int, content: bytes, headers: Headers) -> Exception:
    """What a call raises; it names settings as they are written in Python."""
    retry_after = next((value.decode() for name, value in headers if name == b"retry-after"), None)
    error = failure_of(status, content, retry_after)
    error.args = (in_python(str(error)), *error.args[1:])
    return error
