"""A server's batches, from the request for one to the files of its answers.

Owns their states, and who may see them. A batch that the server's end interrupts stays as it is: the folder's are gone on with.
Knows no routes.
"""

from asyncio import CancelledError, Task, create_task, gather, get_running_loop
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from time import time
from typing import TypeVar

import orjson
import structlog
from anyio import CapacityLimiter, to_thread
from starlette.types import ASGIApp

from streamserve.api.batch_ledger import Sink
from streamserve.api.batch_lines import Line
from streamserve.api.batch_room import SharedRoom
from streamserve.api.batch_schema import Batch, CreateBatch, Status
from streamserve.api.batch_store import BatchStore, Record
from streamserve.api.batch_todo import Todo, indexed
from streamserve.api.batch_work import give_up, work
from streamserve.api.inside import Inside, Reply
from streamserve.api.openai import MAX_PRIORITY
from streamserve.api.service import Service
from streamserve.api.stream import TURN
from streamserve.api.wire import unforeseen
from streamserve.errors import Conflict, EngineStopped, QueueFull, StreamServeError

log = structlog.get_logger(__name__)
T = TypeVar("T")

MAX_LINES = 50_000  # OpenAI's
MAX_UNFINISHED, MAX_OWN_UNFINISHED = 128, 32  # batches; each has a thread and three open files
MAX_KEPT, MAX_OWN_KEPT = 10_000, 2_500
RETRY_AFTER_S = 60.0
WITH_PRIORITY = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate")
ENDINGS: dict[Status, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "expired": ("batch_expired", "the batch's completion window ended before this request was answered"),
}


@dataclass(slots=True)
class Job:
    """A batch that is not over. `ending`: what ends it early."""

    record: Record
    sink: Sink | None = None
    ending: Status | None = None
    task: Task[None] | None = None
    working: Task[None] | None = None

    @property
    def batch(self) -> Batch:
        """As clients see it."""
        return self.record.batch

    def end(self, status: Status) -> None:
        """Ask no more lines."""
        self.ending = self.ending or status
        if self.working is not None:
            self.working.cancel()


class BatchRunner:
    """All batches of a server."""

    def __init__(self, service: Service, app: ASGIApp, store: BatchStore) -> None:
        self._service = service
        self._app = app
        self._store = store
        self._records: dict[str, Record] = {}  # oldest first
        self._jobs: dict[str, Job] = {}
        self._room = SharedRoom(service.client.facts, has_encoder=service.encoder is not None)
        self._one_at_a_time = CapacityLimiter(1)  # of the store's work
        self._forgetting: Task[None] | None = None
        self._has_priorities = service.settings.get("schedule_policy") == "priority"
        self._is_stopped = False

    async def _in_store(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=self._one_at_a_time) if self._store.blocks else work()

    # ---- what clients ask for ------------------------------------------------------------------------------------

    async def create(self, request: CreateBatch, data: bytes, owner: str) -> Batch:
        """Begin a batch whose input is `data`. Raises QueueFull or EngineStopped."""
        if not self._service.client.facts().is_ready:
            raise EngineStopped("the server is shutting down; it takes no batches")
        await self._forget_old()
        self._check_room(owner)
        now_s = int(time())
        batch = Batch(
            id=f"batch_{token_hex(16)}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            created_at=now_s,
            expires_at=now_s + request.window_s,
            model=self._service.model_name,
            metadata=request.metadata,
        )
        asked = request.output_expires_after
        record = Record(batch, owner, self._store.ttl_s if asked is None else asked.seconds)
        self._records[batch.id] = record
        try:
            await self._in_store(partial(self._store.begin, record, data))
        except BaseException as error:
            del self._records[batch.id]
            await self._in_store(partial(self._store.forget, record))
            if isinstance(error, OSError):
                raise StreamServeError(f"the batch cannot be kept: {error.strerror}") from None
            raise
        self._start(record)
        return batch

    def _check_room(self, owner: str) -> None:
        """Raises QueueFull when there are too many batches, this owner's or all."""
        own = [record for record in self._records.values() if record.owner == owner]
        num_own, num = (sum(not record.batch.is_over for record in records) for records in (own, self._records.values()))
        if num_own >= MAX_OWN_UNFINISHED or num >= MAX_UNFINISHED:
            raise QueueFull(
                f"{num_own} of your batches are not over (at most {MAX_OWN_UNFINISHED} may be), nor are {num} of all "
                f"(at most {MAX_UNFINISHED}); wait until one is over",
                retry_after_s=RETRY_AFTER_S,
            )
        if len(own) >= MAX_OWN_KEPT or len(self._records) >= MAX_KEPT:
            raise QueueFull(
                f"{len(own)} of your batches are kept (at most {MAX_OWN_KEPT} may be), and {len(self._records)} of all (at most "
                f"{MAX_KEPT}); delete the files of answers that you have read, or wait until they expire",
                retry_after_s=RETRY_AFTER_S,
            )

    def get(self, id: str, owner: str) -> Batch | None:
        """The batch of that id; None when this owner has no such batch."""
        record = self._records.get(id)
        return self._counted(record) if record is not None and record.owner == owner and not record.is_old else None

    def listed(self, owner: str) -> list[Batch]:
        """This owner's, oldest first."""
        return [self._counted(record) for record in self._records.values() if record.owner == owner and not record.is_old]

    async def cancel(self, id: str) -> None:
        """End a batch early; what it has answered stays. Raises Conflict when it is too late."""
        job, batch = self._jobs.get(id), self._records[id].batch
        if batch.status == "cancelling":
            return
        if job is None or batch.status not in ("validating", "in_progress"):
            raise Conflict(f"the batch is {batch.status.replace('_', ' ')}; it cannot be cancelled any more", param="id")
        batch.enter("cancelling", time())
        job.end("cancelled")
        await self._save(job.record)

    def _counted(self, record: Record) -> Batch:
        job = self._jobs.get(record.batch.id)
        if job is not None and job.sink is not None:
            record.batch.count(record.num_lines, job.sink.tally)
        return record.batch

    # ---- the server's start and end ------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Take in the batches that were kept, and go on with those that are not over."""
        for record in await self._in_store(self._store.load):
            self._records[record.batch.id] = record
            if not record.batch.is_over:
                self._start(record)
        await self._forget_old()
        if self._jobs:
            log.info("batches_resumed", batches=len(self._jobs))

    def close(self) -> None:
        """From now on no line is asked; those under way go on."""
        self._room.close()

    async def stop(self) -> None:
        """Break off what is under way: none of it counts as answered. What is written is safe then."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.close()
        jobs = list(self._jobs.values())
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
        await gather(*(job.task for job in jobs if job.task is not None), return_exceptions=True)
        for job in jobs:
            if job.sink is not None:
                await self._in_store(job.sink.close)
        await self._in_store(self._store.close)

    # ---- one batch -----------------------------------------------------------------------------------------------

    def _start(self, record: Record) -> None:
        job = self._jobs[record.batch.id] = Job(record)
        job.task = create_task(self._run(job), name=record.batch.id)

    async def _run(self, job: Job) -> None:
        try:
            await self._answer(job)
        except EngineStopped:
            log.info("batch_interrupted", id=job.batch.id)
        except StreamServeError as error:
            await self._fail(job, error)
        except Exception as bug:
            await self._fail(job, unforeseen(bug, batch=job.batch.id))

    async def _answer(self, job: Job) -> None:
        record, batch, max_bytes = job.record, job.batch, self._service.max_body_bytes
        open_input = self._store.input_of(record)
        check = partial(indexed, open_input, max_bytes, url=batch.endpoint, max_lines=MAX_LINES)
        index = await to_thread.run_sync(check, limiter=self._service.checks)
        record.num_lines = len(index)
        sink = await self._in_store(partial(self._store.sink_of, record))
        job.sink = sink
        if batch.status == "validating":
            batch.enter("in_progress", time())
            await self._save(record)
        elif batch.status == "cancelling":
            job.ending = "cancelled"
        todo = await to_thread.run_sync(Todo, open_input, index, sink.answers, max_bytes)
        try:
            await self._work(job, todo, sink)
        finally:
            todo.close()
        if job.ending is not None:
            await sink.settled()
            rest = await to_thread.run_sync(Todo, open_input, index, sink.answers, max_bytes)
            try:
                await give_up(rest, *ENDINGS[job.ending], sink)
            finally:
                rest.close()
        elif batch.status == "in_progress":
            batch.enter("finalizing", time())
            await self._save(record)
        await self._finish(job)
        await self._over(job, job.ending or "completed")

    async def _work(self, job: Job, todo: Todo, sink: Sink) -> None:
        """Until all is answered, or the batch is ended."""
        if job.ending is not None:
            return
        ask = partial(self._ask, Inside(self._app, owner=job.record.owner))
        job.working = create_task(work(todo, ask, sink, self._room))
        timer = get_running_loop().call_later(max(0.0, job.batch.expires_at - time()), job.end, "expired")
        try:
            await job.working
        except CancelledError:
            if job.ending is None:  # the server's end
                job.working.cancel()
                await gather(job.working, return_exceptions=True)
                raise
        finally:
            timer.cancel()
            job.working = None

    async def _ask(self, inside: Inside, line: Line) -> Reply:
        TURN.set(self._room.turn)
        body = line.body
        if self._has_priorities and line.url in WITH_PRIORITY:
            body = orjson.dumps({"priority": -MAX_PRIORITY, **orjson.loads(body)})
        reply = await inside.ask("POST", line.url, body)
        if not self._service.client.facts().is_healthy:  # what a broken engine leaves is no answer
            raise EngineStopped("the engine has stopped")
        return reply

    async def _finish(self, job: Job) -> None:
        """Make files of the answers."""
        job.record.kept_until_s = int(time()) + job.record.output_ttl_s
        try:
            if job.sink is not None:
                await job.sink.settled()
                await self._in_store(job.sink.close)
        finally:  # what a disk has taken is there all the same
            self._counted(job.record)
            self._store.finish(job.record, job.sink)

    async def _fail(self, job: Job, error: StreamServeError) -> None:
        """End it; what it has answered stays."""
        log.warning("batch_failed", id=job.batch.id, error=str(error))
        if job.record.kept_until_s is None:
            with suppress(StreamServeError, OSError):  # the disk's, again
                await self._finish(job)
        job.batch.fail(error, time())
        await self._over(job, "failed")

    async def _over(self, job: Job, status: Status) -> None:
        job.batch.enter(status, time())
        del self._jobs[job.batch.id]
        get_running_loop().call_later(job.record.output_ttl_s + 1, self._forget_soon)
        counts = job.batch.request_counts
        log.info("batch_over", id=job.batch.id, status=status, completed=counts.completed, failed=counts.failed)
        await self._save(job.record)

    async def _save(self, record: Record) -> None:
        try:
            await self._in_store(partial(self._store.save, record))
        except OSError as error:  # its answers are safe all the same
            log.error("batch_not_saved", id=record.batch.id, error=str(error))

    def _forget_soon(self) -> None:
        self._forgetting = create_task(self._forget_old())

    async def _forget_old(self) -> None:
        """Those whose time is up, and where many are kept, those whose answers were deleted."""
        is_full = len(self._records) >= MAX_OWN_KEPT
        for record in list(self._records.values()):
            is_empty = is_full and record.batch.is_over and not self._store.has_files(record)
            if (record.is_old or is_empty) and self._records.pop(record.batch.id, None) is not None:
                await self._in_store(partial(self._store.forget, record))
