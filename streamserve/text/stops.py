"""Stop strings: where an answer ends, found while it arrives, with nothing of the stop string shown.

Owns text that may be the beginning of a stop string. Knows nothing of tokens or requests.
"""

from collections.abc import Sequence
from typing import Protocol

from streamserve.errors import InvalidRequest
from streamserve.text.stop_patterns import StopPatterns, StopRun


class Stops(Protocol):
    """What ends an answer, along its text. `matched`: the stop string or pattern that was found."""

    matched: str | None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certainly before what ends the answer, and that, once it is found. Then nothing."""
        ...

    def flush(self) -> str:
        """The text has ended: what was held back."""
        ...


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces; the result does not depend on the pieces.

    The match that starts earliest wins; of two that start at the same place, the shorter one, because it is complete
    first. So a stop string inside a longer one that began before it is decided only when the longer one has failed.
    `matched` is the stop string found, else None. With `include_stop` the stop string is part of the text.
    """

    __slots__ = ("_first_letters", "_held", "_include_stop", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if "" in stops:
            raise InvalidRequest("stop holds an empty string; each stop string needs at least one character", param="stop")
        self._stops = sorted(set(stops), key=len)
        self._first_letters = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certainly before any stop string, and the stop string if one is complete. After a match: nothing."""
        if self.matched is not None:
            return "", self.matched
        if not self._held and self._first_letters.isdisjoint(text):
            return text, None  # as nearly always: no stop string begins here
        self._held += text
        return self._take(may_grow=True)

    def flush(self) -> str:
        """The text has ended: what was held back. `matched` is set if a stop string was in it, as it is for push."""
        return self._take(may_grow=False)[0] if self.matched is None else ""

    def _take(self, *, may_grow: bool) -> tuple[str, str | None]:
        held = self._held
        start, found = self._first_match(held)
        open_at = self._first_open(held) if may_grow else len(held)
        if found is not None and start <= open_at:
            self.matched, self._held = found, ""
            return held[: start + len(found) if self._include_stop else start], found
        self._held = held[open_at:]
        return held[:open_at], None

    def _first_match(self, held: str) -> tuple[int, str | None]:
        matches = [(at, len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        start, _, found = min(matches, default=(len(held), 0, None))
        return start, found

    def _first_open(self, held: str) -> int:
        """Where the earliest stop string may have begun that the end of the text cuts off; the length if none has."""
        earliest = len(held)
        for stop in self._stops:
            at = max(0, len(held) - len(stop) + 1)
            while (at := held.find(stop[0], at, earliest)) >= 0:
                if stop.startswith(held[at:]):
                    earliest = at
                    break
                at += 1
        return earliest


class _Both:
    """Stop strings, and patterns in the text before them."""

    __slots__ = ("_include_stop", "_patterns", "_strings", "matched")

    def __init__(self, strings: Sequence[str], patterns: StopPatterns, *, include_stop: bool) -> None:
        self._strings = StopStrings(strings)
        self._patterns = StopRun(patterns, include_stop=include_stop)
        self._include_stop = include_stop
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """See Stops."""
        if self.matched is not None:
            return "", self.matched
        text, string = self._strings.push(text)
        return self._before(text, string, is_end=string is not None)

    def flush(self) -> str:
        """See Stops."""
        if self.matched is not None:
            return ""
        text = self._strings.flush()
        return self._before(text, self._strings.matched, is_end=True)[0]

    def _before(self, text: str, string: str | None, *, is_end: bool) -> tuple[str, str | None]:
        text, pattern = self._patterns.push(text)
        if is_end and pattern is None:
            text += self._patterns.flush() + (string if string is not None and self._include_stop else "")
        self.matched = pattern if pattern is not None else string
        return text, self.matched


def stops_in(strings: Sequence[str], patterns: StopPatterns | None, *, include_stop: bool = False) -> Stops | None:
    """What looks for these; None where there are none."""
    if strings and patterns is not None:
        return _Both(strings, patterns, include_stop=include_stop)
    if strings:
        return StopStrings(strings, include_stop=include_stop)
    return None if patterns is None else StopRun(patterns, include_stop=include_stop)
