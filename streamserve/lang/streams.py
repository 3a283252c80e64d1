"""Answers that are read while they come, by plain code or by a coroutine on any loop.

Owns the way from an async generator on the background loop to its reader. Knows nothing of what it carries.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Generic, TypeVar

from streamserve.errors import EngineStopped
from streamserve.lang import loops

T = TypeVar("T")
_END: Any = object()
ELSEWHERE = "this engine's threads are in the process that forked this one; load one here"


class Stream(Generic[T]):
    """Read it with `for` or with `async for`. The request begins with the first reading, and ends when the reader leaves early.
    Reading it again asks again."""

    def __init__(self, open: Callable[[], AsyncGenerator[T, None]]) -> None:
        self._open = open

    def __iter__(self) -> Iterator[T]:
        source = _Source(self._open())
        try:
            while (item := loops.run(source.next())) is not _END:
                yield item
        finally:
            if not sys.is_finalizing() and source.pid == os.getpid():  # else the engine has ended already, or is elsewhere
                loops.run(source.close())

    async def __aiter__(self) -> AsyncGenerator[T, None]:
        source = _Source(self._open())
        try:
            while (item := await loops.arun(source.next())) is not _END:
                yield item
        finally:
            await loops.arun(source.close())


class _Source(Generic[T]):
    """An async generator that is read on the background loop by somebody elsewhere. Whoever is interrupted while he waits for an
    item (Ctrl+C, a cancelled task) closes it at once: that has its turn when the reading has ended."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._turn = asyncio.Lock()
        self.pid = os.getpid()

    async def next(self) -> T:
        if self.pid != os.getpid():
            raise EngineStopped(ELSEWHERE)
        async with self._turn:
            return await anext(self._items, _END)

    async def close(self) -> None:
        async with self._turn:
            await self._items.aclose()
