"""The embedder: sequences of many requests gathered into batches for one encoder, in a worker thread. Torch-free.

Owns the queue of an encoder and the order in which requests get their turns. While a batch is computed, what arrives gathers
for the next one; nobody waits for company. Every request that waits gets an equal share of a batch's tokens, so that a short
one is not held up by thousands of texts of another.

The thread runs at a lower priority than the rest of the process where the system has such: on a CPU an answer that is being
written comes first, vectors take what it leaves.
"""

import os
import sys
import threading
from asyncio import Event, Future, get_running_loop
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from streamserve.errors import EngineStopped, QueueFull, StepFailed
from streamserve.messages import EncoderFacts, EncoderInput

Rows = NDArray[np.float32]

log = structlog.get_logger(__name__)

NICENESS = 5  # of the thread: a third of the processor's time where others want all of it
MAX_QUEUED_TOKENS = 4 << 20  # about 150 MB of Python's numbers


class Encoder(Protocol):
    """What computes. Both methods run in the embedder's thread."""

    facts: EncoderFacts

    def enter_thread(self) -> None:
        """Called once, first."""
        ...

    def encode(self, inputs: Sequence[EncoderInput]) -> Rows:
        """One row per input. Blocks."""
        ...


_NOTHING: Rows = np.empty(0, np.float32)


class _Job:
    """One call of `encode`."""

    __slots__ = ("done", "inputs", "num_left", "order", "rows", "tokens_left")

    def __init__(self, inputs: Sequence[EncoderInput]) -> None:
        self.inputs = inputs
        # The shortest is taken first, from the end; neighbours are of about the same length, which attention likes.
        self.order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index].token_ids))
        self.rows = [_NOTHING] * len(inputs)
        self.num_left = len(inputs)
        self.tokens_left = sum(len(given.token_ids) for given in inputs)  # that wait in the queue
        self.done: Future[list[Rows]] = get_running_loop().create_future()

    def take(self, share: int, room: int | None) -> list[int]:
        """Indexes of inputs that together hold `share` tokens or a few less; of one at least, if it fits into `room` (None: it
        does)."""
        taken: list[int] = []
        num_tokens = 0
        while self.order:
            length = self.length(self.order[-1])
            most = share if taken else room
            if most is not None and num_tokens + length > most:
                break
            taken.append(self.order.pop())
            num_tokens += length
        self.tokens_left -= num_tokens
        return taken

    def length(self, index: int) -> int:
        """Tokens of an input."""
        return len(self.inputs[index].token_ids)


_Part = tuple[_Job, list[int]]


class Embedder:
    """EncoderClient in this process. `run()` must be running for calls to make progress."""

    def __init__(self, encoder: Encoder, *, batch_tokens: int, max_queued: int = 1024) -> None:
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._max_queued = max_queued
        self._jobs: deque[_Job] = deque()
        self._live: set[_Job] = set()
        self._wake, self._idle = Event(), Event()
        self._idle.set()
        self._stopped: str | None = None
        self._tokens_per_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedder")
        self._thread.submit(self._enter_thread).result()

    @property
    def facts(self) -> EncoderFacts:
        """See EncoderClient."""
        return self._encoder.facts

    async def encode(self, inputs: Sequence[EncoderInput]) -> Rows:
        """See EncoderClient."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        assert all(0 < len(given.token_ids) <= self.facts.max_len for given in inputs)
        if not inputs:
            return np.empty((0, len(self.facts.labels) or self.facts.dimension), np.float32)
        self._check_queue()
        job = _Job(inputs)
        self._jobs.append(job)
        self._live.add(job)
        self._idle.clear()
        self._wake.set()
        try:
            return np.stack(await job.done)
        finally:
            self._live.discard(job)
            self._withdraw(job)

    def _check_queue(self) -> None:
        waiting = sum(job.tokens_left for job in self._jobs)
        if len(self._jobs) >= self._max_queued or waiting >= MAX_QUEUED_TOKENS:
            raise QueueFull(
                f"{len(self._jobs)} requests with {waiting} tokens wait for the encoder already; at most {self._max_queued} may "
                f"(--max-queued-requests), with {MAX_QUEUED_TOKENS} tokens",
                retry_after_s=max(1.0, waiting / self._tokens_per_s if self._tokens_per_s else 1.0),
            )

    @property
    def num_waiting(self) -> int:
        """Calls with inputs that nobody has begun to compute."""
        return len(self._jobs)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Take no new calls; those that wait go on."""
        self._stopped = self._stopped or reason

    async def idle(self) -> None:
        """Wait until nothing is left to do."""
        await self._idle.wait()

    def warm_up(self, given: EncoderInput) -> None:
        """Compute one input and forget it: the first call is slow on some devices. Blocks; before `run`."""
        self._thread.submit(self._encoder.encode, [given]).result()

    def shut(self) -> None:
        """Wait for the running batch and end the thread."""
        self._thread.shutdown(wait=True)

    def _withdraw(self, job: _Job) -> None:
        """Compute no more of a call."""
        with suppress(ValueError):  # all of it was taken already
            self._jobs.remove(job)

    async def run(self) -> None:
        """Compute what is asked for, until cancelled. Blocks the loop for the making of a batch only."""
        try:
            while True:
                if not self._jobs:
                    self._idle.set()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._compute(self._next_batch())
        finally:
            self._stopped = self._stopped or "the embedder has stopped"
            for job in self._live:
                _end(job, EngineStopped(self._stopped))
            self._idle.set()

    def _next_batch(self) -> list[_Part]:
        """Inputs of the calls at the front of the queue, of each an equal share, as long as there is room. An input of more
        tokens than a batch should have is a batch by itself."""
        parts: dict[int, _Part] = {}
        room = self._batch_tokens
        share = room // len(self._jobs)
        while self._jobs and room > 0:
            job = self._jobs[0]
            taken = job.take(min(share, room), room if parts else None)
            if not taken:  # it stays the first of the next batch
                break
            self._jobs.popleft()
            if job.order:
                self._jobs.append(job)
            parts.setdefault(id(job), (job, []))[1].extend(taken)
            room -= sum(map(job.length, taken))
        return list(parts.values())

    async def _compute(self, parts: list[_Part]) -> None:
        if await self._try(parts) or len(parts) == 1:
            return
        for part in parts:  # whoever is at fault, the others shall not pay for it
            await self._try([part])

    async def _try(self, parts: list[_Part]) -> bool:
        """Compute one batch. When that fails with parts of several calls, nothing is decided yet."""
        inputs = [job.inputs[index] for job, taken in parts for index in taken]
        started = monotonic()
        try:
            rows = await get_running_loop().run_in_executor(self._thread, self._encoder.encode, inputs)
        except Exception as error:
            log.error("encoder_failed", exc_info=error, num_inputs=len(inputs))
            if len(parts) == 1:
                self._fail(parts[0][0], "computing this request's vectors failed; the server's log says why")
            return False
        speed = sum(len(given.token_ids) for given in inputs) / max(1e-6, monotonic() - started)
        self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * speed if self._tokens_per_s else speed
        at = 0
        for job, taken in parts:
            if not np.isfinite(rows[at : at + len(taken)]).all():  # JSON has no word for such numbers
                self._fail(job, "the model's vectors of this request are not finite")
            for index in taken:
                job.rows[index] = rows[at]
                at += 1
            job.num_left -= len(taken)
            if job.num_left == 0 and not job.done.done():
                job.done.set_result(job.rows)
        return True

    def _fail(self, job: _Job, reason: str) -> None:
        self._withdraw(job)
        _end(job, StepFailed(reason))

    def _enter_thread(self) -> None:
        if sys.platform == "linux":  # elsewhere priorities belong to the process
            with suppress(OSError):
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
        self._encoder.enter_thread()


def _end(job: _Job, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
