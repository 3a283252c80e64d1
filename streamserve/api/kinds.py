"""What can be asked for over /v1/ws: the bodies of every dialect, as runs and what writes their answers, or as whole answers.

Owns the names of these frames. Knows nothing of sockets, nor of what is in a body.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamserve.api.anthropic import Messages
from streamserve.api.embeddings import Embeddings
from streamserve.api.openai import Completions, Job
from streamserve.api.pictures import Caller
from streamserve.api.responses import Responses
from streamserve.api.resume import Produce
from streamserve.api.sse import Events
from streamserve.api.stream import Piece, Run
from streamserve.api.wire import WARNING, Headers
from streamserve.errors import InvalidRequest

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spoken:
    """A checked request: its run, not yet started, and what writes the answer. `warnings`: what of the body has no effect.
    `is_resumable`: the answer survives the socket, and may be read over HTTP: `write` writes it as it comes there."""

    run: Run
    write: Produce
    warnings: tuple[str, ...] = ()
    is_resumable: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that comes in one piece: JSON. `warnings`: as Spoken's."""

    answer: bytes
    usage: dict[str, int]
    warnings: tuple[str, ...] = ()


class Kinds:
    """Types of frames that ask for something. `spoken` ones are answered in chunks; they get the key of the socket as well."""

    def __init__(
        self,
        completions: Completions,
        responses: Responses,
        messages: Messages,
        embeddings: Embeddings,
        owner_with: Callable[[bytes], str],
    ) -> None:
        self._owner_with = owner_with
        self._completions = completions
        self._responses = responses
        self._messages = messages
        self._embeddings = embeddings
        self.spoken: dict[str, Callable[[Body, bytes], Awaitable[Spoken]]] = {
            "chat.create": self._chat,
            "completion.create": self._completion,
            "response.create": self._response,
            "message.create": self._message,
        }
        self.whole: dict[str, Callable[[Body], Awaitable[Whole]]] = {"embedding.create": self._embedding}

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.spoken, *self.whole)

    def _caller(self, key: bytes) -> Caller:
        return Caller(self._owner_with(key))

    async def _chat(self, given: Body, key: bytes) -> Spoken:
        return self._spoken(await self._completions.chat_job(given, self._caller(key), is_socket=True))

    async def _completion(self, given: Body, key: bytes) -> Spoken:
        return self._spoken(await self._completions.completion_job(given, is_socket=True))

    def _spoken(self, job: Job) -> Spoken:
        write = self._completions.write if job.is_resumable else _write_chunks
        return Spoken(job.run, partial(write, job), job.warnings, job.is_resumable)

    async def _response(self, given: Body, key: bytes) -> Spoken:
        job = await self._responses.job({**given, "stream": True}, self._caller(key))
        if job.request.background:
            raise InvalidRequest("background is for POST /v1/responses; what runs on a socket ends with it", param="background")
        _check_not_resumable(job.request.resumable)
        return Spoken(job.run, partial(self._responses.write, job))  # its warnings stand in its events

    async def _message(self, given: Body, key: bytes) -> Spoken:
        _check_not_resumable(bool(given.get("resumable")))
        job = await self._messages.job(given, self._caller(key))
        return Spoken(job.run, partial(self._messages.write, job), _warnings_in(job.headers))

    async def _embedding(self, given: Body) -> Whole:
        answer, num_tokens, warnings = await self._embeddings.embed(given)
        return Whole(answer, {"prompt_tokens": num_tokens, "total_tokens": num_tokens}, warnings)


async def _write_chunks(job: Job, stream: Events) -> None:
    """As over HTTP, but an error in mid-answer is raised: a socket has a frame for it."""

    def emit(piece: Piece) -> Awaitable[None] | None:
        chunks = job.shape.chunks(piece)
        return stream.events(*chunks) if chunks else None

    opening = job.shape.opening()
    waits_for = stream.events(*opening) if opening else None
    if waits_for is not None:
        await waits_for
    await job.run.deliver(emit)
    await stream.end(*job.shape.closing())


def _check_not_resumable(is_resumable: bool) -> None:
    if is_resumable:
        raise InvalidRequest("on a socket, resumable is for chat.create and completion.create only", param="resumable")


def _warnings_in(headers: Headers) -> tuple[str, ...]:
    return tuple(value.decode("latin1") for name, value in headers if name == WARNING)
