"""How many calls are under way at once. Owns the places per back end, and the waiting where a server says that it is full.

Thousands of programs may run at once, but a server's queue is bounded: what is over the number of places waits here, in order.
Everything runs on the background loop.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

from streamserve.errors import QueueFull, StreamServeError
from streamserve.lang.backend import Backend, Piece, Prompt

T = TypeVar("T")
MAX_CALLS = 256  # at once, per back end
MAX_TRIES = 12  # of a call that finds the queue full
MAX_WAIT_S = 30.0  # between two of them
MIN_PREFIX = 64  # characters; less is not worth computing ahead


class Gate:
    """The places of one back end."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_CALLS)

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """What a call brings; it is made again where the queue was full."""
        async with self._places:
            for tried in range(1, MAX_TRIES + 1):
                try:
                    return await make()
                except QueueFull as error:
                    await _later(error, tried)
        raise AssertionError("the last try returns or raises")

    async def stream(self, make: Callable[[], AsyncIterator[Piece]]) -> AsyncGenerator[Piece, None]:
        """An answer as it comes; it is asked for again where the queue was full, but never once it has begun."""
        async with self._places:
            for tried in range(1, MAX_TRIES + 1):
                has_begun = False
                try:
                    async with aclosing(_closable(make())) as pieces:
                        async for piece in pieces:
                            has_begun = True
                            yield piece
                    return
                except QueueFull as error:
                    if has_begun:
                        raise
                    await _later(error, tried)


class _Gates:
    """The gate of each back end that is alive."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Backend, Gate] = WeakKeyDictionary()

    def __call__(self, backend: Backend) -> Gate:
        found = self._of.get(backend)
        if found is None:
            found = self._of[backend] = Gate()
        return found


gate_of = _Gates()


class Leader:
    """Lets one program of a batch compute its prompt first: the others find what they share with it.

    No program is called for it: the first that comes to an answer leads. It costs the others one prompt's time, once.
    """

    def __init__(self) -> None:
        self._arrived: asyncio.Event | None = None

    async def follow(self, backend: Backend, prompt: Prompt) -> None:
        """Before a program's first answer."""
        if self._arrived is not None:
            await self._arrived.wait()
        elif len(prompt.text) > MIN_PREFIX:
            self._arrived = asyncio.Event()
            try:
                await warm(backend, prompt)
            finally:
                self._arrived.set()


async def warm(backend: Backend, prompt: Prompt) -> None:
    """Computes a prompt that others begin with. Where that fails nothing is lost: what is wrong is said when they ask."""
    with suppress(StreamServeError):
        await gate_of(backend).call(lambda: backend.cache_prefix(prompt))


async def _closable(pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    """Closed with what is behind it."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


async def _later(error: QueueFull, tried: int) -> None:
    if tried == MAX_TRIES:
        raise error
    # Not all at the same moment: they would meet the same full queue again.
    await asyncio.sleep(min(max(error.retry_after_s, 0.05), MAX_WAIT_S) * random.uniform(1.0, 1.5))
