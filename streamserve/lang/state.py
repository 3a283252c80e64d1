"""The state that a program's function is given: what it appends to, and what it reads from.

Owns the methods users call: those of SGLang's ProgramState, and their counterparts for coroutines. What they mean is the
executor's.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal, overload

from streamserve.lang.appending import Appending
from streamserve.lang.backend import Piece
from streamserve.lang.executor import HIDDEN, Executor, SetVar
from streamserve.lang.expressions import Expression, Gen, Select, gen, select
from streamserve.lang.group import ProgramStateGroup
from streamserve.lang.loops import arun, run


class ProgramState(Appending):
    """`s` of a program. Appending never waits; `s["name"]` waits until the variable is there.

    In an `async def` program nothing may block: `await s.get("name")`, `await s.gen(...)`, `await s.async_text()` wait there.
    """

    def __init__(self, executor: Executor, *, is_async: bool = False) -> None:
        self.executor = executor
        self.is_async = is_async
        self.ret_value: Any = None  # what the program's function returned
        self.task: Any = None  # an async program that is streamed: kept alive
        self._hidden = count()

    def set_var(self, name: str, value: Any) -> None:
        """Sets a variable, in its turn among what was appended."""
        self.executor.push(SetVar(name, value))

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_var(name, value)

    def _push(self, *parts: Expression) -> None:
        self.executor.push(*parts)

    # Reading, for functions that are no coroutines, and for whoever has the state of a program that is done.

    def get_var(self, name: str) -> Any:
        """The variable's value, once it is final. Raises the program's error, or KeyError where nothing sets it."""
        is_final, value = self.executor.look(name)
        if is_final:
            return value
        self._must_not_wait(f's["{name}"]', f'await s.get("{name}")')
        return self.executor.wait_value(name)

    def __getitem__(self, name: str) -> Any:
        return self.get_var(name)

    def __contains__(self, name: str) -> bool:
        if self.executor.knows(name):
            return True
        if not self.is_async and not self.executor.is_settled():
            self.executor.wait_settled()  # a join may bring it
        return self.executor.knows(name)

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        """What the server said of that answer: token counts, finish reason, log-probabilities. None where it is no answer."""
        if not self.executor.look(name)[0]:
            self._must_not_wait(f"s.get_meta_info({name!r})", f"await s.async_meta_info({name!r})")
            if timeout is None:
                self.executor.wait_value(name)
            else:
                run(self.executor.value_within(name, self.executor.is_inside(), timeout))
        return self.executor.transcript.meta.get(name)

    def text(self) -> str:
        """All of the text, once what was appended is done."""
        self.sync()
        return self._raised().transcript.text

    def messages(self) -> list[dict[str, Any]]:
        """The turns so far, in OpenAI's shape."""
        self.sync()
        return list(self._raised().transcript.messages)

    def sync(self) -> None:
        """Waits until all that was appended is done. It raises nothing: `error` tells."""
        if not self.executor.is_settled():
            self._must_not_wait("this", "await s.async_text()")
            self.executor.wait_settled()

    def error(self) -> BaseException | None:
        """What stopped the program, once it is done; None if nothing did."""
        self.sync()
        return self.executor.error

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text, or one variable's, as it comes. Leaving it early stops no program."""
        self._must_not_wait("text_iter", "async for text in s.text_async_iter(...)")
        read = self.executor.read(var_name, self.executor.is_inside())
        while pieces := run(_next(read)):
            yield "".join(piece.text for piece in pieces)

    # The same for coroutines, on any loop.

    async def get(self, name: str) -> Any:
        """The variable's value, once it is final."""
        return await self.executor.await_value(name)

    async def gen(self, name: str | None = None, *args: Any, **sampling: Any) -> Any:
        """Appends an answer and waits for it: `gen`'s arguments."""
        return await self._ask(gen(name, *args, **sampling))

    async def select(self, name: str | None = None, *args: Any, **options: Any) -> Any:
        """Appends a choice and waits for it: `select`'s arguments."""
        return await self._ask(select(name, *args, **options))

    async def async_text(self) -> str:
        """All of the text, once what was appended is done."""
        await self.async_sync()
        return self._raised().transcript.text

    async def async_sync(self) -> None:
        """Waits until all that was appended is done."""
        await self.executor.await_settled()

    async def async_meta_info(self, name: str) -> Any:
        """What the server said of that answer."""
        await self.executor.await_value(name)
        return self.executor.transcript.meta.get(name)

    @overload
    def text_async_iter(self, var_name: str | None = None, return_meta_data: Literal[False] = False) -> AsyncIterator[str]: ...

    @overload
    def text_async_iter(
        self, var_name: str | None, return_meta_data: Literal[True]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]: ...

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """The text, or one variable's, as it comes; with `return_meta_data`, which needs a name, pairs of text and meta info."""
        if return_meta_data and var_name is None:
            raise ValueError("return_meta_data tells of one answer: say which, text_async_iter(name, return_meta_data=True)")
        read = self.executor.read(var_name, self.executor.is_inside())
        while pieces := await arun(_next(read)):
            if return_meta_data:
                for piece in pieces:
                    yield piece.text, piece.meta
            else:
                yield "".join(piece.text for piece in pieces)

    # Forks, and the end.

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "ProgramStateGroup[ProgramState]":
        """So many states that go on from here, side by side. It waits for nothing: they begin when this one gets here.

        `position_ids_offset` is taken, as SGLang does, and means nothing: positions are those of the text.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"fork({size!r}): the number of forks is a whole number, 0 or more")
        forks = [ProgramState(executor, is_async=self.is_async) for executor in self.executor.fork(size)]
        return ProgramStateGroup(forks, self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> "Iterator[ProgramState]":
        """One fork, joined at the end of the block."""
        group = self.fork(1, position_ids_offset)
        try:
            yield group[0]
        finally:
            group.join()

    def end(self) -> None:
        """Ends the program now: what is under way, here and in its forks, is aborted; what is done stays to be read."""
        self.executor.end()

    def __repr__(self) -> str:
        return f"ProgramState({self.executor.transcript.text!r})"

    async def _ask(self, node: Any) -> Any:
        """Appends a node and waits for its value, whether the user named it or not."""
        if node.name is not None:
            self.executor.push(node)
            return await self.get(node.name)
        name = f"{HIDDEN}{next(self._hidden)}"
        hidden = Gen(name, node.sampling) if isinstance(node, Gen) else Select(name, node.choices, node.temperature, node.method)
        self.executor.push(hidden)
        try:
            return await self.get(name)
        finally:
            self.executor.forget(name)

    def _raised(self) -> Executor:
        if self.executor.error is not None:
            raise self.executor.error
        return self.executor

    def _must_not_wait(self, what: str, instead: str) -> None:
        if self.is_async and not self.executor.is_settled() and self.executor.is_inside():
            raise RuntimeError(
                f"{what} would wait, and with it all that runs on this loop: write `{instead}` in an async program"
            )


async def _next(read: AsyncGenerator[list[Piece], None]) -> list[Piece]:
    """What comes next; nothing where that was all. Who leaves early leaves it to the loop to close what he read."""
    return await anext(read, [])
