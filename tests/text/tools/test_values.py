"""Arguments that are written as text have the type that the schema gives them."""

import json
from typing import Any

import pytest

from streamserve.text.tools.values import ArgumentsWriter

SCHEMA: Any = {
    "properties": {
        "text": {"type": "string"},
        "maybe": {"type": ["string", "null"]},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "list": {"type": "array"},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "kind": {"enum": ["1", "b"]},
        "link": {"$ref": "#/$defs/link"},
        "loop": {"$ref": "#/$defs/loop"},
        "open": {},
    },
    "$defs": {"link": {"type": "string"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]}},
}


def written(name: str, *pieces: str, schema: Any = SCHEMA) -> Any:
    writer = ArgumentsWriter(schema)
    text = writer.begin(name) + "".join(map(writer.more, pieces)) + writer.end() + writer.close()
    found = json.loads(text)
    assert list(found) == [name]
    return found[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", '3 "x"\n\\', '3 "x"\n\\'),
        ("text", "", ""),
        ("text", "null", "null"),
        ("maybe", "null", None),
        ("maybe", "nullify", "nullify"),
        ("maybe", "", ""),
        ("count", " 3\n", 3),
        ("count", "3.5", "3.5"),
        ("count", "three", "three"),
        ("ratio", "3", 3),
        ("ratio", "1e-3", 0.001),
        ("ratio", "NaN", "NaN"),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", "yes", "yes"),
        ("list", "['a', 1]", ["a", 1]),
        ("list", '["a"]', ["a"]),
        ("either", "12", 12),
        ("either", "twelve", "twelve"),
        ("kind", "1", "1"),
        ("link", "5", "5"),
        ("loop", "5", 5),
        ("open", "{}", {}),
        ("open", "word", "word"),
        ("unknown", "[1]", [1]),
    ],
)
def test_a_text_is_what_the_schema_says(name: str, text: str, value: Any) -> None:
    assert written(name, text) == written(name, *text) == value
    assert type(written(name, text)) is type(value)


def test_a_string_comes_out_as_it_comes_in() -> None:
    writer = ArgumentsWriter(SCHEMA)
    assert writer.begin("text") == '{"text": '
    assert [writer.more("a"), writer.more('"\n')] == ['"a', '\\"\\n']
    assert writer.end() + writer.begin("count") + writer.more("1") + writer.end() + writer.close() == '", "count": 1}'


def test_a_schema_that_is_none_or_odd_does_no_harm() -> None:
    for schema in (
        None,
        {},
        {"properties": 3},
        {"properties": {"a": 3}},
        {"properties": {"a": {"type": 3, "enum": 4, "allOf": 5}}},
    ):
        assert written("a", "7", schema=schema) == 7
    assert ArgumentsWriter(None).close() == "{}"
