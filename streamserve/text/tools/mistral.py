"""Mistral's ways of writing calls: [TOOL_CALLS] and a list of {"name": ..., "arguments": {...}}; in newer models
[TOOL_CALLS]name[ARGS]{...} for each call, with [CALL_ID]... before [ARGS] in some.

Owns the format's markers, and ids of calls: its chat templates take nine letters and digits and nothing else.
"""

import re
import secrets
import string
from collections.abc import Mapping, Sequence

from streamserve.text.lark import Grammar, literal, marked
from streamserve.text.tools.calls import Frame
from streamserve.text.tools.format import Demand, Tool
from streamserve.text.tools.json_calls import JsonCallsParser
from streamserve.text.tools.schemas import SPACED, allowed, arguments_value, object_calls

BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"\s*([\w./:-]+)\s*")
_ID = re.compile(r"\s*([A-Za-z0-9_.:-]+)\s*")
_LETTERS = string.ascii_letters + string.digits


class Mistral:
    """The format. See ToolFormat. `is_list`: a list of objects is written, else a name and arguments for each."""

    control_tokens: tuple[str, ...] = (BEGIN, ARGUMENTS, CALL_ID)
    triggers: tuple[str, ...] = (BEGIN,)
    reads_thoughts = False

    def __init__(self, control: Mapping[str, int] | None = None, *, is_list: bool = True) -> None:
        self.name = "mistral" if is_list else "mistral_args"
        self._control = dict(control or {})
        self._is_list = is_list

    def parser(self, tools: Sequence[Tool]) -> "MistralParser":
        """See ToolFormat."""
        return MistralParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat."""
        known = allowed(tools, demand)
        if self._is_list:
            bodies = [object_calls(known, "arguments")]
            frame = Frame("", "", ", ", before=BEGIN + "[", after="]", control=self._control)
        else:
            head = f"({marked(CALL_ID, self._control)} /[A-Za-z0-9]{{9}}/)? {marked(ARGUMENTS, self._control)}"
            bodies = [Grammar(f"{literal(tool.name)} {head} {arguments_value(tool, SPACED)}") for tool in known]
            frame = Frame(BEGIN, control=self._control)
        return frame.grammar(bodies, demand, BEGIN, answer).text


class MistralParser(JsonCallsParser):
    """Reads one answer in either form. A list may go on with text behind it."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(tools, (BEGIN,))

    def _id_of(self, written: str | None) -> str | None:
        return written or _new_id()

    def _trigger(self, marker: str) -> bool:
        self._state = self._read_kind
        return True

    def _read_kind(self) -> bool:
        if not self._skip_blank():
            return False
        if self._text[self._pos] != "[":
            self._state = self._read_header
            return True
        self._pos += 1
        return self._begin_object()

    # name[ARGS]{...}

    def _read_header(self) -> bool:
        start = self._pos
        name = _NAME.match(self._text, start)
        if name is None:
            return self._reject()
        self._pos = name.end()
        id = None
        has_id = self._expect(CALL_ID)
        if has_id:
            if (written := _ID.match(self._text, self._pos)) is None:
                return self._reject() if self._text[self._pos :].strip() else self._wait(start)
            self._pos, id = written.end(), written[1]
        has_arguments = self._expect(ARGUMENTS)
        if has_id is None or has_arguments is None:
            return self._wait(start)
        if not has_arguments:
            return self._reject()
        return self._begin_arguments(name[1], id)

    def _wait(self, start: int) -> bool:
        self._pos = start
        return False

    def _behind_object(self) -> bool:
        if not self._skip_blank():
            return False
        letter = self._text[self._pos]
        if letter == ",":
            self._pos += 1
            return self._begin_object()
        self._pos += letter == "]"
        return self._go(self._read_content)


def _new_id() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
