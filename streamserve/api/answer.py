"""How an answer's text is read: thought, content and tool calls, for every dialect alike.

Owns the reading of one choice. The dialects (chunks, responses, anthropic) give what comes out their own shapes.

    prepared = await completions.prepare_chat(ChatRequest(messages=…, tools=…))     # checked; an error names the field
    with service.live(prepared.run):
        await prepared.run.start()                                                 # errors still have a status of their own
        await prepared.run.deliver(emit)                                           # emit(piece): for event in events_of(piece): …

`fold` makes one value of a whole choice's events. Every call has an id here, whoever gave it; an index counts calls of one
choice from 0; arguments come in pieces of one JSON text. Stop strings of the client hold for content only: neither a thought
nor a call is cut by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from streamserve.messages import FinishReason
from streamserve.text.markers import first_letters, may_hold
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Event, Parser, Thought

TOOL_CALLS = "tool_calls"


class Splitter(Protocol):
    """Parts thoughts from the rest (text/reasoning.py makes them). Any cutting of the text gives the same joined events."""

    def push(self, text: str) -> Sequence[Event]:
        """More text."""
        ...

    def finish(self) -> Sequence[Event]:
        """The answer has ended: what was held back."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How a call's answers are to be read; made once per request, one reader per choice.

    `splitter` parts thoughts from the rest, `parser` finds calls in that rest; None: there is nothing to find. `marker_ids` are
    control tokens whose text the two need to see; `hidden` are the texts of those, which must not reach the client as content.
    `has_thoughts`: thoughts are shown apart, else as content. `streams_thought` False: a thought comes as one event when it is
    over. `max_calls`: the answer is over with the last of so many calls; None: any number.
    """

    splitter: Callable[[], Splitter] | None = None
    parser: Callable[[], Parser] | None = None
    marker_ids: frozenset[int] = frozenset()
    hidden: tuple[str, ...] = ()
    has_thoughts: bool = False
    streams_thought: bool = True
    max_calls: int | None = None


class AnswerReader:
    """Reads one choice: pieces of text in, events out. Neighbouring events of one kind are joined.

    `may_end`: whether the answer may be over before the model ends it.
    """

    __slots__ = (
        "_events",
        "_has_thoughts",
        "_hidden",
        "_hidden_letters",
        "_is_beyond",
        "_max_calls",
        "_num_calls",
        "_parser",
        "_splitter",
        "_streams_thought",
        "_thought",
        "may_end",
    )

    def __init__(self, reading: Reading) -> None:
        self._splitter = None if reading.splitter is None else reading.splitter()
        self._parser = None if reading.parser is None else reading.parser()
        self._hidden = reading.hidden
        self._hidden_letters = first_letters(reading.hidden)
        self._has_thoughts = reading.has_thoughts
        self._streams_thought = reading.streams_thought
        self._thought: list[str] = []  # of a thought that is to come as a whole
        self._max_calls = reading.max_calls
        self.may_end = reading.max_calls is not None
        self._num_calls = 0
        self._is_beyond = False  # another call has begun, behind the last one that there may be
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """More text of the choice."""
        if not text:
            return []
        if self._splitter is None:
            self._parse(Content(text))
        else:
            self._take(self._splitter.push(text))
        return self._given()

    def finish(self, finish_reason: str) -> tuple[list[Event], str]:
        """What was held back, and the finish reason: "tool_calls" in place of "stop" when calls were made, all of them whole."""
        if self._splitter is not None:
            self._take(self._splitter.finish())
        is_cut = False
        if self._parser is not None:
            for event in self._parser.finish():
                self._add(event)
            is_cut = self._parser.is_inside_call and not self._is_beyond
        self._release_thought()
        has_called = self._num_calls > 0 and not is_cut and finish_reason == FinishReason.STOP
        return self._given(), TOOL_CALLS if has_called else finish_reason

    def _take(self, split: Sequence[Event]) -> None:
        for event in split:
            if type(event) is Content:
                self._parse(event)
            else:
                self._add(event)

    def _parse(self, content: Content) -> None:
        if self._parser is None:
            self._add(content)
        else:
            for event in self._parser.push(content.text):
                self._add(event)

    @property
    def is_over(self) -> bool:
        """As many calls as there may be are made, the last of them whole."""
        if self._parser is None or self._num_calls != self._max_calls:
            return False
        return self._is_beyond or not self._parser.is_inside_call

    def _add(self, event: Event) -> None:
        # Nearly every token is an event: a `match` with its patterns takes four times as long.
        if isinstance(event, Content):
            if self._thought:
                self._release_thought()
            text = event.text
            if may_hold(text, self._hidden_letters):
                for marker in self._hidden:
                    text = text.replace(marker, "")
            if text:
                self._join(Content(text))
        elif isinstance(event, Thought):
            if not self._has_thoughts:
                if event.text:
                    self._join(Content(event.text))
            elif not self._streams_thought:
                self._thought.append(event.text)
            elif event.text:
                self._join(event)
        elif event.index == self._max_calls or self._is_beyond:
            self._is_beyond = True
        elif isinstance(event, CallBegan):
            self._release_thought()
            self._num_calls = event.index + 1
            self._events.append(event if event.id is not None else CallBegan(event.index, event.name, new_call_id()))
        elif event.arguments:
            self._join(event)

    def _join(self, event: Content | Thought | CallGrew) -> None:
        """Add an event to the one before it, where both are of a kind."""
        events = self._events
        if not events:  # as nearly always
            events.append(event)
            return
        match events[-1], event:
            case Content(before), Content(text):
                events[-1] = Content(before + text)
            case Thought(before), Thought(text):
                events[-1] = Thought(before + text)
            case CallGrew(first, before), CallGrew(index, arguments) if first == index:
                events[-1] = CallGrew(index, before + arguments)
            case _:
                events.append(event)

    def _release_thought(self) -> None:
        if self._thought:
            self._events.append(Thought("".join(self._thought)))
            self._thought = []

    def _given(self) -> list[Event]:
        events, self._events = self._events, []
        return events


@dataclass(slots=True)
class MadeCall:
    """A call as an answer made it. `arguments` is JSON text, cut short where the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """A choice's events as one value."""

    content: str = ""
    thought: str = ""
    calls: list[MadeCall] = field(default_factory=list)


def fold(events: Sequence[Event]) -> Answer:
    """A whole choice's events as one value."""
    content: list[str] = []
    thought: list[str] = []
    calls: list[tuple[str, str, list[str]]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Thought(text):
                thought.append(text)
            case CallBegan(_, name, id):
                assert id is not None, "readers give every call an id"
                calls.append((id, name, []))
            case CallGrew(index, arguments):
                calls[index][2].append(arguments)
    return Answer("".join(content), "".join(thought), [MadeCall(id, name, "".join(parts)) for id, name, parts in calls])


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid4().hex[:24]}"


__all__ = [
    "TOOL_CALLS",
    "Answer",
    "AnswerReader",
    "CallBegan",
    "CallGrew",
    "Content",
    "Event",
    "MadeCall",
    "Parser",
    "Reading",
    "Splitter",
    "Thought",
    "fold",
    "new_call_id",
]
