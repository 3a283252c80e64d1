"""Descriptions of answers become grammars that take what fits and nothing else."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from streamserve.errors import InvalidRequest
from streamserve.text import structure
from streamserve.text.lark import led
from streamserve.text.structure import text_of
from tests.text.grammars import Grammar

PERSON: Mapping[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_schema(schema: Any, whitespace: str = "compact") -> Grammar:
    return Grammar(text_of(structure.json_schema(schema, "schema", whitespace)))


def test_json_is_compact_unless_asked_otherwise() -> None:
    compact, spaced, any_space = '{"name":"A","age":3}', '{"name": "A", "age": 3}', '{ "name" :\n"A","age":3}'
    taken = {way: [of_schema(PERSON, way).accepts(text) for text in (compact, spaced, any_space)] for way in structure.WHITESPACE}
    assert taken == {"compact": [True, False, False], "spaced": [False, True, False], "flexible": [True, True, True]}
    assert of_schema(PERSON, " {0,2}").accepts('{"name":  "A","age": 3}')
    with pytest.raises(InvalidRequest, match="json_whitespace"):
        of_schema(PERSON, "[")


def test_everything_that_is_certain_is_forced() -> None:
    assert of_schema(PERSON).forced("") == '{"name":"'


@pytest.mark.parametrize("schema", [{}, True, {"title": "anything"}])
def test_an_empty_schema_is_any_json_with_bounded_numbers(schema: Any) -> None:
    grammar = of_schema(schema)
    for text in ('"a"', "null", "-12.5", '{"a":[1,{"b":[]}]}', "[[[]]]"):
        assert grammar.accepts(text), text
    assert not grammar.begins("1" * 20)
    assert not grammar.begins("0." + "1" * 20)
    assert not grammar.begins("[" * 20)


def test_any_object_is_an_object() -> None:
    grammar = Grammar(text_of(structure.json_object()))
    assert grammar.accepts('{"a":{"b":[1,true,null,"x"]}}')
    assert not grammar.begins("[")
    assert not grammar.begins('{"a":' + "9" * 30)
    assert not grammar.accepts("")


def test_the_empty_object_is_one_of_no_properties() -> None:
    assert of_schema({"type": "object", "additionalProperties": False}).forced("") == "{}"


@pytest.mark.parametrize(
    "schema", [{"type": "number"}, {"type": "integer"}, {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 1}]
)
def test_digits_end(schema: Any) -> None:
    grammar = of_schema(schema)
    assert grammar.accepts("12")
    assert not grammar.begins("1" * 40)
    assert not grammar.begins("1." + "1" * 40)


def test_a_wide_integer_fits() -> None:
    assert of_schema({"type": "integer"}).accepts("1234567890123456789")
    assert of_schema({"type": "integer", "minimum": 0}).accepts("1234567890123456789")
    assert not of_schema({"type": "integer", "format": "int32"}).begins("3000000000")


@pytest.mark.parametrize("const", ["žluťoučký 🦙 世界", 'a"b\\c', 1.0, 0.5, None, True, {"a": [1, "x"]}])
def test_a_const_is_the_only_text(const: Any) -> None:
    said = of_schema({"const": const}).forced("")
    assert json.loads(said) == const


def test_a_pattern_matches_from_one_end_to_the_other() -> None:
    grammar = Grammar(text_of(structure.regex(r"^\d{3}-[a/b]+$")))
    assert grammar.accepts("123-a/b")
    assert not grammar.begins("1234")
    either = Grammar(text_of(structure.regex("a|b\nc")))
    assert either.accepts("a") and either.accepts("b\nc") and not either.accepts("ac")


@pytest.mark.parametrize("pattern", ["^[a-z", "(?=a)b", r"(a)\1", "a**b(", r"\bword", "*"])
def test_a_pattern_that_cannot_be_held_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="regex is"):
        structure.regex(pattern)


def test_one_of_several_texts() -> None:
    grammar = Grammar(text_of(structure.choice(["yes", "no", 'it "depends"\n', "yes sir"])))
    for text in ("yes", "no", 'it "depends"\n', "yes sir"):
        assert grammar.accepts(text)
    assert not grammar.begins("maybe")
    for wrong in ([], [""], ["a", 3]):
        with pytest.raises(InvalidRequest, match="choice"):
            structure.choice(wrong)  # type: ignore[arg-type]


GBNF = r"""
# sums of small numbers
root   ::= term (("+" | "-") term){1,3} End
term ::= [0-9] | "(" root ")" |
   [^a-z0-9\]\x21-\x2F"\\]
End ::= "=\"\u00e9" [a-]?
"""


def test_gbnf_is_read() -> None:
    grammar = Grammar(text_of(structure.ebnf(GBNF)))
    assert grammar.accepts('1+2="é')
    assert grammar.accepts('1+(2-3="é)-A="éa')
    assert grammar.accepts('1+2="é-')
    assert not grammar.begins("1=")
    assert not grammar.begins("1+b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root ::= other", "line 1 .*there is no rule 'other'"),
        ('start ::= "a"', "no rule `root`"),
        ('root ::= "a"\nroot ::= "b"', "line 2 .*given twice"),
        ('root ::= ("a"', "not closed"),
        ('root ::= "a")', "closes nothing"),
        ('root ::= "a" $', "is not GBNF"),
        ("root ::= []", "empty"),
        (" ", "empty"),
    ],
)
def test_a_grammar_that_is_wrong_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        structure.ebnf(text)


def test_lark_goes_through_as_it_is() -> None:
    text = 'start: "a" WORD\nWORD: /[b-d]+/\n'
    assert text_of(structure.ebnf(text)) == text
    assert Grammar(text).accepts("abd")
    assert Grammar(text_of(structure.ebnf(text), lead="\n")).accepts("\nabd")


@pytest.mark.parametrize("grammar", [structure.json_schema({"const": "no"}, "schema"), structure.choice(["yes", '"no"'])])
def test_a_finished_grammar_can_be_put_behind_a_lead(grammar: Any) -> None:
    led_grammar = Grammar(led(text_of(grammar), "\n\n"))
    assert led_grammar.forced("").startswith("\n\n")
    assert led_grammar.accepts('\n\n"no"')
    assert not led_grammar.accepts('"no"')


def test_a_lead_stands_before_the_answer() -> None:
    grammar = Grammar(text_of(structure.choice(["yes", "no"]), lead="\n\n"))
    assert grammar.forced("") == "\n\n"
    assert grammar.accepts("\n\nno")
