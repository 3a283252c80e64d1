"""Programs done side by side come to what they come to one step after another: a model of them waits for everything."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.lang import ProgramState, function, gen, select
from streamserve.lang.backend import Prompt, Sampling
from tests.lang.scripted import Scripted

NAMES = ("x", "y")
ON_NAMES = ("gen", "select", "set", "read", "read_text", "has", "again")
MAX_STATES = 12
WORD = "\x01"  # in a prompt, it makes the next answer fail


class Refused(Exception):
    """What a failing answer raises."""


def answer(prompt: Prompt, sampling: Sampling) -> str:
    if WORD in prompt.text:
        raise Refused
    return f"<{len(prompt.text)}>"


@dataclass
class Model:
    """A state that does each thing at once."""

    text: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    has_failed: bool = False
    fork_at: int = 0

    def say(self, text: str) -> None:
        if not self.has_failed:
            self.text += text

    def keep(self, name: str, value: Any) -> None:
        if self.has_failed:
            self.lost.add(name)
        else:
            self.variables[name] = value

    def ask(self, name: str, chosen: str | None = None) -> None:
        if chosen is None and WORD in self.text:
            self.has_failed = True
        said = f"<{len(self.text)}>" if chosen is None else chosen
        self.keep(name, said)
        self.say(said)

    def fork(self) -> "Model":
        if self.has_failed:
            return Model(has_failed=True)
        return Model(self.text, dict(self.variables), fork_at=len(self.text))

    def join(self, children: "list[Model]", appends: bool) -> None:
        self.has_failed = self.has_failed or any(child.has_failed for child in children)
        if self.has_failed:
            return
        if appends:
            self.text += "".join(child.text[child.fork_at :] for child in children)
            return
        found: dict[str, list[Any]] = {}
        for child in children:
            for name in child.variables.keys() - self.variables.keys():
                found.setdefault(name, []).append(child.variables[name])
        self.variables.update(found)

    def read(self, name: str) -> Any:
        if name in self.variables and name not in self.lost:
            return self.variables[name]
        return Refused if self.has_failed else KeyError


Step = tuple[str, int, Any]  # what, on which of the states there are, with what
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.integers(0, 20), st.sampled_from(("a", "bc", "d", "ef", "g", WORD))),
        st.tuples(st.sampled_from(ON_NAMES), st.integers(0, 20), st.sampled_from(NAMES)),
        st.tuples(st.just("fork"), st.integers(0, 20), st.integers(0, 3)),
        st.tuples(st.sampled_from(("gather", "append")), st.integers(0, 20), st.none()),
    ),
    min_size=8,
    max_size=40,
)


def expected(steps: list[Step]) -> list[Any]:
    states, groups, seen = [Model()], [], []
    for what, at, with_ in steps:
        state = states[at % len(states)]
        match what:
            case "say":
                state.say(with_)
            case "gen":
                state.ask(with_)
            case "select":
                state.ask(with_, ("l", "rr")[len(state.text) % 2])
            case "set":
                state.keep(with_, at)
            case "again":
                state.keep(with_, "old")
                state.ask(with_)
                seen.append(state.read(with_))
            case "read":
                seen.append(state.read(with_))
            case "read_text":
                seen.append(Refused if state.has_failed else state.text)
            case "has":
                seen.append(None if state.has_failed else with_ in state.variables)
            case "fork":
                if len(states) + with_ <= MAX_STATES:
                    groups.append((state, [state.fork() for _ in range(with_)]))
                    states += groups[-1][1]
            case _:
                if groups:
                    source, children = groups[at % len(groups)]
                    source.join(children, what == "append")
    return [*seen, *(Refused if state.has_failed else state.text for state in states)]


async def observed(s: ProgramState, steps: list[Step]) -> list[Any]:
    """The same with real states; what would wait is awaited."""
    states, groups, seen = [s], [], []

    async def text_of(state: ProgramState) -> Any:
        try:
            return await state.async_text()
        except Refused:
            return Refused

    async def value_of(state: ProgramState, name: str) -> Any:
        try:
            return await state.get(name)
        except (KeyError, Refused) as error:
            return type(error)

    for what, at, with_ in steps:
        state = states[at % len(states)]
        match what:
            case "say":
                state += with_
            case "gen":
                state += gen(with_)
            case "select":
                state += select(with_, ["l", "rr"])
            case "set":
                state[with_] = at
            case "again":
                state[with_] = "old"
                state += gen(with_)
                seen.append(await value_of(state, with_))
            case "read":
                seen.append(await value_of(state, with_))
            case "read_text":
                seen.append(await text_of(state))
            case "has":
                await state.async_sync()
                seen.append(None if state.error() else with_ in state)
            case "fork":
                if len(states) + with_ <= MAX_STATES:
                    groups.append(state.fork(with_))
                    states += list(groups[-1])
            case _:
                if groups:
                    groups[at % len(groups)].join("concate_and_append" if what == "append" else "gather_variable")
    return [*seen, *[await text_of(state) for state in states]]


@function
async def as_coroutine(s: ProgramState, steps: list[Step]) -> list[Any]:
    return await observed(s, steps)


class Waiting:
    """A state whose awaitable methods block, so that one walk over the steps serves both kinds of programs."""

    def __init__(self, state: ProgramState) -> None:
        self.state = state

    def __iadd__(self, other: Any) -> "Waiting":
        self.state += other
        return self

    def __setitem__(self, name: str, value: Any) -> None:
        self.state[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def fork(self, size: int) -> Any:
        group = self.state.fork(size)
        return _WaitingGroup(group)

    def error(self) -> Any:
        return self.state.error()

    async def get(self, name: str) -> Any:
        return self.state[name]

    async def async_text(self) -> str:
        return self.state.text()

    async def async_sync(self) -> None:
        """`in` waits by itself."""


class _WaitingGroup:
    def __init__(self, group: Any) -> None:
        self.group = group

    def __iter__(self) -> Any:
        return iter([Waiting(state) for state in self.group])

    def join(self, mode: str) -> None:
        self.group.join(mode)


@function
def as_function(s: ProgramState, steps: list[Step]) -> list[Any]:
    work = observed(Waiting(s), steps)  # type: ignore[arg-type]
    try:
        work.send(None)
    except StopIteration as end:
        return list(end.value)
    raise AssertionError("nothing of it suspends")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, way=st.sampled_from(("run", "batch", "async", "async in thread")), streams=st.booleans())
def test_side_by_side_is_as_one_after_another(steps: list[Step], way: str, streams: bool) -> None:
    backend = Scripted(answer)
    if way == "run":
        state = as_function.run(steps=steps, backend=backend, stream=streams)
        state.sync()
    elif way == "batch":
        _, state = as_function.run_batch([{"steps": steps}, {"steps": steps}], backend=backend)
    elif way == "async":
        state = asyncio.run(as_coroutine.async_run(steps=steps, backend=backend))
    else:
        state = asyncio.run(as_function.async_run(steps=steps, backend=backend))
    assert state.ret_value == expected(steps)
