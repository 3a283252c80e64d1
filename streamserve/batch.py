"""`streamserve batch`: a file of requests in OpenAI's batch format in, a file of answers out, without a server.

Every line is called as over HTTP. Files are looked at before the model is loaded, and what the output answers already is not
asked again: after a crash, Ctrl+C or a power failure the same command goes on. Owns the command; what a batch is stands in
api/batch_*.py.
"""

import argparse
import sys
from asyncio import CancelledError, Semaphore, TaskGroup, create_task, sleep
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import monotonic

import anyio
import anyio.to_thread

from streamserve import process
from streamserve.api.batch_ledger import Ledger, Tally
from streamserve.api.batch_lines import Line
from streamserve.api.batch_todo import BadInput, Todo, indexed
from streamserve.api.batch_work import work
from streamserve.api.inside import Inside, Reply
from streamserve.api.response_store import open_store
from streamserve.api.wire import one_error
from streamserve.application import app_of, num_in_flight
from streamserve.build import Built, build
from streamserve.config import Config
from streamserve.errors import ConfigError, Conflict, EngineStopped
from streamserve.startup import StartUp

MIB = 1 << 20
MAX_IN_FLIGHT = 1024
SHOW_EVERY_S = 0.5


def run(config: Config, namespace: argparse.Namespace) -> int:
    """Answer everything; 1 when something failed. Raises ConfigError for files that cannot be used, before anything is asked."""
    source, output = Path(namespace.input_file), Path(namespace.output_file)
    errors = None if namespace.errors is None else Path(namespace.errors)
    with _opened(source, output, errors, config.server.max_body_mb * MIB) as (todo, ledger):
        before = deepcopy(ledger.tally)
        started = monotonic()
        try:
            if todo.num_answered < todo.num_lines:
                anyio.run(_run, config, todo, ledger, backend="asyncio")
        finally:
            _say(_summary(todo, ledger, before, monotonic() - started))
        return int(_num_failed(todo, ledger) > 0)


@contextmanager
def _opened(source: Path, output: Path, errors: Path | None, max_bytes: int) -> Iterator[tuple[Todo, Ledger]]:
    """What is to be done, and where its answers go. Blocks while the files are read."""
    named = [source.resolve(), output.resolve(), *([errors.resolve()] if errors is not None else [])]
    if len(set(named)) < len(named):
        raise ConfigError("the files of input, output and errors must be different ones")
    if not source.is_file():
        raise ConfigError(f"{source} is no file; an input is read twice, so that it cannot be a pipe")

    try:
        index = indexed(lambda: source.open("rb"), max_bytes)
    except BadInput as bad:
        raise ConfigError(f"{source}: {bad}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    ledger = Ledger(output, errors)
    try:
        todo = Todo(lambda: source.open("rb"), index, ledger.answers, max_bytes)
    except Conflict as conflict:
        ledger.close()
        raise ConfigError(f"{source} and {output}: {conflict}") from None
    if ledger.num_cut:
        _say(f"{output}: the last line was torn off; its request is asked again")
    if todo.num_strangers:
        _say(f"{output}: {todo.num_strangers} answers are of requests that {source} does not have; they stay")
    try:
        yield todo, ledger
    finally:
        todo.close()
        ledger.close()


async def _run(config: Config, todo: Todo, ledger: Ledger) -> None:
    display = StartUp(config, sys.stderr) if sys.stderr.isatty() else None
    built = await anyio.to_thread.run_sync(lambda: build(config, None, display), abandon_on_cancel=True)
    process.settle()
    store = open_store(config.server.response_store)
    try:
        # Whoever runs this asks in nobody's name: keys are for servers.
        open_to_all = replace(config, server=replace(config.server, api_key=(), admin_api_key=None, batch_folder=None))
        inside = Inside(app_of(open_to_all, built, response_store=store))

        async def ask(line: Line) -> Reply:
            reply = await inside.ask("POST", line.url, line.body)
            if not built.engine.facts().is_healthy:  # what it breaks off is no answer
                raise EngineStopped("the engine has failed; run the batch again to go on")
            return reply

        async with _running(built), _shown(todo, ledger.tally):
            await work(todo, ask, ledger, _Room(min(MAX_IN_FLIGHT, num_in_flight(config, built))))
    finally:
        await ledger.settled()  # what is being written counts
        store.close()
        built.close()


@asynccontextmanager
async def _running(built: Built) -> AsyncIterator[None]:
    """The engine, and the embedding model beside it, while the body runs. An engine that fails ends the body."""
    with one_error():
        async with TaskGroup() as tasks:
            parts = [tasks.create_task(built.engine.run())]
            if built.encoder is not None:
                parts.append(tasks.create_task(built.encoder.embedder.run()))
            try:
                yield
            finally:
                for part in parts:
                    part.cancel()


class _Room:
    """For so many requests, whatever they ask."""

    def __init__(self, size: int) -> None:
        self._free = Semaphore(size)

    async def enter(self, line: Line) -> None:
        await self._free.acquire()

    def leave(self, line: Line) -> None:
        self._free.release()


@asynccontextmanager
async def _shown(todo: Todo, tally: Tally) -> AsyncIterator[None]:
    """On a terminal: how far it is, while the body runs."""
    if not sys.stderr.isatty():
        yield
        return
    started, first, first_tokens = monotonic(), todo.num_answered, tally.usage.output_tokens

    async def show() -> None:
        while True:
            await sleep(SHOW_EVERY_S)
            answered, seconds = tally.completed + tally.failed - todo.num_strangers, monotonic() - started
            pace = (answered - first) / seconds
            left = f", {(todo.num_lines - answered) / pace:,.0f} s to go" if pace else ""
            tokens = (tally.usage.output_tokens - first_tokens) / seconds
            failed = f", {tally.failed:,} failed" if tally.failed else ""
            print(f"\r\x1b[K  {answered:,} of {todo.num_lines:,}{failed}, {tokens:,.0f} tokens/s{left}", end="", file=sys.stderr)
            sys.stderr.flush()

    task = create_task(show())
    try:
        yield
    finally:
        task.cancel()
        with suppress(CancelledError):
            await task
        print("\r\x1b[K", end="", file=sys.stderr)


def _num_failed(todo: Todo, ledger: Ledger) -> int:
    """Of the lines that the input has."""
    return ledger.tally.failed - todo.num_strangers_among(ledger.failed)


def _summary(todo: Todo, ledger: Ledger, before: Tally, seconds: float) -> str:
    tally = ledger.tally
    now = tally.completed + tally.failed - before.completed - before.failed
    parts = [f"{todo.num_lines:,} requests", f"{now:,} answered now"]
    if todo.num_answered:
        parts.append(f"{todo.num_answered:,} before")
    left = todo.num_lines - todo.num_answered - now
    if left:
        parts.append(f"{left:,} not yet: the same command goes on")
    parts.append(f"{_num_failed(todo, ledger):,} failed")
    tokens = tally.usage.output_tokens - before.usage.output_tokens
    return f"{', '.join(parts)}; {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
