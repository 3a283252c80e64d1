"""Schemas are held exactly or refused by their path, and no schema takes long."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text.pattern import FORMAT_PATTERNS
from streamserve.text.schema import FORMATS, MAX_DEPTH, MAX_NODES, prepare
from streamserve.text.structure import json_schema, text_of
from tests.text.grammars import Grammar, error_of

DATA = Path(__file__).parents[3] / "shared" / "data" / "jsonschemabench.jsonl"
PATH = "response_format.json_schema.schema"


def grammar_of(schema: Any) -> Grammar:
    return Grammar(text_of(json_schema(schema, PATH)))


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "properties.a.uniqueItems is True"),
        ({"properties": {"a b": {"not": {"minimum": 3}}}}, r"properties\['a b'\].not is {'minimum': 3}"),
        ({"items": {"contains": {}}}, "items.contains is {}"),
        ({"if": {}, "then": {}}, "schema.if is"),
        ({"anyOf": [{}, {"propertyNames": {"minLength": 2}}]}, r"anyOf\[1\].propertyNames"),
        ({"propertyNames": {"$ref": "#/$defs/x"}, "$defs": {"x": {"minLength": 2}}}, "propertyNames is {'minLength': 2}"),
        ({"propertyNames": {"$ref": "#/$defs/x"}, "$defs": {"x": True}}, "propertyNames is True"),
        ({"dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"allOf": [{}], "unevaluatedProperties": False}, "unevaluatedProperties is False"),
        ({"$dynamicRef": "#a"}, "dynamicRef"),
        ({"type": "string", "nullable": True}, r'nullable is True; .*"null"'),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"type": "text"}, "schema.type is 'text'; allowed are null"),
        ({"type": []}, "schema.type"),
        ({"type": "string", "pattern": "^[a-z"}, r"schema.pattern is '\^\[a-z': the class at character 1 is not closed"),
        ({"type": "string", "pattern": "(?!a)b"}, "look-around"),
        ({"patternProperties": {"(": {}}}, r"patternProperties\['\('\]"),
        ({"type": "string", "format": "iri"}, "format is 'iri'; allowed are date-time"),
        ({"minLength": -1}, "minLength is -1"),
        ({"minItems": "2"}, "minItems is '2'"),
        ({"maximum": "9"}, "maximum is '9'"),
        ({"multipleOf": 0}, "multipleOf is 0"),
        ({"enum": []}, "enum is"),
        ({"enum": [1e300]}, r"enum\[0\] is 1e\+300"),
        ({"required": True}, "required is True"),
        ({"properties": [1]}, "properties is"),
        ({"properties": {"a": 3}}, "properties.a is 3"),
        ({"anyOf": []}, "anyOf is"),
        ({"$ref": "http://example.com/a.json"}, "ref is 'http.*another document"),
        ({"$ref": "#/$defs/nope"}, "ref is .*no such place"),
        ({"$ref": "#"}, "nothing but itself"),
        ({"$ref": 3}, "ref is 3"),
        ({"$defs": {"x": {"not": {}}}, "properties": {"a": {"$ref": "#/$defs/x"}}}, r"schema.\$defs.x.not is {}"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, r"schema.oneOf has options \[0\] and \[1\]"),
        ({"type": "object", "aditionalProperties": False}, "aditionalProperties is no keyword.*additionalProperties"),
        ([], "is .*a schema is an object or a boolean"),
        ("string", "a schema is an object or a boolean"),
    ],
)
def test_what_cannot_be_held_is_named_by_its_path(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        prepare(schema, PATH)
    assert caught.value.param is not None and caught.value.param.startswith(PATH)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
        {"type": "array", "uniqueItems": True, "maxItems": 1, "items": {"type": "null"}},
        {"then": False, "type": "string"},
        {"type": "object", "properties": {}, "unevaluatedProperties": False},
        {"$schema": "http://example.com/own", "$id": "x", "type": "string", "x-order": 3, "javaType": "String", "_comment": ""},
        {"type": "object", "propertyNames": {"type": "string"}},
        {"type": "string", "format": "password", "nullable": False},
        {"type": "integer", "exclusiveMinimum": True, "minimum": 3},
        {"type": "array", "items": [{"type": "string"}], "additionalItems": False},
        {"properties": {"type": {"type": "string"}, "not": {}, "$ref": {"type": "string"}}},
    ],
)
def test_what_says_nothing_or_can_be_said_otherwise_is_taken(schema: Any) -> None:
    grammar_of(schema)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, [3], [4]),
        ({"not": {"type": ["null", "string"]}}, [1, {}], [None, "a"]),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": 1}, {"b": 1}],
            [{}, {"a": 1, "b": 2}],
        ),
        (
            {
                "oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}],
                "$defs": {k: {"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "xy"},
            },
            [{"k": "x"}, {"k": "y"}],
            [{"k": "z"}, {}],
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
            [{}, {"b": 1}, {"a": 1, "b": 2}],
            [{"a": 1}],
        ),
        ({"type": "object", "propertyNames": {"pattern": "^x"}}, [{}, {"x1": 2}], [{"y": 1}]),
        (
            {
                "type": "object",
                "properties": {"x": {"const": 1}, "z": {}},
                "propertyNames": {"enum": ["x", "y"]},
                "additionalProperties": {"type": "null"},
            },
            [{}, {"x": 1, "y": None}],
            [{"x": 2}, {"y": 1}, {"z": 1}, {"w": None}],
        ),
        (
            {
                "type": "object",
                "additionalProperties": {"type": "integer"},
                "propertyNames": {"$ref": "#/$defs/Color"},
                "$defs": {"Color": {"type": "string", "enum": ["red", "blue"]}},
            },
            [{}, {"blue": 1}],
            [{"red": "1"}, {"green": 1}],
        ),
        (
            {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
            ["1", "-1.5", "+.5", "007.", "0"],
            ["", ".", "-", "1.2.3", "1e5", "--1"],
        ),
        (
            {
                "type": "string",
                "format": "email",
                "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
            },
            ["a@b.cz", "o'b.c-d+e@x-y.example.org", "_@a.bc"],
            [".a@b.cz", "a..b@c.de", "a.@b.cz", "a'@b.cz", "a@b", "a@-b.cz", "@b.cz"],
        ),
        ({"type": "string", "format": "directory-path"}, ["/tmp"], [1]),
        ({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, [[], [[], [[]]]], [[1]]),
        ({"type": "array", "items": {"$ref": "#"}}, [[[]]], [[3]]),
        ({"definitions": {"a b/c": {"const": 1}}, "$ref": "#/definitions/a%20b~1c"}, [1], [2]),
        ({"$defs": {"q": {"$anchor": "here", "const": 1}}, "$ref": "#here"}, [1], [2]),
        ({"type": "number", "multipleOf": 0.5, "minimum": -1}, [0.5, -1], [0.3, -1.5]),
        ({"enum": [1.0, "a", None]}, [1, "a", None], [2, "b"]),
        ({"type": ["integer", "null"]}, [None, -3], ["a"]),
    ],
)
def test_the_grammar_takes_what_the_schema_takes(schema: Any, right: list[Any], wrong: list[Any]) -> None:
    grammar = grammar_of(schema)
    assert [value for value in right if not grammar.accepts(compact(value))] == []
    assert [value for value in wrong if grammar.accepts(compact(value))] == []


def test_definitions_beside_other_schemas_leave_open_what_those_say() -> None:
    rule = {"$ref": "#/$defs/base", "type": "object", "properties": {"size": {"type": "number"}, "open": {}}}
    schema = {
        "$ref": "#/$defs/base",
        "properties": {f"rule{n}": {"anyOf": [{"type": "boolean"}, rule]} for n in range(20)},
        "$defs": {"base": {"properties": {"ignore": {"type": "string"}}}},
    }
    grammar = grammar_of(schema)
    assert grammar.accepts('{"ignore":"a","rule3":{"ignore":"b","size":1,"open":[1],"other":{}}}')
    assert not grammar.begins('{"ignore":"a","rule3":{"ignore":1')
    parts = {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {}}
    parts["$defs"] = {n: {"type": "object", "properties": {n: {"const": 1}}, "required": [n]} for n in ("a", "b")}
    closed = Grammar(text_of(json_schema(parts, PATH, closes_objects=True)))
    assert closed.accepts('{"a":1,"b":1}')


def test_a_circle_of_definitions_beside_other_schemas_compiles() -> None:
    package = {"type": "object", "properties": {"name": {"type": "string"}, "sources": {"items": {"$ref": "#/$defs/source"}}}}
    source = {"type": "object", "oneOf": [{"$ref": "#/$defs/inline"}, {"$ref": "#/$defs/path"}]}
    path = {"type": "object", "properties": {"path": {"type": "string"}, "kind": {"const": "p"}}, "required": ["path", "kind"]}
    inline = {
        "type": "object",
        "properties": {"kind": {"const": "i"}, "package": {"$ref": "#/$defs/named"}},
        "required": ["kind"],
    }
    named = {"$ref": "#", "required": ["name"]}
    schema = {**package, "$defs": {"source": source, "path": path, "inline": inline, "named": named}}
    grammar = grammar_of(schema)
    assert grammar.accepts('{"name":"a","sources":[{"kind":"i","package":{"name":"b","sources":[]}},{"path":"c","kind":"p"}]}')
    assert not grammar.accepts('{"sources":[{"kind":"i","package":{}}]}')


def test_a_closed_schema_takes_no_other_properties() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert grammar_of(schema).accepts('{"b":1}')
    assert not Grammar(text_of(json_schema(schema, PATH, closes_objects=True))).begins('{"b')


def test_closing_leaves_what_is_listed_or_required() -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}
    grammar = Grammar(text_of(json_schema(schema, PATH, closes_objects=True)))
    assert grammar.accepts('{"a":null,"b":[1]}')
    assert not grammar.accepts('{"a":null}')
    assert not grammar.begins('{"c')
    nothing = Grammar(text_of(json_schema({"type": "object", "properties": {}}, PATH, closes_objects=True)))
    assert nothing.accepts("{}") and not nothing.begins('{"')
    schema |= {"patternProperties": {"^b": {"const": 1}}}
    grammar = Grammar(text_of(json_schema(schema, PATH, closes_objects=True)))
    assert grammar.accepts('{"b":1}') and not grammar.accepts('{"b":2}')


def test_a_schema_too_large_is_refused_before_it_costs_time() -> None:
    for schema in (
        {"enum": [str(n) for n in range(MAX_NODES)]},
        {"anyOf": [{"const": n} for n in range(MAX_NODES)]},
        {"const": "x" * 5_000_000},
        {"properties": {f"p{n}": {"type": "string"} for n in range(MAX_NODES)}},
    ):
        with pytest.raises(InvalidRequest, match="too large"):
            prepare(schema, PATH)


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: Any = {}
    value: Any = []
    for _ in range(1000):
        schema, value = {"items": schema}, [value]
    for deep in (schema, {"const": value}, {"allOf": [schema]}):
        with pytest.raises(InvalidRequest, match="nested"):
            prepare(deep, PATH)


def test_many_options_that_overlap_are_refused_and_do_not_run_on() -> None:
    nested: Any = {"type": "string"}
    for _ in range(7):
        nested = {"anyOf": [nested, nested, nested]}
    with pytest.raises(InvalidRequest, match="oneOf"):
        prepare({"oneOf": [nested, nested, nested]}, PATH)
    assert prepare({"oneOf": [{"const": n} for n in range(5000)]}, PATH)
    kinds = [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(2000)]
    assert prepare({"oneOf": kinds}, PATH)
    with pytest.raises(InvalidRequest, match=r"\[0\] and \[1\]"):
        prepare({"oneOf": [kinds[0], *kinds]}, PATH)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}}},
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"allOf": [{"$ref": "#/$defs/b"}], "title": "A"},
                "b": {"type": "object", "required": ["x"], "additionalProperties": {"$ref": "#/$defs/a"}},
            },
        },
    ],
)
def test_a_schema_of_endless_values_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="no finite value"):
        prepare(schema, PATH)


def test_as_deep_as_a_schema_may_be_it_compiles() -> None:
    schema: Any = {"const": [[[1]]]}
    for n in range(MAX_DEPTH - 2):
        schema = {"anyOf": [schema, {"type": "null"}]} if n % 2 else {"type": "object", "properties": {"a": schema}}
    grammar_of(schema)


def test_definitions_that_nothing_refers_to_may_hold_anything() -> None:
    grammar_of({"type": "null", "$defs": {"x": {"not": {}}}})


WORDS = st.sampled_from(["a", "b", "c"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), WORDS)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(
            lambda properties, required, is_closed: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                **({"additionalProperties": False} if is_closed else {}),
            },
            st.dictionaries(WORDS, inner, max_size=3),
            st.lists(WORDS, unique=True, max_size=3),
            st.booleans(),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda options: {"oneOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


SCHEMAS = st.recursive(
    st.one_of(
        st.sampled_from(["string", "integer", "number", "null", "boolean"]).map(lambda name: {"type": name}),
        SCALARS.map(lambda value: {"const": value}),
        st.just({}),
    ),
    _schemas,
    max_leaves=6,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(SCHEMAS, st.lists(VALUES, min_size=4, max_size=8))
def test_a_grammar_takes_nothing_that_the_schema_refuses(schema: Any, values: list[Any]) -> None:
    try:
        text = text_of(json_schema(schema, PATH))
    except InvalidRequest:
        return
    if error_of(text):  # options that no value matches, found by the compiler
        return
    grammar = Grammar(text)
    validator = jsonschema.Draft202012Validator(schema)
    assert [value for value in values if grammar.accepts(compact(value)) and not validator.is_valid(value)] == []


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/jsonschemabench.jsonl")
def test_schemas_of_the_field_are_held_or_refused_by_name() -> None:
    """Every eighth of them, as all take a while."""
    num_held = num_refused = 0
    for line in DATA.read_text("utf-8").splitlines()[::8]:
        row = json.loads(line)
        try:
            text = text_of(json_schema(row["schema"], PATH))
        except InvalidRequest as error:
            assert PATH in str(error) and error.param
            num_refused += 1
            continue
        if error := error_of(text):
            assert "too large" in error
            continue
        num_held += 1
        grammar = Grammar(text)
        assert [test for test in row["tests"] if not test["valid"] and grammar.accepts(compact(test["data"]))] == []
    assert num_held > 4 * num_refused


def test_a_formats_pattern_takes_what_the_format_is_and_nothing_else() -> None:
    """For texts that no JSON stands around; as JSON the compiler knows formats itself."""
    cases = {
        "date": (["2024-02-29"], ["2024-13-01", ""]),
        "time": (["01:02:03Z", "01:02:03.5+02:00"], ["1:2:3", "01:02:03"]),
        "date-time": (["2024-01-02T03:04:05Z"], ["2024-01-02 03:04:05"]),
        "duration": (["P1D", "PT5M", "P1Y2M3DT4H5M6S", "P2W"], ["P", "PT", "P1DT", ""]),
        "email": (["a.b@c.cz"], ["a@", "@b", "a..b@c"]),
        "hostname": (["a-b.cz"], ["-a", "a..b", ""]),
        "ipv4": (["1.2.3.255"], ["1.2.3", "256.1.1.1"]),
        "ipv6": (["::", "::1", "1::", "1::2:3", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::"], [":", "1::2::3", "1:2:3:4:5:6:7:8:9"]),
        "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        "uri": (["https://a.b/c?d=[e]#f"], ["a b", "://"]),
    }
    assert set(cases) == set(FORMATS) == set(FORMAT_PATTERNS)
    for name, (right, wrong) in cases.items():
        assert [text for text in right if not re.fullmatch(FORMAT_PATTERNS[name], text)] == []
        assert [text for text in wrong if re.fullmatch(FORMAT_PATTERNS[name], text)] == []
