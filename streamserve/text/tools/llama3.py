"""Llama 3's way of writing calls: the answer is {"name": "f", "parameters": {...}}, several divided by semicolons, behind
<|python_tag|> or bare. Llama 4, told the same, may put <|python_start|> and <|python_end|> around what it says before.

Owns that format. A bare object is a call only where the answer, or another call, is all that stands before it.
"""

from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, marked
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import allowed, object_calls

TAG, START, END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"


class Llama3:
    """The format. See ToolFormat."""

    name = "llama3"
    control_tokens: tuple[str, ...] = (TAG, START, END)
    triggers: tuple[str, ...] = (TAG, START)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "Llama3Parser":
        """See ToolFormat."""
        return Llama3Parser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat. An answer that begins with a brace is calls; else it is text."""
        bodies = [object_calls(allowed(tools, demand), "parameters")]
        frame = Frame("", "", "; ", control=self._control)
        if demand.min_calls or answer is not None:
            return frame.grammar(bodies, demand, TAG, answer).text
        text = Grammar("free_text", ("free_text: FREE_TEXT", r'FREE_TEXT: "" | /\s*[^{\s](?s:.*)/'))
        if demand.max_calls == 0:
            return text.text
        made = frame.grammar(bodies, Demand(1, demand.max_calls), TAG)
        tag = marked(TAG, self._control)
        return Grammar(f"free_text | {tag}? made", (f"made: {made.start}", *text.rules, *made.rules)).text


class Llama3Parser(JsonCallsParser):
    """Reads one answer."""

    _needs_arguments = True

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (TAG, START, END))
        if tools:
            self._state = self._read_start

    def _trigger(self, marker: str) -> bool:
        if marker == TAG:
            self._state = self._behind_tag
            return True
        self._max_undecided = 0  # around calls or text: it is neither
        return self._go(self._read_start)

    def _behind_tag(self) -> bool:
        if not self._skip_blank():
            return False
        return self._begin_object() if self._text[self._pos] == "{" else self._reject()

    def _read_start(self) -> bool:
        """Where a bare object may begin."""
        if not self._skip_blank():
            return False
        return self._begin_object() if self._text[self._pos] == "{" else self._go_on_as_text()

    def _behind_object(self) -> bool:
        """A semicolon, a comma or a line's end may divide this call from another; small models write a brace too many."""
        if not self._skip_blank():
            return False
        if self._text[self._pos] == "}":
            self._pos += 1
            return self._go(self._behind_object)
        self._pos += self._text[self._pos] in ";,"
        return self._go(self._read_start)
