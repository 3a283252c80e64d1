"""Llama 3's way of writing calls: the answer is {"name": "f", "parameters": {...}}, several divided by semicolons, behind
<|python_tag|> or bare.

Owns that format. A bare object is a call only where the answer, or another call, is all that stands before it.
"""

from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, marked
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import allowed, object_calls

TAG = "<|python_tag|>"


class Llama3:
    """The format. See ToolFormat."""

    name = "llama3"
    control_tokens: tuple[str, ...] = (TAG,)
    triggers: tuple[str, ...] = (TAG,)
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
        super().__init__(tools, (TAG,))
        if tools:
            self._is_undecided = True
            self._state = self._read_start

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_start
        return True

    def _read_start(self) -> bool:
        """Where an object may begin."""
        if not self._skip_blank():
            return False
        is_tag = self._expect(TAG)
        if is_tag is None:
            return False
        if not is_tag:
            if self._text[self._pos] != "{":
                return self._reject_start()
            return self._begin_object()
        return True

    def _reject_start(self) -> bool:
        """What stands here is text, unless it is a tag further on."""
        if self._text.startswith(TAG, self._at):
            return self._reject()
        self._is_undecided = False
        self._pos = self._at
        self._state = self._read_content
        return True

    def _behind_object(self) -> bool:
        """A semicolon, a comma or a line's end may divide this call from another."""
        if not self._skip_blank():
            return False
        if self._text[self._pos] in ";,":
            self._pos += 1
            if not self._skip_blank():
                self._pos = self._at
                return False
        self._is_undecided = True
        self._state = self._read_start
        return True
