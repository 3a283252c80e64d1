"""What formats have in common that write each parameter between tags of its own, as plain text.

Owns the reading of such a value, and the grammar of one. Knows no format's tags.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamserve.text.lark import ANY_TEXT, Grammar, SharedRules, between_slashes, json_value, literal, marked, without
from streamserve.text.markers import find_first, open_at
from streamserve.text.pattern import FORMAT_PATTERNS
from streamserve.text.tools.format import Tool
from streamserve.text.tools.parser import CallParser
from streamserve.text.tools.schemas import SPACED, Property, properties_of
from streamserve.text.tools.values import ArgumentsWriter

MAX_EXTRA = 16
_MAX_FREE_NAME = 64
_MAX_OPTIONS = 1_000
_TEXT_KEYS = frozenset(("minLength", "maxLength", "pattern", "format"))
_IN_PLACE = frozenset(("allOf", "anyOf", "oneOf", "$ref", "const", "enum"))


class TaggedCallsParser(CallParser):
    """Reads values up to the texts that may end them. A format sets the states before and behind a value."""

    def __init__(self, tools: Sequence[Tool], triggers: Sequence[str], value_ends: Sequence[str]) -> None:
        super().__init__(tools, triggers)
        self._value_ends = tuple(value_ends)
        self._writer = ArgumentsWriter(None)

    def _begin_tagged(self, name: str) -> bool:
        """The call's name is read, up to `_pos`. No call when there is no such tool."""
        if name not in self._schemas or self._is_too_long():
            return self._reject()
        self._begin_call(name)
        self._writer = ArgumentsWriter(self._schemas[name])
        return self._go(self._read_parameter)

    def _read_parameter(self) -> bool:
        """Another parameter begins, or the call ends."""
        raise NotImplementedError

    def _behind_value(self, end: str) -> bool:
        """A value has ended with one of `value_ends`, which `_pos` stands before."""
        raise NotImplementedError

    def _begin_value(self, name: str) -> bool:
        self._grow(self._writer.begin(name))
        return self._go(self._read_value)

    def _read_value(self) -> bool:
        at, end = find_first(self._text, self._value_ends, self._pos)
        if end is None:
            at = open_at(self._text, self._value_ends, self._pos)
        self._grow(self._writer.more(self._text[self._pos : at]))
        self._pos = at
        self._settle()
        if end is None:
            return False
        self._grow(self._writer.end())
        return self._behind_value(end)

    def _close_call(self) -> None:
        self._grow(self._writer.close())
        self._end_call()

    def _cut_short(self) -> None:
        if self._state == self._read_value:
            self._grow(self._writer.more(self._text[self._at :]))


def tagged_parameters(
    tool: Tool,
    format: str,
    prefix: str,
    *,
    opening: Callable[[str], str],
    free_opening: tuple[str, str],
    end: str,
    others: Sequence[str],
    control: Mapping[str, int],
    shared: SharedRules,
) -> Grammar:
    """Lark of all parameters of a call, in the schema's order.

    `opening` gives what stands before the value of a parameter, `free_opening` the texts around a name that the schema leaves
    open; `end` is what ends a value and `others` what a text must not hold besides. `prefix` keeps the rules' names apart;
    JSON values are rules of `shared`.
    """
    properties, extra = properties_of(tool, format)
    parts, rules = [], []
    for n, known in enumerate(properties):
        rules += _value_rules(f"{prefix}{n}", known, end, others, control, shared)
        part = f"{marked(opening(known.name), control)} {prefix}{n}"
        parts.append(part if known.is_required else f"({part})?")
    if extra is not None:
        rules += _value_rules(f"{prefix}x", extra, end, others, control, shared)
        before, behind = (marked(text, control) for text in free_opening)
        name = f"/[A-Za-z_][\\w.-]{{0,{_MAX_FREE_NAME - 1}}}/"
        parts.append(f"({before} {name} {behind} {prefix}x){{0,{MAX_EXTRA}}}")
    return Grammar(" ".join(parts) or '""', tuple(rules))


def _value_rules(
    rule: str, known: Property, end: str, others: Sequence[str], control: Mapping[str, int], shared: SharedRules
) -> list[str]:
    """A rule for a value and the text that ends it: any text where the schema allows that, else one of the texts and JSON values
    that it describes."""
    closing = marked(end, control)
    texts, values = _options(known)
    if not texts:
        return [f"{rule}: {shared.name_of(known.json_value(SPACED))} {closing}"]
    rules, parts = [], []
    for n, inner in enumerate(texts):
        part, terminal = f"{rule}_{n}", f"{rule}_{n}".upper()
        parts.append(part)
        if any(end.startswith(token) for token in control):
            rules += [f"{part}: {terminal} {closing}", f"{terminal}: {inner}"]
        else:
            apart = "".join(without(others).partition(" & ")[1:]) if others else ""
            rules += [f"{part}[lazy]: {terminal}", f"{terminal}: (({inner}){apart}) {literal(end)}"]
    if values:
        definitions = {"$defs": known.schema["$defs"]} if "$defs" in known.schema else {}
        parts.append(f"{shared.name_of(json_value({'anyOf': values, **definitions}, SPACED))} {closing}")
    return [f"{rule}: {' | '.join(parts)}", *rules]


def _options(known: Property) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Terminals of the texts that a value may be, none when it is JSON in any case; and schemas of JSON that it may be too."""
    if "string" not in known.types:
        return [], []
    definitions = known.schema.get("$defs", {})
    literals: list[Any] = []
    texts: list[str] = []
    values: list[Mapping[str, Any]] = []
    waiting, num_seen = [known.schema], 0
    while waiting:
        schema = _resolved({**waiting.pop(), "$defs": definitions})
        own = {key: item for key, item in schema.items() if key != "$defs"}
        said, types, num_seen = set(own), own.get("type"), num_seen + 1
        if said == {"anyOf"} and num_seen < _MAX_OPTIONS:
            waiting += [option for option in schema["anyOf"] if isinstance(option, Mapping)]
        elif said & {"const", "enum"} and said <= {"const", "enum", "type"}:
            literals += [schema["const"]] if "const" in schema else schema["enum"]
        elif said & _IN_PLACE or types is None or (types == "string" and not said & _TEXT_KEYS):
            return [ANY_TEXT], []
        elif isinstance(types, list):
            waiting += [{**own, "type": name} for name in types]
        elif types == "string":
            texts.append(_text_terminal(own))
        else:
            values.append(own)
    if literals:
        shown = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in literals)
        texts.append(" | ".join(map(literal, dict.fromkeys(shown))))
    return texts or [ANY_TEXT], values


def _text_terminal(schema: Mapping[str, Any]) -> str:
    """Text of the lengths, the pattern and the format that a schema asks for."""
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    parts = [f"/(?s:.){{{low},{'' if high is None else high}}}/" if low or high is not None else ANY_TEXT]
    if pattern := schema.get("pattern"):
        before = "" if pattern.startswith("^") else "(?s:.*)"
        behind = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
        inner = pattern.removeprefix("^")
        inner = inner if behind else inner[:-1]
        parts.append(f"/{before}(?:{between_slashes(inner)}){behind}/")
    if form := schema.get("format"):
        parts.append(f"/{FORMAT_PATTERNS[form]}/")
    return " & ".join(parts)


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, where it is but a reference."""
    for _ in range(8):
        if set(schema) - {"$defs"} != {"$ref"}:
            break
        target = schema["$defs"].get(schema["$ref"].removeprefix("#/$defs/"))
        if not isinstance(target, Mapping):
            break
        schema = {**target, "$defs": schema["$defs"]}
    return schema
