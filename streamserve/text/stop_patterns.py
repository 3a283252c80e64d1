"""Stop patterns: regular expressions that end an answer where one has matched, found while it arrives.

Owns how patterns become one automaton, and its run along a text. No character costs more than the automaton has edges, and there
are at most MAX_EDGES: nothing ever backtracks (Glushkov 1961; Thompson 1968). Knows nothing of tokens or requests.

The text ends at the first character with which some pattern is matched, as if it were searched anew after each; of the matches
that end there the longest counts. No match is longer than MAX_MATCH characters, so no more than that is ever held back.
"""

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from streamserve.errors import InvalidRequest
from streamserve.text.pattern import fault_of

MAX_CHARS = 2000  # of all patterns of a request
MAX_EDGES = 1000
MAX_MATCH = 256
_LENGTHS = (1 << MAX_MATCH) - 1
_COUNT = re.compile(r"\{\s*(\d{1,9})\s*(?:(,)\s*(\d{0,9})\s*)?\}")
_GROUP = re.compile(r"\((?:\?(?::|P?<[^>]*>))?")
_CODED = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a"}
_ANCHORS = frozenset(("^", "$", r"\A", r"\z"))

Test = Callable[[str], object]  # of a character, for its truth
_KINDS: dict[str, Test] = {kind: re.compile(f"\\{kind}").fullmatch for kind in "dDwWsS"}


@dataclass(slots=True)
class _Part:
    """A part of a pattern: at which of its positions a match begins and ends, and whether nothing matches it too."""

    first: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    is_nullable: bool = True


class StopPatterns:
    """Patterns, compiled. InvalidRequest, which names `param`, for one that cannot be. Never changes: runs share it."""

    def __init__(self, patterns: Sequence[str], param: str = "stop_regex") -> None:
        self.tests: list[Test] = []  # of the character at each position
        self.follow: list[set[int]] = []  # positions behind it
        self.first: set[int] = set()
        self.pattern_of: dict[int, str] = {}  # of positions at which a match ends
        self._num_edges = 0
        if (num_chars := sum(map(len, patterns))) > MAX_CHARS:
            raise InvalidRequest(f"{param} has {num_chars} characters in all; at most {MAX_CHARS} are allowed", param=param)
        for place, pattern in enumerate(patterns):
            name = param if len(patterns) == 1 else f"{param}[{place}]"
            try:
                part = _Reader(self, pattern).whole()
            except ValueError as error:
                raise InvalidRequest(f"{name} is {pattern[:200]!r}: {error}", param=name) from None
            self.first |= part.first
            self.pattern_of |= dict.fromkeys(part.last, pattern)

    def position(self, test: Test) -> int:
        """One more."""
        self.tests.append(test)
        self.follow.append(set())
        self._grow(1)
        return len(self.tests) - 1

    def link(self, last: set[int], first: set[int]) -> None:
        """What begins at `first` stands behind what ends at `last`."""
        for position in last if first else ():
            following = self.follow[position]
            num_before = len(following)
            following |= first
            self._grow(len(following) - num_before)

    def copy(self, part: _Part, begin: int, num: int) -> list[_Part]:
        """`num` more of a part whose positions are the newest, from `begin` on."""
        tests, follow = self.tests[begin:], self.follow[begin:]
        num_edges = len(tests) + sum(map(len, follow))
        copies = []
        for nth in range(1, num + 1):
            self._grow(num_edges)
            shift = nth * len(tests)
            self.tests += tests
            self.follow += [{position + shift for position in following} for following in follow]
            first, last = ({position + shift for position in places} for places in (part.first, part.last))
            copies.append(_Part(first, last, part.is_nullable))
        return copies

    def _grow(self, num_edges: int) -> None:
        self._num_edges += num_edges
        if self._num_edges > MAX_EDGES:
            raise ValueError(f"its automaton has over {MAX_EDGES} edges, which is the most allowed; make it simpler")


class StopRun:
    """Finds the first match in a text that arrives in pieces; see StopStrings, whose methods these are."""

    __slots__ = ("_active", "_held", "_include_stop", "_patterns", "matched")

    def __init__(self, patterns: StopPatterns, *, include_stop: bool = False) -> None:
        self._patterns = patterns
        self._include_stop = include_stop
        self._held = ""  # from where the longest match that is under way begins
        self._active: dict[int, int] = {}  # positions, and how long the matches are that are at it: bit n for n + 1 characters
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certainly before any match, and the pattern that has matched, if one has."""
        if self.matched is not None:
            return "", self.matched
        shown: list[str] = []
        for letter in text:
            self._held += letter
            length, self.matched = self._step(letter)
            if self.matched is not None:
                shown.append(self._held if self._include_stop else self._held[:-length])
                self._held = ""
                break
            if num_free := len(self._held) - length:
                shown.append(self._held[:num_free])
                self._held = self._held[num_free:]
        return "".join(shown), self.matched

    def flush(self) -> str:
        """The text has ended: what was held back."""
        held, self._held = self._held, ""
        self._active = {}
        return held

    def _step(self, letter: str) -> tuple[int, str | None]:
        """One character on. How long the longest match under way is; or the one that has ended, and its pattern."""
        patterns = self._patterns
        reached = dict.fromkeys(patterns.first, 1)
        for position, lengths in self._active.items():
            if longer := lengths << 1 & _LENGTHS:
                for following in patterns.follow[position]:
                    reached[following] = reached.get(following, 0) | longer
        tests = patterns.tests
        self._active = {position: lengths for position, lengths in reached.items() if tests[position](letter)}
        ended = self._active.keys() & patterns.pattern_of.keys()
        if not ended:
            return max(map(int.bit_length, self._active.values()), default=0), None
        length, place = max((self._active[position].bit_length(), -position) for position in ended)
        return length, patterns.pattern_of[-place]


class _Reader:
    """Reads one pattern from the left into an automaton. Raises ValueError, which says what is wrong."""

    def __init__(self, automaton: StopPatterns, pattern: str) -> None:
        if fault := fault_of(pattern):
            raise ValueError(fault)
        self._automaton = automaton
        self._any_case = pattern.startswith("(?i)")
        self._text = pattern
        self._pos = 4 * self._any_case

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
            part.first |= other.first
            part.last |= other.last
            part.is_nullable |= other.is_nullable
        return part

    def _sequence(self) -> _Part:
        part = _Part()
        while self._pos < len(self._text) and self._text[self._pos] not in "|)":
            other = self._repeated()
            self._automaton.link(part.last, other.first)
            if part.is_nullable:
                part.first |= other.first
            if not other.is_nullable:
                part.last.clear()
            part.last |= other.last
            part.is_nullable &= other.is_nullable
        return part

    def _repeated(self) -> _Part:
        """Counted repeats are written out: each follows only the one before it. A match may end at any that suffices."""
        begin = len(self._automaton.tests)
        part = self._atom()
        low, high = self._count()
        if high == 0:
            return _Part()
        if (low, high) == (1, 1) or not part.first:
            return part
        parts = [part, *self._automaton.copy(part, begin, max(low, high or low, 1) - 1)]
        for one, other in pairwise(parts):
            self._automaton.link(one.last, other.first)
        if high is None:
            self._automaton.link(parts[-1].last, parts[-1].first)
        is_nullable = part.is_nullable or low == 0
        enough = parts if is_nullable else parts[low - 1 :]
        return _Part(part.first, set().union(*[one.last for one in enough]), is_nullable)

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
            head = _GROUP.match(text, at)
            assert head is not None
            if text.startswith("?", head.end()):
                raise ValueError(f"the group at character {at} has flags, which only the beginning may: (?i)")
            self._pos = head.end()
            part = self._either()
            self._pos += 1  # the )
            return part
        if text[at] in "*+?{":
            raise ValueError(f"the {text[at]} at character {at} repeats what is repeated already; put that in a group")
        position = self._automaton.position(self._class() if text[at] == "[" else self._test())
        return _Part({position}, {position}, False)

    def _test(self) -> Test:
        at = self._pos
        found = self._character()
        if self._text[at : self._pos] in _ANCHORS:
            raise ValueError(f"the {self._text[at]} at character {at} has no place in a text that is searched while it grows")
        if not isinstance(found, str):
            return found
        if self._text[at] == ".":
            return bool
        return _one_of([(ord(found), ord(found))], any_case=True) if self._any_case else found.__eq__

    def _character(self) -> str | Test:
        """A character, or the test of a kind of them."""
        text, at = self._text, self._pos
        if text[at] != "\\":
            self._pos += 1
            return text[at]
        if coded := _CODED.match(text, at):
            self._pos = coded.end()
            code = int(coded[coded.lastindex or 0], 16)
            if code > sys.maxunicode:
                raise ValueError(f"{coded[0]} at character {at} is no character")
            return chr(code)
        letter = text[at + 1]
        self._pos += 2
        if letter in _KINDS:
            return _KINDS[letter]
        if letter.isalnum() and letter not in _NAMED and letter not in "Az":
            raise ValueError(f"\\{letter} at character {at} is not supported")
        return _NAMED.get(letter, letter)

    def _class(self) -> Test:
        """Characters in brackets."""
        text, at = self._text, self._pos
        is_negated = text.startswith("^", at + 1)
        begin = self._pos = at + 1 + is_negated
        ranges: list[tuple[int, int]] = []
        kinds: set[Test] = set()
        while self._pos == begin or text[self._pos] != "]":
            if text[self._pos : self._pos + 2] in ("&&", "--", "~~"):
                raise ValueError(f"the class at character {at} is an operation on sets, which is not supported")
            low = high = self._member(at)
            if text[self._pos] == "-" and text[self._pos + 1] not in "-]":
                self._pos += 1
                high = self._member(at)
            if isinstance(low, str) and isinstance(high, str) and low <= high:
                ranges.append((ord(low), ord(high)))
            elif low is high and not isinstance(low, str):
                kinds.add(low)
            else:
                raise ValueError(f"the class at character {at} has a range that is none")
        self._pos += 1
        return _one_of(ranges, kinds, is_negated=is_negated, any_case=self._any_case)

    def _member(self, at: int) -> str | Test:
        if self._text[self._pos] == "[":
            raise ValueError(f"the class at character {at} has another one inside; write \\[ for the letter")
        return self._character()


def _one_of(
    ranges: Sequence[tuple[int, int]], kinds: Collection[Test] = (), *, is_negated: bool = False, any_case: bool = False
) -> Test:
    """Whether a character is in one of the ranges or of one of the kinds. However many there are, the time is about the same."""
    bounds: list[int] = []  # in turn where ranges begin, and where they have ended
    for low, high in sorted(ranges):
        if bounds and low <= bounds[-1]:
            bounds[-1] = max(bounds[-1], high + 1)
        else:
            bounds += (low, high + 1)

    def test(letter: str) -> bool:
        letters = {letter, letter.lower(), letter.upper()} if any_case else (letter,)
        return is_negated != any(
            bisect_right(bounds, ord(one)) % 2 or any(kind(one) for kind in kinds) for one in letters if len(one) == 1
        )

    return test
