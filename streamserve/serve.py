"""The server: builds all parts, runs them in one task group, stops them in order. The composition root.

Order of a start: bind the port, answer /health while the model loads in a worker thread, run one warm-up request,
open the doors. Order of a stop: refuse new requests, let running ones finish within the drain time, abort the rest,
close the sockets. A second signal stops at once.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import hypercorn.asyncio
import hypercorn.config
import structlog
from anyio import create_task_group, move_on_after, open_signal_receiver, sleep
from anyio.abc import TaskGroup

from streamserve import process
from streamserve.api.app import Api
from streamserve.api.auth import read_keys
from streamserve.api.gate import Gate
from streamserve.api.h2 import install_flow_control
from streamserve.api.playground import Playground, static_folder
from streamserve.api.response_store import ResponseStore, open_store
from streamserve.application import app_of
from streamserve.build import Built, build
from streamserve.config import Config, ServerConfig
from streamserve.errors import ConfigError, StartError
from streamserve.metrics import Metrics
from streamserve.startup import StartUp

log = structlog.get_logger(__name__)
MIB = 1 << 20
ROOT_PATH = "STREAMSERVE_ROOT_PATH"  # the prefix below which a proxy serves this, if it passes it on
SETTLE_S = 5.0  # for what is still to be kept when everything has ended


def run(config: Config) -> int:
    """Serve until told to stop; returns the process's exit code."""
    backend: dict[str, object] = {}
    if sys.platform != "win32":
        with suppress(ImportError):
            import uvloop  # noqa: F401  (hypercorn enforces its graceful timeout on Python 3.12+ only with uvloop)

            backend["use_uvloop"] = True
    return anyio.run(Server(config).run, backend="asyncio", backend_options=backend)


class Server:
    """One listening server and the engine behind it."""

    def __init__(self, config: Config) -> None:
        config = self._config = replace(config, server=read_keys(config.server, os.environ))
        self._display = StartUp(config)
        self._page = Playground(None if config.server.disable_playground else static_folder())
        self._gate = Gate(self._page, self._display.progress, os.environ.get(ROOT_PATH, ""))
        self._metrics = Metrics()
        self._stop = anyio.Event()  # tells hypercorn to stop
        self._closed = anyio.Event()  # it has
        self._built: Built | None = None
        self._app: Api | None = None
        self._store: ResponseStore | None = None
        self._exit_code = 0

    async def run(self) -> int:
        """See module."""
        server = self._config.server
        asyncio.get_running_loop().set_exception_handler(_quiet_about_cancelled)
        listener = bind(server)
        port: int = listener.getsockname()[1]
        install_flow_control(server.write_timeout_s)
        async with create_task_group() as tasks:
            tasks.start_soon(self._watch_signals, tasks)
            tasks.start_soon(self._start_engine, tasks, port)
            tasks.start_soon(self._serve_http, listener)
            await self._closed.wait()
            if self._app is not None:
                await self._app.stop_batches()
            tasks.cancel_scope.cancel()
        if self._app is not None:
            with move_on_after(SETTLE_S):
                await self._app.settled()
        if self._built is not None:
            await anyio.to_thread.run_sync(self._built.close)
        if self._store is not None:
            self._store.close()
        return self._exit_code

    async def _serve_http(self, listener: socket.socket) -> None:
        # In a task of its own: the task group inside hypercorn leaves its host task marked as cancelled.
        try:
            await hypercorn.asyncio.serve(
                self._gate,  # type: ignore[arg-type]
                http_config(self._config.server, listener),
                shutdown_trigger=self._stop.wait,
                mode="asgi",
            )
        finally:
            self._closed.set()

    async def _start_engine(self, tasks: TaskGroup, port: int) -> None:
        started = time.monotonic()
        try:
            load = partial(build, self._config, self._metrics, self._display)
            self._store = await anyio.to_thread.run_sync(open_store, self._config.server.response_store)
            built = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)  # Ctrl+C does not wait for weights
            process.settle()
            self._built = built
            self._app = app_of(self._config, built, metrics=self._metrics, response_store=self._store, page=self._page)
            await self._app.resume_batches()
        except StartError as error:
            self._display.failed(error)
            self._exit_code = 1
            self._stop.set()
            return
        tasks.start_soon(self._run_part, built.engine.run)
        if built.encoder is not None:
            tasks.start_soon(self._run_part, built.encoder.embedder.run)
        self._gate.open(self._app)
        encoder_name = built.encoder.name if built.encoder else None
        self._display.ready(port, built.model_name, time.monotonic() - started, encoder_name)

    async def _run_part(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run the engine, or the embedder beside it, to the end of the server."""
        try:
            await run()
        except Exception as error:
            # Requests have had their last delta by now; give the sockets a moment to carry it, then let a supervisor restart us.
            log.critical("engine_stopped", exc_info=error)
            self._exit_code = 1
            await sleep(0.5)
            self._stop.set()

    async def _watch_signals(self, tasks: TaskGroup) -> None:
        with open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            seen = 0
            async for number in signals:
                seen += 1
                if seen == 1:
                    log.info("shutdown_started", signal=signal.Signals(number).name)
                    tasks.start_soon(self._drain)
                else:
                    self._exit_code = 130 if number == signal.SIGINT else 1
                    self._stop.set()

    async def _drain(self) -> None:
        if self._built is not None:
            engine = self._built.engine
            embedder = self._built.encoder.embedder if self._built.encoder is not None else None
            engine.close()
            if embedder is not None:
                embedder.close()
            if self._app is not None:
                self._app.close_idle_sockets()
            with move_on_after(self._config.server.drain_timeout_s):
                await engine.idle()
                if embedder is not None:
                    await embedder.idle()
            if self._app is not None:
                await self._app.stop_batches()
            engine.abort_all()
            await sleep(0.1)  # last events leave before the sockets close
        self._stop.set()


def _quiet_about_cancelled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Python 3.11 reports a connection's task that was cancelled, as at every shutdown, as an error in its own callback."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def bind(server: ServerConfig) -> socket.socket:
    """A listening socket on the configured address; port 0 picks a free one."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        place = f"{server.host}:{server.port}"
        raise ConfigError(f"cannot listen on {place}: {error.strerror}; choose another --port or --host") from None
    listener.listen(1024)
    return listener


def http_config(server: ServerConfig, listener: socket.socket) -> hypercorn.config.Config:
    """hypercorn's settings; its own access log and short time-outs are replaced by ours."""
    config = hypercorn.config.Config()
    config.bind = [f"fd://{listener.detach()}"]  # hypercorn closes it
    config.backlog = 1024
    config.keep_alive_timeout = 75.0
    config.keep_alive_max_requests = 1_000_000
    config.h2_max_concurrent_streams = 1000
    config.graceful_timeout = 1.0  # requests were drained by us before hypercorn is told to stop
    config.websocket_max_message_size = server.max_body_mb * MIB + 64 * 1024  # ours answers with an error frame first
    config.websocket_ping_interval = 20.0
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None
    config.certfile = server.ssl_certfile
    config.keyfile = server.ssl_keyfile
    return config
