"""What a tool-call format is: how a model writes calls, as a parser of its text and as a grammar that makes it write them.

Owns the words shared by all formats. One file beside this one per format, found by name (`find` in text/tools/find.py).
Knows nothing of HTTP, JSON bodies or the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from streamserve.text.lark import Grammar


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that a model may call. `parameters` is its JSON schema, None when it takes none. `is_strict`: its calls must
    match the schema even where nobody forces a call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False


class Content(Struct, frozen=True, gc=False):
    """Text of the answer itself."""

    text: str


class Thought(Struct, frozen=True, gc=False):
    """Text of the reasoning before the answer."""

    text: str


class CallBegan(Struct, frozen=True, gc=False):
    """A call begins. `index` counts calls of one answer from 0. `id` None: the format writes none, so the API gives it one."""

    index: int
    name: str
    id: str | None = None


class CallGrew(Struct, frozen=True, gc=False):
    """More of a call's arguments: pieces of one JSON text, in order."""

    index: int
    arguments: str


Event = Content | Thought | CallBegan | CallGrew


class Parser(Protocol):
    """Reads one answer as it comes, in pieces cut anywhere. Any cutting gives the same joined events."""

    def push(self, text: str) -> list[Event]:
        """More text. What may be the beginning of a marker is held back."""
        ...

    def finish(self) -> list[Event]:
        """The answer has ended: what was held back. A call that was cut short keeps the arguments it has; text that only looked
        like a call comes out as Content."""
        ...

    @property
    def is_inside_call(self) -> bool:
        """Whether a call has begun and not ended: at the end of an answer, one that was cut short."""
        ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What of calls an answer must hold. `min_calls` 0: calls are allowed, free text too; then the grammar constrains only what
    stands inside a call. `max_calls` None: any number, or where nothing but calls may follow, calls.MAX_CALLS. `only` names the
    one tool that may be called."""

    min_calls: int = 0
    max_calls: int | None = None
    only: str | None = None


class ToolFormat(Protocol):
    """One way of writing calls. `control_tokens` are markers that are control tokens in its models' vocabularies: they must reach
    the parser. `triggers` are texts with which calls begin. `reads_thoughts`: its parser gives Thought too, so the answer's text
    goes to it as it is."""

    name: str
    control_tokens: tuple[str, ...]
    triggers: tuple[str, ...]
    reads_thoughts: bool

    def parser(self, tools: Sequence[Tool]) -> Parser:
        """A parser for one answer. Calls of names that are not in `tools` are text."""
        ...

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """The format as an llguidance grammar in Lark, arguments constrained by each tool's schema. InvalidRequest when a schema
        cannot be a grammar's. With `answer` (see text/structure.py) and no call demanded, the whole answer is either calls
        or what `answer` describes."""
        ...
