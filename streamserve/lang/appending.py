"""How a program appends: `s += ...`, turns, scopes of variables; the same for a state and for what stands in for it in a trace.

Owns these methods, under the names of SGLang's ProgramState. What becomes of an expression is the subclass's matter.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

from streamserve.lang.expressions import Expression, Part, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, parts_of, turn


class Appending:
    """What can be appended to."""

    def _push(self, *parts: Expression) -> None:
        raise NotImplementedError

    def __iadd__(self, other: Part) -> Self:
        self._push(*parts_of(other))
        return self

    def system(self, expr: Part | None = None) -> Any:
        """A system message: `s.system("...")`, or `with s.system(): s += "..."`."""
        return self._turn("system", expr)

    def user(self, expr: Part | None = None) -> Any:
        """A user's turn, either way."""
        return self._turn("user", expr)

    def assistant(self, expr: Part | None = None) -> Any:
        """An assistant's turn, either way."""
        return self._turn("assistant", expr)

    def var_scope(self, name: str) -> AbstractContextManager[None]:
        """What is appended inside becomes the variable `name`."""
        return self._between(ScopeBegin(name), ScopeEnd(name))

    def _turn(self, role: str, expr: Part | None) -> Any:
        if expr is None:
            return self._between(RoleBegin(role), RoleEnd(role))
        whole = turn(role, expr)
        self._push(*whole.parts)
        return whole

    @contextmanager
    def _between(self, begin: Expression, end: Expression) -> Iterator[None]:
        self._push(begin)
        try:
            yield
        except Exception:  # a program that catches it goes on behind the end
            self._push(end)
            raise
        self._push(end)
