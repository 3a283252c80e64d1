"""What an answer must look like, as a grammar: JSON by a schema, any JSON object, a regular expression, a grammar, one of several
texts, or free text with tagged parts.

Owns the reading of those descriptions, their limits, and white space in JSON. It makes text and compiles none: what only a
compiler can see, the engine refuses with the same field's name. Schemas over schema.LARGE_CHARS belong in a worker thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.text.gbnf import is_gbnf, lark_of_gbnf
from streamserve.text.lark import Grammar, between_slashes, check_part, json_value, literal, own_grammar
from streamserve.text.pattern import fault_of
from streamserve.text.schema import free_object, prepare
from streamserve.text.structural_tag import structural_tag as _structural_tag

MAX_CHOICES = 10_000
MAX_GRAMMAR_CHARS = 500_000
WHITESPACE = ("compact", "spaced", "flexible")


def json_object(whitespace: str = "compact") -> Grammar:
    """Any JSON object, its nesting and its numbers bounded."""
    return Grammar(json_value(free_object(), spacing(whitespace)))


def json_schema(schema: Any, param: str, whitespace: str = "compact", *, closes_objects: bool = False) -> Grammar:
    """JSON that a schema describes; `param` is where it stands in the request."""
    return Grammar(json_value(prepare(schema, param, closes_objects=closes_objects), spacing(whitespace)))


def regex(pattern: str, param: str = "regex") -> Grammar:
    """Text that a regular expression matches from its beginning to its end."""
    if fault := fault_of(pattern):
        raise InvalidRequest(f"{param} is {_shown(pattern)}: {fault}", param=param)
    inner = pattern.removeprefix("^")
    if inner.endswith("$") and not inner.endswith("\\$"):
        inner = inner[:-1]
    return Grammar("ANSWER", (f"ANSWER: /(?:{between_slashes(inner)})/",))


def choice(options: Sequence[str], param: str = "choice") -> Grammar:
    """One of the texts."""
    if not options:
        raise InvalidRequest(f"{param} is empty; give at least one text to choose from", param=param)
    if len(options) > MAX_CHOICES:
        raise InvalidRequest(f"{param} has {len(options)} texts; at most {MAX_CHOICES} are allowed", param=param)
    for n, option in enumerate(options):
        if not isinstance(option, str) or not option:
            raise InvalidRequest(f"{param}[{n}] is {_shown(option)}; each choice is a text that is not empty", param=param)
    return Grammar("ANSWER", (f"ANSWER: {' | '.join(map(literal, dict.fromkeys(options)))}",))


def ebnf(text: str, param: str = "ebnf") -> Grammar:
    """A grammar as llama.cpp writes them (GBNF) or in llguidance's Lark; which of them is seen from the text."""
    if not text.strip():
        raise InvalidRequest(f"{param} is empty; give a grammar with a rule `root` (GBNF) or `start` (Lark)", param=param)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"{param} has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are allowed", param=param)
    return lark_of_gbnf(text, param) if is_gbnf(text) else own_grammar(text)


def structural_tag(
    value: Any, param: str = "response_format", whitespace: str = "compact", control: Mapping[str, int] | None = None
) -> Grammar:
    """Free text with constrained parts; see text/structural_tag.py. `control`: ids of control tokens, which tags may hold."""
    return _structural_tag(value, param, spacing(whitespace), control)


def spacing(whitespace: str, param: str = "json_whitespace") -> Mapping[str, Any]:
    """White space between the parts of JSON. "compact": none; "spaced": one space behind each comma and colon; "flexible": any;
    anything else is a regular expression of what may stand there once."""
    if whitespace == "compact":
        return {"whitespace_flexible": False}
    if whitespace == "spaced":
        return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    if whitespace == "flexible":
        return {"whitespace_flexible": True}
    if fault := fault_of(whitespace):
        raise InvalidRequest(
            f"{param} is {_shown(whitespace)}: {fault}; allowed are {', '.join(WHITESPACE)} and patterns", param=param
        )
    return {"whitespace_pattern": whitespace}


def text_of(grammar: Grammar, lead: str = "") -> str:
    """The grammar as the engine takes it. `lead`: a text that must stand before the answer."""
    if not lead:
        return grammar.text
    check_part(grammar)
    return Grammar(f"{literal(lead)} ({grammar.start})", grammar.rules).text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
