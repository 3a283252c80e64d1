"""A real hypercorn on a free port in front of an application, and an engine that makes up tokens."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import hypercorn.asyncio
import hypercorn.config
from anyio import create_task_group
from starlette.types import ASGIApp

from streamserve.api.app import Api, create_app
from streamserve.api.h2 import install_flow_control
from streamserve.api.response_store import ResponseStore
from streamserve.cache.kv_cache import KVCache
from streamserve.config import ServerConfig
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.encodings import Encodings
from streamserve.engine.fake import Clock, FakeRunner
from streamserve.engine.grammar import Grammars
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.media.family import Family
from streamserve.media.fetch import Fetcher
from streamserve.text.byte_tokenizer import END_OF_TURN, byte_text_model
from streamserve.text.model import TextModel

PAGE_SIZE = 16
SCRIPT = b"The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True)
class FakeServer:
    """An application on an engine on a fake runner, with a scripted text of plain ASCII."""

    engine: Engine
    scheduler: Scheduler
    runner: FakeRunner
    app: Api
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until_idle(self) -> None:
        """Wait until no request is live."""
        async with asyncio.timeout(10):
            while (load := self.engine.load()).running or load.waiting:  # noqa: ASYNC110 (the engine tells nobody)
                await asyncio.sleep(0.002)


def fake_engine(
    *,
    step_s: float = 0.002,
    num_pages: int = 4096,
    max_running: int = 128,
    answer_len: int | None = None,
    clock: Clock | None = None,
    grammars: Grammars | None = None,
) -> tuple[Engine, Scheduler, FakeRunner]:
    """An engine whose every answer is a walk through SCRIPT, as far as its grammar allows."""
    text = byte_text_model().tokenizer
    eos = frozenset({END_OF_TURN})
    runner = FakeRunner(
        vocab_size=text.vocab_size,
        page_size=PAGE_SIZE,
        step_s=step_s,
        clock=clock,
        script=SCRIPT,
        eos_token_id=END_OF_TURN,
        answer_len=answer_len,
    )
    cache = KVCache(num_pages, PAGE_SIZE)
    scheduler = Scheduler(cache, Limits(max_running, 512, eos), POLICIES["fcfs"], encodings=Encodings())
    context_len = min(8192, (num_pages - 1) * PAGE_SIZE)
    options = EngineOptions(context_len, text.vocab_size, eos, seed=0, takes_media=True)
    engine = Engine(scheduler, runner, options, grammars=grammars)
    return engine, scheduler, runner


@asynccontextmanager
async def fake_server(
    config: ServerConfig | None = None,
    *,
    response_store: ResponseStore | None = None,
    text: TextModel | None = None,
    family: Family | None = None,
    fetcher: Fetcher | None = None,
    **engine_options: object,
) -> AsyncIterator[FakeServer]:
    """All of it, running. `text` is a byte tokenizer with another template, `family` how pictures are taken."""
    text = text or byte_text_model()
    grammars = Grammars(text.tokenizer, vocab_size=text.tokenizer.vocab_size, eos_token_ids=(END_OF_TURN,), num_lanes=1)
    engine, scheduler, runner = fake_engine(grammars=grammars, **engine_options)  # type: ignore[arg-type]
    settings = config or ServerConfig()
    app = create_app(engine, text, settings, model_name="tiny", response_store=response_store, family=family, fetcher=fetcher)
    async with create_task_group() as tasks:
        tasks.start_soon(engine.run)
        async with listening(app, config) as port:
            yield FakeServer(engine, scheduler, runner, app, port)
        tasks.cancel_scope.cancel()
    grammars.close()


@asynccontextmanager
async def listening(app: ASGIApp, config: ServerConfig | None = None, *, idle_s: float = 5.0) -> AsyncIterator[int]:
    """`app` behind hypercorn; yields the port. `idle_s`: how long a connection may have no request."""
    server = config or ServerConfig()
    install_flow_control(server.write_timeout_s)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    settings = hypercorn.config.Config()
    port = listener.getsockname()[1]
    settings.bind = [f"fd://{listener.detach()}"]
    settings.graceful_timeout = 0.2
    settings.keep_alive_timeout = idle_s
    settings.h2_max_concurrent_streams = 1000
    settings.websocket_max_message_size = server.max_body_mb * (1 << 20) + 65536
    settings.errorlog = None
    stop = asyncio.Event()
    serving = asyncio.create_task(
        hypercorn.asyncio.serve(app, settings, shutdown_trigger=stop.wait, mode="asgi")  # type: ignore[arg-type]
    )
    try:
        yield port
    finally:
        stop.set()
        await serving
