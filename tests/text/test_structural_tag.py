"""Free text with constrained parts in it, in both ways of describing them."""

from typing import Any

import pytest

from streamserve.errors import InvalidRequest
from streamserve.text.structure import structural_tag, text_of
from tests.text.grammars import Grammar

COUNT: Any = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
NAMED: Any = {"type": "object", "properties": {"s": {"enum": ["x", "y"]}}, "required": ["s"], "additionalProperties": False}
LEGACY: Any = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<function=count>", "schema": COUNT, "end": "</function>"},
        {"begin": "<function=name>", "schema": NAMED, "end": "</function>"},
    ],
    "triggers": ["<function="],
}


def held(value: Any, **options: Any) -> Grammar:
    return Grammar(text_of(structural_tag(value, **options)), options.get("control"))


def typed(format: Any, **options: Any) -> Grammar:
    return held({"type": "structural_tag", "format": format}, **options)


def test_a_trigger_in_free_text_begins_a_structure() -> None:
    grammar = held(LEGACY)
    assert grammar.accepts("")
    assert grammar.accepts("1 < 2, nothing to call")
    assert grammar.accepts('So <function=count>{"n":3}</function> and <function=name>{"s":"x"}</function>.')
    assert not grammar.begins("So <function=other")
    assert not grammar.begins('So <function=count>{"n":"')
    assert not grammar.begins('So <function=name>{"n"')
    assert not grammar.accepts("So <function=")


def test_a_trigger_may_be_a_control_token() -> None:
    value = {"structures": [{"begin": "<|tag|>", "schema": COUNT, "end": ""}], "triggers": ["<|tag|>"]}
    grammar = held(value, control={"<|tag|>": 257})
    assert grammar.accepts('Text <|tag|>{"n":1}')
    assert not grammar.begins("Text <|tag|>[")


def test_triggered_tags_may_be_demanded_and_end_the_answer() -> None:
    tags = [{"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": COUNT}, "end": "</a>"}]
    node = {"type": "triggered_tags", "triggers": ["<a"], "tags": tags}
    assert typed(node).accepts("none")
    demanded = typed({**node, "at_least_one": True, "stop_after_first": True})
    assert demanded.accepts('yes <a>{"n":1}</a>')
    assert not demanded.accepts("none")
    assert not demanded.begins('yes <a>{"n":1}</a> more')


def test_parts_follow_each_other() -> None:
    grammar = typed(
        {
            "type": "sequence",
            "elements": [
                {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
                {"type": "or", "elements": [{"type": "const_string", "value": "yes"}, {"type": "regex", "pattern": "^no{1,3}$"}]},
                {"type": "any_text"},
            ],
        }
    )
    assert grammar.accepts("<think>a < b</think>yes, because")
    assert grammar.accepts("<think></think>nooo")
    assert not grammar.begins("<think>a</think>maybe")
    assert not grammar.accepts("<think>a")


def test_free_text_ends_where_a_tag_begins() -> None:
    tag = {"type": "tag", "begin": "<n>", "content": {"type": "grammar", "grammar": 'root ::= [0-9]+ "!"'}, "end": "</n>"}
    grammar = typed({"type": "sequence", "elements": [{"type": "any_text"}, tag]})
    assert grammar.accepts("It is <n>42!</n>")
    assert not grammar.begins("It is <n>4 ")


def test_tags_stand_apart_by_a_separator() -> None:
    tags = [{"type": "tag", "begin": f"<{k}>", "content": {"type": "const_string", "value": k}, "end": "."} for k in "ab"]
    node = {"type": "tags_with_separator", "tags": tags, "separator": ", "}
    assert typed(node).accepts("")
    assert typed(node).accepts("<a>a., <b>b., <a>a.")
    assert not typed(node).begins("<a>a.<")
    assert not typed({**node, "stop_after_first": True, "at_least_one": True}).begins("<a>a.,")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**LEGACY, "triggers": ["<tool"]}, r"response_format.triggers holds no beginning of '<function=count>'"),
        ({**LEGACY, "triggers": ["<function=", "<x"]}, "none of structures begins"),
        ({**LEGACY, "triggers": []}, "response_format.triggers is"),
        (
            {**LEGACY, "structures": [{"begin": "<function=", "schema": {"not": {"minimum": 1}}, "end": ""}]},
            r"structures\[0\].schema.not",
        ),
        ({**LEGACY, "structures": [{"begin": "", "schema": {}, "end": ""}]}, r"structures\[0\].begin is ''"),
        ({**LEGACY, "extra": 1}, "response_format.extra is not known"),
        ({"format": {"type": "qwen_xml"}}, "response_format.format.type is 'qwen_xml'; allowed are const_string"),
        ({"format": {"type": "regex", "pattern": "("}}, "format.pattern is"),
        ({"format": {"type": "const_string", "value": 3}}, "format.value is 3"),
        ({"format": {"type": "json_schema", "json_schema": {"contains": {}}}}, "format.json_schema.contains"),
        ({"format": {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}}, "format.style"),
        ({"format": {"type": "grammar", "grammar": 'start: "a"'}}, "is not GBNF"),
        (
            {"format": {"type": "sequence", "elements": [{"type": "any_text"}, {"type": "any_text"}]}},
            r"elements\[0\] is free text",
        ),
        ({"format": 3}, "format is 3"),
        ([], "response_format is"),
    ],
)
def test_what_is_not_known_is_refused_by_its_path(value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        structural_tag(value)


def test_nesting_ends() -> None:
    node: Any = {"type": "any_text"}
    for _ in range(100):
        node = {"type": "or", "elements": [node]}
    with pytest.raises(InvalidRequest, match="nested"):
        structural_tag({"format": node})
