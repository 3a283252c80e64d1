"""Hermes' way of writing calls, which Qwen2.5 and Qwen3 share: <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>.

Owns that format's markers. Several calls stand one after another, each on its own lines.
"""

from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import allowed, object_calls

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
        bodies = [object_calls(allowed(tools, demand), "arguments")]
        frame = Frame(begin=BEGIN + "\n", end="\n" + END, between="\n", control=self._control)
        return frame.grammar(bodies, demand, BEGIN, answer).text


class HermesParser(JsonCallsParser):
    """Reads one answer. A tag may hold several objects; it may stay open at the end of the answer."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN,))

    def _trigger(self, marker: str) -> bool:
        return self._begin_object()

    def _behind_object(self) -> bool:
        if not self._skip_blank():
            return False
        if self._text[self._pos] == "{":
            return self._begin_object()
        if self._text[self._pos] == "}":  # one too many, as small models write
            self._pos += 1
            return self._go(self._behind_object)
        return self._pass(END)
