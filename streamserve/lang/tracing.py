"""What a program appends, found without a model: it runs once with placeholders for arguments and answers.

Owns the stand-in for a program's state and the tree it makes. Good for a look at a program, and for the text that all its runs
begin with. A program that decides by its variables is seen on one of its ways only.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import iscoroutine
from typing import Any

from streamserve.lang.appending import Appending
from streamserve.lang.executor import Executor
from streamserve.lang.expressions import Expression, RoleBegin, RoleEnd, Text, defined_by, gen, select
from streamserve.lang.gates import MIN_PREFIX, gate_of
from streamserve.lang.loops import run

MAX_NODES = 10_000
_CURRENT: "ContextVar[Tracer | None]" = ContextVar("streamserve_tracer", default=None)


@dataclass(frozen=True, slots=True)
class Placeholder(Expression):
    """An argument that was not given, or an answer that was not generated."""

    name: str


class _Enough(BaseException):
    """The constant beginning has ended."""


@dataclass(slots=True)
class Trace:
    """What was appended, in order: expressions, and for a fork the traces of its states."""

    parts: "list[Expression | tuple[Trace, ...]]" = field(default_factory=list)

    def prefix(self) -> tuple[Expression, ...]:
        """The expressions before the first that another run may have otherwise."""
        found: list[Expression] = []
        for part in self.parts:
            if not isinstance(part, Text | RoleBegin | RoleEnd):
                break
            found.append(part)
        return tuple(found)

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The tree, one expression a line."""
        for part in self.parts:
            if isinstance(part, Expression):
                yield "  " * depth + repr(part)
                continue
            yield "  " * depth + f"Fork({len(part)})"
            for i, child in enumerate(part):
                yield "  " * (depth + 1) + f"[{i}]"
                yield from child.lines(depth + 2)

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Tracer(Appending):
    """Stands in for a ProgramState: it writes down, and answers with placeholders."""

    def __init__(self, *, only_prefix: bool = False) -> None:
        self.trace_ = Trace()
        self._only_prefix = only_prefix
        self._values: dict[str, Any] = {}

    @classmethod
    def trace(
        cls, func: Callable[..., Any], names: Sequence[str], given: Mapping[str, Any], *, only_prefix: bool = False
    ) -> Trace:
        """Runs a program's function on a tracer; `names` are its parameters' behind `s`.

        With `only_prefix` it is left at the first thing that is not constant.
        """
        tracer = cls(only_prefix=only_prefix)
        missing = {name: Placeholder(name) for name in names if name not in given}
        try:
            tracer.inline(func, (), {**given, **missing})
        except _Enough:
            pass
        except Exception:
            if not only_prefix:  # a placeholder went where no expression can go: what came before is right
                raise
        return tracer.trace_

    def inline(self, func: Callable[..., Any], args: tuple[Any, ...], arguments: Mapping[str, Any]) -> "Tracer":
        """Runs a program's function here."""
        before = _CURRENT.set(self)
        try:
            found = func(self, *args, **arguments)
            if iscoroutine(found):
                _finish(found)
        finally:
            _CURRENT.reset(before)
        return self

    def _push(self, *parts: Expression) -> None:
        for part in parts:
            if not isinstance(part, Text | RoleBegin | RoleEnd):
                self._not_constant()
            self.trace_.parts.append(part)
        if len(self.trace_.parts) > MAX_NODES:
            raise RuntimeError(f"the program appended {MAX_NODES} expressions without a model: it seems to wait for an answer")

    def set_var(self, name: str, value: Any) -> None:
        """As of a state."""
        self._values[name] = value

    __setitem__ = set_var

    def get_var(self, name: str) -> Any:
        """What the program set itself, or a placeholder."""
        if name in self._values:
            return self._values[name]
        self._not_constant()
        return Placeholder(name)

    __getitem__ = get_var

    def __contains__(self, name: str) -> bool:
        return name in self._values or any(
            isinstance(part, Expression) and defined_by(part) == name for part in self.trace_.parts
        )

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        """Nothing is known."""
        self._not_constant()
        return {}

    def text(self) -> str:
        """Nothing is known."""
        self._not_constant()
        return ""

    def messages(self) -> list[dict[str, Any]]:
        """Nothing is known."""
        self._not_constant()
        return []

    def sync(self) -> None:
        """There is nothing to wait for."""

    def error(self) -> None:
        """Nothing fails."""

    def end(self) -> None:
        """Nothing is under way."""

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Nothing comes."""
        self._not_constant()
        return iter(())

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """Nothing comes."""
        self._not_constant()
        for character in self.text():  # none
            yield character

    async def get(self, name: str) -> Any:
        """As of a state."""
        return self.get_var(name)

    async def gen(self, name: str | None = None, *args: Any, **sampling: Any) -> Any:
        """As of a state."""
        self._push(gen(name, *args, **sampling))
        return Placeholder(name or "")

    async def select(self, name: str | None = None, *args: Any, **options: Any) -> Any:
        """As of a state."""
        self._push(select(name, *args, **options))
        return Placeholder(name or "")

    async def async_text(self) -> str:
        """As of a state."""
        return self.text()

    async def async_sync(self) -> None:
        """As of a state."""

    async def async_meta_info(self, name: str) -> Any:
        """As of a state."""
        return self.get_meta_info(name)

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> "TracerGroup":
        """As of a state."""
        self._not_constant()
        forks = [Tracer() for _ in range(size)]
        for each in forks:
            each._values = dict(self._values)
        self.trace_.parts.append(tuple(each.trace_ for each in forks))
        return TracerGroup(forks)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> "Iterator[Tracer]":
        """As of a state."""
        yield self.fork(1)[0]

    @contextmanager
    def _between(self, begin: Expression, end: Expression) -> Iterator[None]:
        """Without the end where the program fails inside: no run of it goes on so."""
        self._push(begin)
        yield
        self._push(end)

    def _not_constant(self) -> None:
        if self._only_prefix:
            raise _Enough


class TracerGroup:
    """Forks of a tracer."""

    def __init__(self, states: list[Tracer]) -> None:
        self.states = states

    def join(self, mode: str = "gather_variable") -> None:
        """As of a group."""

    def __getitem__(self, i: int) -> Tracer:
        return self.states[i]

    def __setitem__(self, i: int, value: Tracer) -> None:
        """group[i] += x assigns what += returns."""

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tracer]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> "TracerGroup":
        for i, state in enumerate(self.states):
            state += other if isinstance(other, str | Expression) else other(i) if callable(other) else other[i]
        return self


def current_tracer() -> Tracer | None:
    """The tracer whose program this code runs in."""
    return _CURRENT.get()


def warm(prefix: Sequence[Expression], executor: Executor) -> None:
    """Computes a program's constant beginning, if it is long enough to be worth it. `executor` is a fresh one."""
    executor.push(*prefix)
    executor.close()
    executor.wait_settled()
    if executor.error is not None:
        raise executor.error
    prompt, backend = executor.transcript.prompt(), executor.backend

    async def cache() -> None:
        await gate_of(backend).call(lambda: backend.cache_prefix(prompt))

    if len(prompt.text) > MIN_PREFIX:
        run(cache())


def _finish(work: Any) -> None:
    """Runs an async program to its end: what it awaits of a tracer is there at once."""
    try:
        work.send(None)
    except StopIteration:
        return
    finally:
        work.close()
    raise RuntimeError("an async program that waits for something else than its state cannot be traced")
