"""A tool's parameter schema, as the grammars of all formats need it.

Owns how arguments are spaced and named in refusals. Knows no format.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.text.lark import Grammar, json_value
from streamserve.text.schema import MAX_DEPTH, TYPES, prepare
from streamserve.text.tools.format import Demand, Tool

# As Python's json.dumps and most chat templates write JSON: what models have seen, and no choice left to them.
SPACED: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMPACT: Mapping[str, Any] = {"whitespace_flexible": False}
MAX_PARTS = 60_000
ALL_TYPES = frozenset(TYPES)
_MAX_STEPS = 16
_NOT_BY_PROPERTIES = {"allOf", "anyOf", "oneOf", "const", "enum", "patternProperties", "minProperties", "maxProperties"}


def parameters_of(tool: Tool) -> Any:
    """The prepared schema of a tool's arguments: an object always; without one, of any properties."""
    path = f"tools[{tool.name}].parameters"
    schema: Any = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{path} is {json.dumps(schema)[:60]}; it must be a JSON schema of an object", param="tools")
    if not schema:
        schema = {"type": "object"}
    elif "type" not in schema and not {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"} & set(schema):
        schema = {"type": "object", **schema}
    elif schema.get("type", "object") != "object":
        raise InvalidRequest(f'{path}.type is {schema["type"]!r}; arguments are an object: "type": "object"', param="tools")
    if tool.parameters is None:
        schema = {**schema, "additionalProperties": False}
    try:
        return prepare(schema, path, closes_objects=True)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=error.param) from None


def arguments_value(tool: Tool, options: Mapping[str, Any]) -> str:
    """Lark of a tool's arguments as JSON."""
    return json_value(parameters_of(tool), options)


def object_calls(tools: Sequence[Tool], arguments_key: str) -> Grammar:
    """A call of one of the tools as an object: {"name": ..., "arguments": {...}}.

    It is one JSON schema, not texts with JSON in them: a lexer that has read `{"na` could not turn to another object's keys, and
    what the tools' schemas have in common is compiled once.
    """
    definitions: dict[str, Any] = {}
    scalars: dict[str, str] = {}
    options = []
    for n, tool in enumerate(tools):
        arguments = parameters_of(tool)
        own = arguments.get("$defs", {})
        names = {name: _common_name(name, schema, n, scalars) for name, schema in own.items()}
        definitions |= {names[name]: _renamed(schema, names) for name, schema in own.items()}
        inner = _renamed({key: item for key, item in arguments.items() if key != "$defs"}, names)
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments_key: inner},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    return Grammar(json_value({"anyOf": options, **({"$defs": definitions} if definitions else {})}, SPACED))


def _common_name(name: str, schema: Any, n: int, scalars: dict[str, str]) -> str:
    """The name of a tool's definition among those of all tools: free JSON and ranges of numbers are the same for all."""
    if name.startswith("json."):
        return name
    if name.startswith("scalar."):
        return scalars.setdefault(json.dumps(schema, sort_keys=True), f"scalar.{len(scalars)}")
    return f"{n}.{name}"


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    """The schema with its references to other names."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for key, item in schema.items():
        if key == "$ref" and isinstance(item, str):
            found[key] = f"#/$defs/{names[item.removeprefix('#/$defs/')]}"
        else:
            found[key] = item if key in ("const", "enum") else _renamed(item, names)
    return found


@dataclass(frozen=True, slots=True)
class Property:
    """One parameter of a tool, for formats that write parameters one by one. `schema` holds the definitions it refers to.
    `is_narrow`: it says more than which types there may be."""

    name: str
    schema: Any
    types: frozenset[str]
    is_required: bool = False
    is_narrow: bool = True

    def json_value(self, options: Mapping[str, Any]) -> str:
        """Lark of the value as JSON."""
        return json_value(self.schema, options)


def properties_of(tool: Tool, format: str) -> tuple[list[Property], Property | None]:
    """The parameters in the schema's order, required ones that have no schema of their own last; and what others may be.

    InvalidRequest when the schema says otherwise than by properties what an object may hold.
    """
    whole = parameters_of(tool)
    definitions = {"$defs": whole["$defs"]} if "$defs" in whole else {}
    seen = 0
    while "$ref" in whole and seen < _MAX_STEPS:
        whole, seen = definitions["$defs"][whole["$ref"].removeprefix("#/$defs/")], seen + 1
    if odd := sorted(set(whole) & _NOT_BY_PROPERTIES):
        path = f"tools[{tool.name}].parameters.{odd[0]}"
        raise InvalidRequest(
            f"{path} cannot be held in calls as this model writes them ({format}): list the parameters in properties", param=path
        )
    known: Mapping[str, Any] = whole.get("properties", {})
    required: Sequence[str] = whole.get("required", ())
    other = whole.get("additionalProperties", True)
    found = []
    for name in (*known, *(name for name in required if name not in known)):
        schema = known.get(name, other)
        if schema is False:
            continue
        found.append(_property(name, schema, definitions, name in required))
    return found, None if other is False else _property("", other, definitions, False)


def _property(name: str, schema: Any, definitions: Mapping[str, Any], is_required: bool) -> Property:
    whole = {"allOf": [schema], **definitions} if not isinstance(schema, Mapping) else {**schema, **definitions}
    types = _types(schema, whole, {})
    is_narrow = not isinstance(schema, Mapping) or bool(set(schema) - {"type"})
    return Property(name, whole, types, is_required, is_narrow)


def types_of(schema: Mapping[str, Any] | None, name: str) -> frozenset[str]:
    """The types that a tool's schema, as the client wrote it, allows for a parameter; all where it says nothing."""
    if not isinstance(schema, Mapping):
        return ALL_TYPES
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return _types(properties[name], schema, {})
    other = schema.get("additionalProperties")
    return _types(other, schema, {}) if isinstance(other, Mapping) else ALL_TYPES


def _types(schema: Any, root: Mapping[str, Any], known: dict[str, frozenset[str]], depth: int = 0) -> frozenset[str]:
    """`known`: of definitions met already; one that is being looked at may be anything, and so may what is nested too deeply."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ALL_TYPES
    found = ALL_TYPES
    given = schema.get("type")
    if given is not None:
        names = given if isinstance(given, list) else [given]
        found = frozenset(name for name in names if name in TYPES)
        if "number" in found:
            found |= {"integer"}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        found &= frozenset(map(_type_of_value, values))
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        if reference not in known:
            known[reference] = ALL_TYPES
            known[reference] = _types(_at(root, reference), root, known, depth + 1)
        found &= known[reference]
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list) and options:
            found &= frozenset().union(*(_types(option, root, known, depth + 1) for option in options))
    for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= _types(part, root, known, depth + 1)
    return found or ALL_TYPES


def _at(root: Any, reference: str) -> Any:
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, Mapping) or part not in root:
            return None
        root = root[part]
    return root


def _type_of_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def allowed(tools: Sequence[Tool], demand: Demand) -> list[Tool]:
    """The tools that may be called. InvalidRequest when there is none."""
    found = [tool for tool in tools if demand.only in (None, tool.name)]
    if not found:
        names = ", ".join(tool.name for tool in tools) or "none"
        what = f"the tool {demand.only!r}" if demand.only is not None else "a tool"
        raise InvalidRequest(f"{what} must be called, but tools holds {names}", param="tool_choice")
    _check_size(found)
    return found


def _check_size(tools: Sequence[Tool]) -> None:
    """Schemas have a limit each; together they have one too, so that a thousand tools do not take a minute."""
    num_parts = 0
    waiting: list[Any] = [tool.parameters for tool in tools]
    while waiting:
        item = waiting.pop()
        num_parts += 1
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        if num_parts > MAX_PARTS:
            raise InvalidRequest(f"tools that must be held to their schemas have over {MAX_PARTS:,} parts in all", param="tools")
