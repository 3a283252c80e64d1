"""Programs: functions whose first parameter is `s`, and the ways to run them.

Owns how a function is called: in the caller's thread, as a greenlet, in a thread, or as a coroutine on the caller's loop. What it
appends is done elsewhere, on the background loop, in every case. Names and arguments are those of SGLang's SglFunction.
"""

import asyncio
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from contextvars import copy_context
from functools import partial, update_wrapper
from typing import Any, Literal, overload

from streamserve.lang.arguments import SAMPLING_NAMES, sampling_of, whole_number
from streamserve.lang.backend import Backend, Sampling
from streamserve.lang.batches import Crew, in_order
from streamserve.lang.executor import INSIDE, Executor
from streamserve.lang.gates import Leader
from streamserve.lang.greenlets import spawn, start_thread
from streamserve.lang.interpreter import perform
from streamserve.lang.loops import awaited, programs, wait
from streamserve.lang.progress import counting
from streamserve.lang.settings import backend_of, global_config
from streamserve.lang.state import ProgramState
from streamserve.lang.tracing import Trace, Tracer, current_tracer, warm

AT_ONCE = 256  # programs of a batch that are under way
AHEAD = 200  # programs of a batch that are under way before their results are asked for
_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Item = Mapping[str, Any] | Sequence[Any]


class Function:
    """A program. Calling it runs it; inside another program's trace it becomes part of that one."""

    def __init__(
        self, func: Callable[..., Any], num_api_spec_tokens: int | None = None, bound: Mapping[str, Any] | None = None
    ) -> None:
        update_wrapper(self, func)
        self._signature = inspect.signature(func)
        parameters = list(self._signature.parameters)
        name = self.__name__ = getattr(func, "__name__", "the program")
        if not parameters or parameters[0] != "s":
            has = f"has {parameters[0]!r}" if parameters else "has none"
            raise TypeError(f"the first parameter of a program must be 's', its state; {name} {has}")
        if num_api_spec_tokens is not None and whole_number("num_api_spec_tokens", num_api_spec_tokens) < 1:
            raise ValueError(f"num_api_spec_tokens is {num_api_spec_tokens}; allowed are whole numbers from 1")
        self.func = func
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bound = dict(bound or {})
        self.arg_names = [each for each in parameters[1:] if self._signature.parameters[each].kind not in _STARS]
        self.is_async = inspect.iscoroutinefunction(func)

    def __reduce__(self) -> str:
        """Pickled by its name, as functions are."""
        return str(self.func.__qualname__)

    def bind(self, **arguments: Any) -> "Function":
        """The same program with some of its arguments set."""
        self._check_names(arguments)
        return Function(self.func, self.num_api_spec_tokens, {**self.bound, **arguments})

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Runs it, and in a trace records it. With a state as its first argument it goes on from that state instead."""
        if args and isinstance(args[0], ProgramState | Tracer):
            return self.func(args[0], *args[1:], **{**self.bound, **arguments})
        tracer = current_tracer()
        if tracer is not None:
            return tracer.inline(self.func, args, {**self.bound, **arguments})
        return self.run(*args, **arguments)

    def run(
        self, *args: Any, stream: bool = False, backend: Any = None, use_thread: bool = False, **arguments: Any
    ) -> ProgramState:
        """Runs it, and returns its state when all is done; with `stream` at once, to be read while it runs.

        Arguments named as sampling parameters (temperature, max_new_tokens, stop, ...) are defaults for all its answers, unless
        the program has parameters of these names. An error of the model is in the state: `error()` tells, and reading raises it.
        `use_thread`: a function that is streamed gets a thread of its own, for one that blocks on something else than a model.
        """
        sampling, arguments = self._split(arguments)
        self._check(args, arguments)
        state = self._state(backend_of(backend), sampling, streams=stream)
        if stream:
            self._start(state, args, arguments, in_thread=use_thread)
        elif self.is_async:
            self._must_not_block()
            future = programs().submit(self._acall(state, args, arguments))
            try:
                wait(future)
            except BaseException:
                state.end()
                raise
        else:
            self._call(state, args, arguments)
        return state

    async def async_run(self, *args: Any, stream: bool = False, backend: Any = None, **arguments: Any) -> ProgramState:
        """The same for coroutines. An `async def` program runs on the caller's loop. Cancelling it aborts what is under way."""
        sampling, arguments = self._split(arguments)
        self._check(args, arguments)
        state = self._state(backend_of(backend), sampling, streams=stream)
        if stream:
            if self.is_async:
                state.task = asyncio.create_task(self._aguarded(state, args, arguments))
            else:
                self._start(state, args, arguments)
        elif self.is_async:
            await self._acall(state, args, arguments)
        else:
            await _greenlet(lambda: self._call(state, args, arguments), state)
        return state

    @overload
    def run_batch(
        self, batch_kwargs: Sequence[Item], *, generator_style: Literal[False] = False, **options: Any
    ) -> list[ProgramState]: ...

    @overload
    def run_batch(
        self, batch_kwargs: Sequence[Item], *, generator_style: Literal[True], **options: Any
    ) -> Generator[ProgramState, None, None]: ...

    def run_batch(
        self,
        batch_kwargs: Sequence[Item],
        *,
        backend: Any = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **sampling_defaults: Any,
    ) -> Any:
        """Runs it once per item (a dict of arguments, or a tuple of them), many at once; the states come back in order.

        With "auto" all run in one thread, side by side. `num_threads` as a number takes real threads, for programs that block on
        something else than a model. An item's error is in its own state. With `generator_style` the states come one after
        another, and programs are not started long before they are asked for.
        """
        items = self._items(batch_kwargs)
        sampling, unknown = self._split(sampling_defaults)
        if unknown:
            raise TypeError(f"run_batch has no argument {next(iter(unknown))!r}; arguments of the program belong into the items")
        if num_threads != "auto" and (isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1):
            raise ValueError(f"num_threads is {num_threads!r}; allowed are 'auto' and whole numbers from 1")
        if self.is_async:
            self._must_not_block()
        states = self._batch(items, backend_of(backend), sampling, num_threads, progress_bar, generator_style)
        if generator_style:
            return states
        with closing(states):
            return next(states)

    async def async_run_batch(
        self,
        batch_kwargs: Sequence[Item],
        *,
        backend: Any = None,
        at_once: int = AT_ONCE,
        progress_bar: bool = False,
        **sampling_defaults: Any,
    ) -> list[ProgramState]:
        """The same for coroutines: `async def` programs run as tasks of the caller's loop, `at_once` of them at a time."""
        items = self._items(batch_kwargs)
        sampling, unknown = self._split(sampling_defaults)
        if unknown:
            raise TypeError(f"async_run_batch has no argument {next(iter(unknown))!r}")
        if whole_number("at_once", at_once) < 1:
            raise ValueError(f"at_once is {at_once}; allowed are whole numbers from 1")
        found, leader, places = backend_of(backend), self._leader(items), asyncio.Semaphore(at_once)

        async def one(arguments: dict[str, Any], count: Callable[[], None]) -> ProgramState:
            async with places:
                state = self._state(found, sampling, leader=leader)
                if self.is_async:
                    await self._aguarded(state, (), arguments)
                else:
                    await _greenlet(lambda: self._guarded(state, (), arguments), state)
                count()
                return state

        with counting(len(items), is_shown=progress_bar) as count:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(arguments, count)) for arguments in items]
        return [task.result() for task in tasks]

    def trace(self, *, backend: Any = None, **arguments: Any) -> Trace:
        """What the program appends, as a tree, without a model. Arguments that are not given are placeholders."""
        return Tracer.trace(self.func, self.arg_names, {**self.bound, **arguments})

    def cache(self, backend: Any = None) -> None:
        """Computes the text that all runs of the program begin with, so that they find it."""
        prefix = Tracer.trace(self.func, self.arg_names, self.bound, only_prefix=True).prefix()
        warm(prefix, self._state(backend_of(backend), Sampling()).executor)

    def _must_not_block(self) -> None:
        """An async program that is run without awaiting, from inside another one."""
        if programs().is_here and asyncio._get_running_loop() is not None:
            raise RuntimeError(f"{self.__name__} would wait for itself here: await {self.__name__}.async_run(...) instead")

    def _split(self, arguments: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """Defaults of sampling, and what the program itself is given."""
        sampling = {name: arguments[name] for name in arguments if name in SAMPLING_NAMES and name not in self.arg_names}
        return sampling_of(sampling), {name: value for name, value in arguments.items() if name not in sampling}

    def _check(self, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
        """Raises TypeError for arguments that the function does not take, before any of it runs."""
        self._check_names(arguments)
        try:
            self._signature.bind(None, *args, **{**self.bound, **arguments})
        except TypeError as error:
            raise TypeError(f"{self.__name__}: {error}") from None

    def _check_names(self, arguments: Iterable[str]) -> None:
        unknown = [name for name in arguments if name not in self.arg_names]
        if unknown and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self._signature.parameters.values()):
            raise TypeError(f"{self.__name__} has no parameter {unknown[0]!r}; it has {', '.join(self.arg_names) or 'none'}")

    def _items(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Those of a batch, by name."""
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise TypeError(f"a batch is {items!r}; allowed is a list of dicts, or of tuples of arguments")
        found = []
        for place, item in enumerate(items):
            found.append(self._arguments(item))
            try:
                self._check((), found[-1])
            except TypeError as error:
                raise TypeError(f"item {place} of the batch: {error}") from None
        return found

    def _arguments(self, item: Item) -> dict[str, Any]:
        """One item of a batch, by name."""
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, str | bytes) or not isinstance(item, Sequence):
            raise TypeError(f"{item!r} in a batch is {type(item).__name__}; each item is a dict or a tuple of arguments")
        free = [name for name in self.arg_names if name not in self.bound]
        if len(item) > len(free):
            raise TypeError(
                f"{self.__name__} takes {len(free)} arguments ({', '.join(free)}), an item of the batch has {len(item)}"
            )
        return dict(zip(free, item, strict=False))

    def _leader(self, items: Sequence[Any]) -> Leader | None:
        return Leader() if len(items) > 1 and global_config.enable_precache_with_tracing else None

    def _state(
        self, backend: Backend, sampling: Sampling, *, streams: bool = False, leader: Leader | None = None
    ) -> ProgramState:
        executor = Executor(
            backend,
            sampling,
            perform,
            streams=streams,
            num_api_spec_tokens=self.num_api_spec_tokens,
            leader=leader,
            is_open=True,
        )
        return ProgramState(executor, is_async=self.is_async)

    def _batch(
        self,
        items: list[dict[str, Any]],
        backend: Backend,
        sampling: Sampling,
        num_threads: int | str,
        progress_bar: bool,
        one_by_one: bool,
    ) -> Generator[Any, None, None]:
        """The states one after another, or all of them at once."""
        leader, context = self._leader(items), copy_context()
        pool = ThreadPoolExecutor(num_threads, "streamserve-program") if isinstance(num_threads, int) else None
        try:
            with counting(len(items), is_shown=progress_bar) as count:

                def start(index: int) -> "tuple[Future[ProgramState], Callable[[], None]]":
                    state = self._state(backend, sampling, leader=leader)
                    # The caller's context, not that of the program whose end made room for this one.
                    end, stop = context.copy().run(self._begin, state, items[index], pool)
                    end.add_done_callback(lambda _: count())
                    return end, stop

                if one_by_one:
                    yield from in_order(len(items), AHEAD, start)
                else:
                    at_once = num_threads if isinstance(num_threads, int) else AT_ONCE
                    yield Crew(len(items), at_once, start).run()
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, state: ProgramState, arguments: dict[str, Any], pool: ThreadPoolExecutor | None
    ) -> "tuple[Future[ProgramState], Callable[[], None]]":
        """Starts one program of a batch, which raises nothing. What ends it before."""
        if pool is not None and not self.is_async:
            return pool.submit(copy_context().run, self._guarded, state, (), arguments), state.end
        stop: Callable[[], object]
        if self.is_async:
            end = programs().submit(self._aguarded(state, (), arguments))
            stop = end.cancel
        else:
            end, stop = spawn(lambda: self._guarded(state, (), arguments))

        def give_up() -> None:
            stop()
            state.end()

        return end, give_up

    def _start(self, state: ProgramState, args: tuple[Any, ...], arguments: dict[str, Any], *, in_thread: bool = False) -> None:
        """A program that is read while it runs."""
        if self.is_async:
            programs().submit(self._aguarded(state, args, arguments))
        elif in_thread:
            start_thread(partial(copy_context().run, self._guarded, state, args, arguments))
        else:
            spawn(lambda: self._guarded(state, args, arguments))

    def _call(self, state: ProgramState, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
        executor = state.executor
        before = INSIDE.set((*INSIDE.get(), executor.program))
        try:
            state.ret_value = self.func(state, *args, **{**self.bound, **arguments})
            executor.wait_settled()
        except BaseException as error:
            _gave_up(executor, error)
            raise
        finally:
            INSIDE.reset(before)
            executor.close()

    async def _acall(self, state: ProgramState, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
        executor = state.executor
        before = INSIDE.set((*INSIDE.get(), executor.program))
        try:
            state.ret_value = await self.func(state, *args, **{**self.bound, **arguments})
            await executor.await_settled()
        except BaseException as error:
            _gave_up(executor, error)
            raise
        finally:
            INSIDE.reset(before)
            executor.close()

    def _guarded(self, state: ProgramState, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> ProgramState:
        """Runs it; an error is in the state."""
        with suppress(Exception):
            self._call(state, args, arguments)
        return state

    async def _aguarded(self, state: ProgramState, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> ProgramState:
        with suppress(Exception):
            await self._acall(state, args, arguments)
        return state


async def _greenlet(run: Callable[[], object], state: ProgramState) -> None:
    """A plain function that a coroutine waits for. Cancelling that ends the program."""
    end, stop = spawn(run)
    try:
        await awaited(end)
    except asyncio.CancelledError:
        stop()
        state.end()
        raise


def _gave_up(executor: Executor, error: BaseException) -> None:
    if isinstance(error, Exception):
        executor.fail(error)
    else:
        executor.end()


@overload
def function(func: Callable[..., Any]) -> Function: ...


@overload
def function(func: None = None, num_api_spec_tokens: int | None = None) -> Callable[[Callable[..., Any]], Function]: ...


def function(func: Callable[..., Any] | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Makes a program of a function whose first parameter is `s`; `@function`, or `@function(num_api_spec_tokens=...)`.

    With `num_api_spec_tokens` a back end whose answers are paid calls (OpenAI, ...) is asked for up to so many tokens ahead, and
    its words serve the next answers too where they fit. A server of our own needs no such thing, and does none.
    """
    if func is None:
        return lambda each: Function(each, num_api_spec_tokens)
    return Function(func, num_api_spec_tokens)
