"""Many programs at once, some at a time: all results in order, or one after another as they are asked for.

Owns how many are under way, and that an interrupted caller leaves none behind. Knows not what a program is: it is started by a
function, and ends with its future.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from streamserve.lang.loops import wait

T = TypeVar("T")
Started = tuple[Future[T], Callable[[], None]]  # its end, and what ends it before


class Crew(Generic[T]):
    """Runs `number` programs, at most `at_once` at a time. `start` is called with each one's index, in order."""

    def __init__(self, number: int, at_once: int, start: Callable[[int], Started[T]]) -> None:
        self._number = number
        self._at_once = at_once
        self._start = start
        self._running: dict[int, Started[T]] = {}
        self._ends: list[Future[T]] = []
        self._all: Future[None] = Future()
        self._next = 0
        self._is_starting = False
        self._is_stopped = False
        self._lock = threading.Lock()

    def run(self) -> list[T]:
        """All results, in order. The first program that raises stops the others; so does Ctrl+C."""
        if self._number == 0:
            return []
        try:
            self._fill()
            wait(self._all)
            ends, self._ends = self._ends, []  # a future keeps its callbacks, which are this object's
            return [end.result() for end in ends]
        except BaseException:
            self._stop()
            raise

    def _fill(self) -> None:
        """Starts what may be. One caller at a time: who ends a program while another starts some leaves it to that one."""
        with self._lock:
            if self._is_starting:
                return
            self._is_starting = True
        while True:
            with self._lock:
                if self._is_stopped or self._next == self._number or len(self._running) >= self._at_once:
                    self._is_starting = False
                    return
                index, self._next = self._next, self._next + 1
                try:
                    end, stop = self._start(index)
                except Exception as error:  # it must reach who waits, whoever's thread this is
                    end, stop = Future(), lambda: None
                    end.set_exception(error)
                self._running[index] = (end, stop)
                self._ends.append(end)
            end.add_done_callback(partial(self._ended, index))

    def _ended(self, index: int, end: "Future[T]") -> None:
        with self._lock:
            del self._running[index]
            is_over = self._next == self._number and not self._running
            if end.cancelled() or end.exception() is not None:
                is_over = True
            if is_over and not self._all.done():
                self._all.set_result(None)
                return
        self._fill()

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            running = tuple(self._running.values())
        for _, stop in running:
            stop()


def in_order(number: int, ahead: int, start: Callable[[int], Started[T]]) -> Iterator[T]:
    """The results one after another. At most `ahead` are started beyond the one that is waited for."""
    running: deque[Started[T]] = deque()
    started = 0
    try:
        while running or started < number:
            while started < number and len(running) < ahead:
                running.append(start(started))
                started += 1
            result = wait(running[0][0])
            running.popleft()
            yield result
    finally:
        for _, stop in running:
            stop()
