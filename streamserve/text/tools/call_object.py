"""One call as a JSON object, {"name": ..., "arguments": {...}}, read while it arrives.

Owns the reading of that object's keys. Knows nothing of what stands around it.
"""

import json
import re
from collections.abc import Callable, Container

from streamserve.text.tools.json_text import JsonSpan, StringReader

_BLANK = re.compile(r"\s*")
_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")


class CallObject:
    """Reads one object. `name` is known once `is_call`: then it is one of `names`, and its arguments come out piece by piece.

    `is_bad`: the object is no call, or no JSON from here on. `is_done`: it is closed. `has_arguments`: their value is whole.
    With `needs_arguments` an object without that key is no call, and neither is one with keys that calls don't have: JSON that is
    an answer shows at once. Arguments may be a string of JSON; what it holds is given.
    """

    def __init__(self, names: Container[str], *, needs_arguments: bool = False) -> None:
        self._names = names
        self._needs_arguments = needs_arguments
        self._step: Callable[[str, int], int] = self._open
        self._key = ""
        self._span = JsonSpan()
        self._string: StringReader | None = None
        self._is_empty = True  # the string
        self._value: list[str] = []
        self._early: list[str] = []  # arguments that came before the name
        self._pieces: list[str] = []
        self._has_begun_arguments = False
        self.name: str | None = None
        self.id: str | None = None
        self.is_call = False
        self.has_arguments = False
        self.is_bad = False
        self.is_done = False

    def feed(self, text: str, pos: int) -> int:
        """Where `text` was read to, from `pos` on. Reads all of it unless the object ends, is bad, or is now known as a call."""
        was_call = self.is_call
        while pos < len(text) and not (self.is_bad or self.is_done or self.is_call != was_call):
            pos = self._step(text, pos)
        return pos

    def take(self) -> str:
        """The arguments that came since the last call of this. Empty before `is_call`."""
        if not self.is_call:
            return ""
        taken = "".join((*self._early, *self._pieces))
        self._early, self._pieces = [], []
        return taken

    def _open(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos < len(text):
            self.is_bad = text[pos] != "{"
            self._step = self._first_key
            pos += not self.is_bad
        return pos

    def _first_key(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos < len(text) and text[pos] == "}":
            return self._close(pos)
        return self._begin_key(text, pos)

    def _begin_key(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos < len(text):
            self.is_bad = text[pos] != '"'
            self._span, self._value = JsonSpan(), []
            self._step = self._read_key
        return pos

    def _read_key(self, text: str, pos: int) -> int:
        pos = self._read_span(text, pos)
        if self._span.is_done:
            self._key = _text_of("".join(self._value))
            is_known = self.is_call or self._key in (*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS)
            self.is_bad = self._needs_arguments and not is_known
            self._step = self._read_colon
        return pos

    def _read_colon(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos < len(text):
            self.is_bad = text[pos] != ":"
            self._step = self._begin_value
            pos += not self.is_bad
        return pos

    def _begin_value(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        self._span, self._value = JsonSpan(), []
        if self._key in _ARGUMENT_KEYS and not self._has_begun_arguments:
            self._has_begun_arguments = True
            self._step = self._read_null if text[pos] == "n" else self._read_arguments
            if text[pos] == '"':
                self._string = StringReader()
                pos += 1
            self._decide()
        else:
            self._step = self._read_value
        return pos

    def _read_value(self, text: str, pos: int) -> int:
        pos = self._read_span(text, pos)
        if self._span.is_done:
            value = "".join(self._value)
            if self._key in _NAME_KEYS and self.name is None:
                self.name = _text_of(value) if value.startswith('"') else ""
                self.is_bad = self.name not in self._names
                self._decide()
            elif self._key == "id" and value.startswith('"'):
                self.id = _text_of(value)
            self._step = self._behind_value
        elif self._span.is_bad:
            self.is_bad = True
        return pos

    def _read_arguments(self, text: str, pos: int) -> int:
        into = self._pieces if self.is_call else self._early
        if self._string is not None:
            held, pos = self._string.feed(text, pos)
            self._is_empty = self._is_empty and not held
            is_done = self._string.is_done
            into.append("{}" if is_done and self._is_empty else held)
        else:
            end = self._span.feed(text, pos)
            into.append(text[pos:end])
            is_done, self.is_bad, pos = self._span.is_done, self._span.is_bad, end
        if is_done:
            self.has_arguments = True
            self._step = self._behind_value
        return pos

    def _read_null(self, text: str, pos: int) -> int:
        """No arguments, written as null."""
        pos = self._read_span(text, pos)
        if self._span.is_done:
            self._pieces.append("{}")
            self.has_arguments = True
            self._step = self._behind_value
        return pos

    def _behind_value(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        if text[pos] == "}":
            return self._close(pos)
        self.is_bad = text[pos] != ","
        self._step = self._begin_key
        return pos + (not self.is_bad)

    def _close(self, pos: int) -> int:
        self.is_done = True
        if self.name is None or (self._needs_arguments and not self._has_begun_arguments):
            self.is_bad = True
        elif not self._has_begun_arguments:
            self._pieces.append("{}")
            self.is_call = self.has_arguments = True
        return pos + 1

    def _decide(self) -> None:
        """It is a call once its name is known and its arguments have begun."""
        self.is_call = self._has_begun_arguments and self.name is not None and not self.is_bad

    def _read_span(self, text: str, pos: int) -> int:
        end = self._span.feed(text, pos)
        self._value.append(text[pos:end])
        return end


def _skip(text: str, pos: int) -> int:
    return _BLANK.match(text, pos).end()  # type: ignore[union-attr] # matches always


def _text_of(value: str) -> str:
    """What a JSON string holds; "" when it is not valid."""
    try:
        found = json.loads(value, strict=False)
    except ValueError:
        return ""
    return found if isinstance(found, str) else ""
