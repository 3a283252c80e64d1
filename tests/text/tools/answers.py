"""Tools to call, and answers read in one piece or cut anywhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from streamserve.text.tools.format import CallBegan, CallGrew, Content, Event, Parser, Thought, Tool, ToolFormat
from streamserve.text.tools.parser import joined

WEATHER = Tool(
    "get_weather",
    "Weather of a place.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
)
ADD = Tool(
    "add", "", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}
)
NOTE = Tool(
    "write_note",
    "",
    {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "meta": {"type": "object", "properties": {"pinned": {"type": "boolean"}, "of": {"type": ["string", "null"]}}},
        },
    },
)
NOW = Tool("now")
TOOLS = (WEATHER, ADD, NOTE, NOW)


@dataclass
class Call:
    """One call that was read."""

    name: str
    arguments: str = ""
    id: str | None = None

    @property
    def values(self) -> Any:
        """The arguments as JSON."""
        return json.loads(self.arguments)


@dataclass
class Answer:
    """What was read of one answer."""

    content: str = ""
    thought: str = ""
    calls: Sequence[Call] = ()

    @property
    def made(self) -> list[tuple[str, Any]]:
        """Names and arguments."""
        return [(call.name, call.values) for call in self.calls]


def events_of(parser: Parser, pieces: Sequence[str]) -> list[Event]:
    """All events, pieces that follow each other joined. An id that is made up is not the text's."""
    found = [event for piece in pieces for event in parser.push(piece)]
    return joined([*found, *parser.finish()])


def read(format: ToolFormat, *pieces: str, tools: Sequence[Tool] = TOOLS) -> Answer:
    """An answer read from its pieces. Asserts what holds for every sequence of events."""
    parser = format.parser(tools)
    answer = Answer(calls=[])
    calls: list[Call] = []
    for event in events_of(parser, pieces):
        match event:
            case Content(text):
                assert text
                answer.content += text
            case Thought(text):
                answer.thought += text
            case CallBegan(index, name, id):
                assert index == len(calls)
                calls.append(Call(name, id=id))
            case CallGrew(index, arguments):
                assert index == len(calls) - 1 and arguments
                calls[-1].arguments += arguments
    answer.calls = calls
    return answer


@st.composite
def cuttings(draw: st.DrawFn, text: str) -> list[str]:
    """The text cut into pieces, empty ones among them."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=min(len(text), 40))))
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(edges)]
