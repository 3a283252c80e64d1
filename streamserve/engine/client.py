"""The seam between API and engine: four methods, and the mailbox in which a request's deltas wait. Torch-free.

Owns undelivered deltas. Knows nothing of HTTP, text or scheduling.
"""

from asyncio import Future, get_running_loop
from typing import Protocol

from streamserve.messages import CacheSummary, Delta, EngineFacts, GenerateRequest

MAX_PENDING = 64  # deltas; then they are merged, so that a slow reader costs little memory and, on average, little time


class Mailbox:
    """Undelivered output of one request, for one reader. Deltas merge while it does not take them."""

    __slots__ = ("_is_resting", "_pending", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._pending: list[Delta] = []
        self._waiter: Future[None] | None = None  # of a reader that waits
        self._is_resting = False

    def put_nowait(self, delta: Delta) -> None:
        """Engine side. Never blocks."""
        self._pending.append(delta)
        if len(self._pending) == MAX_PENDING:
            self._pending = [Delta.merged(self._pending)]
        waiter = self._waiter
        if waiter is not None and (not self._is_resting or delta.finish_reason is not None):
            self._waiter = None
            _wake(waiter)

    async def get(self) -> Delta:
        """Client side: everything that arrived since the last call, as one delta; waits for the first."""
        while not self._pending:
            await self._wait()
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else Delta.merged(pending)

    async def rest(self, seconds: float) -> None:
        """Client side: let deltas merge for `seconds`, or until the last one is here."""
        if self._pending and self._pending[-1].finish_reason is not None:
            return
        self._is_resting = True
        try:
            await self._wait(seconds)
        finally:
            self._is_resting = False

    async def _wait(self, seconds: float | None = None) -> None:
        loop = get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(seconds, _wake, waiter) if seconds is not None else None
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


def _wake(waiter: "Future[None]") -> None:
    if not waiter.done():  # the reader may have been cancelled
        waiter.set_result(None)


class EngineClient(Protocol):
    """What the API may ask of an engine. All methods are called on the event loop; none blocks it."""

    async def submit(self, request: GenerateRequest) -> Mailbox:
        """Queue a request. Raises ContextOverflow, QueueFull or EngineStopped before anything has started."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a request before the next plan; its pages are free by then. False when no such request lives.

        A request that was live gets a last delta with finish_reason ABORT."""
        ...

    def facts(self) -> EngineFacts:
        """Limits, health and load right now."""
        ...

    def cache_summary(self, max_prefixes: int = 10) -> CacheSummary:
        """The prefix tree right now."""
        ...


async def collect(mailbox: Mailbox) -> Delta:
    """The whole output of one request as one delta."""
    deltas = [await mailbox.get()]
    while deltas[-1].finish_reason is None:
        deltas.append(await mailbox.get())
    return Delta.merged(deltas)
