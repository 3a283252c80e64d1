"""The seam between API and engine: four methods, and the mailbox in which a request's deltas wait. Torch-free.

Owns undelivered deltas. Knows nothing of HTTP, text or scheduling.
"""

from asyncio import Event
from typing import Protocol

from streamserve.messages import CacheSummary, Delta, EngineFacts, GenerateRequest


class Mailbox:
    """Undelivered output of one request. Deltas merge while nobody takes them, so a slow reader costs one object."""

    __slots__ = ("_arrived", "_pending", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._pending: Delta | None = None
        self._arrived = Event()

    def put_nowait(self, delta: Delta) -> None:
        """Engine side. Never blocks."""
        self._pending = delta if self._pending is None else self._pending.then(delta)
        self._arrived.set()

    async def get(self) -> Delta:
        """Client side: everything that arrived since the last call, as one delta; waits for the first."""
        while self._pending is None:
            await self._arrived.wait()
        delta, self._pending = self._pending, None
        self._arrived.clear()
        return delta


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
    whole = await mailbox.get()
    while whole.finish_reason is None:
        whole = whole.then(await mailbox.get())
    return whole
