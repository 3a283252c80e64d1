"""What the executor does for back ends that guess ahead: whole turns put off, words told (backend.Guesses)."""

from collections.abc import Sequence

from streamserve.errors import InvalidRequest
from streamserve.lang import ProgramState, assistant, function, gen, select, separate_reasoning, user
from streamserve.lang.backend import Piece, Prompt, Sampling
from tests.lang.scripted import Scripted


class Told:
    """Writes down what it is told."""

    def __init__(self, *, whole_turns: bool) -> None:
        self.whole_turns = whole_turns
        self.words: list[str] = []
        self.turns: list[tuple[str, list[str]]] = []

    def wrote(self, text: str) -> None:
        self.words.append(text)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Piece:
        return Piece(f"<{prompt.text}>", {"alone": True})

    async def turn(self, prompt: Prompt, parts: Sequence[str | Sampling]) -> list[Piece]:
        self.turns.append((prompt.opened, [part if isinstance(part, str) else f"?{part.stop}" for part in parts]))
        return [Piece(f"<{i}>", {"turn": i}) for i, part in enumerate(parts) if isinstance(part, Sampling)]


class Guessed(Scripted):
    """A back end that guesses."""

    def __init__(self, *, whole_turns: bool) -> None:
        super().__init__()
        self.told = Told(whole_turns=whole_turns)

    def guesses(self, num_tokens: int) -> Told:
        assert num_tokens == 9
        return self.told


@function(num_api_spec_tokens=9)
def form(s: ProgramState) -> None:
    s += "Name:" + gen("name", stop="\n") + "\nAge:"
    s += gen("age", stop="\n")


def test_a_completion_is_guessed_between_what_the_program_wrote() -> None:
    backend = Guessed(whole_turns=False)
    state = form.run(backend=backend)
    assert state.text() == "Name:<Name:>\nAge:<Name:<Name:>\nAge:>"
    assert backend.told.words == ["Name:", "\nAge:"]
    assert state.get_meta_info("name") == {"alone": True}


def test_a_turn_is_answered_when_it_ends() -> None:
    backend = Guessed(whole_turns=True)

    @function(num_api_spec_tokens=9)
    def chat(s: ProgramState) -> str:
        s += user("fill in" + gen("before"))
        with s.assistant():
            s += "Name:" + gen("name", stop="\n") + "\nAge:"
            s += gen("age")
            try:
                s["age"]
            except KeyError as error:
                return str(error)
        return ""

    @function(num_api_spec_tokens=9)
    def whole(s: ProgramState) -> None:
        s += user("fill in") + assistant("Name:" + gen("name", stop="\n") + "\nAge:" + gen("age"))
        s += " " + s["age"]

    state = whole.run(backend=backend)
    assert state.text() == "0user:fill in;01assistant:Name:<1>\nAge:<3>;1 <3>"
    assert state.messages()[1] == {"role": "assistant", "content": "Name:<1>\nAge:<3>"}
    assert backend.told.turns == [("", ["Name:", "?('\\n',)", "\nAge:", "?()"])]
    assert (state["name"], state.get_meta_info("age")) == ("<1>", {"turn": 3})
    assert "set when the assistant's turn ends" in str(chat.run(backend=backend).ret_value)


def test_what_cannot_be_guessed_in_a_turn_is_refused_and_thoughts_end_the_guess() -> None:
    @function(num_api_spec_tokens=9)
    def chosen(s: ProgramState) -> None:
        s += assistant("a" + gen("b") + select("c", ["d"]))

    assert isinstance(chosen.run(backend=Guessed(whole_turns=True)).error(), InvalidRequest)

    @function(num_api_spec_tokens=9)
    def thinking(s: ProgramState) -> None:
        s += assistant(separate_reasoning(gen("a"), "qwen3"))

    state = thinking.run(backend=Guessed(whole_turns=True))
    assert (state["a"], state["a_reasoning_content"]) == ("<0>", "")


def test_a_back_end_that_guesses_nothing_is_asked_each_time() -> None:
    backend = Scripted()
    assert form.run(backend=backend).text() == "Name:<5>\nAge:<13>"
