"""Server-sent events, written straight to ASGI. Knows nothing of what the events mean.

A dialect writes to an `Events`: an EventStream, which is one connection, or a recording that outlives connections (resume.py).
"""

from collections.abc import Awaitable
from functools import partial
from time import monotonic
from typing import Protocol

from anyio import sleep

from streamserve.api.wire import Exchange, Headers, Presence

HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),  # proxies must neither keep nor compress it: both hold events back
    (b"x-accel-buffering", b"no"),  # nginx's name for the same wish
)


class Events(Protocol):
    """Where the events of one answer go. None from a method: they are on their way; else await what is returned."""

    def events(self, *events: bytes) -> Awaitable[None] | None:
        """Send events, each one line of data, in one write."""
        ...

    def named(self, *events: tuple[bytes, bytes]) -> Awaitable[None] | None:
        """Send events that have a name (the `event:` field) before their line of data."""
        ...

    def comment(self, text: bytes) -> Awaitable[None] | None:
        """Send a line that is no event: clients that do not look for it do not see it."""
        ...

    async def end(self, *events: bytes) -> None:
        """Send the last events."""
        ...


class EventStream:
    """One stream of events to one client.

    A comment is a block of its own, but not where events have ids: OpenAI's and Anthropic's clients keep the last id and take
    every block behind it, empty or not, for an event. There a comment is the first line of the next event's block.
    """

    __slots__ = ("_comment", "_exchange", "_wrote_s")

    def __init__(self, exchange: Exchange, *, has_ids: bool = False) -> None:
        self._comment = b": %b\n" if has_ids else b": %b\n\n"
        self._exchange = exchange
        self._wrote_s = monotonic()

    async def start(self, headers: Headers = ()) -> None:
        """Send status 200 and the headers."""
        await self._exchange.start(200, [*HEADERS, *headers])

    def events(self, *events: bytes) -> Awaitable[None] | None:
        """See Events."""
        self._wrote_s = monotonic()
        return self._exchange.put(frame(events))

    def named(self, *events: tuple[bytes, bytes]) -> Awaitable[None] | None:
        """See Events."""
        return self.raw(b"".join([b"event: %b\ndata: %b\n\n" % event for event in events]))

    def comment(self, text: bytes) -> Awaitable[None] | None:
        """See Events."""
        return self.raw(self._comment % text)

    def raw(self, frames: bytes) -> Awaitable[None] | None:
        """Send what is framed already."""
        self._wrote_s = monotonic()
        return self._exchange.put(frames)

    async def end(self, *events: bytes) -> None:
        """See Events."""
        await self._exchange.end(frame(events))

    def keep_alive(self, interval_s: float, presence: Presence) -> None:
        """From now on send a comment whenever nothing was written for `interval_s`; nothing when that is 0."""
        if interval_s > 0:
            presence.start_after(interval_s, partial(self._keep_alive, interval_s))

    async def _keep_alive(self, interval_s: float) -> None:
        while not self._exchange.has_ended:
            quiet_s = monotonic() - self._wrote_s
            if quiet_s >= interval_s:
                self._wrote_s = monotonic()
                await self._exchange.write(self._comment % b"keep-alive")
            else:
                await sleep(interval_s - quiet_s)


def frame(events: tuple[bytes, ...]) -> bytes:
    """Events as they go over the wire."""
    if len(events) == 1:
        return b"data: %b\n\n" % events
    return b"".join([b"data: %b\n\n" % event for event in events])
