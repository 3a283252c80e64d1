"""Fixtures for all tests: the event loop, a watch on its stalls, and quiet arithmetic threads."""

import asyncio
import os
import signal
import sys
from asyncio import get_running_loop
from collections.abc import AsyncIterator

import pytest

# Two busy test processes on two cores lose whole scheduler slices at every barrier of a parallel region.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# In a shell's background Ctrl+C is ignored, by children as well, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

MAX_STALL_S = 0.05


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """StreamServe runs on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Where a test file has imported torch; the others must not load it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


class LoopWatch:
    """How long the event loop stood still, at most, since the watch began."""

    def __init__(self, every_s: float = 0.002) -> None:
        self.longest_s = 0.0
        self._every_s = every_s

    async def run(self) -> None:
        """Until cancelled: sleep, and see how late it got."""
        now = get_running_loop().time
        while True:
            before = now()
            await asyncio.sleep(self._every_s)
            self.longest_s = max(self.longest_s, now() - before - self._every_s)


@pytest.fixture
async def calm_loop() -> AsyncIterator[LoopWatch]:
    """Fails the test if its event loop stalls for over 50 ms. Ask for it only where a stall would be ours: a busy machine
    stalls every loop."""
    watch = LoopWatch()
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    yield watch
    task.cancel()
    assert watch.longest_s < MAX_STALL_S, f"the event loop stood still for {watch.longest_s * 1e3:.0f} ms"
