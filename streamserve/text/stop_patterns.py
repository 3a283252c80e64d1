"""Stop patterns: regular expressions that end an answer where one has matched, found while it arrives.

Owns how patterns become one automaton, and its run along a text. No character costs more than the automaton has edges, and there
are at most MAX_EDGES: nothing ever backtracks (Glushkov 1961; Thompson 1968). Knows nothing of tokens or requests.

The text ends at the first character with which some pattern is matched, as if it were searched anew after each; of the matches
that end there the longest counts. No match is longer than MAX_MATCH characters, so no more than that is ever held back.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from streamserve.errors import InvalidRequest
from streamserve.text.pattern import fault_of

MAX_EDGES = 1000
MAX_MATCH = 256
_COUNT = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_CHARACTER = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|[^\\]", re.DOTALL)
_ANCHORS = frozenset(("^", "$", r"\A", r"\z"))


@dataclass(slots=True)
class _Part:
    """A part of a pattern: at which of its positions a match begins and ends, and whether nothing matches it too."""

    first: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    is_nullable: bool = True


class StopPatterns:
    """Patterns, compiled. InvalidRequest, which names `param`, for one that cannot be. Never changes: runs share it."""

    def __init__(self, patterns: Sequence[str], param: str = "stop_regex") -> None:
        self.tests: list[re.Pattern[str]] = []  # of the character at each position
        self.follow: list[set[int]] = []  # positions behind it
        self.first: set[int] = set()
        self.pattern_of: dict[int, str] = {}  # of positions at which a match ends
        for place, pattern in enumerate(patterns):
            name = param if len(patterns) == 1 else f"{param}[{place}]"
            try:
                part = _Reader(self, pattern).whole()
            except ValueError as error:
                raise InvalidRequest(f"{name} is {pattern[:200]!r}: {error}", param=name) from None
            self.first |= part.first
            self.pattern_of |= dict.fromkeys(part.last, pattern)

    def position(self, test: re.Pattern[str]) -> int:
        """One more."""
        self.tests.append(test)
        self.follow.append(set())
        self.check_size()
        return len(self.tests) - 1

    def check_size(self) -> None:
        """Raises ValueError when there are too many edges."""
        if len(self.tests) + sum(map(len, self.follow)) > MAX_EDGES:
            raise ValueError(f"its automaton has over {MAX_EDGES} edges, which is the most allowed; make it simpler")


class StopRun:
    """Finds the first match in a text that arrives in pieces; see StopStrings, whose methods these are."""

    __slots__ = ("_active", "_held", "_include_stop", "_patterns", "matched")

    def __init__(self, patterns: StopPatterns, *, include_stop: bool = False) -> None:
        self._patterns = patterns
        self._include_stop = include_stop
        self._held = ""  # from where the longest match that is under way begins
        self._active: dict[int, int] = {}  # positions, and where in what is held the longest match that is at it begins
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certainly before any match, and the pattern that has matched, if one has."""
        if self.matched is not None:
            return "", self.matched
        shown: list[str] = []
        for letter in text:
            self._held += letter
            ends = self._step(letter)
            if ends is not None:
                start, self.matched = ends
                shown.append(self._held if self._include_stop else self._held[:start])
                self._held = ""
                break
            start = min(self._active.values(), default=len(self._held))
            if start:
                shown.append(self._held[:start])
                self._held = self._held[start:]
                self._active = {position: begun - start for position, begun in self._active.items()}
        return "".join(shown), self.matched

    def flush(self) -> str:
        """The text has ended: what was held back."""
        held, self._held = self._held, ""
        self._active = {}
        return held

    def _step(self, letter: str) -> tuple[int, str] | None:
        """One character on. Where the longest match that ends with it begins, and its pattern."""
        patterns, at = self._patterns, len(self._held) - 1
        reached: dict[int, int] = {}
        for position, begun in self._active.items():
            if at - begun < MAX_MATCH:
                for following in patterns.follow[position]:
                    if reached.get(following, at) >= begun:
                        reached[following] = begun
        for position in patterns.first:
            reached.setdefault(position, at)
        self._active = {position: begun for position, begun in reached.items() if _fits(patterns.tests[position], letter)}
        ends = patterns.pattern_of
        ended = [(begun, ends[position]) for position, begun in self._active.items() if position in ends]
        return min(ended, default=None)


@lru_cache(maxsize=4096)
def _fits(test: re.Pattern[str], letter: str) -> bool:
    return test.fullmatch(letter) is not None


class _Reader:
    """Reads one pattern from the left into an automaton. Raises ValueError, which says what is wrong."""

    def __init__(self, automaton: StopPatterns, pattern: str) -> None:
        if fault := fault_of(pattern):
            raise ValueError(fault)
        self._automaton = automaton
        self._flags = re.IGNORECASE if pattern.startswith("(?i)") else re.RegexFlag(0)
        self._text = pattern.removeprefix("(?i)")
        self._pos = 0

    def whole(self) -> _Part:
        """All of it."""
        part = self._either()
        if self._pos < len(self._text):
            raise ValueError("a ) closes no group")
        if part.is_nullable:
            raise ValueError("it matches the empty text, so it would end every answer at once")
        return part

    def _either(self) -> _Part:
        part = self._sequence()
        while self._text.startswith("|", self._pos):
            self._pos += 1
            other = self._sequence()
            part = _Part(part.first | other.first, part.last | other.last, part.is_nullable or other.is_nullable)
        return part

    def _sequence(self) -> _Part:
        part = _Part()
        while self._pos < len(self._text) and self._text[self._pos] not in "|)":
            part = self._joined(part, self._repeated())
        return part

    def _joined(self, one: _Part, other: _Part) -> _Part:
        self._link(one.last, other.first)
        first = one.first | other.first if one.is_nullable else one.first
        last = one.last | other.last if other.is_nullable else other.last
        return _Part(first, last, one.is_nullable and other.is_nullable)

    def _link(self, last: set[int], first: set[int]) -> None:
        for position in last:
            self._automaton.follow[position] |= first
        self._automaton.check_size()

    def _repeated(self) -> _Part:
        """Counted repeats are written out: the atom is read as often as it stands there."""
        begin = self._pos
        part = self._atom()
        end = self._pos
        low, high = self._count()
        if (low, high) == (1, 1) or not part.first:
            return part
        after = self._pos
        whole = _Part()
        for nth in range(max(low, high or low, 1)):
            if nth:
                self._pos = begin
                part = self._atom()
                assert self._pos == end
            if high is None and nth == max(low, 1) - 1:
                self._link(part.last, part.first)
            whole = self._joined(whole, _Part(part.first, part.last, part.is_nullable or nth >= low))
        self._pos = after
        return _Part() if high == 0 else whole

    def _count(self) -> tuple[int, int | None]:
        """How often the atom before stands there; None: any number. Whether it is greedy changes nothing here."""
        letter = self._text[self._pos : self._pos + 1]
        if letter and letter in "*+?":
            self._pos += 1
            found: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}[letter]
        elif count := _COUNT.match(self._text, self._pos):
            self._pos = count.end()
            low = int(count[1])
            found = (low, low if not count[2] else int(count[3]) if count[3] else None)
        else:
            return 1, 1
        if self._text.startswith("?", self._pos):
            self._pos += 1
        return found

    def _atom(self) -> _Part:
        text, at = self._text, self._pos
        if text[at] == "(":
            head = re.compile(r"\((?:\?(?::|P?<\w+>))?").match(text, at)
            assert head is not None
            if text.startswith("?", head.end()):
                raise ValueError(f"the group at character {at} has flags, which only the beginning may: (?i)")
            self._pos = head.end()
            part = self._either()
            self._pos += 1  # the )
            return part
        if text[at] == "[":
            self._pos = _end_of_class(text, at)
        else:
            found = _CHARACTER.match(text, at)
            assert found is not None
            self._pos = found.end()
        test = text[at : self._pos]
        if len(test) > 2 and any(two in test for two in ("&&", "--", "~~", "||")):
            raise ValueError(f"the class at character {at} is an operation on sets, which is not supported")
        if test in _ANCHORS:
            raise ValueError(f"the {test} at character {at} has no place in a text that is searched while it grows")
        try:
            compiled = re.compile(test, self._flags | re.DOTALL if test == "." else self._flags)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{test} at character {at} is not supported: {error}") from None
        position = self._automaton.position(compiled)
        return _Part({position}, {position}, False)


def _end_of_class(text: str, at: int) -> int:
    """Behind a class in brackets. What stands in it is Python's to read, which knows no classes inside classes."""
    pos = at + 1
    pos += text.startswith("^", pos)
    pos += text.startswith("]", pos)
    while not text.startswith("]", pos):
        if text.startswith("[", pos):
            raise ValueError(f"the class at character {at} has another one inside; write \\[ for the letter")
        pos += 2 if text.startswith("\\", pos) else 1
    return pos + 1
