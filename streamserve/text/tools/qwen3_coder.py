"""Qwen3-Coder's way of writing calls: <function=name> with <parameter=key> for each argument, inside <tool_call>.

Owns the format's tags. A value stands on lines of its own; the outer tag, and the end of a value, may be missing.
"""

from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, SharedRules, literal
from streamserve.text.markers import find_first
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.parser import MAX_HEAD_CHARS
from streamserve.text.tools.schemas import allowed
from streamserve.text.tools.tagged import TaggedCallsParser, tagged_parameters

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_VALUE_ENDS = ("\n" + PARAMETER_END, PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)


class Qwen3Coder:
    """The format. See ToolFormat."""

    name = "qwen3_coder"
    control_tokens: tuple[str, ...] = (BEGIN, END)
    triggers: tuple[str, ...] = (BEGIN, FUNCTION)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "Qwen3CoderParser":
        """See ToolFormat."""
        return Qwen3CoderParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat."""
        bodies = []
        shared = SharedRules("value_")
        for n, tool in enumerate(allowed(tools, demand)):
            parameters = tagged_parameters(
                tool,
                self.name,
                f"v{n}_",
                opening=lambda name: f"{PARAMETER}{name}>\n",
                free_opening=(PARAMETER, ">\n"),
                end=f"\n{PARAMETER_END}\n",
                others=(PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END),
                control=self._control,
                shared=shared,
            )
            bodies.append(Grammar(f"{literal(f'{tool.name}>' + chr(10))} {parameters.start}", parameters.rules))
        frame = Frame(f"{BEGIN}\n{FUNCTION}", f"{FUNCTION_END}\n{END}", "\n", control=self._control)
        return frame.grammar(bodies, demand, BEGIN, answer, shared.rules).text


class Qwen3CoderParser(TaggedCallsParser):
    """Reads one answer."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN, FUNCTION), _VALUE_ENDS)

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_function if marker == BEGIN else self._read_name
        return True

    def _read_function(self) -> bool:
        return self._demand(FUNCTION, self._read_name)

    def _read_name(self) -> bool:
        end, marker = find_first(self._text, (">", "\n"), self._pos)
        if marker != ">":
            return self._reject() if marker else False
        name = self._text[self._pos : end].strip()
        self._pos = end + 1
        return self._begin_tagged(name)

    def _read_parameter(self) -> bool:
        if not self._skip_blank():
            return False
        tag = self._expect_one((PARAMETER, FUNCTION_END, END))
        if tag == PARAMETER:
            return self._go(self._read_key)
        if tag:
            self._close_call()
            return self._go(self._behind_function if tag == FUNCTION_END else self._read_content)
        if tag is None:
            return False
        self._break_call()
        return self._go(self._read_content)

    def _read_key(self) -> bool:
        end = self._text.find(">", self._pos, self._pos + MAX_HEAD_CHARS)
        if end < 0 and len(self._text) - self._pos >= MAX_HEAD_CHARS:
            self._break_call()
            return self._go(self._read_content)
        if end < 0 or (end + 1 == len(self._text) and not self._is_last):
            return False
        name = self._text[self._pos : end].strip()
        self._pos = end + 1 + self._text.startswith("\n", end + 1)
        return self._begin_value(name)

    def _behind_value(self, end: str) -> bool:
        if end.endswith(PARAMETER_END):
            self._pos += len(end)
        return self._go(self._read_parameter)

    def _behind_function(self) -> bool:
        return self._pass(END)
