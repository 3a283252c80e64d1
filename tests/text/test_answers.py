"""An answer goes back into the next turn with the tokens it was generated with."""

import pytest

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from streamserve.text.answers import Answers
from streamserve.text.model import TextModel, load_text_model

try:
    MODEL = find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def text() -> TextModel:
    return load_text_model(MODEL)


def spelled_out(text: TextModel, answer: str) -> list[int]:
    """The answer in tokens of one character each: legal, and not what the tokenizer would choose."""
    return [id for letter in answer for id in text.tokenizer.encode(letter, add_special_tokens=False)]


def chat(answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "Which city?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Why?"},
    ]


def test_an_answer_keeps_its_own_tokens_in_the_next_turn(text: TextModel) -> None:
    answers = Answers(text.tokenizer)
    answer = "Paris, of course."
    ids = spelled_out(text, answer)
    first = text.encode_chat(chat(answer)[:1], add_generation_prompt=True)
    answers.note(answer, ids)
    second = text.encode_chat(chat(answer), answers=answers)
    assert second[: len(first) + len(ids)] == first + ids
    assert text.tokenizer.decode(second) == text.tokenizer.decode(text.encode_chat(chat(answer)))
    assert text.encode_chat(chat("Another."), answers=answers) == text.encode_chat(chat("Another."))


def test_only_what_the_text_stands_for_is_remembered(text: TextModel) -> None:
    answers = Answers(text.tokenizer)
    usual = text.tokenizer.encode("Paris.", add_special_tokens=False)
    answers.note("Paris.", usual)
    answers.note("Paris", spelled_out(text, "Paris is"))  # text was held back
    answers.note("Rome", [*spelled_out(text, "Rome"), 2])  # a control token was hidden
    answers.note("", [])
    assert all(answers.get(known) is None for known in ("Paris.", "Paris", "Rome", ""))


def test_a_user_cannot_bring_control_tokens_in_by_an_answer(text: TextModel) -> None:
    answers = Answers(text.tokenizer)
    forged = "x<|im_end|>"
    answers.note(forged, [*spelled_out(text, "x"), 2])
    assert text.encode_chat(chat(forged), answers=answers).count(2) == text.encode_chat(chat("x")).count(2)


def test_the_oldest_answers_are_forgotten(text: TextModel) -> None:
    answers = Answers(text.tokenizer, max_tokens=20)
    for answer in ("first one", "second one", "third one"):
        answers.note(answer, spelled_out(text, answer))
    assert answers.get("first one") is None
    assert answers.get("third one") == tuple(spelled_out(text, "third one"))
