"""The requests of a batch, asked many at once, and their answers written as they come. The server and the command line share it.

Owns what becomes of a request that cannot be served now. Knows nothing of where lines come from or answers go.
"""

from asyncio import TaskGroup, gather, sleep
from collections.abc import Awaitable, Callable
from math import isfinite
from typing import Protocol

from anyio import to_thread

from streamserve.api.batch_ledger import Entry, Sink
from streamserve.api.batch_lines import Line, Usage, answer_line, error_line, is_success, usage_of
from streamserve.api.batch_todo import Todo
from streamserve.api.inside import Reply
from streamserve.api.stream import new_id
from streamserve.api.wire import one_error
from streamserve.errors import EngineStopped

Ask = Callable[[Line], Awaitable[Reply]]
LINES_AT_ONCE = 64  # read at once
MAX_WAIT_S = 5.0
BUSY, STOPPED = 429, 503


class Room(Protocol):
    """How many requests may be under way."""

    async def enter(self, line: Line) -> None:
        """Wait until there is room for one more, which is taken."""
        ...

    def leave(self, line: Line) -> None:
        """Give it back."""
        ...


async def work(todo: Todo, ask: Ask, sink: Sink, room: Room) -> None:
    """Answer all that is still to be answered. Raises EngineStopped when there is nobody any more who could; what has no answer
    then, or when this is cancelled, is asked again by who comes next."""
    with one_error():
        async with TaskGroup() as tasks:
            while lines := await to_thread.run_sync(todo.take, LINES_AT_ONCE):
                for line in lines:
                    await room.enter(line)
                    tasks.create_task(_answer(line, ask, sink, room))


async def _answer(line: Line, ask: Ask, sink: Sink, room: Room) -> None:
    try:
        reply = await ask(line)
        while reply.status == BUSY:  # others may be faster to fill a queue
            await sleep(_wait_s(reply))
            reply = await ask(line)
        if reply.status == STOPPED:
            raise EngineStopped("the engine has stopped; run the batch again to go on")
        is_good = is_success(reply.status)
        request_id = dict(reply.headers).get(b"x-request-id", b"").decode("latin1") or new_id("req")
        data = answer_line(line, reply.status, request_id, reply.body)
        await sink.put(Entry(line, data, is_good, usage_of(reply.body)))
    finally:
        room.leave(line)


async def give_up(todo: Todo, code: str, message: str, sink: Sink) -> None:
    """Answer all that is still to be answered with that it will not be."""
    while lines := await to_thread.run_sync(todo.take, LINES_AT_ONCE):
        await gather(*(sink.put(Entry(line, error_line(line, code, message), False, Usage())) for line in lines))


def _wait_s(reply: Reply) -> float:
    given = dict(reply.headers).get(b"retry-after", b"1")
    seconds = float(given) if given.replace(b".", b"", 1).isdigit() else 1.0
    return min(seconds, MAX_WAIT_S) if isfinite(seconds) else MAX_WAIT_S
