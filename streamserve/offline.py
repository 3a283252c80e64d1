"""`streamserve generate`: prompts in, answers out, without a server. From arguments, standard input, or JSON lines.

Owns the two formats. A line's fields mean what they mean over HTTP: it goes through the same application.

    in   {"messages": [...], "max_tokens": 64, "custom_id": "a"}     body of /v1/chat/completions or, with "prompt",
         {"custom_id": "a", "body": {"prompt": "..."}}               of /v1/completions; OpenAI's batch form works too
    out  {"index": 0, "custom_id": "a", "response": {...}}           in the order of the input
         {"index": 1, "custom_id": null, "error": {...}}             a line that cannot be served; the others go on
"""

import argparse
import sys
from asyncio import Task, TaskGroup
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any

import anyio
import anyio.to_thread
import orjson

from streamserve import process
from streamserve.api.inside import Inside, Reply
from streamserve.api.playground import Playground
from streamserve.api.schema import load_object
from streamserve.api.wire import WARNING
from streamserve.application import app_of, num_in_flight
from streamserve.build import Built, build
from streamserve.config import Config
from streamserve.errors import ConfigError, InvalidRequest, StreamServeError, error_body
from streamserve.startup import StartUp


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request: an answer as over HTTP, or the `error` object."""

    index: int
    custom_id: Any
    response: dict[str, Any] | None
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class Tally:
    """Sums over all answers."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Count one answer."""
        self.requests += 1
        self.failed += answer.error is not None
        if answer.response is not None:
            self.tokens += answer.response["usage"]["completion_tokens"]


def run(config: Config, namespace: argparse.Namespace) -> int:
    """Answer everything; 1 when something could not be answered."""
    return anyio.run(_run, config, namespace, backend="asyncio")


async def _run(config: Config, namespace: argparse.Namespace) -> int:
    if namespace.input is not None and namespace.prompts:
        raise ConfigError("prompts were given twice: as arguments and with --input; give one")
    if config.model.embedding_model is not None:
        raise ConfigError("--embedding-model is for `serve`: `generate` completes prompts; leave it out")
    display = StartUp(config, sys.stderr) if sys.stderr.isatty() else None
    built = await anyio.to_thread.run_sync(lambda: build(config, None, display))
    process.settle()
    try:
        with _opened(namespace.input, "r", sys.stdin) as source, _opened(namespace.output, "w", sys.stdout) as sink:
            bodies = _lines(source) if namespace.input else _prompts(namespace.prompts or [source.read()])
            return await _answer_all(config, built, bodies, namespace, sink)
    finally:
        built.close()


async def _answer_all(
    config: Config, built: Built, bodies: AsyncIterator[str | dict[str, Any]], namespace: argparse.Namespace, sink: IO[str]
) -> int:
    desk = Desk(config, built, _defaults(namespace), is_raw=namespace.raw)
    as_json, tally, started = bool(namespace.input or namespace.output), Tally(), monotonic()

    def take(answer: Answer) -> None:
        tally.add(answer)
        _write(answer, sink, as_json)

    is_read = True
    try:
        async with TaskGroup() as tasks:
            engine = tasks.create_task(built.engine.run())
            await desk.answer_all(bodies, take)
            engine.cancel()
    except* BrokenPipeError:  # whoever read our output has left
        is_read = False
    if not is_read:
        raise BrokenPipeError
    if as_json:
        seconds = monotonic() - started
        counts = f"{tally.requests} requests, {tally.failed} failed, {tally.tokens} tokens"
        print(f"{counts} in {seconds:.1f} s ({tally.tokens / seconds:.0f} tokens/s)", file=sys.stderr)
    return int(tally.failed > 0)


class Desk:
    """Turns bodies into answers, many at once, in the order they came. To be made on the engine's event loop."""

    def __init__(self, config: Config, built: Built, defaults: dict[str, Any], *, is_raw: bool) -> None:
        self._inside = Inside(app_of(config, built, page=Playground(None)))
        self._defaults = defaults
        self._completes = is_raw or built.text.template is None
        self._max_in_flight = num_in_flight(config, built)

    async def answer_all(self, bodies: AsyncIterator[str | dict[str, Any]], take: Callable[[Answer], None]) -> None:
        """One answer per body, in order. A body is read only when there is room for it."""
        waiting: deque[Task[Answer]] = deque()
        async with TaskGroup() as tasks:
            index = 0
            async for body in bodies:
                waiting.append(tasks.create_task(self._answer(index, body)))
                index += 1
                while waiting and (waiting[0].done() or len(waiting) >= self._max_in_flight):
                    take(await waiting.popleft())
            while waiting:
                take(await waiting.popleft())

    async def _answer(self, index: int, line: str | dict[str, Any]) -> Answer:
        custom_id = None
        try:
            given = load_object(line) if isinstance(line, str) else line
            custom_id, body = _unwrapped(given)
        except StreamServeError as error:
            return Answer(index, custom_id, None, error_body(error)["error"])
        reply = await self._asked(self._defaults | body)
        answer = orjson.loads(reply.body)
        if reply.status != 200:
            return Answer(index, custom_id, None, answer["error"])
        warnings = [part for name, value in reply.headers if name == WARNING for part in value.decode().split("; ")]
        return Answer(index, custom_id, {**answer, "warnings": warnings} if warnings else answer)

    async def _asked(self, body: dict[str, Any]) -> Reply:
        if "text" in body:  # a bare prompt from the command line
            text = body.pop("text")
            body |= {"prompt": text} if self._completes else {"messages": [{"role": "user", "content": text}]}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return await self._inside.ask("POST", path, orjson.dumps(body))


def _unwrapped(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    body = {name: value for name, value in given.items() if name != "custom_id"}
    if "body" in body:  # OpenAI's batch form
        body = body["body"]
        if not isinstance(body, dict):
            raise InvalidRequest("body is not an object", param="body")
    if body.get("stream"):
        raise InvalidRequest("stream is true; answers are written whole here", param="stream")
    return given.get("custom_id"), body


def _defaults(namespace: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(namespace, name) for name in ("max_tokens", "temperature", "seed")}
    return {name: value for name, value in given.items() if value is not None}


async def _prompts(prompts: Iterable[str]) -> AsyncIterator[str | dict[str, Any]]:
    for prompt in prompts:
        yield {"text": prompt}


async def _lines(source: IO[str]) -> AsyncIterator[str | dict[str, Any]]:
    while line := await anyio.to_thread.run_sync(source.readline):
        if line.strip():
            yield line


def _opened(path: str | None, mode: str, otherwise: IO[str]) -> Any:
    if path in (None, "-"):
        return nullcontext(otherwise)
    try:
        return Path(str(path)).open(mode, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror}") from None


def _write(answer: Answer, sink: IO[str], as_json: bool) -> None:
    if as_json:
        line: dict[str, Any] = {"index": answer.index, "custom_id": answer.custom_id}
        line |= {"response": answer.response} if answer.error is None else {"error": answer.error}
        sink.write(orjson.dumps(line).decode() + "\n")
    elif answer.response is not None:
        for choice in answer.response["choices"]:
            sink.write((choice["message"]["content"] if "message" in choice else choice["text"]) + "\n")
    else:
        assert answer.error is not None
        print(f"streamserve: prompt {answer.index}: {answer.error['message']}", file=sys.stderr)
    sink.flush()
