"""Streams of events that survive their connection, for every dialect that writes to `Events` (sse.py).

    without a wish         the client leaves, the request ends before the next plan
    "resumable": true,     every event has an id, STREAM:N with N from 1 on. A client that left comes back with the header
    or the header          `Last-Event-ID: STREAM:N` and gets everything behind N, as it would have come: to
    x-streamserve-           GET /v1/streams/STREAM      (STREAM is the answer's x-request-id; without the header: from the start)
      resumable: 1           POST the same body again    (what clients made after the browser's EventSource do)
                           DELETE /v1/streams/STREAM ends the request: a lost connection no longer does.

The answer is written into a recording, by a task of its own; a connection reads from it. While nobody reads, the request goes
on for `--resume-window-s`; then it ends, and nothing of it is left. A finished stream is kept as long. At most `max_bytes` of a
stream are kept: what was sent longest ago is forgotten first, and when it is all unread, nothing more is written: tokens merge
in their mailbox, as they do for a slow reader, and no text is lost. Of two readers the newer one goes on. Only the key that
began a stream may read or end it.

Over a WebSocket it is the same, with frames (ws_streams.py).

Owns recordings and the tasks that write them. Knows nothing of what is in an event.
"""

from asyncio import CancelledError, Future, Task, TimerHandle, get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps

import orjson
import structlog
from anyio import CancelScope, Event, move_on_after

from streamserve.api.auth import given_key
from streamserve.api.sse import Events, EventStream
from streamserve.api.stream import Progress, Run, Usage
from streamserve.api.wire import RESUMABLE, ClientLeft, Exchange, Headers, digest_of, leaving_noticed, unforeseen
from streamserve.errors import InvalidRequest, NotFound, QueueFull, StreamGone, StreamServeError, StreamTaken, error_body

log = structlog.get_logger(__name__)

Produce = Callable[[Events], Awaitable[None]]  # writes a whole answer, errors in mid-stream included
Live = Callable[[Run], AbstractContextManager[None]]

LAST_EVENT_ID = b"last-event-id"
MAX_BYTES = 4 << 20  # of one stream
MAX_TOTAL_BYTES = 256 << 20  # of all streams
MAX_ORPHANS = 64  # requests that go on without a reader
MAX_BATCH_BYTES = 64 * 1024
FAREWELL_S = 1.0
RETRY = b"retry: 1000\n"  # ms that the browser's EventSource waits before it comes back; a line of the first event's block


class Recording:
    """The events of one stream, numbered from 1 on: written once, read by one reader at a time. An `Events`."""

    def __init__(self, id: str, owner: bytes, body: bytes, max_bytes: int, note_bytes: Callable[[int], None]) -> None:
        self.id = id
        self.owner = owner  # digests: of the key, and of the body that asked for it
        self.body = body
        self.reader: Reader | None = None
        self.has_ended = False
        self.is_dropped = False
        self.comments: list[bytes] = []  # only for who reads now
        self._head = b"id: %b:" % id.encode()
        self._max_bytes = max_bytes
        self._note_bytes = note_bytes
        self._frames: deque[bytes] = deque()
        self._first = 1  # the number of the oldest frame
        self._num_bytes = 0
        self.num_given = 0  # events that a reader has been given
        self._unread_bytes = 0  # of those behind them
        self._room = Event()  # its writers, one for each choice, wait for it; replaced whenever one begins to

    # ---- the writer's side -----------------------------------------------------------------------------------------

    def events(self, *events: bytes) -> Awaitable[None] | None:
        """See Events."""
        return self._add([b"data: %b\n\n" % event for event in events])

    def named(self, *events: tuple[bytes, bytes]) -> Awaitable[None] | None:
        """See Events."""
        return self._add([b"event: %b\ndata: %b\n\n" % event for event in events])

    def comment(self, text: bytes) -> Awaitable[None] | None:
        """See Events. Comments have no number, and only who reads at the moment gets them."""
        if self.reader is not None:
            self.comments = [*self.comments[-16:], b": %b\n" % text]
            self.wake_reader()
        return None

    async def end(self, *events: bytes) -> None:
        """See Events."""
        self._add([b"data: %b\n\n" % event for event in events])
        self.close()

    def close(self) -> None:
        """Nothing follows."""
        self.has_ended = True
        self.wake_reader()

    def _add(self, frames: list[bytes]) -> Awaitable[None] | None:
        if self.is_dropped:
            return None
        number = self.num_events
        num_bytes = 0
        for frame in frames:
            number += 1
            self._frames.append(b"%b%d\n%b" % (self._head, number, frame))
            num_bytes += len(self._frames[-1])
        self._num_bytes += num_bytes
        self._unread_bytes += num_bytes
        self._note_bytes(num_bytes)
        self._forget()
        self.wake_reader()
        return self._wait_for_room() if self._unread_bytes > self._max_bytes // 2 else None

    def _forget(self) -> None:
        """Let go of what was sent longest ago. At least half of the room stays for it: what was sent may be lost on its way."""
        floor = self.num_given if self.reader is None else self.reader.position
        while self._num_bytes > self._max_bytes and self._first <= floor:
            size = len(self._frames.popleft())
            self._first += 1
            self._num_bytes -= size
            self._note_bytes(-size)

    async def _wait_for_room(self) -> None:
        while self._unread_bytes > self._max_bytes // 2 and not self.is_dropped:
            if self._room.is_set():
                self._room = Event()
            await self._room.wait()

    def drop(self) -> None:
        """Nobody comes back: forget everything, and take nothing any more."""
        self.is_dropped = self.has_ended = True
        self._frames.clear()
        self._note_bytes(-self._num_bytes)
        self._num_bytes = self._unread_bytes = 0
        self._room.set()
        self.wake_reader()

    # ---- the reader's side -----------------------------------------------------------------------------------------

    @property
    def num_events(self) -> int:
        """How many events were written so far."""
        return self._first + len(self._frames) - 1

    @property
    def num_forgotten(self) -> int:
        """So many events, the first ones, can no longer be had."""
        return self._first - 1

    def take(self, position: int) -> list[bytes]:
        """Some of the frames behind a position; none: all are read."""
        frames: list[bytes] = []
        size = 0
        while size < MAX_BATCH_BYTES and position + len(frames) < self.num_events:
            frames.append(self._frames[position + len(frames) + 1 - self._first])
            size += len(frames[-1])
        number = position + len(frames)
        if number > self.num_given:
            fresh = frames[self.num_given - number :]
            self._unread_bytes -= sum(map(len, fresh))
            self.num_given = number
            if self._unread_bytes <= self._max_bytes // 2:
                self._room.set()
        return frames

    def wake_reader(self) -> None:
        """There is something new."""
        if self.reader is not None:
            self.reader.wake()


class Reader:
    """A connection that reads a recording. `position`: events it was given."""

    __slots__ = ("arrived", "has_lost", "position", "scope")

    def __init__(self, position: int) -> None:
        self.position = position
        self.scope = CancelScope()
        self.has_lost = False  # its place to a newer one
        self.arrived: Future[None] | None = None  # it waits for it

    async def wait(self) -> None:
        """Until there is something new."""
        self.arrived = get_running_loop().create_future()
        await self.arrived

    def wake(self) -> None:
        """There is something new."""
        if self.arrived is not None and not self.arrived.done():
            self.arrived.set_result(None)

    def give_way(self) -> None:
        """A newer reader goes on."""
        self.has_lost = True
        self.scope.cancel()


class Kept:
    """A recording, its runs and the task that writes it; and how long it may go on without a reader."""

    __slots__ = ("expiry", "headers", "recording", "runs", "task", "usage")

    def __init__(self, recording: Recording, runs: Sequence[Run], headers: Headers) -> None:
        self.recording = recording
        self.runs = runs  # none, once they have ended: their prompts count in nobody's bytes
        self.usage: Usage | None = None  # the first run's, once it has ended
        self.headers = headers
        self.task: Task[None] | None = None
        self.expiry: TimerHandle | None = None


class Streams:
    """All streams of one server, resumable or not, and the routes to come back to the former."""

    def __init__(
        self,
        live: Live,
        *,
        window_s: float,
        keep_alive_s: float,
        max_body_bytes: int,
        needs_key: bool,
        max_bytes: int = MAX_BYTES,
        max_total_bytes: int = MAX_TOTAL_BYTES,
        max_orphans: int = MAX_ORPHANS,
    ) -> None:
        self._live = live
        self._window_s = window_s
        self._keep_alive_s = keep_alive_s
        self._max_body_bytes = max_body_bytes
        self._needs_key = needs_key
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._max_orphans = max_orphans
        self._kept: dict[str, Kept] = {}
        self._orphans: dict[str, Kept] = {}  # of these, those that run and nobody reads; who was left longest ago stands first
        self._finished: dict[str, Kept] = {}  # and those that have ended, likewise
        self._tasks: set[Task[None]] = set()
        self.num_bytes = 0

    @property
    def num_kept(self) -> int:
        """Resumable streams that can be read now."""
        return len(self._kept)

    # ---- streams ---------------------------------------------------------------------------------------------------

    async def answer(
        self, exchange: Exchange, runs: Sequence[Run], produce: Produce, headers: Headers = (), *, is_resumable: bool = False
    ) -> None:
        """Start the runs, then answer 200 with the events that `produce` writes. What a run's start raises is raised. The
        first run's id is the answer's."""
        headers = [(b"x-request-id", runs[0].call.id.encode()), *headers]
        if is_resumable or self._wishes(exchange):
            owner, leaving = self.owner_of(given_key(exchange.scope)), leaving_noticed(exchange, partial(_abort, runs))
            kept = await self.begin(runs, produce, headers, owner=owner, body=exchange.digest, leaving=leaving)
            await self._follow(exchange, kept, 0)
            return
        with self._live(runs[0]) if len(runs) == 1 else self._all_live(runs):
            async with leaving_noticed(exchange, partial(_abort, runs)) as presence:
                for run in runs:
                    await run.start()
                stream = EventStream(exchange)
                _tell_progress(runs, stream)
                await stream.start(headers)
                stream.keep_alive(self._keep_alive_s, presence)
                await produce(stream)

    @contextmanager
    def _all_live(self, runs: Sequence[Run]) -> Iterator[None]:
        with ExitStack() as live:
            for run in runs:
                live.enter_context(self._live(run))
            yield

    def check_whole(self, exchange: Exchange, is_resumable: bool) -> None:
        """For an answer that is no stream. Raises InvalidRequest when it is to be resumable."""
        if is_resumable or self._wishes(exchange):
            name = "resumable" if is_resumable else RESUMABLE.decode()
            raise InvalidRequest(f"{name} is given but stream is not true: only streams can be resumed", param=name)

    def _wishes(self, exchange: Exchange) -> bool:
        given = exchange.header(RESUMABLE) or b"0"
        if given not in (b"0", b"1"):
            name = RESUMABLE.decode()
            raise InvalidRequest(f"{name} is {given[:60].decode('latin1')!r}; allowed is 1 or 0", param=name)
        return given == b"1"

    async def begin(
        self,
        runs: Sequence[Run],
        produce: Produce,
        headers: Headers,
        *,
        owner: bytes,
        body: bytes,
        leaving: AbstractAsyncContextManager[object],
    ) -> Kept:
        """Start the runs, and write what `produce` does into a recording, with or without a reader. What a run's start raises is
        raised. `leaving`: in which a client's leaving is noticed until then. `body`: a digest of it, where it may come again."""
        if self._window_s <= 0:
            raise InvalidRequest("this server keeps no streams (--resume-window-s 0); leave resumable out", param="resumable")
        if self.num_bytes > self._max_total_bytes:
            raise QueueFull(
                f"resumable streams hold {self.num_bytes} bytes already; at most {self._max_total_bytes} are kept for them: "
                "leave resumable out, or come back later",
                retry_after_s=self._window_s,
                param="resumable",
            )
        recording = Recording(runs[0].call.id, owner, body, self._max_bytes, self._note_bytes)
        kept = Kept(recording, runs, headers)
        started: Future[StreamServeError | None] = get_running_loop().create_future()
        kept.task = task = get_running_loop().create_task(self._record(kept, produce, started))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            async with leaving:
                error = await started
        except (CancelledError, ClientLeft):
            task.cancel()  # nobody knows the stream's name yet
            recording.drop()
            raise
        if error is not None:
            recording.drop()
            raise error
        self._kept[recording.id] = kept
        return kept

    async def _record(self, kept: Kept, produce: Produce, started: Future[StreamServeError | None]) -> None:
        """Write the whole answer. A task of its own, because no connection's task group may hold it; it ends with the run."""
        runs, recording = kept.runs, kept.recording
        error: StreamServeError | None = None
        try:
            with self._all_live(runs):
                for run in runs:
                    await run.start()
                _settle(started, None)
                _tell_progress(runs, recording)
                await produce(recording)
        except StreamServeError as refused:
            error = refused
        except CancelledError:
            error = StreamGone("the stream was ended: nobody read it")
        except Exception as bug:
            error = unforeseen(bug, id=recording.id)
        kept.runs, kept.usage = (), runs[0].usage
        if error is not None:
            _settle(started, error)
            recording.events(_json(error))
        recording.close()
        if recording.reader is None and recording.id in self._kept:
            self._leave(kept)  # the time in which a finished stream can be had begins now

    def owner_of(self, key: bytes | None) -> bytes:
        """Who may read the stream: the holder of this key. Without keys on the server, whoever knows its name."""
        return digest_of((key or b"") if self._needs_key else b"")

    def close(self) -> None:
        """The server has stopped, and nobody comes back: what still runs ends by itself, even where it waits for room."""
        for kept in self._kept.values():
            self._hold(kept)
            _abort(kept.runs)
            kept.recording.drop()
        self._kept.clear()

    # ---- time and memory ---------------------------------------------------------------------------------------------

    def _note_bytes(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_total_bytes and num_bytes > 0:
            self._make_room()

    def _make_room(self) -> None:
        """Drop streams that nobody reads: finished ones first, of each kind the one that was left longest ago."""
        for left in (self._finished, self._orphans):
            while left and self.num_bytes > self._max_total_bytes:
                self._drop(next(iter(left.values())))

    def _leave(self, kept: Kept) -> None:
        """Nobody reads it from now on: its window begins."""
        self._hold(kept)
        (self._finished if kept.recording.has_ended else self._orphans)[kept.recording.id] = kept
        kept.expiry = get_running_loop().call_later(self._window_s, self._drop, kept)
        if len(self._orphans) > self._max_orphans:
            self._drop(next(iter(self._orphans.values())))

    def _hold(self, kept: Kept) -> None:
        """Its window does not count: it is read, or gone."""
        self._orphans.pop(kept.recording.id, None)
        self._finished.pop(kept.recording.id, None)
        if kept.expiry is not None:
            kept.expiry.cancel()
            kept.expiry = None

    def _drop(self, kept: Kept) -> None:
        """End it, before the next plan if it still runs; nothing of it is left."""
        self._hold(kept)
        if self._kept.pop(kept.recording.id, None) is None:
            return
        if not kept.recording.has_ended:
            log.info("stream_dropped", id=kept.recording.id, events=kept.recording.num_events)
            _abort(kept.runs)
            if kept.task is not None:
                kept.task.cancel()
        kept.recording.drop()

    # ---- readers -----------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, kept: Kept, position: int) -> Iterator[Reader]:
        """Somebody reads it, from a position on; nobody else does any longer. At the end its window begins."""
        recording, reader = kept.recording, Reader(position)
        if recording.reader is not None:
            recording.reader.give_way()
        recording.reader = reader
        recording.comments = []
        self._hold(kept)
        try:
            yield reader
        finally:
            if recording.reader is reader:
                recording.reader = None
                if recording.id in self._kept:
                    self._leave(kept)
                else:
                    recording.drop()

    async def _follow(self, exchange: Exchange, kept: Kept, position: int) -> None:
        """Send what is behind a position, until the stream ends, the client leaves or a newer reader comes."""
        recording = kept.recording
        with self.reading(kept, position) as reader:
            async with leaving_noticed(exchange, _nothing) as presence:
                stream = EventStream(exchange, has_ids=True)
                with reader.scope:
                    await stream.start(kept.headers)
                    stream.keep_alive(self._keep_alive_s, presence)
                    await exchange.write(RETRY)
                    await self._send(recording, reader, stream)
                if reader.has_lost:
                    error = StreamTaken("another connection reads this stream now")
                    if not exchange.has_started:
                        raise error
                    with move_on_after(FAREWELL_S):
                        await stream.end(_json(error))
                else:
                    await stream.end()

    async def _send(self, recording: Recording, reader: Reader, stream: EventStream) -> None:
        while not reader.has_lost:  # its cancellation may come a turn later
            frames = recording.take(reader.position)
            reader.position += len(frames)
            comments, recording.comments = recording.comments, []
            if frames or comments:
                waits_for = stream.raw(b"".join([*comments, *frames]))
                if waits_for is not None:
                    await waits_for
            elif recording.has_ended:
                return
            else:
                await reader.wait()

    # ---- routes ------------------------------------------------------------------------------------------------------

    def again(self, answer: Callable[[Exchange], Awaitable[None]]) -> Callable[[Exchange], Awaitable[None]]:
        """A POST route whose streams can be resumed by sending the same body again, with the header Last-Event-ID."""

        @wraps(answer)
        async def route(exchange: Exchange) -> None:
            if not exchange.header(LAST_EVENT_ID):
                await answer(exchange)
                return
            body = await exchange.body(self._max_body_bytes)
            last = exchange.header(LAST_EVENT_ID) or b""
            kept = self._asked_for(exchange, last.rpartition(b":")[0].decode("latin1"))
            if digest_of(body) != kept.recording.body:
                raise InvalidRequest(
                    "Last-Event-ID names a stream that another body has asked for; leave the header out to begin a new one",
                    param="last-event-id",
                )
            await self._go_on(exchange, kept)

        return route

    async def read(self, exchange: Exchange) -> None:
        """GET /v1/streams/{id}: a resumable stream, from the event behind Last-Event-ID on."""
        await self._go_on(exchange, self._asked_for(exchange, exchange.scope["path_params"]["id"]))

    async def stop(self, exchange: Exchange) -> None:
        """DELETE /v1/streams/{id}: its reader gets what there is, with finish_reason "abort"; nobody can come back to it."""
        kept = self._asked_for(exchange, exchange.scope["path_params"]["id"])
        was_running = not kept.recording.has_ended
        _abort(kept.runs)
        self._hold(kept)
        if kept.recording.reader is None:
            self._drop(kept)
        else:
            del self._kept[kept.recording.id]
        await exchange.answer_json({"id": kept.recording.id, "object": "stream.deleted", "deleted": True, "aborted": was_running})

    def _asked_for(self, exchange: Exchange, id: str) -> Kept:
        return self.find(id, self.owner_of(given_key(exchange.scope)), "last-event-id")

    def find(self, id: str, owner: bytes, param: str) -> Kept:
        """The stream of that name. Raises NotFound, which names `param`."""
        kept = self._kept.get(id)
        # Somebody else's stream is told apart from none in no way.
        if kept is None or kept.recording.owner != owner:
            raise NotFound(
                f"there is no stream {id[:80]!r} to go on with: one is kept for {self._window_s:g} s after its reader left "
                "(--resume-window-s), and only for the key that began it",
                param=param,
            )
        return kept

    def check_kept(self, recording: Recording, position: int, param: str) -> None:
        """Raises StreamGone where not all events behind that one can be had."""
        if position < recording.num_forgotten:
            raise StreamGone(
                f"events {position + 1} to {recording.num_forgotten} of this stream are no longer kept "
                f"({self._max_bytes} bytes of a stream are)",
                param=param,
            )

    async def _go_on(self, exchange: Exchange, kept: Kept) -> None:
        recording = kept.recording
        position = _number_of(exchange.header(LAST_EVENT_ID), recording)
        self.check_kept(recording, position, "last-event-id")
        if recording.has_ended and position == recording.num_events:
            await exchange.start(204, [(b"x-request-id", recording.id.encode())])  # to EventSource: do not come back
            await exchange.end()
            return
        await self._follow(exchange, kept, position)


def _json(error: StreamServeError) -> bytes:
    return orjson.dumps({"error": error_body(error)["error"]})


def _abort(runs: Sequence[Run]) -> None:
    for run in runs:
        run.abort()


def _tell_progress(runs: Sequence[Run], stream: Events) -> None:
    """Comments about a long prompt, where the request asks for them."""

    def tell(progress: Progress) -> Awaitable[None] | None:
        return stream.comment(b"prompt_progress %b" % orjson.dumps(progress.as_json()))

    for run in runs:
        run.on_progress = tell if run.call.wants_progress else None


def _nothing() -> None:
    """A reader's leaving ends nothing but its reading."""


def _settle(future: Future[StreamServeError | None], error: StreamServeError | None) -> None:
    if not future.done():
        future.set_result(error)


def _number_of(header: bytes | None, recording: Recording) -> int:
    """N of a Last-Event-ID; 0 without one."""
    if not header:
        return 0
    id, _, number = header.rpartition(b":")
    given = recording.num_given
    if id != recording.id.encode() or not number.isdigit() or len(number) > 12 or int(number) > given:
        raise InvalidRequest(
            f"Last-Event-ID is {header[:120].decode('latin1')!r}; an id of this stream's events is expected, "
            f"{recording.id}:1 to {recording.id}:{given}",
            param="last-event-id",
        )
    return int(number)
