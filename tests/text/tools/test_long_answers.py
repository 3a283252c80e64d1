"""A model that writes one piece on and on, or a head without an end, costs a parser no more than that text's length: none of it
is held, so none is read twice."""

import pytest

from streamserve.text import reasoning
from streamserve.text.tools.find import find
from streamserve.text.tools.format import CallBegan, Content, Event, Tool
from streamserve.text.tools.parser import MAX_HEAD_CHARS, MAX_OBJECT_CHARS
from tests.text.tools.answers import TOOLS, events_of, read
from tests.text.tools.recorded import ANSWERS

FORMATS = sorted(ANSWERS)
NUM_CHARS, NUM_PER_PIECE = 12_000, 400


def _held(reader: object) -> int:
    """Characters that a parser goes over again when more come."""
    return max(len(value) for value in vars(reader).values() if isinstance(value, str))


@pytest.mark.parametrize("name", FORMATS)
def test_a_loop_of_one_piece_is_not_held(name: str) -> None:
    units = (" ", "\n", "a", "1", '"', "{", "[", "(", "<", ",", *find(name).control_tokens)
    beginnings = {case.text[: len(case.text) * eighths // 8] for case in ANSWERS[name] for eighths in range(9)}
    for beginning in sorted(beginnings):
        for unit in units:
            parser = find(name).parser(TOOLS)
            parser.push(beginning)
            for _ in range(NUM_CHARS // NUM_PER_PIECE):
                parser.push(unit * (NUM_PER_PIECE // len(unit)))
                limit = MAX_OBJECT_CHARS if getattr(parser, "_max_undecided", 0) > MAX_HEAD_CHARS else 2 * MAX_HEAD_CHARS
                assert _held(parser) <= limit, (beginning, unit)


@pytest.mark.parametrize("name", FORMATS)
def test_heads_at_the_limit_are_read_the_same_however_cut(name: str) -> None:
    for case in ANSWERS[name]:
        for at in range(0, len(case.text), 9):
            for filler in (" " * 17, "a" * 300, "a" * 1100, "\n" * 5000):
                text = case.text[:at] + filler + case.text[at:]
                whole = _read(name, [text])
                assert _read(name, [text[n : n + 7] for n in range(0, len(text), 7)]) == whole, text


def _read(name: str, pieces: list[str]) -> list[Event]:
    """Events, without ids that a format makes up."""
    events = events_of(find(name).parser(TOOLS), pieces)
    return [CallBegan(event.index, event.name) if isinstance(event, CallBegan) else event for event in events]


@pytest.mark.parametrize("is_open", [False, True])
def test_white_space_around_a_thought_is_not_held(is_open: bool) -> None:
    splitter = reasoning.find("qwen3").splitter(is_open=is_open)
    for _ in range(NUM_CHARS):
        splitter.push(" \n")
        assert _held(splitter) <= MAX_HEAD_CHARS
    blank = " \n" * NUM_CHARS
    assert [*splitter.push("x"), *splitter.finish()] == ([*_thought("x")] if is_open else [Content(blank + "x")])


def _thought(text: str) -> list[Event]:
    return [*reasoning.find("qwen3").splitter(is_open=True).push(text)]


def test_a_number_too_large_for_python_stays_text() -> None:
    for digits in ("0x" + "F" * 5000, "0b" + "1" * 5000):
        (call,) = read(find("pythonic"), f"[add(a={digits}, b=1)]").calls
        assert call.values == {"a": digits, "b": 1}


def test_a_schema_nested_without_end_leaves_a_values_type_open() -> None:
    deep: object = {"type": "string"}
    for _ in range(2000):
        deep = {"anyOf": [deep]}
    tool = Tool("f", "", {"type": "object", "properties": {"a": deep}})
    answer = read(find("glm45"), "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>", tools=(tool,))
    assert answer.made == [("f", {"a": "x"})]


def test_a_null_that_may_be_a_string_waits_for_its_end_and_no_longer() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": ["string", "null"]}}})
    for value, meant in (("null", None), ("nul", "nul"), (" null ", None), ("null" + " " * 100, "null" + " " * 100)):
        text = f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
        assert read(find("glm45"), text, tools=(tool,)).made == [("f", {"a": meant})]
        assert read(find("glm45"), *text, tools=(tool,)).made == [("f", {"a": meant})]


def test_a_fence_behind_deepseeks_calls_is_content() -> None:
    begin, end = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    answer = read(find("deepseekv31"), f"{begin}now<｜tool▁sep｜>{{}}{end}\n```sh\nls\n```")
    assert answer.content == "\n```sh\nls\n```" and answer.made == [("now", {})]
