"""The threads of a packed decoder: helpers that sleep in native code between steps, and how many of them a step wakes.

A step of few tokens waits for memory, which one thread may saturate alone; and where other processes want the cores, two
threads that wait for one another lose whole scheduler slices. So both are tried, now and then, and the faster one is taken:
a row's bits do not depend on it. Owns the helper threads and their semaphores. Knows no network.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from math import inf
from threading import Thread, current_thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamserve.kernels.impl.numba_pack import aligned_bytes
from streamserve.kernels.impl.numba_threads import GATE_WORDS, SEMAPHORE_BYTES, STOP, init_semaphores, post

FEW_TOKENS = 7  # up to here the time goes into reading weights: the other way is tried early. The largest of its size
_TRY_EVERY = 100  # steps
_TRY = 4  # steps of few tokens, one after another, so
_TRY_FEW_EVERY = 400  # of them once there were as many, or trials themselves would be felt
_WEIGHT = 0.2  # of the newest time in the running mean


class Pace:
    """How many threads a step gets: all, or one alone when that was faster lately for steps of its size.

    The first step of few tokens on another number of threads does not count: it wakes a thread that slept, or meets memory that
    nobody has read yet, and takes up to twice as long as those behind it. What a trial shows takes the place of what was known
    before, which is old."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._seconds: dict[tuple[int, int], float] = {}  # by size of the step and number of threads
        self._seen: dict[tuple[int, int], int] = {}  # steps of that size, when it was measured last
        self._steps: Counter[int] = Counter()
        self._tried: dict[int, int] = {}  # threads of the last trial, by size
        self._last = 0  # threads of the step before

    def choose(self, tokens: int) -> int:
        """For the next step; `took` says afterwards how long it ran."""
        if self._threads == 1:
            return 1
        size = tokens.bit_length()
        self._steps[size] += 1
        together, alone = (self._seconds.get((size, threads), inf) for threads in (self._threads, 1))
        best, other = (1, self._threads) if alone < together else (self._threads, 1)
        if tokens > FEW_TOKENS:
            return best if self._steps[size] % _TRY_EVERY else other
        turn = self._steps[size] % (_TRY_EVERY if self._steps[size] <= _TRY_FEW_EVERY else _TRY_FEW_EVERY)
        if turn == _TRY + 1:
            self._tried[size] = other  # to the end of the trial: what it shows may make it the best before that
        return self._tried[size] if _TRY < turn <= 2 * _TRY else best

    def took(self, tokens: int, threads: int, seconds: float) -> None:
        """The step ran so long."""
        has_changed, self._last = threads != self._last, threads
        if has_changed and tokens <= FEW_TOKENS:
            return
        size = tokens.bit_length()
        key, now = (size, threads), self._steps[size]
        before = self._seconds.get(key)
        is_old = now - self._seen.get(key, 0) > _TRY_EVERY // 2
        self._seconds[key] = seconds if before is None or is_old else before + _WEIGHT * (seconds - before)
        self._seen[key] = now


class Helpers:
    """Threads 1 .. threads - 1 of a team. They end when this object goes."""

    def __init__(self, threads: int) -> None:
        self._count = threads - 1
        self._gate: NDArray[np.int64] = aligned_bytes(GATE_WORDS * 8).view(np.int64)
        self._semaphores = aligned_bytes(max(1, self._count) * SEMAPHORE_BYTES)
        init_semaphores(self.semaphores, self._count)

    @property
    def gate(self) -> int:
        """Address of the gate (numba_threads.py)."""
        return self._gate.ctypes.data

    @property
    def semaphores(self) -> int:
        """Address of the semaphores."""
        return self._semaphores.ctypes.data

    def start(self, serve: Callable[[int], None], kept: Any) -> None:
        """Run serve(number) in every helper. `kept` is held as long as a helper runs."""
        memory = (kept, self._gate, self._semaphores)
        threads = [
            Thread(target=_run, args=(serve, number, memory), name=f"packed-{number}", daemon=True)
            for number in range(1, self._count + 1)
        ]
        for thread in threads:
            thread.start()
        # Not at exit: a helper that came back to an interpreter in its last moments would bring the process down.
        weakref.finalize(self, _stop, self._gate, self._semaphores, threads).atexit = False


def _run(serve: Callable[[int], None], number: int, memory: Any) -> None:
    """A helper thread. Its arguments keep alive what native code reads."""
    serve(number)


def _stop(gate: "NDArray[np.int64]", semaphores: "NDArray[np.uint8]", threads: list[Thread]) -> None:
    gate[STOP] = 1
    for i in range(len(threads)):
        post(semaphores.ctypes.data + i * SEMAPHORE_BYTES)
    for thread in threads:
        if thread is not current_thread():
            thread.join()
