"""A tool's parameter schema, as the grammars of all formats need it.

Owns how arguments are spaced and named in refusals. Knows no format.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.text.lark import json_value
from streamserve.text.schema import prepare
from streamserve.text.tools.format import Demand, Tool

# As Python's json.dumps and most chat templates write JSON: what models have seen, and no choice left to them.
SPACED: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COMPACT: Mapping[str, Any] = {"whitespace_flexible": False}


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


def allowed(tools: Sequence[Tool], demand: Demand) -> list[Tool]:
    """The tools that may be called. InvalidRequest when there is none."""
    found = [tool for tool in tools if demand.only in (None, tool.name)]
    if not found:
        names = ", ".join(tool.name for tool in tools) or "none"
        what = f"the tool {demand.only!r}" if demand.only is not None else "a tool"
        raise InvalidRequest(f"{what} must be called, but tools holds {names}", param="tool_choice")
    return found
