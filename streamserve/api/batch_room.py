"""How many requests of batches may be under way on a server that others use at the same time.

Owns that number, of requests and of the choices that one may ask for. A quarter of the engine's slots and of its KV memory stays
free for who waits for an answer, and nothing new begins while requests wait for the engine; where nobody else asks, batches have
the rest. Lines of all batches take turns.
"""

from asyncio import Event, Lock, sleep, timeout
from collections.abc import Callable
from contextlib import suppress

from streamserve.api.batch_lines import Line
from streamserve.messages import EngineFacts

LOOK_EVERY_S = 0.01
RESERVE = 4  # this part is left to others
SOME_RUNNING = 8  # where nobody said how many run at once
MAX_WAITING = 8  # requests at the engine's door, anybody's; enough for the next steps
MAX_ENCODING = 4  # texts for the embedding model, whose queue is its own
ENCODED = ("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify")


class SharedRoom:
    """See module. `has_encoder`: lines of ENCODED are not the engine's."""

    def __init__(self, facts: Callable[[], EngineFacts], *, has_encoder: bool) -> None:
        self._facts = facts
        self._has_encoder = has_encoder
        self._turns = {True: Lock(), False: Lock()}  # first come, first served
        self._choices = Lock()  # the same for those of lines under way
        self._num = {True: 0, False: 0}  # under way
        self._freed = Event()
        self._is_closed = False

    def _is_encoded(self, line: Line) -> bool:
        return self._has_encoder and line.url in ENCODED

    async def enter(self, line: Line) -> None:
        """See Room."""
        kind = self._is_encoded(line)
        async with self._turns[kind]:
            await sleep(0)  # the line before this one goes to the engine, which counts it
            while self._is_closed or not self._has_room(kind):
                await self._look_again()
            self._num[kind] += 1

    async def turn(self) -> None:
        """Wait until the engine has room for one more choice of a line that has entered: there may be hundreds."""
        async with self._choices:
            await sleep(0)
            while not self._is_closed and not self._has_engine_room(0):
                await self._look_again()

    async def _look_again(self) -> None:
        self._freed.clear()
        with suppress(TimeoutError):
            async with timeout(LOOK_EVERY_S):  # not wait_for: Python 3.11's may swallow that this is cancelled
                await self._freed.wait()

    def leave(self, line: Line) -> None:
        """See Room."""
        self._num[self._is_encoded(line)] -= 1
        self._freed.set()

    def close(self) -> None:
        """From now on nobody enters."""
        self._is_closed = True

    def _has_room(self, is_encoded: bool) -> bool:
        if is_encoded:
            return self._num[True] < MAX_ENCODING
        return self._has_engine_room(self._num[False])

    def _has_engine_room(self, num_entered: int) -> bool:
        """`num_entered`: requests that may still be on their way to it."""
        facts = self._facts()
        load, slots = facts.load, facts.max_running or SOME_RUNNING
        under_way = max(load.running + load.waiting, num_entered)
        if under_way == 0:
            return True
        free = load.free_tokens + load.evictable_tokens
        return under_way < slots - max(1, slots // RESERVE) and load.waiting < MAX_WAITING and free * RESERVE >= load.total_tokens
