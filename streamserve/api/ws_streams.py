"""Streams that survive their socket (resume.py), as frames.

    {"type": "chat.create", "id": I, "request": {…, "resumable": true}}     or completion.create
    <- {"type": "stream", "id": I, "stream": NAME}         first of all: what the stream is called
    <- {"type": "chunk", "id": I, "n": N, "chunk": {…}}    each with its number, from 1 on
    {"type": "stream.resume", "id": I, "stream": NAME, "after": N}    on another socket: what is behind N, as it would have come

A cancel ends the request. The socket's end no longer does. The stream can be read over HTTP as well: GET /v1/streams/NAME.

Owns these frames. Knows nothing of what is in a chunk, but that an error begins with its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import orjson

from streamserve.api.openai import DONE
from streamserve.api.resume import Kept, Produce, Streams
from streamserve.api.schema import show
from streamserve.api.socket import Lane, Outbox
from streamserve.api.stream import Run, Usage
from streamserve.api.wire import Headers
from streamserve.errors import InvalidRequest, StreamTaken

RESUME = "stream.resume"
MAX_NUMBER = 1 << 48
PROGRESS = b": prompt_progress "
DATA = b"\ndata: "
ERROR = b'{"error":'


class Reads(Protocol):
    """The request of a frame that reads a stream."""

    id: str
    lane: Lane


class SocketStreams:
    """Begins and reads streams for one socket."""

    def __init__(self, streams: Streams, outbox: Outbox) -> None:
        self._streams = streams
        self._outbox = outbox

    async def begin(self, run: Run, produce: Produce, headers: Headers, key: bytes | None) -> Kept:
        """Start a run whose answer is kept. What its start raises is raised."""
        owner = self._streams.owner_of(key)
        return await self._streams.begin((run,), produce, headers, owner=owner, body=b"", leaving=nullcontext())

    def find(self, frame: dict[str, Any], key: bytes | None) -> tuple[Kept, int]:
        """The stream that a frame wants to go on with, and behind which event. Raises InvalidRequest, NotFound or StreamGone."""
        name, after = frame.get("stream"), frame.get("after", 0)
        if not isinstance(name, str):
            raise InvalidRequest(f"stream is {show(name)}; the name of a stream is expected", param="stream")
        if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < MAX_NUMBER:
            raise InvalidRequest(f"after is {show(after)}; the number of the last chunk that came is expected", param="after")
        kept = self._streams.find(name, self._streams.owner_of(key), "stream")
        given = kept.recording.num_given
        if after > given:
            raise InvalidRequest(f"after is {after}; 0 to {given} is expected: so many chunks were sent", param="after")
        self._streams.check_kept(kept.recording, after, "after")
        return kept, after

    async def read(self, ticket: Reads, kept: Kept, position: int) -> Usage | None:
        """Send what is behind a position, to the end. None: that is an error, which was sent. Raises StreamTaken."""
        recording, id = kept.recording, orjson.dumps(ticket.id)
        await self._put(ticket, b'{"type":"stream","id":%b,"stream":%b}' % (id, orjson.dumps(recording.id)))
        has_failed = False
        with self._reading(kept, position) as reader:
            while True:
                frames, comments = recording.take(reader.position), self._comments(kept)
                for comment in comments:
                    await self._put(ticket, b'{"type":"progress","id":%b,"progress":%b}' % (id, comment))
                for frame in frames:
                    reader.position += 1
                    data = frame[frame.index(DATA) + len(DATA) : -2]
                    if data.startswith(ERROR):
                        has_failed = True
                        await self._put(ticket, b'{"type":"error","id":%b,%b' % (id, data[1:]))
                    elif data != DONE:
                        await self._put(ticket, b'{"type":"chunk","id":%b,"n":%d,"chunk":%b}' % (id, reader.position, data))
                if frames or comments:
                    continue  # there may be more by now
                if recording.has_ended:
                    return None if has_failed else kept.usage
                await reader.wait()
        raise StreamTaken("another connection reads this stream now")

    @contextmanager
    def _reading(self, kept: Kept, position: int) -> Iterator[Any]:
        with self._streams.reading(kept, position) as reader, reader.scope:
            yield reader

    def _comments(self, kept: Kept) -> list[bytes]:
        comments, kept.recording.comments = kept.recording.comments, []
        return [text.removeprefix(PROGRESS).rstrip() for text in comments if text.startswith(PROGRESS)]

    async def _put(self, ticket: Reads, frame: bytes) -> None:
        await self._outbox.put(ticket.lane, frame)
