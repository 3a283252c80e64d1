"""What parsers of calls have in common: text that waits to be decided, and content that is told from calls.

Owns the undecided text and the count of calls of one answer. Knows no format: each has a class of its own on top of this one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamserve.text.markers import find_first, first_letters, may_hold, open_at, pieces_of
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Event, Thought, Tool

# Text that may turn out to be a call is held back. No call's head is longer than this, nor an object whose arguments come first.
MAX_HEAD_CHARS = 1_024
MAX_OBJECT_CHARS = 65_536

_BLANK = re.compile(r"\s*")


class CallParser:
    """Reads text as a machine of states. A state is a method that reads on from `_pos`, says True when there is something to do
    again, and False when it needs more text; it decides only what no further text can change, so cutting changes nothing.

    Text up to `_at` is decided. White space around calls is no content unless content goes on behind it. What may be a call is
    undecided up to `_max_undecided` characters; outside of that, nothing waits but a marker's beginning, so time is linear.
    """

    def __init__(self, tools: Sequence[Tool], triggers: Sequence[str]) -> None:
        self._schemas: Mapping[str, Mapping[str, Any] | None] = {tool.name: tool.parameters for tool in tools}
        self._triggers = tuple(triggers) if tools else ()
        self._letters = first_letters(self._triggers)
        self._text = ""
        self._at = 0
        self._pos = 0
        self._is_last = False
        self._blank: list[str] = []  # white space that is content once content follows
        self._out: list[Event] = []
        self._state: Callable[[], bool] = self._read_content
        self._is_inside_call = False
        self._has_arguments = False
        self._is_broken = False
        self._max_undecided = 0  # 0: nothing is undecided
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """See Parser."""
        for piece in pieces_of(text):
            self._text = self._text[self._at :] + piece
            self._pos -= self._at
            self._at = 0
            self._run()
            while self._max_undecided and len(self._text) - self._at > self._max_undecided:
                self._reject()
                self._run()
        return self._take()

    def finish(self) -> list[Event]:
        """See Parser."""
        self._is_last = True
        self._run()
        while self._max_undecided:
            self._reject()
            self._run()
        if self._at < len(self._text):
            self._cut_short()
        if not self.num_calls and self._blank:
            self._out.append(Content("".join(self._blank)))
            self._blank.clear()
        return self._take()

    @property
    def is_inside_call(self) -> bool:
        """See Parser."""
        return self._is_inside_call or self._is_broken

    def _trigger(self, marker: str) -> bool:
        """A marker was found: `_at` is before it, `_pos` behind it. Sets the next state."""
        raise NotImplementedError

    def _cut_short(self) -> None:
        """The answer has ended inside a call, with text that waited for more: gives what there is of the arguments."""

    def _run(self) -> None:
        while self._state():
            pass

    def _read_content(self) -> bool:
        if not may_hold(self._text, self._letters, self._at):
            self._content(self._text[self._at :])
            self._at = self._pos = len(self._text)
            return False
        at, marker = find_first(self._text, self._triggers, self._at)
        if marker is None:
            end = len(self._text) if self._is_last else open_at(self._text, self._triggers, self._at)
            self._content(self._text[self._at : end])
            self._at = self._pos = end
            return False
        self._content(self._text[self._at : at])
        self._at, self._pos = at, at + len(marker)
        self._max_undecided = MAX_HEAD_CHARS
        return self._trigger(marker)

    def _reject(self) -> bool:
        """What began at `_at` is no call: its first character is content, and behind that reading begins anew."""
        self._content(self._text[self._at : self._at + 1])
        self._at += 1
        return self._go_on_as_text()

    def _go_on_as_text(self) -> bool:
        """What follows `_at` is content, as far as no marker comes."""
        self._max_undecided = 0
        self._pos = self._at
        self._state = self._read_content
        return True

    def _is_too_long(self) -> bool:
        """Whether the head that ends at `_pos` would have been given up, had it come in small pieces."""
        return self._pos - self._at > self._max_undecided

    def _content(self, text: str) -> None:
        if not text:
            return
        kept = text.rstrip()
        if kept:
            self._out.append(Content("".join((*self._blank, kept)) if self._blank else kept))
            self._blank.clear()
        if len(kept) < len(text):
            self._blank.append(text[len(kept) :])

    def _begin_call(self, name: str, id: str | None = None) -> None:
        """All text up to `_pos` belongs to a call."""
        self._max_undecided = 0
        self._blank.clear()
        self._settle()
        self._out.append(CallBegan(self.num_calls, name, id))
        self._has_arguments = False
        self.num_calls += 1
        self._is_inside_call = True

    def _grow(self, arguments: str) -> None:
        if arguments:
            self._has_arguments = True
            self._out.append(CallGrew(self.num_calls - 1, arguments))

    def _end_call(self) -> None:
        self._is_inside_call = False

    def _break_call(self) -> None:
        """The call's arguments went wrong before their end; it counts as cut short."""
        self._is_inside_call = False
        self._is_broken = True

    def _settle(self) -> None:
        """All text up to `_pos` belongs to calls."""
        if self._pos > self._at:
            self._blank.clear()
        self._at = self._pos

    def _go(self, state: Callable[[], bool]) -> bool:
        """All text up to `_pos` belongs to calls, and `state` reads on."""
        self._settle()
        self._state = state
        return True

    def _skip_blank(self) -> bool:
        """Moves `_pos` over white space; whether text follows. Unless something is undecided, `_pos` stands at `_at` and both
        move: what was skipped is read once, however it is cut."""
        start = self._pos
        self._pos = _BLANK.match(self._text, start).end()  # type: ignore[union-attr] # matches always
        if not self._max_undecided and self._pos > start:
            assert start == self._at
            self._blank.append(self._text[start : self._pos])
            self._at = self._pos
        return self._pos < len(self._text)

    def _demand(self, marker: str, state: Callable[[], bool]) -> bool:
        """This marker must come for there to be a call; behind it, `state` reads on."""
        if not self._skip_blank():
            return False
        found = self._expect(marker)
        if found is None:
            return False
        self._state = state
        return True if found else self._reject()

    def _pass(self, marker: str) -> bool:
        """This marker belongs to the calls that end here, where it comes; behind it, content goes on."""
        if not self._skip_blank():
            return False
        return False if self._expect(marker) is None else self._go(self._read_content)

    def _expect(self, marker: str) -> bool | None:
        """Moves `_pos` behind the marker if it stands there. False: it doesn't; None: more text must tell."""
        found = self._expect_one((marker,))
        return None if found is None else bool(found)

    def _expect_one(self, markers: Sequence[str]) -> str | None:
        """Moves `_pos` behind the marker that stands there, and says which; "" when none does, None when more text must tell."""
        for marker in markers:
            if self._text.startswith(marker, self._pos):
                self._pos += len(marker)
                return marker
        rest = len(self._text) - self._pos
        may_come = any(len(marker) > rest and marker.startswith(self._text[self._pos :]) for marker in markers)
        return None if may_come and not self._is_last else ""

    def _take(self) -> list[Event]:
        out, self._out = self._out, []
        return joined(out) if len(out) > 1 else out


def joined(events: Sequence[Event]) -> list[Event]:
    """The same events, pieces that follow each other as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Content) and isinstance(last, Content):
            out[-1] = Content(last.text + event.text)
        elif isinstance(event, Thought) and isinstance(last, Thought):
            out[-1] = Thought(last.text + event.text)
        elif isinstance(event, CallGrew) and isinstance(last, CallGrew) and event.index == last.index:
            out[-1] = CallGrew(event.index, last.arguments + event.arguments)
        else:
            out.append(event)
    return out
