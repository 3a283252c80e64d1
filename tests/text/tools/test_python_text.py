"""Python literals become the JSON of their values, however they are cut."""

import ast
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.text.tools.python_text import PythonValue, json_of_python

LITERALS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else value


@settings(max_examples=300, deadline=None)
@given(LITERALS)
def test_a_literal_is_its_value_read_whole_or_by_characters(value: Any) -> None:
    text = repr(value)
    found = json_of_python(text)
    assert found is not None and json.loads(found) == plain(value)
    reader, held, pieces = PythonValue(), "", ""
    for letter in text + ",":
        piece, pos = reader.feed(held + letter, 0)
        held, pieces = (held + letter)[pos:], pieces + piece
    assert reader.is_done and held == ","
    assert json.loads(pieces) == plain(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0x1F",
            "-0b11",
            "1_000",
            ".5",
            "5.",
            "1e5",
            "'a' \"b\"",
            "'''a'b\n'''",
            '"""a"b"""',
            r"r'\d'",
            "u'é'",
            r"'\x41\u00e9\101\a'",
        ),
        *("(1, 2)", "(1)", "(1,)", "()", "('a' 'b')", "[1, 2,]", "{'a': (1, [2]),}", "'\\\n'", "[((1,), '(')]"),
    ],
)
def test_ways_of_writing(text: str) -> None:
    found = json_of_python(text)
    assert found is not None and json.loads(found) == plain(ast.literal_eval(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("null", None),
        ("datetime(2020, 1)", "datetime(2020, 1)"),
        ("x.y", "x.y"),
        ("1e999", "1e999"),
        ("{1: 2}", {"1": 2}),
    ],
)
def test_what_is_no_literal_is_a_string_of_its_text(text: str, value: Any) -> None:
    found = json_of_python(text)
    assert found is not None and json.loads(found) == value


@pytest.mark.parametrize("text", ["", "[1", "'a", "{'a' 1}", "'a' + b", "[" * 200 + "]" * 200])
def test_what_is_broken_is_none(text: str) -> None:
    assert json_of_python(text) is None
