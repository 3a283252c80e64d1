"""A program's expressions, done in their order on the background loop.

Owns the queue of one state, the one task that drains it (there is none while it is empty), and who waits for what. Whoever
appends never waits; who reads waits until what it reads is final. What was written is in its transcript. A fork is an executor
that begins where its parent's queue has got to; a join waits in the parent's queue, not in its program.

The transcript belongs to the task while one runs, and to whoever holds the lock otherwise: then text is written at once.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from streamserve.errors import ProgramEnded
from streamserve.lang.backend import Backend, Guesses, Guessing, Piece, Sampling
from streamserve.lang.expressions import (
    Expression,
    Gen,
    ScopeEnd,
    Select,
    SeparateReasoning,
    Text,
    thought_of,
)
from streamserve.lang.gates import Leader
from streamserve.lang.loops import arun, background, run
from streamserve.lang.transcript import Live, Transcript

HIDDEN = "\0"  # begins names of variables that no user gave


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a fork has come to, for a join."""

    text: str  # behind the fork
    variables: dict[str, Any]
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class SetVar:
    """A variable that the program sets itself."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Fork:
    """Children begin here."""

    children: "tuple[Executor, ...]"


@dataclass(frozen=True, slots=True)
class Mark:
    """What a child has come to when its queue gets here."""

    reached: "Future[Snapshot]"


@dataclass(frozen=True, slots=True)
class Join:
    """Children's marks are waited for, and what they have come to is taken over."""

    marks: tuple[Mark, ...]
    appends: bool


Work = Expression | SetVar | Fork | Mark | Join
Do = Callable[["Executor", Work], Any]

# The programs (Executor.program) inside whose functions this code runs, innermost last.
INSIDE: ContextVar[tuple[object, ...]] = ContextVar("streamserve_programs", default=())


class Executor:
    """See the top of the file. `do` gives single expressions their meaning (interpreter.py)."""

    def __init__(
        self,
        backend: Backend,
        defaults: Sampling,
        do: Do,
        *,
        streams: bool = False,
        num_api_spec_tokens: int | None = None,
        leader: Leader | None = None,
        is_open: bool = False,
        program: object = None,
    ) -> None:
        self.program = object() if program is None else program  # the same for a program and its forks
        self.backend = backend
        self.defaults = defaults
        self.streams = streams
        self.num_api_spec_tokens = num_api_spec_tokens
        self.leader = leader
        self.guesses: Guesses | None = None
        if num_api_spec_tokens is not None and isinstance(backend, Guessing):
            self.guesses = backend.guesses(num_api_spec_tokens)
        self.transcript = Transcript()
        self.turn_parts: list[str | Gen] | None = None  # of an assistant's turn that is answered when it ends
        self.error: BaseException | None = None
        self._do = do
        self._is_open = is_open  # a function still appends
        self._is_running = False
        self._queue: deque[Work] = deque()
        self._pending: dict[str, int] = {}  # how often each variable is going to be set by what is queued
        self._lost: set[str] = set()  # variables that would have been set after the error
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Event | None = None  # made by who waits, on the background loop
        self._children: WeakSet[Executor] = WeakSet()
        self._lock = threading.Lock()

    # What programs do: any thread, and it never waits.

    def push(self, *works: Work) -> None:
        """Appends. After an error nothing is done any more; the error is what readers get."""
        starts, changed = False, None
        with self._lock:
            if self.error is None:
                if not self._is_running and self._write_now(works):
                    changed = self._changed
                else:
                    self._queue.extend(works)
                    for work in works:
                        for name in sets(work):
                            self._pending[name] = self._pending.get(name, 0) + 1
                    starts, self._is_running = not self._is_running, True
                works = ()
            else:
                self._lost.update(name for work in works for name in sets(work))
        if works:
            self._refuse(works)
            if isinstance(self.error, ProgramEnded) and not isinstance(works[0], Mark):
                raise self.error
        if starts:
            background().call(self._start)
        elif changed is not None:
            background().call(self._notify)

    def fork(self, number: int) -> "list[Executor]":
        """Children that begin where this one's queue has got to by then."""
        children = []
        for _ in range(number):
            child = Executor(
                self.backend,
                self.defaults,
                self._do,
                streams=self.streams,
                num_api_spec_tokens=self.num_api_spec_tokens,
                leader=self.leader,
                program=self.program,
            )
            child._is_running = True  # until its parent gets to the fork
            children.append(child)
        with self._lock:
            self._children.update(children)
        self.push(Fork(tuple(children)))
        return children

    def mark(self) -> Mark:
        """A point of this queue that a join may wait for."""
        mark = Mark(Future())
        self.push(mark)
        return mark

    def close(self) -> None:
        """The function has ended: nothing more is going to be appended by it."""
        with self._lock:
            self._is_open = False
            changed = self._changed
        if changed is not None:
            background().call(self._notify)

    def fail(self, error: BaseException) -> None:
        """The function raised this: what is under way is aborted, forks and all."""
        with self._lock:
            if self.error is None and (self._is_running or self._is_open or not isinstance(error, ProgramEnded)):
                self.error = error
        background().call(self._abort, error)

    def end(self) -> None:
        """The same where nobody wants the rest. A program that is done stays as it is."""
        self.fail(ProgramEnded("the program was ended before all of it was done"))

    def forget(self, name: str) -> None:
        """A variable that nobody knows of any more."""
        with self._lock:
            self.transcript.variables.pop(name, None)
            self.transcript.meta.pop(name, None)

    # What readers ask: any thread. `wait_` blocks, `await_` does not.

    def look(self, name: str) -> tuple[bool, Any]:
        """Whether the variable is final, and its value. An error of the program is raised if it is not."""
        with self._lock:
            return self._look(name)

    def knows(self, name: str) -> bool:
        """Whether the variable is set, or going to be by what is queued."""
        with self._lock:
            return name in self.transcript.variables or name in self._pending

    def is_settled(self) -> bool:
        """Whether all that was appended is done, and no more can come as far as the caller can know."""
        inside = self.is_inside()
        with self._lock:
            return self._is_settled(inside)

    def is_inside(self) -> bool:
        """Whether the caller is the program's own function: it knows that nothing comes but what it appends."""
        return self.program in INSIDE.get()

    def wait_value(self, name: str) -> Any:
        """The variable's final value. Raises the program's error, or KeyError if nothing is ever going to set it."""
        is_final, value = self.look(name)
        return value if is_final else run(self._value(name, self.is_inside()))

    async def await_value(self, name: str) -> Any:
        """The same for coroutines."""
        is_final, value = self.look(name)
        return value if is_final else await arun(self._value(name, self.is_inside()))

    def wait_settled(self) -> None:
        """Until all is done, or has failed."""
        if not self.is_settled():
            run(self._settled(self.is_inside()))

    async def await_settled(self) -> None:
        """The same for coroutines."""
        if not self.is_settled():
            await arun(self._settled(self.is_inside()))

    # Runs on the background loop.

    async def read(self, name: str | None, inside: bool) -> AsyncGenerator[list[Piece], None]:
        """The text, or one variable's, in pieces as they come."""
        at, is_over = 0, False
        if name is None:
            while not is_over:
                text, is_over = await self._more_text(at, inside)
                at += len(text)
                if text:
                    yield [Piece(text)]
            return
        source = await self._source(name, inside)
        if isinstance(source, str):
            yield [Piece(source, self.transcript.meta.get(name, {}))]
            return
        while not is_over:
            pieces, is_over = await self._more_pieces(source, at)
            at += len(pieces)
            if told := [piece for piece in pieces if piece.text]:
                yield told

    async def _more_text(self, at: int, inside: bool) -> tuple[str, bool]:
        """Text from there on, as soon as there is some, and whether that is all."""
        while True:
            with self._lock:
                text = self.transcript.text[at:]
                is_over = self.error is not None or self._is_settled(inside)
                if text or is_over:
                    if is_over and self.error is not None and not text:
                        raise self.error
                    return text, is_over and self.error is None
                changed = self._next_change()
            await changed.wait()

    async def _source(self, name: str, inside: bool) -> "Live | str":
        """Where to read a variable from while it is generated; its value, where it was not streamed."""
        while True:
            with self._lock:
                live = self.transcript.live.get(name)
                if live is not None and not (live.is_done and name in self._pending):
                    return live
                is_final, value = self._look(name)
                if is_final:
                    return str(value[0] if isinstance(value, list) and value else value)
                self._raise_if_settled(name, inside)
                changed = self._next_change()
            await changed.wait()

    async def _more_pieces(self, live: Live, at: int) -> tuple[list[Piece], bool]:
        """Pieces of a streamed answer from there on, as soon as there are some, and whether those are all."""
        while True:
            with self._lock:
                if live.is_done or len(live.pieces) > at:
                    return live.pieces[at:], live.is_done
                if self.error is not None:
                    raise self.error
                changed = self._next_change()
            await changed.wait()

    def adopt(self, transcript: Transcript, turn_parts: "list[str | Gen] | None") -> None:
        """A fork begins: with these words."""
        with self._lock:
            if self.error is not None:
                return
            self.transcript = transcript
            self.turn_parts = turn_parts
        self._continue()

    def write(self, change: Callable[[], object]) -> None:
        """Changes the transcript and tells those who wait. Only for the task that runs."""
        with self._lock:
            change()
        self._notify()

    def snapshot(self) -> Snapshot:
        """For a join."""
        return Snapshot(self.transcript.text[self.transcript.fork_at :], dict(self.transcript.variables), self.error)

    def stop(self, error: BaseException) -> None:
        """Nothing of what is queued is done any more."""
        with self._lock:
            self.error = error if self.error is None else self.error
            self._is_running = False
            works = tuple(self._queue)
            self._queue.clear()
            self._lost.update(self._pending)
            self._pending.clear()
        self._refuse(works)
        self._notify()

    async def value_within(self, name: str, inside: bool, timeout_s: float) -> Any:
        """The variable's final value, or TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self._value(name, inside)

    async def _value(self, name: str, inside: bool) -> Any:
        while True:
            with self._lock:
                is_final, value = self._look(name)
                if is_final:
                    return value
                self._raise_if_settled(name, inside)
                changed = self._next_change()
            await changed.wait()

    async def _settled(self, inside: bool) -> None:
        while True:
            with self._lock:
                if self._is_settled(inside):
                    return
                changed = self._next_change()
            await changed.wait()

    def _start(self) -> None:
        if self.error is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    def _continue(self) -> None:
        """A fork, whose parent has come to it."""
        with self._lock:
            self._is_running = bool(self._queue)
        if self._is_running:
            self._start()
        else:
            self._notify()

    async def _drain(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, Mark):
                    _resolve(work, self.snapshot())
                else:
                    await self._do(self, work)
                    self._finish(work)
        except asyncio.CancelledError:
            self.stop(ProgramEnded("the program was ended before all of it was done"))
        except Exception as error:
            self.stop(error)
        finally:
            self._task = None

    def _next(self) -> Work | None:
        with self._lock:
            if self._queue and self.error is None:
                return self._queue.popleft()
            self._is_running = False
        self._notify()
        return None

    def _finish(self, work: Work) -> None:
        names = sets(work)
        if names:
            with self._lock:
                for name in names:
                    left = self._pending.get(name, 0) - 1
                    if left > 0:
                        self._pending[name] = left
                    else:
                        self._pending.pop(name, None)
        self._notify()

    def _abort(self, error: BaseException) -> None:
        for child in tuple(self._children):
            child.fail(error)
        if self.error is not None:
            if self._task is not None:
                self._task.cancel()
            self.stop(self.error)

    def _notify(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, None
        if changed is not None:
            changed.set()

    def _refuse(self, works: tuple[Work, ...]) -> None:
        """What depends on works that are not going to be done learns so."""
        for work in works:
            if isinstance(work, Mark):
                _resolve(work, self.snapshot())
            elif isinstance(work, Fork) and self.error is not None:
                for child in work.children:
                    child.fail(self.error)

    # With the lock held.

    def _write_now(self, works: tuple[Work, ...]) -> bool:
        """Writes what needs no model, when nothing stands before it."""
        if self.guesses is not None or not all(isinstance(work, Text | SetVar) for work in works):
            return False
        for work in works:
            if isinstance(work, Text):
                self.transcript.text += work.value
            elif isinstance(work, SetVar):
                self.transcript.variables[work.name] = work.value
        return True

    def _look(self, name: str) -> tuple[bool, Any]:
        if name in self.transcript.variables and name not in self._pending and name not in self._lost:
            return True, self.transcript.variables[name]
        if self.error is not None:
            raise self.error
        return False, None

    def _is_settled(self, inside: bool) -> bool:
        """Nothing is going to happen any more, as far as one knows who is, or is not, in the program's function."""
        if self._is_open and self.streams and not inside:  # who reads meanwhile cannot know what will come
            return isinstance(self.error, ProgramEnded)  # a function that was ended may take its time: nobody waits for it
        return self.error is not None or not self._is_running

    def _raise_if_settled(self, name: str, inside: bool) -> None:
        if self._is_settled(inside):
            if any(isinstance(part, Gen) and part.name == name for part in self.turn_parts or ()):
                raise KeyError(f"with num_api_spec_tokens the variable {name!r} is set when the assistant's turn ends")
            known = ", ".join(repr(each) for each in self.transcript.variables if not each.startswith(HIDDEN))
            raise KeyError(f"nothing sets the variable {name!r}; set are: {known or 'none'}")

    def _next_change(self) -> asyncio.Event:
        if self._changed is None:
            self._changed = asyncio.Event()
        return self._changed


def sets(work: Work) -> tuple[str, ...]:
    """The variables that a work sets; of a join that is not known before."""
    if isinstance(work, Gen | Select | ScopeEnd | SetVar):
        return () if work.name is None else (work.name,)
    if isinstance(work, SeparateReasoning):
        return (*work.names, *(thought_of(name) for name in work.names))
    return ()


def _resolve(mark: Mark, snapshot: Snapshot) -> None:
    if not mark.reached.done():
        mark.reached.set_result(snapshot)
