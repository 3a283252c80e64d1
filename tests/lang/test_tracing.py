"""Programs seen without a model."""

import pytest

from streamserve.lang import ProgramState, assistant, function, gen, select, system, user
from tests.lang.scripted import Scripted

LONG = "an example that all runs share. " * 3


@function
def program(s: ProgramState, question: str, times: int = 2) -> None:
    s += system("rules") + LONG
    s += user(question)
    s += assistant("I think " + gen("answer"))
    forks = s.fork(2)
    forks += "and " + select("which", ["a", "b"])
    forks.join()
    s += s["answer"]


def test_a_trace_is_the_tree_of_what_is_appended() -> None:
    lines = str(program.trace(question="why?")).splitlines()
    assert lines[1] == "Text(value='rules')"
    assert lines[5] == "Text(value='why?')"
    at = lines.index("Fork(2)")
    assert lines[at + 1 : at + 4] == [
        "  [0]",
        "    Text(value='and ')",
        "    Select(name='which', choices=('a', 'b'), temperature=0.0, method=None)",
    ]
    assert lines[-1] == "Placeholder(name='answer')"


def test_the_constant_beginning_is_computed() -> None:
    backend = Scripted()
    program.cache(backend)
    assert backend.prefixes == ["0system:rules;0" + LONG + "1user:"]
    assert backend.prompts == []


def test_arguments_that_are_bound_are_constant() -> None:
    backend = Scripted()
    program.bind(question="why?").cache(backend)
    assert backend.prefixes == ["0system:rules;0" + LONG + "1user:why?;12assistant:I think "]


def test_a_short_beginning_or_one_that_ends_in_an_f_string_is_no_matter() -> None:
    backend = Scripted()

    @function
    def formatted(s: ProgramState, name: str) -> None:
        s += "short"
        s += f"Hello {name}" + gen("a")

    formatted.cache(backend)
    assert backend.prefixes == []
    with pytest.raises(TypeError, match="f-string"):
        formatted.trace()


def test_a_turn_in_which_the_program_fails_without_arguments_stays_open() -> None:
    backend = Scripted()

    @function
    def formatted(s: ProgramState, name: str) -> None:
        with s.user():
            s += LONG
            s += f"Hello {name}"

    formatted.cache(backend)
    assert backend.prefixes == ["0user:" + LONG]


def test_programs_called_in_a_trace_are_part_of_it() -> None:
    @function
    def outer(s: ProgramState) -> None:
        s += "outer"
        s += program(question="why?")["answer"]

    text = str(outer.trace())
    assert text.startswith("Text(value='outer')\nRoleBegin(role='system'")
    assert "why?" in text


def test_async_programs_are_traced() -> None:
    @function
    async def coroutine(s: ProgramState, question: str) -> None:
        s += user(question)
        s += await s.gen("a")

    assert str(coroutine.trace()).splitlines()[1] == "Placeholder(name='question')"


def test_a_program_that_waits_for_its_answer_is_left() -> None:
    @function
    def until(s: ProgramState) -> None:
        while s["a"] != "done":
            s += gen("a")

    with pytest.raises(RuntimeError, match="without a model"):
        until.trace()
