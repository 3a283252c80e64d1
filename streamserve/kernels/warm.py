"""Compiles all Triton kernels of a start together, on all cores, instead of one after the other as they are launched.

Owns the rehearsal: launches that compile and launch nothing. Knows no kernel. Triton keeps what it compiled on the disk
(TRITON_CACHE_DIR, else ~/.triton/cache): the next start only reads it.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

from triton import AsyncCompileMode, JITFunction

MAX_THREADS = 16


@contextmanager
def rehearsal(progress: Callable[[int, int], None] = lambda done, total: None, threads: int | None = None) -> Iterator[None]:
    """Inside, a launch of a Triton kernel hands its compilation to a thread and launches nothing; the end of the block waits
    for all of them. The first real launch with such arguments finds its kernel ready. Raises what a compilation raises.

    Whatever runs inside computes garbage: kernels leave their outputs as they were, while torch's own operations are done.
    So nothing in the block may index with what a Triton kernel was to write. For one thread at a time; in Triton's
    interpreter nothing is compiled, and launches are done as ever."""
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    # Compiling is work in LLVM, which lets other threads go on, and in an assembler process.
    with (
        ThreadPoolExecutor(threads or min(MAX_THREADS, os.cpu_count() or 1), "kernels-compile") as pool,
        AsyncCompileMode(pool) as mode,
    ):
        JITFunction.run = only_compile
        try:
            yield
        finally:
            JITFunction.run = run
        for done, _ in enumerate(as_completed(mode.raw_futures)):
            progress(done + 1, len(mode.raw_futures))
