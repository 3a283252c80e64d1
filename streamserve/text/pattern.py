"""Regular expressions as grammars read them: what is wrong with one, before it is compiled.

Owns the syntax that llguidance takes (that of Rust's regex crate, without look-around and anchors inside), and patterns of string
formats. Compiles nothing; its time is linear. What it lets through by mistake the engine refuses when it compiles the grammar.
"""

import re
from collections.abc import Mapping

MAX_CHARS = 8_192
_MAX_DEPTH = 100
_MAX_REPEAT = 100_000
_ESCAPES = "dDwWsSpPnrtfavxuUAz"  # with a meaning; any punctuation may be escaped too
_PUNCTUATION = set("!\"#$%&'()*+,-./:;=?@[\\]^_`{|}~ ")
_COUNT = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_GROUP = re.compile(r"\(\?(?:P?<[A-Za-z_][\w.\[\]]*>|[isUx]*(?:-[isUx]+)?[:)])")
_BRACES = re.compile(r"\{[\w=^ :!-]+\}")
_LOOK = re.compile(r"\(\?<?[=!]")
_CLASS_ITEM = re.compile(r"\[:\^?[a-z]+:\]")

# Patterns that libraries write into schemas by themselves, and the same without look-around.
_KNOWN: Mapping[str, str] = {
    # pydantic's Decimal
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(?:\d+\.?\d*|\.\d+)$",
    # zod's email
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+\-]@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
}

_DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OF_DAY = "[0-9]{1,9}H(?:[0-9]{1,9}M)?(?:[0-9]{1,9}S)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S"
_DAYS = "[0-9]{1,9}Y(?:[0-9]{1,9}M)?(?:[0-9]{1,9}D)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = f"{_LABEL}(?:\\.{_LABEL})*"
_ATOM = "[A-Za-z0-9!#$%&'*+\\/=?^_`{|}~-]+"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9A-Fa-f]"
_WORD = f"{_HEX}{{1,4}}"
_GAPS = (f"(?:{_WORD}:){{{n}}}:(?:{_WORD}(?::{_WORD}){{0,{6 - n}}})?" for n in range(1, 7))

# String formats as they stand between slashes, for texts that no JSON stands around. Each takes only what its format allows.
FORMAT_PATTERNS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:[0-9]{{1,9}}W|(?:{_DAYS})(?:T(?:{_OF_DAY}))?|T(?:{_OF_DAY}))",
    "email": f"{_ATOM}(?:\\.{_ATOM})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
    "ipv6": f"(?:{_WORD}:){{7}}{_WORD}|::(?:{_WORD}(?::{_WORD}){{0,6}})?|(?:{_WORD}:){{7}}:|" + "|".join(_GAPS),
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "uri": "[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:\\/?#\\[\\]@!$&'()*+,;=%-]+",
}


def plainer(pattern: str) -> str:
    """The pattern, or one of the same meaning that needs no look-around."""
    return _KNOWN.get(pattern, pattern)


def fault_of(pattern: str) -> str | None:
    """What is wrong with a pattern, as half a sentence; None when nothing is seen."""
    if len(pattern) > MAX_CHARS:
        return f"it has {len(pattern)} characters; at most {MAX_CHARS} are allowed"
    return _Reader(pattern).fault()


class _Reader:
    """Reads one pattern from the left."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._pos = 0

    def fault(self) -> str | None:
        """See fault_of."""
        depth, may_repeat, is_first = 0, False, True
        text = self._text
        while self._pos < len(text):
            letter = text[self._pos]
            at = self._pos
            if letter == "(":
                if _LOOK.match(text, at):
                    return f"look-around at character {at} is not supported"
                group = _GROUP.match(text, at)
                if group is None and text.startswith("(?", at):
                    return f"the group at character {at} is of a kind that is not supported"
                self._pos = group.end() if group else at + 1
                may_repeat = False
                if group is None or not group[0].endswith(")"):
                    depth += 1
                if depth > _MAX_DEPTH:
                    return f"groups are nested over {_MAX_DEPTH} deep"
            elif letter == ")":
                if not depth:
                    return f"the ) at character {at} closes no group"
                depth -= 1
                self._pos += 1
                may_repeat = True
            elif letter == "[":
                if fault := self._class():
                    return fault
                may_repeat = True
            elif letter in "*+?{":
                if fault := self._repeat(may_repeat):
                    return fault
            elif letter == "\\":
                if fault := self._escape(is_in_class=False):
                    return fault
                may_repeat = True
            elif letter == "^" and not is_first:
                return f"the ^ at character {at} is not at the beginning"
            elif letter == "$" and text[at + 1 : at + 2] not in ("", "|", ")"):
                return f"the $ at character {at} is not at the end"
            else:
                self._pos += 1
                may_repeat = letter not in "|^$"
            is_first = letter in "(|^"
        return "a group is not closed" if depth else None

    def _repeat(self, may_repeat: bool) -> str | None:
        at = self._pos
        if not may_repeat:
            return f"nothing stands before the {self._text[at]} at character {at} that could be repeated"
        if self._text[at] != "{":
            self._pos += 1
            return None
        count = _COUNT.match(self._text, at)
        if count is None:
            return f"the {{ at character {at} is no count such as {{2,3}}; write \\{{ for the letter"
        low = int(count[1][:9])
        high = int(count[3][:9]) if count[3] else low
        if high < low:
            return f"the count at character {at} ends below its beginning"
        if high > _MAX_REPEAT:
            return f"the count at character {at} is {high}; at most {_MAX_REPEAT} is allowed"
        self._pos = count.end()
        return None

    def _escape(self, *, is_in_class: bool) -> str | None:
        at = self._pos
        letter = self._text[at + 1 : at + 2]
        self._pos = at + 2
        if not letter:
            return "it ends in a lone backslash"
        if letter.isdigit():
            return f"the back-reference at character {at} is not supported"
        if letter in "bB<>":
            return f"the word boundary at character {at} is not supported"
        if letter in "pPxu" and (braces := _BRACES.match(self._text, self._pos)):
            self._pos = braces.end()
        if letter not in _PUNCTUATION and (letter not in _ESCAPES or (is_in_class and letter in "Az")):
            return f"the escape \\{letter} at character {at} is not known"
        return None

    def _class(self) -> str | None:
        """A class in brackets; classes may stand inside one."""
        text, at = self._text, self._pos
        depth = 0
        last = ""  # a letter that a range may begin with
        while self._pos < len(text):
            letter = text[self._pos]
            if letter == "[" and (item := _CLASS_ITEM.match(text, self._pos)) and depth:
                self._pos = item.end()
                last = ""
            elif letter == "[":
                depth += 1
                if depth > _MAX_DEPTH:
                    return f"classes are nested over {_MAX_DEPTH} deep"
                self._pos += 1
                if text.startswith("^", self._pos):
                    self._pos += 1
                if text.startswith("]", self._pos):  # the first in a class is a letter
                    self._pos += 1
                last = ""
            elif letter == "]":
                depth -= 1
                self._pos += 1
                if not depth:
                    return None
            elif letter == "\\":
                begin = self._pos
                if fault := self._escape(is_in_class=True):
                    return fault
                kind = text[begin + 1]
                last = kind if kind in _PUNCTUATION else ""
            elif letter == "-" and last and text[self._pos + 1 : self._pos + 2] not in ("]", "-", "[", "\\", ""):
                if text[self._pos + 1] < last:
                    return f"the range at character {self._pos - 1} ends before its beginning"
                self._pos += 2
                last = ""
            else:
                self._pos += 1
                last = letter
        return f"the class at character {at} is not closed"
