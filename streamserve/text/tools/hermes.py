"""Hermes' way of writing calls, which Qwen2.5 and Qwen3 share: <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>.

Owns that format's markers. Several calls stand one after another, each on its own lines.
"""

import json
from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, literal
from streamserve.text.tools.call_object import CallObject
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.parser import MAX_UNDECIDED_CHARS, CallParser
from streamserve.text.tools.schemas import SPACED, allowed, arguments_value

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes:
    """The format. See ToolFormat."""

    name = "hermes"
    control_tokens: tuple[str, ...] = (BEGIN, END)
    triggers: tuple[str, ...] = (BEGIN,)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "HermesParser":
        """See ToolFormat."""
        return HermesParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat."""
        bodies = [
            Grammar(f'{literal(f"""{{"name": {json.dumps(tool.name)}, "arguments": """)} {arguments_value(tool, SPACED)} "}}"')
            for tool in allowed(tools, demand)
        ]
        frame = Frame(begin=BEGIN + "\n", end="\n" + END, between="\n", control=self._control)
        return frame.grammar(bodies, demand, BEGIN, answer).text


class HermesParser(CallParser):
    """Reads one answer. A tag may hold several objects; it may stay open at the end of the answer."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN,))
        self._object = CallObject(self._schemas)

    def _trigger(self, marker: str) -> bool:
        self._object = CallObject(self._schemas)
        self._state = self._read_object
        return True

    def _read_object(self) -> bool:
        call = self._object
        was_call = call.is_call
        self._pos = call.feed(self._text, self._pos)
        if call.is_call and not was_call:
            if self._pos - self._at > MAX_UNDECIDED_CHARS:
                return self._reject()
            assert call.name is not None
            self._begin_call(call.name, call.id)
        if not call.is_call:
            return self._reject() if call.is_bad or call.is_done else False
        self._grow(call.take())
        self._settle()
        if call.has_arguments:
            self._end_call()
        elif call.is_bad:
            self._break_call()
        if call.is_done or call.is_bad:
            self._state = self._behind_object
            return True
        return self._pos < len(self._text)

    def _behind_object(self) -> bool:
        if not self._skip_blank():
            return False
        if self._text[self._pos] == "{":
            self._object = CallObject(self._schemas)
            self._is_undecided = True
            self._state = self._read_object
            return True
        is_end = self._expect(END)
        if is_end is None:
            return False
        if is_end:
            self._settle()
        self._state = self._read_content
        return True
