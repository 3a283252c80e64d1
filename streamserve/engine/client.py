"""The seam between API and engine: four methods, and the mailbox in which a request's deltas wait. Torch-free.

Owns undelivered deltas. Knows nothing of HTTP, text or scheduling.
"""

from asyncio import Future, TimerHandle, get_running_loop
from typing import Protocol

from streamserve.messages import CacheSummary, Delta, EngineFacts, GenerateRequest

MAX_PENDING = 64  # deltas; then they are merged, so that a slow reader costs little memory and, on average, little time


class Mailbox:
    """Undelivered output of one request, for one reader. Deltas merge while it does not take them."""

    __slots__ = ("_pending", "_rest", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._pending: list[Delta] = []
        self._waiter: Future[None] | None = None  # of a reader that waits
        self._rest: TimerHandle | None = None  # ends the time in which nothing but the last delta is given out

    def put_nowait(self, delta: Delta) -> None:
        """Engine side. Never blocks."""
        self._pending.append(delta)
        if len(self._pending) == MAX_PENDING:
            self._pending = [Delta.merged(self._pending)]
        if self._rest is None:
            self._wake()
        elif delta.finish_reason is not None:
            self._rest.cancel()
            self._end_rest()

    async def get(self) -> Delta:
        """Client side: everything that arrived since the last call, as one delta; waits for the first."""
        while not self._pending or self._rest is not None:
            self._waiter = get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else Delta.merged(pending)

    def rest(self, seconds: float) -> None:
        """Client side: the next `get` lets deltas merge for so long, or until the last one is here. One rest at a time."""
        if self._rest is None and not (self._pending and self._pending[-1].finish_reason is not None):
            self._rest = get_running_loop().call_later(seconds, self._end_rest)

    def _end_rest(self) -> None:
        self._rest = None
        if self._pending:
            self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
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
