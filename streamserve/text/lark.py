"""Pieces of grammars in llguidance's Lark notation, as text.

Owns how literals, control tokens and JSON schemas are spelt there. Knows nothing of what a grammar is for, and compiles none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.errors import InvalidRequest

ANY_TEXT = "/(?s:.*)/"
OWN_RULE = "own_grammar"
_HEAD = "start: "
_JSON = "%json "
_SCHEMA_HEAD, _SCHEMA_TAIL = '{"grammars":[{"json_schema":', "}]}"


@dataclass(frozen=True, slots=True)
class Grammar:
    """An expression to start with and the rules it refers to. Names of rules begin with letters that their maker owns, so that
    grammars can stand in one text. `whole`: a client's own text, which is taken as it is where it stands alone."""

    start: str
    rules: tuple[str, ...] = ()
    whole: str = ""

    @property
    def text(self) -> str:
        """The whole grammar. A schema alone is written without Lark, of which llguidance would read half a millisecond longer."""
        if self.whole:
            return self.whole
        if not self.rules and self.start.startswith(_JSON):
            return f"{_SCHEMA_HEAD}{self.start.removeprefix(_JSON)}{_SCHEMA_TAIL}"
        return "\n".join((f"{_HEAD}{self.start}", *self.rules)) + "\n"


class SharedRules:
    """Rules that several parts of a grammar use: each is compiled once. Names begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._names: dict[str, str] = {}

    def name_of(self, body: str) -> str:
        """The rule of this body."""
        return self._names.setdefault(body, f"{self._prefix}{len(self._names)}")

    @property
    def rules(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(f"{name}: {body}" for body, name in self._names.items())


def own_grammar(text: str) -> Grammar:
    """A client's own Lark, whose names are its own wherever it stands."""
    return Grammar(OWN_RULE, (f"{OWN_RULE}: %lark {{\n{text}\n}}",), whole=text)


def check_part(grammar: Grammar) -> None:
    """A client's own grammar beside other rules: what it says of the whole text would not hold."""
    if "%ignore" in grammar.whole:
        raise InvalidRequest("a grammar with %ignore cannot stand beside thoughts or tools; write it without", param="ebnf")


def led(grammar: str, lead: str) -> str:
    """A whole grammar's text behind a text that must come first. A client's own Lark stays as it is."""
    if grammar.startswith(_SCHEMA_HEAD):
        behind = f"{_JSON}{grammar.removeprefix(_SCHEMA_HEAD).removesuffix(_SCHEMA_TAIL)}\n"
    elif grammar.startswith(_HEAD):
        behind = grammar.removeprefix(_HEAD)
    else:
        return grammar
    return f"{_HEAD}{literal(lead)} behind_lead\nbehind_lead: {behind}"


def literal(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def marked(text: str, control: Mapping[str, int]) -> str:
    """A text in which control tokens occur: these as tokens (a grammar's text never matches one), the rest as text."""
    parts = []
    for piece in split_markers(text, control):
        parts.append(f"<[{control[piece]}]>" if piece in control else literal(piece))
    return " ".join(parts) or '""'


def split_markers(text: str, control: Mapping[str, int]) -> list[str]:
    """The text cut before and behind each control token in it; the longest where several begin."""
    pieces, start, at = [], 0, 0
    known = sorted(control, key=len, reverse=True)
    while at < len(text):
        token = next((token for token in known if text.startswith(token, at)), None)
        if token is None:
            at += 1
            continue
        if start < at:
            pieces.append(text[start:at])
        pieces.append(token)
        start = at = at + len(token)
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def json_value(schema: Any, options: Mapping[str, Any]) -> str:
    """A JSON text that the schema describes. `options`: llguidance's x-guidance."""
    if not isinstance(schema, Mapping):
        schema = {"allOf": [schema]}  # a boolean has no room for options
    return _JSON + json.dumps({"x-guidance": dict(options), **schema}, ensure_ascii=False, separators=(",", ":"))


def repeated(expression: str, low: int, high: int | None) -> str:
    """The expression `low` to `high` times (None: any number)."""
    if high is None:
        return f"({expression}){{{low},}}" if low > 1 else f"({expression}){'+' if low else '*'}"
    if high == 0:
        return '""'
    return f"({expression})" if low == high == 1 else f"({expression}){{{low},{high}}}"


def without(markers: Sequence[str]) -> str:
    """A terminal's body: any text in which none of these occurs."""
    return ANY_TEXT + "".join(f" & ~(/(?s:.*)/ {literal(marker)} /(?s:.*)/)" for marker in markers)


def between_slashes(pattern: str) -> str:
    """A pattern as it stands between slashes, on one line."""
    out, escapes = [], False
    for letter in pattern:
        if letter == "/" and not escapes:
            out.append("\\")
        out.append({"\n": "\\n", "\r": "\\r"}.get(letter, letter) if not escapes else {"\n": "n", "\r": "r"}.get(letter, letter))
        escapes = letter == "\\" and not escapes
    return "".join(out)


def regex_of(text: str) -> str:
    """A text as a regular expression between slashes."""
    return re.sub(r"[^A-Za-z0-9 ]", lambda found: f"\\{found[0]}" if found[0] in "\\^$.|?*+()[]{}/-&~" else found[0], text)
