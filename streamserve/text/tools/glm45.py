"""GLM 4.5's way of writing calls: a name, then <arg_key> and <arg_value> for each argument, inside <tool_call>.

Owns the format's tags. Values that are strings stand as they are, others as JSON.
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
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm45:
    """The format. See ToolFormat. `has_lines`: as 4.5 writes it; 4.7 leaves line ends out."""

    control_tokens: tuple[str, ...] = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)
    triggers: tuple[str, ...] = (BEGIN,)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None, *, has_lines: bool = True) -> None:
        self.name = "glm45" if has_lines else "glm47"
        self._control = dict(control or {})
        self._line = "\n" if has_lines else ""

    def parser(self, tools: Sequence[Tool]) -> "Glm45Parser":
        """See ToolFormat."""
        return Glm45Parser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat."""
        bodies = []
        shared = SharedRules("value_")
        line = self._line
        for n, tool in enumerate(allowed(tools, demand)):
            parameters = tagged_parameters(
                tool,
                self.name,
                f"v{n}_",
                opening=lambda name: f"{KEY}{name}{KEY_END}{line}{VALUE}",
                free_opening=(KEY, f"{KEY_END}{line}{VALUE}"),
                end=VALUE_END + line,
                others=(VALUE_END,),
                control=self._control,
                shared=shared,
            )
            bodies.append(Grammar(f"{literal(tool.name + line)} {parameters.start}", parameters.rules))
        frame = Frame(BEGIN, END, "\n" if line else "", control=self._control)
        return frame.grammar(bodies, demand, BEGIN, answer, shared.rules).text


class Glm45Parser(TaggedCallsParser):
    """Reads one answer, with or without line ends between tags."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN,), (VALUE_END,))
        self._key = ""

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_name
        return True

    def _read_name(self) -> bool:
        if not self._skip_blank():
            return False
        end, marker = find_first(self._text, ("\n", KEY, END), self._pos)
        if marker is None:
            return False
        name = self._text[self._pos : end].strip()
        self._pos = end
        return self._begin_tagged(name)

    def _read_parameter(self) -> bool:
        if not self._skip_blank():
            return False
        tag = self._expect_one((KEY, END))
        if tag is None:
            return False
        if tag == KEY:
            return self._go(self._read_key)
        if tag == END:
            self._close_call()
        else:
            self._break_call()
        return self._go(self._read_content)

    def _read_key(self) -> bool:
        end = self._text.find(KEY_END, self._pos, self._pos + MAX_HEAD_CHARS)
        if end >= 0:
            self._key = self._text[self._pos : end].strip()
            self._pos = end + len(KEY_END)
            return self._go(self._behind_key)
        if len(self._text) - self._pos < MAX_HEAD_CHARS:
            return False
        self._break_call()
        return self._go(self._read_content)

    def _behind_key(self) -> bool:
        if not self._skip_blank():
            return False
        is_value = self._expect(VALUE)
        if is_value is None:
            return False
        if is_value:
            return self._begin_value(self._key)
        self._break_call()
        return self._go(self._read_content)

    def _behind_value(self, end: str) -> bool:
        self._pos += len(end)
        return self._go(self._read_parameter)
