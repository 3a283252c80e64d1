"""Functions of synchronous programs, many in one thread: each is a greenlet on the programs' loop.

Owns switching between them. Where a function must wait (loops.wait), its greenlet is put aside and the others go on; so a
thousand programs that wait for a thousand answers take one thread. A function that computes or blocks holds up the others here,
but neither an engine nor anybody's answers: those are on the background loop. (SQLAlchemy reaches its async drivers so.)
"""

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from typing import Any, TypeVar

from greenlet import greenlet

from streamserve.lang.loops import Loop, programs

T = TypeVar("T")
# Public in asyncio, for those who write loops: this thread has none, as far as it says.
_set_running_loop: Callable[[AbstractEventLoop | None], None] = asyncio._set_running_loop


class Parked(greenlet):  # type: ignore[misc]  # greenlet has no types
    """One function's greenlet. Made and switched to on the programs' loop only."""

    def __init__(self, function: Callable[[], object], result: "Future[Any]", context: Context, loop: Loop) -> None:
        super().__init__(self._body)
        self.gr_context = context
        self._function = function
        self._result = result
        self._loop = loop
        self._waits_for: Future[Any] | None = None

    def begin(self) -> None:
        """Runs until the function first waits."""
        if self._result.set_running_or_notify_cancel():
            self._go(None)

    def park(self, future: "Future[T]") -> T:
        """Puts this greenlet aside until the future is done. Called in it, by loops.wait."""
        if not future.done():
            own_loop = asyncio._get_running_loop()  # the function's own, where it has started one
            self._waits_for = future
            future.add_done_callback(lambda done: self._loop.call(self._go, done))
            try:
                self.parent.switch()
            except BaseException:
                future.cancel()
                raise
            finally:
                self._waits_for = None
                _set_running_loop(own_loop)
        return future.result()

    def stop(self) -> None:
        """Raises CancelledError where the function waits. It may be called from any thread, at any time."""
        self._loop.call(self._throw)

    def _go(self, awaited: "Future[Any] | None") -> None:
        if awaited is self._waits_for and not self.dead:
            self._switch(self.switch)

    def _throw(self) -> None:
        if self and self._waits_for is not None:
            self._switch(lambda: self.throw(asyncio.CancelledError()))

    def _switch(self, switch: Callable[[], object]) -> None:
        """The function must not see that its thread runs a loop: asyncio.run() in a tool is none of our business."""
        _set_running_loop(None)
        try:
            switch()
        finally:
            _set_running_loop(self._loop.loop)

    def _body(self) -> None:
        try:
            value = self._function()
        except BaseException as error:
            self._result.set_exception(error)
        else:
            self._result.set_result(value)
        finally:
            del self._function


def start_thread(function: Callable[[], T]) -> "Future[T]":
    """The same in a real thread, which ends with the process."""
    result: Future[T] = Future()

    def body() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=body, name="streamserve-program", daemon=True).start()
    return result


def spawn(function: Callable[[], T]) -> "tuple[Future[T], Callable[[], None]]":
    """Starts a function as a greenlet, in a copy of the caller's context. Its result, and what stops it where it waits."""
    result: Future[T] = Future()
    loop, context = programs(), copy_context()
    if loop.is_here and asyncio._get_running_loop() is not None:
        # The caller is a coroutine of this thread and may wait without awaiting: then nothing else would be switched to.
        return start_thread(lambda: context.run(function)), lambda: None
    made: list[Parked] = []
    is_stopped = False

    def begin() -> None:
        if is_stopped:
            result.cancel()
            result.set_running_or_notify_cancel()
            return
        made.append(Parked(function, result, context, loop))
        made[0].begin()

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True
        if made:
            made[0].stop()

    loop.call(begin)
    return result, stop
