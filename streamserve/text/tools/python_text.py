"""Python literals that arrive in pieces, as JSON.

Owns the reading of one literal: strings, numbers, True, False, None, lists, dicts, tuples. What is no literal becomes a string of
its text. Knows nothing of calls.
"""

import json
import re
from collections.abc import Callable
from math import isfinite

from streamserve.text.tools.json_text import escaped

_BLANK = re.compile(r"\s*")
_PLAIN = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_PREFIX = re.compile(r"(?i:[rbuf]|rb|br|fr|rf)(?=['\"])")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?")
_INTEGER = re.compile(r"[+-]?0(?:[xX][\da-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")
_ESCAPE = re.compile(r"\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|[0-7]{1,3})")
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPE_LEN = {"x": 4, "u": 6, "U": 10}
_MAX_DEPTH = 64
_MAX_INTEGER_CHARS = 1_000  # of another base than ten: what is longer stays text


class PythonValue:
    """Reads one value. `is_done`: it has ended, with what `feed` did not take. `is_bad`: what came can be no value."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._containers: list[str] = []  # what closes them
        self._step: Callable[[str, int], int] = self._begin
        self._out: list[str] = []
        self._quote = ""
        self._is_raw = False
        self._escape = ""
        self._half = ""  # the first half of a surrogate pair
        self._raw: list[str] = []  # of a number, a word or an expression
        self._raw_depth = 0
        self._raw_quote = ""
        self._is_key = False
        self._may_end = False  # a container may end where a value could begin
        self._group: PythonValue | None = None
        self._has_comma = False  # in a group itself
        self.is_done = False
        self.is_bad = False

    def feed(self, text: str, pos: int) -> tuple[str, int]:
        """More JSON, and where in `text` it was read to."""
        while pos < len(text) and not (self.is_done or self.is_bad):
            before, step = pos, self._step
            pos = self._step(text, pos)
            if pos == before and self._step == step:
                break
        out, self._out = "".join(self._out), []
        return out, pos

    def finish(self) -> str:
        """The text has ended: a number, a word or a string may end with it."""
        if self._step == self._read_raw and not self._raw_depth and not self._raw_quote:
            self._end_raw()
        elif self._step in (self._behind_string, self._behind_two):
            self._out.append('"')
        out, self._out = "".join(self._out), []
        return out

    # Where a value begins

    def _begin(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        letter = text[pos]
        if self._may_end and letter == self._containers[-1]:
            return self._close(pos)
        self._may_end = False
        if letter in "'\"":
            return self._open_string(text, pos)
        if letter in "rbufRBUF":
            if len(text) - pos < 3 and not text[pos:].strip("rbufRBUF"):
                return pos  # these letters may stand before a string
            if prefix := _PREFIX.match(text, pos):
                self._is_raw = "r" in prefix[0].lower()
                return self._open_string(text, prefix.end())
        if letter in "[{" and not self._is_key:
            if len(self._containers) + self._depth >= _MAX_DEPTH:
                self.is_bad = True
                return pos
            self._out.append(letter)
            self._containers.append("]" if letter == "[" else "}")
            self._is_key = letter == "{"
            self._may_end = True
            return pos + 1
        if letter == "(" and not self._is_key and self._depth < _MAX_DEPTH:
            self._group = PythonValue(self._depth + 1)
            self._group._open_group()
            self._raw = []
            self._step = self._read_group
            return pos + 1
        self._raw = []
        self._step = self._read_raw
        return pos

    # Groups: a tuple, or one value in parentheses

    def _open_group(self) -> None:
        self._containers = [")"]
        self._may_end = True

    def _read_group(self, text: str, pos: int) -> int:
        """Which of the two it is shows at its end, so it is given then."""
        group = self._group
        assert group is not None
        found, pos = group.feed(text, pos)
        self._raw.append(found)
        if group.is_done:
            inner = "".join(self._raw)
            self._raw, self._group = [], None
            self._out.append(f"[{inner}]" if group._has_comma or not inner else inner)
            return self._end_value(pos)
        self.is_bad = group.is_bad
        return pos

    # Strings

    def _open_string(self, text: str, pos: int) -> int:
        self._quote = text[pos]
        self._out.append('"')
        self._step = self._behind_quote
        return pos + 1

    def _behind_quote(self, text: str, pos: int) -> int:
        """One quote is read: the string may be empty, or three quotes may open it."""
        if text[pos] != self._quote:
            self._step = self._read_string
            return pos
        self._step = self._behind_two
        return pos + 1

    def _behind_two(self, text: str, pos: int) -> int:
        if text[pos] == self._quote:
            self._quote *= 3
            self._step = self._read_string
            return pos + 1
        self._step = self._behind_string
        return pos

    def _read_string(self, text: str, pos: int) -> int:
        if self._escape:
            return self._read_escape(text, pos)
        end = _PLAIN[self._quote[0]].match(text, pos).end()  # type: ignore[union-attr] # matches always
        self._put(text[pos:end])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escape = "\\"
            return end + 1
        if len(self._quote) == 1:
            self._step = self._behind_string
            return end + 1
        self._raw = []
        self._step = self._read_quotes
        return end

    def _read_quotes(self, text: str, pos: int) -> int:
        """Quotes inside a string of three: three of them close it."""
        if text[pos] == self._quote[0]:
            self._raw.append(text[pos])
            if len(self._raw) == 3:
                self._step = self._behind_string
            return pos + 1
        self._put("".join(self._raw))
        self._step = self._read_string
        return pos

    def _read_escape(self, text: str, pos: int) -> int:
        self._escape += text[pos]
        kind = self._escape[1]
        if self._is_raw:
            self._put(self._escape)
            self._escape = ""
            return pos + 1
        if kind in "01234567":
            if len(self._escape) <= 4 and text[pos] in "01234567":
                if len(self._escape) == 4:
                    self._end_escape()
                return pos + 1
            self._escape = self._escape[:-1]
            self._end_escape()
            return pos
        if len(self._escape) >= _ESCAPE_LEN.get(kind, 2):
            self._end_escape()
        return pos + 1

    def _end_escape(self) -> None:
        escape, self._escape = self._escape, ""
        if _ESCAPE.fullmatch(escape):
            number = int(escape[1:], 8) if escape[1] in "01234567" else int(escape[2:], 16)
            self._put(chr(number) if number < 0x110000 else "\ufffd")
        elif escape[1] in "\\'\"":
            self._put(escape[1])
        else:
            self._put(_LETTERS.get(escape[1], escape))

    def _put(self, text: str) -> None:
        """Text of a string; halves of surrogate pairs are joined."""
        if not text:
            return
        half, self._half = self._half, ""
        if len(text) == 1 and "\ud800" <= text <= "\udfff":
            if text < "\udc00":
                self._half = text
                text = "\ufffd" if half else ""
            else:
                text = (half + text).encode("utf-16", "surrogatepass").decode("utf-16") if half else "\ufffd"
        elif half:
            text = "\ufffd" + text
        self._out.append(escaped(text))

    def _behind_string(self, text: str, pos: int) -> int:
        """Strings that follow each other are one."""
        self._is_raw = False
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        if text[pos] in "'\"":
            self._quote = text[pos]
            self._step = self._behind_quote
            return pos + 1
        if self._half:
            self._half = ""
            self._out.append("\ufffd")
        self._out.append('"')
        return self._end_value(pos)

    # Numbers, words, expressions

    def _read_raw(self, text: str, pos: int) -> int:
        end = pos
        while end < len(text):
            letter = text[end]
            if self._raw_quote:
                if len(self._raw_quote) == 2:  # behind a backslash
                    self._raw_quote = self._raw_quote[0]
                elif letter == "\\":
                    self._raw_quote += letter
                elif letter == self._raw_quote:
                    self._raw_quote = ""
            elif letter in "'\"":
                self._raw_quote = letter
            elif letter in "([{":
                self._raw_depth += 1
            elif not self._raw_depth and (letter in ",)]}" or (letter == ":" and self._is_key)):
                self._raw.append(text[pos:end])
                self._end_raw()
                return self._end_value(end)
            elif letter in ")]}":
                self._raw_depth -= 1
            end += 1
        self._raw.append(text[pos:end])
        return end

    def _end_raw(self) -> None:
        raw = "".join(self._raw).strip()
        self._raw = []
        if not raw:
            self.is_bad = True
            return
        found = _json_of(raw)
        if self._is_key and not found.startswith('"'):
            found = json.dumps(found)
        self._out.append(found)

    # Behind a value

    def _end_value(self, pos: int) -> int:
        if self.is_bad:
            return pos
        if not self._containers:
            self.is_done = True
            return pos
        self._step = self._behind_value
        return pos

    def _behind_value(self, text: str, pos: int) -> int:
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        letter = text[pos]
        if self._is_key:
            self._is_key = False
            self.is_bad = letter != ":"
            self._out.append(": " if letter == ":" else "")
            self._step = self._begin
            return pos + (letter == ":")
        if letter == ",":
            self._has_comma = self._has_comma or self._containers == [")"]
            self._step = self._behind_comma
            return pos + 1
        if letter == self._containers[-1]:
            return self._close(pos)
        self.is_bad = True
        return pos

    def _behind_comma(self, text: str, pos: int) -> int:
        """A comma may be the last thing in a container."""
        pos = _skip(text, pos)
        if pos == len(text):
            return pos
        if text[pos] == self._containers[-1]:
            return self._close(pos)
        self._out.append(", ")
        self._is_key = self._containers[-1] == "}"
        self._step = self._begin
        return pos

    def _close(self, pos: int) -> int:
        self._may_end = self._is_key = False
        closer = self._containers.pop()
        if closer != ")":
            self._out.append(closer)
        return self._end_value(pos + 1)


def _json_of(raw: str) -> str:
    """JSON of a number or a word; a string of anything else."""
    if raw in _WORDS:
        return _WORDS[raw]
    if _INTEGER.fullmatch(raw) and len(raw) <= _MAX_INTEGER_CHARS:
        return str(int(raw.replace("_", ""), 0))
    if _NUMBER.fullmatch(raw):
        return _number(raw.replace("_", ""))
    return json.dumps(raw, ensure_ascii=False)


def _number(raw: str) -> str:
    """A number as JSON writes it, its digits kept."""
    sign = "-" if raw.startswith("-") else ""
    digits = raw.lstrip("+-")
    if not re.search(r"[.eE]", digits):
        return sign + (digits.lstrip("0") or "0")
    whole, _, rest = digits.partition(".")
    found = f"{sign}{whole.lstrip('0') or '0'}.{rest}" if "." in digits else sign + (digits.lstrip("0") or "0")
    found = re.sub(r"\.(?=[eE]|$)", ".0", found)
    return found if isfinite(float(found)) else json.dumps(raw)


def _skip(text: str, pos: int) -> int:
    return _BLANK.match(text, pos).end()  # type: ignore[union-attr] # matches always


def json_of_python(text: str) -> str | None:
    """A whole Python literal as JSON; None when it is none."""
    value = PythonValue()
    found, end = value.feed(text, 0)
    found += value.finish()
    is_whole = not text[end:].strip() and not value.is_bad
    try:
        json.loads(found)
    except ValueError:
        return None
    return found if is_whole else None
