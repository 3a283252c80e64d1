"""Kimi K2's way of writing calls: tokens around an id such as functions.get_weather:0, and JSON.

Owns the format's markers and the reading of names out of ids.
"""

import re
from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, literal, marked
from streamserve.text.markers import find_first
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import SPACED, allowed, arguments_value

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
_ID = re.compile(r"\s*((?:functions\.)?(\S+):\d+)\s*")


class KimiK2:
    """The format. See ToolFormat."""

    name = "kimi_k2"
    control_tokens: tuple[str, ...] = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENTS_BEGIN)
    triggers: tuple[str, ...] = (SECTION_BEGIN, CALL_BEGIN)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "KimiK2Parser":
        """See ToolFormat."""
        return KimiK2Parser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat. Numbers in ids go on through a conversation, so any may come."""
        begin = marked(ARGUMENTS_BEGIN, self._control)
        bodies = [
            Grammar(f"{literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {begin} {arguments_value(tool, SPACED)}")
            for tool in allowed(tools, demand)
        ]
        frame = Frame(CALL_BEGIN, CALL_END, before=SECTION_BEGIN, after=SECTION_END, control=self._control)
        return frame.grammar(bodies, demand, SECTION_BEGIN, answer).text


class KimiK2Parser(JsonCallsParser):
    """Reads one answer. The ids that the model writes are the calls' ids."""

    _ends = (CALL_END, SECTION_END)

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (SECTION_BEGIN, CALL_BEGIN))

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_begin if marker == SECTION_BEGIN else self._read_header
        return True

    def _read_begin(self) -> bool:
        return self._demand(CALL_BEGIN, self._read_header)

    def _read_header(self) -> bool:
        end, marker = find_first(self._text, (ARGUMENTS_BEGIN,), self._pos)
        if marker is None:
            return False
        found = _ID.fullmatch(self._text, self._pos, end)
        if found is None:
            return self._reject()
        self._pos = end + len(marker)
        return self._begin_arguments(found[2], found[1])
