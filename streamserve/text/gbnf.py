"""llama.cpp's grammar notation (GBNF) as Lark.

Owns that notation: rules `name ::= ...`, texts, classes, groups, repeats, comments. Checks that every rule that is named exists.
"""

import re

from streamserve.errors import InvalidRequest
from streamserve.text.lark import Grammar, literal

_RULE = re.compile(r"^\s*([A-Za-z][\w-]*)\s*::=", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+|\#[^\n]*) | (?P<line>[\r\n]+) | (?P<rule>[A-Za-z][\w-]*\s*::=) | (?P<name>[A-Za-z][\w-]*)
      | (?P<text>"(?:[^"\\\n]|\\.)*") | (?P<class>\[(?:[^\]\\\n]|\\.)*\]) | (?P<count>\{\s*\d+\s*(?:,\s*\d*\s*)?\})
      | (?P<sign>[|()*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}
_MAX_DEPTH = 200


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written so: Lark has no ::=."""
    return _RULE.search(text) is not None


def lark_of_gbnf(text: str, param: str) -> Grammar:
    """The grammar in Lark. InvalidRequest names the line at fault."""
    return _Converter(text, param).grammar()


class _Converter:
    """One pass over one grammar."""

    def __init__(self, text: str, param: str) -> None:
        self._text = text
        self._param = param

    def grammar(self) -> Grammar:
        """See lark_of_gbnf."""
        rules: dict[str, list[str]] = {}
        used: dict[str, int] = {}
        out: list[str] = []
        depth = at = 0
        name = ""
        while at < len(self._text):
            token = _TOKEN.match(self._text, at)
            if token is None:
                raise self._fault(at, f"{self._text[at : at + 20]!r} is not GBNF")
            kind, piece = token.lastgroup, token[0]
            if kind == "rule":
                if depth:
                    raise self._fault(at, f"a ( of the rule {name!r} is not closed")
                name = piece[:-3].strip()
                if name in rules:
                    raise self._fault(at, f"the rule {name!r} is given twice")
                out = rules[name] = []
            elif kind not in ("blank", "line") and not name:
                raise self._fault(at, "a rule must come first: name ::= ...")
            elif kind == "name":
                used.setdefault(piece, at)
                out.append(_rule(piece))
            elif kind == "text":
                out.append(literal(_unescaped(piece[1:-1])))
            elif kind == "class":
                out.append(self._class(piece, at))
            elif kind == "count":
                out.append(re.sub(r"\s", "", piece))
            elif kind == "sign":
                depth += (piece == "(") - (piece == ")")
                if not 0 <= depth <= _MAX_DEPTH:
                    raise self._fault(at, "a ) closes nothing" if depth < 0 else f"groups are nested over {_MAX_DEPTH} deep")
                out.append("/(?s:.)/" if piece == "." else piece)
            at = token.end()
        if depth:
            raise self._fault(len(self._text) - 1, f"a ( of the rule {name!r} is not closed")
        if "root" not in rules:
            raise InvalidRequest(f"{self._param} has no rule `root`, where a GBNF grammar begins", param=self._param)
        if missing := next((word for word in used if word not in rules), None):
            raise self._fault(used[missing], f"there is no rule {missing!r}")
        return Grammar(_rule("root"), tuple(f"{_rule(rule)}: {self._body(parts)}" for rule, parts in rules.items()))

    def _body(self, parts: list[str]) -> str:
        """The parts in a row; a repeat belongs to what stands before it, an empty alternative is an empty text."""
        text = ""
        previous = "|"
        for part in (*parts, ")"):
            if part in ("|", ")") and previous in ("|", "("):
                text += ' ""'
            if part in ("*", "+", "?") or part.startswith("{"):
                text = f"{text}{part}"
            else:
                text += f" {part}"
            previous = part
        return text[:-1].strip()

    def _class(self, piece: str, at: int) -> str:
        body = piece[1:-1]
        if body in ("", "^"):
            raise self._fault(at, f"the class {piece} is empty")
        inner = _ESCAPE.sub(lambda found: _in_class(_letter(found)), re.sub(r"(?<!\\)([/\[&~])", r"\\\1", body))
        return f"/[{inner}]/"

    def _fault(self, at: int, message: str) -> InvalidRequest:
        line = self._text.count("\n", 0, at) + 1
        return InvalidRequest(f"line {line} of {self._param}: {message}", param=self._param)


def _rule(name: str) -> str:
    """A rule's name in Lark: lower case, as capitals would make it a terminal, and never one of Lark's own."""
    safe = re.sub(r"[A-Z-]", lambda letter: "_h" if letter[0] == "-" else f"_u{letter[0].lower()}", name.replace("_", "__"))
    return f"g_{safe}"


def _letter(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    if code is None:
        return _LETTERS.get(found[4], found[4])
    number = int(code, 16)
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_letter, text)


def _in_class(letter: str) -> str:
    if letter.isalnum() or letter == " ":
        return letter
    return f"\\{letter}" if letter.isascii() and letter.isprintable() else f"\\x{{{ord(letter):x}}}"
