"""Forks of one state: a list of states that can be appended to together, and joined. Knows of a state only its executor."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from streamserve.lang.executor import Executor, Join
from streamserve.lang.expressions import Expression, Part

GATHER, APPEND = "gather_variable", "concate_and_append"


class Forked(Protocol):
    """A state, as a group needs it."""

    executor: Executor

    def __iadd__(self, other: Part, /) -> Any:
        """Appends."""


S = TypeVar("S", bound=Forked)


class ProgramStateGroup(Generic[S]):
    """The forks, in order.

    `group += "text"` appends it to each, `group += [a, b]` one part to each, `group += lambda i: ...` to each what it returns for
    its index.
    """

    def __init__(self, states: list[S], src_state: S) -> None:
        self.states = states
        self.src_state = src_state

    def join(self, mode: str = GATHER) -> None:
        """Brings the forks' work into the state that they were forked from, in its turn; it waits for nothing here.

        "gather_variable": each variable that forks have and the state has not becomes a list there, in the forks' order.
        "concate_and_append": what the forks have written is appended, in their order. An error of a fork becomes the state's.
        """
        if mode not in (GATHER, APPEND):
            raise ValueError(f"join mode is {mode!r}; allowed are {GATHER!r} and {APPEND!r}")
        marks = tuple(state.executor.mark() for state in self.states)
        self.src_state.executor.push(Join(marks, mode == APPEND))

    def __getitem__(self, i: int) -> S:
        return self.states[i]

    def __setitem__(self, i: int, value: S) -> None:
        if self.states[i] is not value:  # group[i] += x assigns what += returns
            raise TypeError("a fork cannot be replaced; append to it: group[i] += ...")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[S]:
        return iter(self.states)

    def __iadd__(self, other: "Part | Sequence[Part] | Callable[[int], Any]") -> "ProgramStateGroup[S]":
        if isinstance(other, str | Expression):
            parts: list[Any] = [other] * len(self.states)
        elif callable(other):
            parts = [other(i) for i in range(len(self.states))]
        else:
            parts = list(other)
            if len(parts) != len(self.states):
                raise ValueError(f"{len(parts)} parts are appended to {len(self.states)} forks; give one to each")
        for state, part in zip(self.states, parts, strict=True):
            state += part
        return self
