"""Hermes' format: what is read of recorded answers, and what its grammar holds."""

import pytest

from streamserve.errors import InvalidRequest
from streamserve.text.structure import json_schema
from streamserve.text.tools.calls import MAX_CALLS
from streamserve.text.tools.find import find
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Demand, Tool
from tests.text.grammars import Grammar
from tests.text.tools.answers import ADD, TOOLS, WEATHER, read

FORMAT = find("hermes")
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Brno", "days": 2}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>'


def test_a_call_behind_text_leaves_the_text_without_the_blank_before_it() -> None:
    answer = read(FORMAT, f"Let me look.\n\n{ONE}\n{TWO}\n")
    assert answer.content == "Let me look."
    assert answer.made == [("get_weather", {"city": "Brno", "days": 2}), ("add", {"a": 1, "b": 2.5})]


def test_the_name_comes_first_and_arguments_as_they_grow() -> None:
    parser = FORMAT.parser(TOOLS)
    assert parser.push('<tool_call>{"name": "add", "arg') == []
    assert parser.push('uments": {"a": 1') == [CallBegan(0, "add"), CallGrew(0, '{"a": 1')]
    assert parser.is_inside_call
    assert parser.push(', "b": 2}') == [CallGrew(0, ', "b": 2}')]
    assert not parser.is_inside_call
    assert parser.push("}</tool_call>") == []
    assert parser.finish() == []


def test_arguments_before_the_name_and_other_keys_are_read() -> None:
    answer = read(FORMAT, '<tool_call>{"type": "function", "arguments": {"a": [1], "b": {}}, "name": "add"}</tool_call>')
    assert answer.made == [("add", {"a": [1], "b": {}})]


@pytest.mark.parametrize("written", ['"{\\"a\\": 1, \\"b\\": \\"\\u00e9\\\\n\\"}"', '{"a": 1, "b": "é\\n"}'])
def test_arguments_as_a_string_of_json_are_the_json(written: str) -> None:
    assert read(FORMAT, f'<tool_call>{{"name": "add", "arguments": {written}}}</tool_call>').made == [
        ("add", {"a": 1, "b": "é\n"})
    ]


@pytest.mark.parametrize("written", ["{}", "null", '"{}"'])
def test_a_call_without_arguments_has_an_empty_object(written: str) -> None:
    assert read(FORMAT, f'<tool_call>{{"name": "now", "arguments": {written}}}</tool_call>').made == [("now", {})]
    assert read(FORMAT, '<tool_call>{"name": "now"}</tool_call>').made == [("now", {})]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        "<tool_call>not json</tool_call>",
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", ',
        "a < b <tool_cal",
        "no call at all \n",
        "<tool_call><tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    answer = read(FORMAT, text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_call_behind_a_false_beginning_is_read() -> None:
    answer = read(FORMAT, f"I write <tool_call> like <tool_call>{{}} this: {ONE} done")
    assert answer.content == "I write <tool_call> like <tool_call>{} this: done"
    assert len(answer.calls) == 1


def test_a_call_that_is_cut_short_keeps_what_it_has() -> None:
    parser = FORMAT.parser(TOOLS)
    parser.push('<tool_call>{"name": "get_weather", "arguments": {"city": "Br')
    assert parser.finish() == []
    assert parser.is_inside_call


def test_arguments_that_go_wrong_end_where_they_did() -> None:
    parser = FORMAT.parser(TOOLS)
    events = parser.push('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call> and more')
    assert events == [CallBegan(0, "add"), CallGrew(0, '{"a": 1'), Content(" and more")]
    assert parser.is_inside_call


def test_several_objects_in_one_tag_are_several_calls() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}\n{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    assert read(FORMAT, text).made == [("now", {}), ("add", {"a": 1, "b": 2})]


def test_without_tools_everything_is_text() -> None:
    assert read(FORMAT, ONE, tools=()).content == ONE


def test_a_demanded_call_is_all_that_the_grammar_takes() -> None:
    grammar = Grammar(FORMAT.grammar(TOOLS, Demand(min_calls=1)))
    assert grammar.accepts(ONE)
    assert grammar.accepts(f"{ONE}\n{TWO}")
    assert grammar.forced("") == '<tool_call>\n{"name": "'
    assert not grammar.begins("Sure")
    assert not grammar.begins('<tool_call>\n{"name": "nope')
    assert not grammar.begins('<tool_call>\n{"name": "add", "arguments": {"a": "x')
    assert not grammar.accepts('<tool_call>\n{"name": "get_weather", "arguments": {"days": 2}}\n</tool_call>')
    assert not grammar.begins('<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "days": 1.5')


def test_demanded_calls_come_to_an_end() -> None:
    answer = json_schema({"const": 1}, "schema")
    for text in (FORMAT.grammar(TOOLS, Demand(min_calls=1)), FORMAT.grammar(TOOLS, Demand(), answer)):
        grammar = Grammar(text)
        assert grammar.accepts("\n".join([TWO] * MAX_CALLS))
        assert not grammar.begins("\n".join([TWO] * MAX_CALLS) + "\n<tool_call>")
    assert Grammar(FORMAT.grammar(TOOLS, Demand(min_calls=1, max_calls=20))).accepts("\n".join([TWO] * 20))


def test_one_named_call_is_the_only_one() -> None:
    grammar = Grammar(FORMAT.grammar(TOOLS, Demand(min_calls=1, max_calls=1, only="add")))
    assert grammar.accepts(TWO)
    assert not grammar.begins(f"{TWO}\n<tool")
    assert grammar.forced("") == '<tool_call>\n{"name": "add", "arguments": {"a": '
    with pytest.raises(InvalidRequest, match="nope"):
        FORMAT.grammar(TOOLS, Demand(min_calls=1, only="nope"))


def test_calls_in_free_text_are_held_to_their_schemas() -> None:
    grammar = Grammar(FORMAT.grammar((ADD, WEATHER), Demand()))
    assert grammar.accepts("")
    assert grammar.accepts("No call < needed.")
    assert grammar.accepts(f"Look: {TWO}\n{ONE}\nDone.")
    assert not grammar.begins("Look: <tool_call>{")
    one = Grammar(FORMAT.grammar((ADD, WEATHER), Demand(max_calls=1)))
    assert one.accepts(f"Look: {TWO} done")
    assert not one.begins(f"Look: {TWO} <tool_call>")


def test_a_final_answer_may_stand_in_place_of_calls() -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False}
    grammar = Grammar(FORMAT.grammar(TOOLS, Demand(), json_schema(schema, "schema")))
    assert grammar.accepts('{"sum":3}')
    assert grammar.accepts(TWO)
    assert not grammar.begins("Sure")
    assert not grammar.begins('{"sum":3} ')


def test_a_control_token_is_demanded_as_a_token() -> None:
    control = {"<tool_call>": 257, "</tool_call>": 258}
    text = find("hermes", control).grammar(TOOLS, Demand(min_calls=1))
    assert Grammar(text, control).accepts(ONE)
    assert not Grammar(text).begins("<tool")
    free = find("hermes", control).grammar(TOOLS, Demand())
    assert Grammar(free, control).accepts(f"Look: {TWO}\n{ONE}\nDone.")
    assert not Grammar(free, control).begins("Look: <tool_call>x")


def test_a_schema_that_cannot_be_held_is_refused_by_its_path() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})
    with pytest.raises(InvalidRequest, match=r"tools\[f\]\.parameters\.properties\.a\.uniqueItems is True"):
        FORMAT.grammar((tool,), Demand(min_calls=1))
