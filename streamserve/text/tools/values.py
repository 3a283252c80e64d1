"""Arguments that a format writes as plain text, one by one, as a JSON object.

Owns what a text means for a parameter of a given type: "3" is a number or a string as the schema has it.
"""

import json
from collections.abc import Mapping
from typing import Any

from streamserve.text.tools.json_text import escaped
from streamserve.text.tools.python_text import json_of_python
from streamserve.text.tools.schemas import types_of

_TEXTUAL = frozenset(("string", "null"))
_MAX_NULL_CHARS = 64  # a null in white space; what is longer is a string


class ArgumentsWriter:
    """Writes one call's arguments. Pieces of texts come out as they come in, wherever the schema leaves no doubt that the value
    is a string; other values when they are whole."""

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._schema = schema
        self._types: frozenset[str] = frozenset()
        self._num_arguments = 0
        self._held: list[str] | None = []  # None: a string that is being written
        self._is_text = False  # the schema allows nothing but strings and null

    def begin(self, name: str) -> str:
        """A parameter's name has come."""
        self._types = types_of(self._schema, name)
        self._held = []
        self._is_text = self._types <= _TEXTUAL and "string" in self._types
        opening = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        return f"{opening}{json.dumps(name, ensure_ascii=False)}: "

    def more(self, text: str) -> str:
        """More of its value."""
        if self._held is None:
            return escaped(text)
        self._held.append(text)
        if self._is_text:
            held = "".join(self._held)
            may_be_null = "null" in self._types and len(held) <= _MAX_NULL_CHARS and "null".startswith(held.strip().lower())
            if not may_be_null:
                self._held = None
                return '"' + escaped(held)
        return ""

    def end(self) -> str:
        """The value is whole."""
        if self._held is None:
            return '"'
        return value_of("".join(self._held), self._types)

    def close(self) -> str:
        """There are no more parameters."""
        return "}" if self._num_arguments else "{}"


def value_of(text: str, types: frozenset[str]) -> str:
    """JSON of a value written as text. What fits no type of the schema's is a string: nothing is lost."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    stripped = text.strip()
    word = stripped.lower()
    if word in ("true", "false") and "boolean" in types:
        return word
    if word in ("null", "none") and "null" in types:
        return "null"
    for found in (stripped, json_of_python(stripped) if stripped[:1] in ("[", "{", "(") else None):
        if found is not None and (kind := _kind(found)) and _fits(kind, types):
            return found
    return json.dumps(text, ensure_ascii=False)


def _kind(text: str) -> str | None:
    """The type of a JSON text that is no string."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool) or value is None:
        return "boolean" if value is not None else "null"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) else "number"
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else None


def _fits(kind: str, types: frozenset[str]) -> bool:
    return kind in types or (kind == "integer" and "number" in types)


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")
