"""The threads a process of programs has: event loops, each in a daemon thread, started when first needed.

Owns them and the ways to wait for what runs there. `background()` carries back ends' I/O, every program's expressions and an
engine in this process; no user's code runs on it. `programs()` runs the functions of many synchronous programs at once, as
greenlets (greenlets.py): one loop per thread that starts programs. A program that blocks holds up those of its own loop, so
another thread, which it may be waiting for, must not need that loop. Callers are anywhere: a plain thread waits with `wait`, a
coroutine on any loop with `awaited`.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, TypeVar
from weakref import finalize

from greenlet import getcurrent

T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own, which ends with the process."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on this loop's thread."""
        return threading.get_ident() == self.thread.ident

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine there. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, function: Callable[..., object], *args: Any, context: Context | None = None) -> None:
        """Calls a function there soon. Calls of one thread are made in their order."""
        self.loop.call_soon_threadsafe(function, *args, context=context)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(_forever())  # a task to which anyio's worker threads belong: run_forever() has none


async def _forever() -> None:
    await asyncio.Event().wait()


class Lent:
    """A programs' loop, for as long as the thread lives that has this."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop


class _Loops:
    """Those of this process. A forked child has no threads of its parent: it starts its own."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        for loop in getattr(self, "_started", {}).values():
            for task in asyncio.all_tasks(loop.loop):  # nobody runs them here, and nobody is to be told so
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own, for tasks that are given up
        self._lock = threading.Lock()
        self._started: dict[int | None, Loop] = {}  # by their threads
        self._background: Loop | None = None
        self._thread = threading.local()  # .lent: the programs' loop of whoever asks
        self._free: list[Loop] = []  # of threads that have ended

    def background(self) -> Loop:
        if self._background is None:
            with self._lock:
                if self._background is None:
                    self._background = self._start("streamserve-background")
        return self._background

    def programs(self) -> Loop:
        lent: Lent | None = getattr(self._thread, "lent", None)
        if lent is not None:
            return lent.loop
        with self._lock:
            loop = self._started.get(threading.get_ident())  # it is one of them that asks
            if loop is None or loop is self._background:
                loop = self._free.pop() if self._free else self._start("streamserve-programs")
                lent = Lent(loop)
                finalize(lent, self._free.append, loop).atexit = False
                self._thread.lent = lent
        return loop

    def _start(self, name: str) -> Loop:
        loop = Loop(name)
        self._started[loop.thread.ident] = loop
        return loop


_LOOPS = _Loops()


def background() -> Loop:
    """The loop of engines, connections and expressions."""
    return _LOOPS.background()


def programs() -> Loop:
    """The loop that runs the programs which this thread starts."""
    return _LOOPS.programs()


def wait(future: "Future[T]") -> T:
    """The future's result, for code that is no coroutine. In a greenlet other greenlets go on meanwhile.

    What interrupts the wait (Ctrl+C) cancels the future.
    """
    park: Callable[[Future[T]], T] | None = getattr(getcurrent(), "park", None)
    if park is not None:
        return park(future)
    if not future.done() and background().is_here:
        future.cancel()
        raise RuntimeError("this would wait on the background loop for the background loop; await it instead")
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def awaited(future: "Future[T]") -> T:
    """The future's result, for a coroutine on any loop. Cancelling travels to it."""
    return await asyncio.wrap_future(future)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the background loop and waits for it here."""
    return wait(background().submit(work))


async def arun(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the background loop and waits for it on the caller's."""
    loop = background()
    if loop.is_here:
        return await work
    return await awaited(loop.submit(work))
