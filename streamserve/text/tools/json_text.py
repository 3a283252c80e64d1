"""JSON text that arrives in pieces: where a value ends, what a string holds, and how a text is written as a string.

Owns the reading of one value or string each. Knows nothing of calls.
"""

import json
import re

_OUTSIDE = re.compile(r"[\s\d.,:+\-eEtrufalsnNIiy]*")  # of numbers, literals and separators; a quote or bracket ends it
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[^\s,\]}<]*")
_CLOSER = {"{": "}", "[": "]"}


class JsonSpan:
    """Finds the end of one JSON value. `is_done`: the value is whole. `is_bad`: what came can be no JSON; it ended there."""

    __slots__ = ("_closers", "_escapes", "_in_string", "_kind", "is_bad", "is_done")

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._kind = ""
        self._in_string = False
        self._escapes = False
        self.is_done = False
        self.is_bad = False

    def feed(self, text: str, pos: int) -> int:
        """Where the part of `text` from `pos` on that belongs to the value ends. The value's first character is at the first
        `pos`."""
        end = len(text)
        if not self._kind:
            if pos == end:
                return pos
            self._kind = text[pos] if text[pos] in '{["' else "scalar"
            self.is_bad = text[pos] in ",:]}<"
        if self._kind == "scalar" and not self.is_bad:
            pos = _SCALAR.match(text, pos).end()  # type: ignore[union-attr] # matches always
            self.is_done = pos < end
            return pos
        while pos < end and not (self.is_done or self.is_bad):
            if self._in_string:
                pos = self._feed_string(text, pos)
                continue
            pos = _OUTSIDE.match(text, pos).end()  # type: ignore[union-attr]
            if pos == end:
                break
            letter = text[pos]
            if letter == '"':
                self._in_string = True
            elif letter in _CLOSER:
                self._closers.append(_CLOSER[letter])
            elif self._closers and letter == self._closers[-1]:
                self._closers.pop()
                self.is_done = not self._closers
            else:
                self.is_bad = True
                break
            pos += 1
        return pos

    def finish(self) -> None:
        """The text has ended: a number or a literal ends with it."""
        if self._kind == "scalar":
            self.is_done = True

    def _feed_string(self, text: str, pos: int) -> int:
        if self._escapes:
            self._escapes = False
            return pos + 1
        pos = _PLAIN.match(text, pos).end()  # type: ignore[union-attr]
        if pos == len(text):
            return pos
        if text[pos] == "\\":
            self._escapes = True
        else:
            self._in_string = False
            self.is_done = not self._closers
        return pos + 1


class StringReader:
    """Reads what a JSON string holds, from behind its opening quote on."""

    __slots__ = ("_escape", "_half", "is_done")

    def __init__(self) -> None:
        self._escape = ""  # an escape that is not whole
        self._half = ""  # the first half of a surrogate pair
        self.is_done = False

    def feed(self, text: str, pos: int) -> tuple[str, int]:
        """What the string holds more, and where in `text` it was read to: behind the closing quote when `is_done`."""
        parts = []
        end = len(text)
        while pos < end and not self.is_done:
            if self._escape:
                self._escape += text[pos]
                pos += 1
                if len(self._escape) == (6 if self._escape[1] == "u" else 2):
                    parts.append(self._joined(_unescaped(self._escape)))
                    self._escape = ""
                continue
            stop = _PLAIN.match(text, pos).end()  # type: ignore[union-attr]
            if stop > pos:
                parts.append(self._joined(text[pos:stop]))
            if stop < end:
                if text[stop] == "\\":
                    self._escape = "\\"
                else:
                    self.is_done = True
                    parts.append(self._joined(""))
                stop += 1
            pos = stop
        return "".join(parts), pos

    def _joined(self, text: str) -> str:
        """The text, behind the half of a pair that waits; a half without its other is U+FFFD."""
        half, self._half = self._half, ""
        if len(text) == 1 and "\ud800" <= text <= "\udfff":
            if text < "\udc00":
                self._half = text
                return "\ufffd" if half else ""
            return (half + text).encode("utf-16", "surrogatepass").decode("utf-16") if half else "\ufffd"
        return "\ufffd" + text if half else text


def _unescaped(escape: str) -> str:
    """The character that an escape stands for; what is no escape stands for itself."""
    try:
        return str(json.loads(f'"{escape}"'))
    except ValueError:
        return escape


def escaped(text: str) -> str:
    """A text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
