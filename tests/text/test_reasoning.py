"""Reasoning is told from the answer, however both are cut."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text import reasoning
from streamserve.text.tools.format import Content, Thought
from streamserve.text.tools.parser import joined
from tests.text.tools.answers import cuttings

QWEN = reasoning.find("qwen3")


def split(*pieces: str, format: reasoning.ReasoningFormat = QWEN, **options: Any) -> tuple[str, str]:
    splitter = format.splitter(**{"is_open": False, **options})
    events = [event for piece in pieces for event in splitter.push(piece)] + splitter.finish()
    assert all(isinstance(event, Thought | Content) and event.text for event in events)
    kinds = [type(event) for event in joined(events)]
    assert kinds in ([], [Thought], [Content], [Thought, Content])
    thought = "".join(event.text for event in events if isinstance(event, Thought))
    return thought, "".join(event.text for event in events if isinstance(event, Content))


def test_a_thought_loses_its_markers_and_the_blank_around_them() -> None:
    assert split("<think>\nHm, 1 < 2.\n\nSo yes.\n</think>\n\nYes.\n") == ("Hm, 1 < 2.\n\nSo yes.", "Yes.\n")


def test_an_answer_without_a_thought_is_as_it_came() -> None:
    assert split(" \n Yes. <think> is a tag") == ("", " \n Yes. <think> is a tag")


def test_a_thought_that_the_prompt_opened_needs_no_begin_marker() -> None:
    assert split("Hm.</think>Yes", is_open=True) == ("Hm.", "Yes")
    assert split("<think>Hm.</think>Yes", is_open=True) == ("Hm.", "Yes")


def test_a_thought_that_never_ends_is_all_thought() -> None:
    assert split("<think>Hm. </thin") == ("Hm. </thin", "")


def test_an_empty_thought_is_none() -> None:
    assert split("<think>\n\n</think>\n\nYes") == ("", "Yes")


def test_a_call_inside_the_thought_ends_it() -> None:
    text = "<think>I should look.\n<tool_call>{}</tool_call>"
    assert split(text, triggers=("<tool_call>",)) == ("I should look.", "<tool_call>{}</tool_call>")
    assert split(text) == ("I should look.\n<tool_call>{}</tool_call>", "")


def test_markers_of_ones_own_are_given_as_a_pair() -> None:
    format = reasoning.find("[THINK], [/THINK]")
    assert split("[THINK]a[/THINK]b", format=format) == ("a", "b")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="qwen3"):
        reasoning.find("qwen7")


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("user: what is <think> for?\nassistant: ", False),
    ],
)
def test_the_prompts_end_says_whether_the_thought_is_open(prompt: str, is_open: bool) -> None:
    assert QWEN.is_open(prompt) is is_open


def test_an_answer_to_go_on_with_may_be_inside_its_thought() -> None:
    assert QWEN.is_open("assistant\n<think>\nSo far", continues=True)
    assert not QWEN.is_open("assistant\n<think>\nSo far</think>\nYes", continues=True)


def test_deepseek_r1_thinks_unless_the_prompt_has_closed_the_thought() -> None:
    r1 = reasoning.find("deepseek-r1")
    assert r1.is_open("<｜Assistant｜>")
    assert not r1.is_open("<｜Assistant｜><think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<think>\\n' }}", "qwen3"),
        ("{% if x %}<arg_key>{% endif %}</think>", "glm45"),
        ("◁think▷", "kimi"),
        ("<|tool_calls_section_begin|> <think></think>", "kimi_k2"),
        ("<|channel|>analysis<|message|>", "gpt-oss"),
        ("<|im_start|>", None),
    ],
)
def test_the_template_shows_the_format(template: str, name: str | None) -> None:
    found = reasoning.auto(template)
    assert (found and found.name) == name


PARTS = st.sampled_from(["<think>", "</think>", "<", "think>", "a", " ", "\n", "</", "<tool_call>", "b c"])


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, max_size=12).map("".join), st.booleans(), st.data())
def test_where_the_text_is_cut_changes_nothing(text: str, is_open: bool, data: st.DataObject) -> None:
    options: dict[str, Any] = {"is_open": is_open, "triggers": ("<tool_call>",)}
    assert split(*data.draw(cuttings(text)), **options) == split(text, **options)
