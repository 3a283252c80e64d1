"""One response on its way: its run, what it has put out so far, and who follows it.

Owns a response from its checked request to its last event, and the journal of a response that can be read again. Knows nothing
of HTTP, sockets or stores.
"""

import zlib
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any

import orjson
from anyio import Event, to_thread

from streamserve.api.chunks import token_text
from streamserve.api.response_events import Growing, Json, usage_json
from streamserve.api.response_schema import CreateResponse, repeated
from streamserve.api.response_store import Record
from streamserve.api.stream import Emit, Piece, Run, events_of
from streamserve.api.wire import WARNING, Headers, header_text, unforeseen
from streamserve.errors import SlowReader, StreamServeError
from streamserve.messages import TokenLogprobs
from streamserve.text.tokenizer import Tokenizer

INLINE_BYTES = 64 * 1024  # of events or items; reading or packing more takes longer than handing it to a thread
MAX_BATCH = 256  # events that are sent in one write


class Journal:
    """Every event of a response, in order, for readers who come later or again. An event's place is its sequence number."""

    def __init__(self, events: Sequence[bytes] = ()) -> None:
        self.events = list(events)
        self.has_ended = False
        self._grew = Event()

    def add(self, events: Sequence[bytes]) -> None:
        """More of them."""
        self.events += events
        self._wake()

    def end(self) -> None:
        """Nothing follows."""
        self.has_ended = True
        self._wake()

    def _wake(self) -> None:
        self._grew.set()
        self._grew = Event()

    async def follow(self, start: int) -> AsyncIterator[list[bytes]]:
        """The events from number `start` on, as they come, until the last one. A client that is slow has time for every few of
        them, not for all at once."""
        while True:
            grew = self._grew
            events = self.events[start : start + MAX_BATCH]
            start += len(events)
            if events:
                yield events
            elif self.has_ended:
                return
            else:
                await grew.wait()

    async def packed(self) -> bytes:
        """All of them as a record keeps them."""
        events = b"\n".join(self.events)
        if len(events) <= INLINE_BYTES:
            return zlib.compress(events, 1)
        return await to_thread.run_sync(zlib.compress, events, 1)

    @classmethod
    async def unpacked(cls, events: bytes) -> "Journal | None":
        """The journal of a record; None where it keeps none."""
        if not events:
            return None
        is_short = len(events) <= INLINE_BYTES // 8
        all_of_it = zlib.decompress(events) if is_short else await to_thread.run_sync(zlib.decompress, events)
        journal = cls(all_of_it.split(b"\n"))
        journal.end()
        return journal


class ResponseJob:
    """A checked request and its response."""

    def __init__(
        self,
        run: Run,
        request: CreateResponse,
        tokenizer: Tokenizer,
        *,
        model: str,
        owner: str,
        input: list[Json],
        warnings: tuple[str, ...] = (),
    ) -> None:
        sampling = run.call.sampling
        fields = {
            "id": run.call.id,
            "object": "response",
            "created_at": int(time()),
            "model": model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **repeated(request),
            **({"warnings": warnings} if warnings else {}),  # sockets have no headers
        }
        options = request.stream_options
        self.run = run
        self.request = request
        self.owner = owner
        self.input = input
        self.headers: Headers = [(WARNING, header_text(warning)) for warning in warnings]
        self.growing = Growing(
            fields, is_queued=request.background, obfuscates=bool(options is not None and options.include_obfuscation)
        )
        self.journal = Journal() if request.background else None
        self.has_ended = Event()
        self.is_forgotten = not request.store
        self._tokenizer = tokenizer
        self._num_top = request.top_logprobs or 0
        self._finish_reason = "abort"  # until it says otherwise

    @property
    def id(self) -> str:
        """The response's id."""
        return self.run.call.id

    @property
    def wants_stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.request.stream

    # ---- events --------------------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """Events that come before any token."""
        return self._noted(self.growing.opening())

    def chunks(self, piece: Piece) -> list[bytes]:
        """The events of a piece."""
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
        logprobs = [self._entry(entry) for entry in piece.logprobs]
        return self._noted([*self.growing.begin(), *self.growing.take(events_of(piece), logprobs)])

    def closing(self) -> list[bytes]:
        """The last events, of an answer that has ended by itself or was aborted."""
        if self.run.call.drops_output and self._finish_reason == "length":
            return self._noted(self.growing.finish("stop", self._usage(), is_silent=True))
        return self._noted(self.growing.finish(self._finish_reason, self._usage()))

    def failing(self, error: StreamServeError) -> list[bytes]:
        """The last events, of an answer that has failed."""
        self.run.outcome = error.code
        return self._noted(self.growing.fail(error, self._usage()))

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response of an answer that was collected."""
        for piece in pieces:
            self.chunks(piece)
        self.closing()
        return self.growing.as_json()

    async def deliver(self, emit: Emit) -> list[bytes]:
        """Hand every piece to `emit`, to the answer's end; returns the last events. What goes wrong now is the last of them: a
        status was sent long ago."""
        try:
            await self.run.deliver(emit)
        except SlowReader:
            raise
        except Exception as failure:
            return self.failing(failure if isinstance(failure, StreamServeError) else unforeseen(failure, id=self.id))
        return self.closing()

    def _noted(self, events: list[bytes]) -> list[bytes]:
        if self.journal is not None and events:
            self.journal.add(events)
        return events

    def _usage(self) -> Json:
        usage = self.run.usage
        return usage_json(
            usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens, usage.image_tokens
        )

    def _entry(self, entry: TokenLogprobs) -> Json:
        top = [self._token(*alternative) for alternative in entry.top[: self._num_top]]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": token_text(raw), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    # ---- afterwards ----------------------------------------------------------------------------------------------

    async def record(self, *, with_events: bool = True) -> Record:
        """What is kept of it."""
        return Record(
            self.id,
            self.owner,
            self.request.previous_response_id,
            orjson.dumps(self.growing.as_json()),
            orjson.dumps(self.input),
            await self.journal.packed() if self.journal is not None and with_events else b"",
        )
