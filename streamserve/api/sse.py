"""Server-sent events, written straight to ASGI. Knows nothing of what the events mean."""

from collections.abc import Awaitable
from time import monotonic

from anyio import sleep

from streamserve.api.wire import Exchange, Headers

HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),  # proxies must neither keep nor compress it: both hold events back
    (b"x-accel-buffering", b"no"),  # nginx's name for the same wish
)


class EventStream:
    """One stream of events to one client."""

    __slots__ = ("_exchange", "_wrote_s")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._wrote_s = monotonic()

    async def start(self, headers: Headers = ()) -> None:
        """Send status 200 and the headers."""
        await self._exchange.start(200, [*HEADERS, *headers])

    def events(self, *events: bytes) -> Awaitable[None] | None:
        """Send events, each one line of data, in one write. None: they are on their way; else await what is returned."""
        self._wrote_s = monotonic()
        return self._exchange.put(frame(events))

    async def end(self, *events: bytes) -> None:
        """Send the last events."""
        await self._exchange.end(frame(events))

    async def keep_alive(self, interval_s: float) -> None:
        """Send a comment whenever nothing was written for `interval_s`; for ever. Returns at once when that is 0."""
        while interval_s > 0 and not self._exchange.has_ended:
            quiet_s = monotonic() - self._wrote_s
            if quiet_s >= interval_s:
                self._wrote_s = monotonic()
                await self._exchange.write(b": keep-alive\n\n")
            else:
                await sleep(interval_s - quiet_s)


def frame(events: tuple[bytes, ...]) -> bytes:
    """Events as they go over the wire."""
    if len(events) == 1:
        return b"data: %b\n\n" % events
    return b"".join([b"data: %b\n\n" % event for event in events])
