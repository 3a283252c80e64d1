"""DeepSeek V3's way of writing calls: tokens around a type, a name and fenced JSON; and V3.1's, which leaves type and fence out.

Owns both formats' markers; one parser reads either.
"""

from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, literal, marked
from streamserve.text.markers import find_first
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import SPACED, allowed, arguments_value

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_FENCE_OPEN, _FENCE = "```json", "```"


class DeepSeekV3:
    """The format. See ToolFormat. `is_fenced`: V3 and R1; else V3.1."""

    control_tokens: tuple[str, ...] = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    triggers: tuple[str, ...] = (CALLS_BEGIN, CALL_BEGIN)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None, *, is_fenced: bool = True) -> None:
        self.name = "deepseekv3" if is_fenced else "deepseekv31"
        self._control = dict(control or {})
        self._is_fenced = is_fenced

    def parser(self, tools: Sequence[Tool]) -> "DeepSeekParser":
        """See ToolFormat."""
        return DeepSeekParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat."""
        bodies = [self._body(tool) for tool in allowed(tools, demand)]
        between = "\n" if self._is_fenced else ""
        frame = Frame(CALL_BEGIN, CALL_END, between, before=CALLS_BEGIN, after=CALLS_END, control=self._control)
        return frame.grammar(bodies, demand, CALLS_BEGIN, answer).text

    def _body(self, tool: Tool) -> Grammar:
        separator, value = marked(SEPARATOR, self._control), arguments_value(tool, SPACED)
        if self._is_fenced:
            opening = literal(f"{tool.name}\n{_FENCE_OPEN}\n")
            return Grammar(f'"function" {separator} {opening} {value} {literal(chr(10) + _FENCE)}')
        return Grammar(f"{literal(tool.name)} {separator} {value}")


class DeepSeekParser(JsonCallsParser):
    """Reads one answer in either form."""

    _ends = (_FENCE, CALL_END, CALLS_END)

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (CALLS_BEGIN, CALL_BEGIN))

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_begin if marker == CALLS_BEGIN else self._read_header
        return True

    def _read_begin(self) -> bool:
        return self._demand(CALL_BEGIN, self._read_header)

    def _read_header(self) -> bool:
        """A type and a name, or a name alone, and what stands before the arguments."""
        end, marker = find_first(self._text, (SEPARATOR,), self._pos)
        if marker is None:
            return False
        start, name = self._pos, self._text[self._pos : end].strip()
        behind = end + len(SEPARATOR)
        if name not in self._schemas or name == "function":
            line_end = self._text.find("\n", behind)
            if line_end < 0:
                return False
            behind, name = line_end, self._text[behind:line_end].strip()
        if name not in self._schemas:
            return self._reject()
        self._pos = behind
        if not self._skip_blank() or self._expect(_FENCE_OPEN) is None:
            self._pos = start
            return False
        return self._begin_arguments(name)
