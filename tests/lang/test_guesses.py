"""One answer for several nodes: what is taken from a guess, and when it is asked for again."""

import re
from collections.abc import Sequence

import pytest

from streamserve.errors import CallFailed
from streamserve.lang.backend import Piece, Prompt, Sampling
from streamserve.lang.guesses import CompletionGuesses, TurnGuesses, pattern, taken_apart

pytestmark = pytest.mark.anyio
LINE = Sampling(stop=("\n",), max_tokens=8)


class Scripted:
    """Answers with the given texts, in order."""

    def __init__(self, *answers: str, finish: str = "length") -> None:
        self._answers = list(answers)
        self._finish = finish
        self.asked: list[tuple[str, Sampling]] = []

    async def __call__(self, prompt: Prompt, sampling: Sampling) -> Piece:
        self.asked.append((prompt.text, sampling))
        return Piece(self._answers.pop(0), {"finish_reason": {"type": self._finish}})


async def test_one_completion_serves_several_answers() -> None:
    ask = Scripted(" Ann\nBirthday: May 1\nWork: nurse\n")
    guesses = CompletionGuesses(ask, 64)
    guesses.wrote("Name:")
    assert (await guesses.generate(Prompt("Name:"), LINE)).text == " Ann"
    guesses.wrote("\nBirthday:")
    assert (await guesses.generate(Prompt("..."), LINE)).text == " May 1"
    guesses.wrote("\nWork:")
    assert (await guesses.generate(Prompt("..."), LINE)).text == " nurse"
    assert [(sampling.max_tokens, sampling.stop) for _, sampling in ask.asked] == [(64, ())]


async def test_a_guess_that_went_another_way_is_dropped() -> None:
    ask = Scripted(" Ann\nAge: 3\n", " May 1\n")
    guesses = CompletionGuesses(ask, 64)
    await guesses.generate(Prompt("Name:"), LINE)
    guesses.wrote("\nBirthday:")
    assert (await guesses.generate(Prompt("Name: Ann\nBirthday:"), LINE)).text == " May 1"
    assert [text for text, _ in ask.asked] == ["Name:", "Name: Ann\nBirthday:"]


@pytest.mark.parametrize("other", [Sampling(stop=("\n",), temperature=1.0), Sampling(stop=("\n",), regex="a+"), Sampling()])
async def test_an_answer_sampled_otherwise_is_asked_for(other: Sampling) -> None:
    ask = Scripted(" Ann\nx: 1\n", "aaa\n")
    guesses = CompletionGuesses(ask, 64)
    await guesses.generate(Prompt("Name:"), LINE)
    guesses.wrote("\nx:")
    assert (await guesses.generate(Prompt("..."), other)).text.rstrip() == "aaa" and len(ask.asked) == 2


async def test_an_answer_longer_than_the_guess_is_asked_for_whole() -> None:
    ask = Scripted("a long li", "a long line")
    sampling = Sampling(stop=("\n",), max_tokens=2)
    assert (await CompletionGuesses(ask, 3).generate(Prompt("x"), sampling)).text == "a long line"
    assert ask.asked[1][1] == sampling
    ended = Scripted("all", finish="stop")
    assert (await CompletionGuesses(ended, 3).generate(Prompt("x"), sampling)).text == "all"


@pytest.mark.parametrize(
    ("text", "parts", "values"),
    [
        ("Name: Ann\nWork: nurse", ["Name:", LINE, "\nWork:", LINE], [" Ann", " nurse"]),
        (" Name: Ann\nWork: nurse\n", ["Name:", LINE, "\nWork:", LINE], [" Ann", " nurse"]),
        ("a, b.", [Sampling(), ",", Sampling(), "."], ["a", " b"]),
        ("a, b", [Sampling(), ",", Sampling(), "."], ["a", " b"]),  # the model ended before the program's last words
        ("free", [Sampling()], ["free"]),
        ("Name: Ann", ["Name:", LINE, "\nWork:", LINE], None),
        ("Age: 3\nWork: x", ["Name:", LINE, "\nWork:", LINE], None),
        ("Name: Ann\nAge: 3", ["Name:", LINE, "\nWork:", LINE], None),
    ],
)
def test_a_turn_is_taken_apart_as_the_program_goes(text: str, parts: Sequence[str | Sampling], values: list[str] | None) -> None:
    assert taken_apart(text, parts) == values
    if values is not None and (form := pattern(parts, 20)) is not None:
        assert re.fullmatch(form, "".join([part if isinstance(part, str) else values.pop(0) for part in parts]))


async def test_a_turn_is_asked_for_again_but_not_for_ever() -> None:
    parts = ["Name:", LINE, "\nWork:", LINE]
    ask = Scripted("no", "Name: A\nWork: b")
    assert [piece.text for piece in await TurnGuesses(ask, 40).turn(Prompt("", role="assistant"), parts)] == [" A", " b"]
    assert ask.asked[0][1] == Sampling(max_tokens=40)
    hopeless = Scripted("no", "no", "never")
    with pytest.raises(CallFailed, match="in 3 tries; the last was 'never'"):
        await TurnGuesses(hopeless, 40).turn(Prompt("", role="assistant"), parts)
    formed = Scripted("Name: A\nWork: b")
    await TurnGuesses(formed, 40, takes_regex=True).turn(Prompt("", role="assistant"), parts)
    assert formed.asked[0][1].regex == pattern(parts, 60)
