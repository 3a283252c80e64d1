"""Calls written as a Python list: [get_weather(city="Brno", days=2), now()]; of Llama 4 and small Llama 3.2 models.

Owns that format. The list is a call only where it begins the answer, or stands behind <|python_start|>.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.text.lark import Grammar, SharedRules, literal, marked
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.parser import MAX_HEAD_CHARS, CallParser
from streamserve.text.tools.python_text import PythonValue
from streamserve.text.tools.schemas import SPACED, Property, allowed, properties_of

BEGIN, END = "<|python_start|>", "<|python_end|>"
_CALL = re.compile(r"([A-Za-z_][\w./:-]*)\s*\(")
_MAY_BE_CALL = re.compile(r"[A-Za-z_][\w./:-]*\s*")
_KEYWORD = re.compile(r"([A-Za-z_]\w{0,255})\s{0,64}=(?!=)")  # what is longer is waited for in vain
_MAY_BE_KEYWORD = re.compile(r"[A-Za-z_]\w{0,255}\s{0,64}=?")


class Pythonic:
    """The format. See ToolFormat."""

    name = "pythonic"
    control_tokens: tuple[str, ...] = (BEGIN, END)
    triggers: tuple[str, ...] = (BEGIN,)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "PythonicParser":
        """See ToolFormat."""
        return PythonicParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat. Arguments stand in the order of the schema; an answer that begins with a bracket is calls."""
        shared = SharedRules("value_")
        bodies = [_body(tool, f"p{n}_", shared) for n, tool in enumerate(allowed(tools, demand))]
        frame = Frame("", "", ", ", before="[", after="]", control=self._control)
        if demand.min_calls or answer is not None:
            return frame.grammar(bodies, demand, "[", answer, shared.rules).text
        text = Grammar("free_text", ("free_text: FREE_TEXT", r'FREE_TEXT: "" | /\s*[^\[\s](?s:.*)/'))
        if demand.max_calls == 0:
            return text.text
        made = frame.grammar(bodies, Demand(1, demand.max_calls), "[", None, shared.rules)
        begin, end = marked(BEGIN, self._control), marked(END, self._control)
        rules = (f"made: {made.start}", *text.rules, *made.rules)
        return Grammar(f"free_text | made | {begin} made {end}", rules).text


def _body(tool: Tool, prefix: str, shared: SharedRules) -> Grammar:
    """name(a=..., b=...): whether a comma comes next depends on whether an argument came before."""
    properties, extra = properties_of(tool, "pythonic")
    rules = []
    for n, known in enumerate(properties):
        value = f"{prefix}{n}: {literal(known.name + '=')} {_value(known, shared)}"
        first, more = f"{prefix}{n} {prefix}more{n + 1}", f'", " {prefix}{n} {prefix}more{n + 1}'
        if not known.is_required:
            first, more = f"{first} | {prefix}first{n + 1}", f"{more} | {prefix}more{n + 1}"
        rules += [value, f"{prefix}first{n}: {first}", f"{prefix}more{n}: {more}"]
    last = len(properties)
    if extra is None:
        rules += [f'{prefix}first{last}: ""', f'{prefix}more{last}: ""']
    else:
        rules += [
            f"{prefix}extra: /[A-Za-z_][A-Za-z0-9_]{{0,40}}=/ {shared.name_of(extra.json_value(SPACED))}",
            f'{prefix}first{last}: "" | {prefix}extra (", " {prefix}extra){{0,15}}',
            f'{prefix}more{last}: (", " {prefix}extra){{0,15}}',
        ]
    return Grammar(f'{literal(tool.name + "(")} {prefix}first0 ")"', tuple(rules))


def _value(known: Property, shared: SharedRules) -> str:
    if known.types <= {"boolean", "null"} and not known.is_narrow:
        words = {"boolean": ["True", "False"], "null": ["None"]}
        return "(" + " | ".join(literal(word) for kind in sorted(known.types) for word in words[kind]) + ")"
    return shared.name_of(known.json_value(SPACED))


class PythonicParser(CallParser):
    """Reads one answer. Arguments without a name take those of the schema, in its order."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN,))
        self._value = PythonValue()
        self._num_arguments = 0
        self._positional: list[str] = []
        if tools:
            self._state = self._read_start

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_list
        return True

    def _read_start(self) -> bool:
        """The answer's beginning, where a list needs no marker."""
        if not self._skip_blank():
            return False
        if self._text[self._pos] != "[":
            return self._go_on_as_text()
        self._max_undecided = MAX_HEAD_CHARS
        return self._read_list()

    def _read_list(self) -> bool:
        if not self._skip_blank():
            return False
        if self._text[self._pos] != "[":
            return self._reject()
        self._pos += 1
        self._state = self._read_name
        return True

    def _read_name(self) -> bool:
        if not self._skip_blank():
            return False
        found = _CALL.match(self._text, self._pos)
        if found is None:
            could = _MAY_BE_CALL.match(self._text, self._pos)
            return False if could is not None and could.end() == len(self._text) else self._reject()
        name = found[1]
        self._pos = found.end()
        if name not in self._schemas or self._is_too_long():
            return self._reject()
        self._begin_call(name)
        schema: Mapping[str, Any] = self._schemas[name] or {}
        properties = schema.get("properties")
        self._positional = list(properties) if isinstance(properties, Mapping) else []
        self._num_arguments = 0
        self._grow("{")
        return self._go(self._read_argument)

    def _read_argument(self) -> bool:
        """A name and a value, a value, or the call's end."""
        if not self._skip_blank():
            return False
        if self._text[self._pos] == ")":
            return self._close()
        keyword = _KEYWORD.match(self._text, self._pos)
        if keyword is None:
            could = _MAY_BE_KEYWORD.match(self._text, self._pos)
            if could is not None and could.end() == len(self._text):
                return False
        elif keyword.end() == len(self._text):
            return False  # == may come of it
        if keyword is not None:
            name = keyword[1]
            self._pos = keyword.end()
        else:
            at = self._num_arguments
            name = self._positional[at] if at < len(self._positional) else f"arg{at}"
        self._grow(f"{', ' if self._num_arguments else ''}{json.dumps(name)}: ")
        self._num_arguments += 1
        self._value = PythonValue()
        return self._go(self._read_value)

    def _read_value(self) -> bool:
        found, self._pos = self._value.feed(self._text, self._pos)
        self._grow(found)
        self._settle()
        if self._value.is_done:
            return self._go(self._behind_value)
        if self._value.is_bad:
            self._break_call()
            return self._go(self._read_content)
        return False

    def _behind_value(self) -> bool:
        if not self._skip_blank():
            return False
        letter = self._text[self._pos]
        if letter == ")":
            return self._close()
        if letter == ",":
            self._pos += 1
            return self._go(self._read_argument)
        self._break_call()
        return self._go(self._read_content)

    def _close(self) -> bool:
        self._pos += 1
        self._grow("}")
        self._end_call()
        return self._go(self._behind_call)

    def _behind_call(self) -> bool:
        """Another call, or the list's end."""
        if not self._skip_blank():
            return False
        letter = self._text[self._pos]
        if letter == ",":
            self._pos += 1
            self._max_undecided = MAX_HEAD_CHARS
            self._state = self._read_name
            return True
        if letter == "]":
            self._pos += 1
            return self._go(self._behind_list)
        return self._go_on_as_text()

    def _behind_list(self) -> bool:
        return self._pass(END)

    def _cut_short(self) -> None:
        self._grow(self._value.finish() if self._is_inside_call else "")
