"""Load on a server: streamed requests over raw HTTP/1.1 from a few processes, and when each read of their answers came.

Owns the client processes and their connections. Knows no workload, and nothing of what an answer says.

A client must not be what is measured. Requests are made into bytes beforehand and spread over a few processes; while the
clock runs, a connection only notes when a read came and what it held. Everything is parsed afterwards (answers.py).
"""

import asyncio
import json
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from streamserve.benchmark.answers import LEFT, STOPPED, Answer, Reads, fields_of, is_chunked, output_of, parsed, timed_events
from streamserve.benchmark.target import Target

PROCESSES = 4
LAST_CHUNK = b"\r\n0\r\n\r\n"
AT_ONCE_S = 0.02  # a client that leaves before anything came stays this long: the request must get there
IDLE_S = 5.0  # a connection that was quiet for longer is not used again: the server may be closing it at that moment
LOOK_EVERY_S = 0.2  # how often progress is shown


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its bytes, when it is due (seconds after the start; later when no connection is free), and after how
    many reads of its answer the client hangs up, if it does; 0 is before anything came."""

    request: bytes
    at_s: float = 0.0
    leaves_after: int | None = None


Sent = tuple[float, Reads, str | None]  # when, what came, why it did not come to its end


def drive(
    target: Target,
    asks: Sequence[Ask],
    *,
    at_once: int,
    processes: int = PROCESSES,
    limit_s: float = 300.0,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Send everything, at most `at_once` at a time, each process its share; the answers in the order of the requests. Ctrl+C
    ends it: requests that were not answered by then have the error STOPPED. `progress` hears now and then how many are done."""
    processes = max(1, min(processes, at_once, len(asks)))
    context = multiprocessing.get_context("fork")  # the requests are there already, nothing is copied
    starts_s = time.perf_counter() + 0.1
    counts = context.Array("q", processes, lock=False)  # each process writes its own
    ends: list[Connection] = []
    workers = []
    try:
        for number in range(processes):
            share = at_once // processes + (number < at_once % processes)
            here, there = context.Pipe(duplex=False)
            arguments = (target, asks[number::processes], share, starts_s, limit_s, there, counts, number)
            worker = context.Process(target=_client, args=arguments, daemon=True)
            worker.start()
            there.close()
            ends.append(here)
            workers.append(worker)
        answers: list[Answer | None] = [None] * len(asks)
        waiting = dict(zip(ends, range(processes), strict=True))
        while waiting:
            try:
                for end in wait(list(waiting), None if progress is None else LOOK_EVERY_S):
                    assert isinstance(end, Connection)
                    answers[waiting.pop(end) :: processes] = end.recv()
                if progress is not None:
                    progress(sum(counts))
            except KeyboardInterrupt:
                for worker in workers:
                    worker.terminate()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()
    return [answer for answer in answers if answer is not None]


def _client(
    target: Target,
    asks: Sequence[Ask],
    at_once: int,
    starts_s: float,
    limit_s: float,
    out: Connection,
    counts: Any,
    number: int,
) -> None:
    """One client process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, who tells us by SIGTERM
    try:
        import uvloop
    except ImportError:
        run: Any = asyncio.run
    else:
        run = uvloop.run

    def count() -> None:
        counts[number] += 1

    out.send([parsed(*sent) for sent in run(send_all(target, asks, at_once, starts_s, limit_s, count))])
    out.close()


async def send_all(
    target: Target,
    asks: Sequence[Ask],
    at_once: int,
    starts_s: float,
    limit_s: float,
    count: Callable[[], None] = lambda: None,
) -> list[Sent]:
    """Send what is due, at most `at_once` at a time; what came of it, in the order of the requests."""
    due, sent = deque(sorted(enumerate(asks), key=lambda numbered: numbered[1].at_s)), dict[int, Sent]()
    tls = target.tls()

    async def connected() -> "_Line":
        name = target.host if tls is not None else None
        return (
            await asyncio.get_running_loop().create_connection(_Line, target.host, target.port, ssl=tls, server_hostname=name)
        )[1]

    async def lane() -> None:
        """Request after request, on one connection as long as it holds."""
        line: _Line | None = None
        while due:
            number, one = due.popleft()
            await asyncio.sleep(max(0.0, starts_s + one.at_s - time.perf_counter()))
            try:
                if line is not None and time.perf_counter() - line.ended_s > IDLE_S:
                    line.close()
                    line = None
                is_new = line is None or line.is_lost
                if line is None or line.is_lost:
                    line = await connected()
                sent[number] = await line.send(one, limit_s)
                if not is_new and line.was_closed_before_it_was_used:  # by a server that had enough of it: never read
                    line = await connected()
                    sent[number] = await line.send(one, limit_s)
            except OSError as error:
                sent[number] = (time.perf_counter(), [], f"cannot connect: {error}")
            count()
        if line is not None:
            line.close()

    lanes = [asyncio.create_task(lane()) for _ in range(min(at_once, len(asks)))]

    def stop() -> None:
        for task in lanes:
            task.cancel()

    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    for ended in await asyncio.gather(*lanes, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    return [sent.get(number) or (time.perf_counter(), [], STOPPED) for number in range(len(asks))]


class Streams:
    """Answers that are streamed beside whatever else is measured, until they are told to stop."""

    def __init__(self, target: Target, asks: Sequence[Ask]) -> None:
        context = multiprocessing.get_context("fork")
        self._ends: list[Connection] = []
        self._workers = []
        for number in range(min(PROCESSES, len(asks))):
            here, there = context.Pipe()
            worker = context.Process(target=_stream, args=(target, asks[number::PROCESSES], there), daemon=True)
            worker.start()
            there.close()
            self._ends.append(here)
            self._workers.append(worker)

    def stop(self) -> list[Answer]:
        """Hang up. What came so far; `has_left` says that an answer was still under way."""
        for end in self._ends:
            end.send(None)
        found = [answer for end in self._ends for answer in end.recv()]
        for worker in self._workers:
            worker.join()
        return found


def _stream(target: Target, asks: Sequence[Ask], pipe: Connection) -> None:
    """One client process of Streams."""

    async def run() -> list[tuple[float, list[tuple[float, bytes]], bool]]:
        loop = asyncio.get_running_loop()
        lines = [(await loop.create_connection(_Line, target.host, target.port, ssl=target.tls()))[1] for _ in asks]
        sent_s = [time.perf_counter() for _ in asks]
        tasks = [asyncio.create_task(line.send(one, 3600.0)) for line, one in zip(lines, asks, strict=True)]
        await loop.run_in_executor(None, pipe.recv)
        running = [not task.done() for task in tasks]
        for line in lines:
            line.close()
        await asyncio.gather(*tasks)
        return [(at, line.reads, is_running) for at, line, is_running in zip(sent_s, lines, running, strict=True)]

    found = []
    for sent_s, reads, is_running in asyncio.run(run()):
        found.append(Answer(sent_s, tuple(_output_times(reads)), has_left=is_running))
    pipe.send(found)
    pipe.close()


def _output_times(reads: Reads) -> list[float]:
    times = []
    for at, data in timed_events(reads):
        with suppress(ValueError):
            times += [at for choice in json.loads(data).get("choices") or () if output_of(choice) is not None]
    return times


class _Line(asyncio.Protocol):
    """A keep-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self.is_lost = False
        self.was_closed_before_it_was_used = False
        self.ended_s = time.perf_counter()  # when it fell quiet
        self._transport: asyncio.Transport | None = None
        self._reads: list[tuple[float, bytes]] = []
        self._tail = b""
        self._is_chunked = False
        self._ends_with_connection = False
        self._leaves_after: int | None = None
        self._ended: asyncio.Future[str | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._reads.append((time.perf_counter(), data))
        if len(self._reads) == self._leaves_after:
            self._end(LEFT)
        elif self._is_chunked:
            self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
            if self._tail == LAST_CHUNK:
                self._end(None)
        elif not self._ends_with_connection:
            self._look_at_head()

    def _look_at_head(self) -> None:
        """Streams come in chunks, or end with the connection; an error is a plain body of a known length."""
        whole = b"".join(data for _, data in self._reads)
        head, blank, body = whole.partition(b"\r\n\r\n")
        if not blank:
            return
        fields = fields_of(head)
        self._is_chunked = is_chunked(fields)
        self._ends_with_connection = not self._is_chunked and b"content-length" not in fields
        self._tail = whole[-len(LAST_CHUNK) :]
        if self._is_chunked:
            is_whole = self._tail == LAST_CHUNK
        else:
            is_whole = not self._ends_with_connection and len(body) >= int(fields[b"content-length"])
        if is_whole:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._ended is not None and not self._ended.done():
            self.was_closed_before_it_was_used = not self._reads
        self._end(
            None if self._ends_with_connection and error is None else f"the connection was lost{f': {error}' if error else ''}"
        )

    def _end(self, why: str | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(why)

    @property
    def reads(self) -> list[tuple[float, bytes]]:
        """What came of the last request."""
        return self._reads

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    async def send(self, one: Ask, limit_s: float) -> Sent:
        """Send a request and wait for the end of its answer, or until its client leaves."""
        assert self._transport is not None
        self._reads, self._tail, self._is_chunked, self._leaves_after = [], b"", False, one.leaves_after
        self._ends_with_connection = False
        self._ended = asyncio.get_running_loop().create_future()
        sent_s = time.perf_counter()
        self._transport.write(one.request)
        try:
            why = await asyncio.wait_for(self._ended, AT_ONCE_S if one.leaves_after == 0 else limit_s)
        except TimeoutError:
            why = LEFT if one.leaves_after == 0 else f"no end after {limit_s:g} s"
        self.ended_s = time.perf_counter()
        if why is not None:
            self.is_lost = True
            self._transport.abort()
        return sent_s, self._reads, why
