"""Answers that are read while they come, by plain code or by a coroutine on any loop.

Owns the way from an async generator on the background loop to its reader. Knows nothing of what it carries.
"""

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

from streamserve.lang import loops

T = TypeVar("T")
_END: Any = object()


class Stream(Generic[T]):
    """Read it with `for` or with `async for`. The request begins with the first reading, and ends when the reader leaves early.
    Reading it again asks again."""

    def __init__(self, open: Callable[[], AsyncGenerator[T, None]]) -> None:
        self._open = open

    def __iter__(self) -> Iterator[T]:
        source = self._open()
        try:
            while (item := loops.run(_next(source))) is not _END:
                yield item
        finally:
            if not sys.is_finalizing():  # then the engine has ended already
                loops.run(_close(source))

    async def __aiter__(self) -> AsyncIterator[T]:
        source = self._open()
        try:
            while (item := await loops.arun(_next(source))) is not _END:
                yield item
        finally:
            await loops.arun(_close(source))


async def _next(source: AsyncGenerator[T, None]) -> T:
    return await anext(source, _END)


async def _close(source: AsyncGenerator[Any, None]) -> None:
    await source.aclose()
