"""Which lines of a batch are still to be answered: its input, checked as a whole and matched with the answers there are.

An input may have millions of lines and more bytes than memory: it is read from its beginning each time, and of a line 24 bytes
are kept. Owns the matching. Knows nothing of how lines are answered.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streamserve.api.batch_lines import Answered, BadLine, Line, numbered, read_line
from streamserve.api.schema import show
from streamserve.errors import Conflict, InvalidRequest

Open = Callable[[], BinaryIO]
MAX_SHOWN_ERRORS = 100
TAKEN_BYTES = 1 << 20  # of lines that are taken at once: about so many, for one may have more


@dataclass(slots=True)
class Index:
    """Digests of lines, in their order."""

    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    numbers: "array[int]" = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, line: Line | Answered, number: int) -> None:
        """Take in the next line."""
        self.keys.append(line.key)
        self.digests.append(line.digest)
        self.numbers.append(number)

    def repeats(self) -> Iterator[tuple[int, int]]:
        """Numbers of two lines with the same key."""
        keys = _array(self.keys)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for place in np.flatnonzero(ordered[1:] == ordered[:-1]):
            yield self.numbers[int(order[place])], self.numbers[int(order[place + 1])]


class BadInput(InvalidRequest):
    """An input that cannot be run. `errors` are what was found, the first of it."""

    def __init__(self, errors: list[BadLine], num_errors: int) -> None:
        more = "" if num_errors == 1 else f" (and {num_errors - 1} more)"
        super().__init__(f"{errors[0]}{more}", param=errors[0].param)
        self.errors = errors


def indexed(open_input: Open, max_line_bytes: int, *, url: str | None = None, max_lines: int | None = None) -> Index:
    """Check all lines. `url`: which all must have. Raises BadInput."""
    index, errors, num_errors, count = Index(), list[BadLine](), 0, 0

    def wrong(error: BadLine) -> None:
        nonlocal num_errors
        num_errors += 1
        if len(errors) < MAX_SHOWN_ERRORS:
            errors.append(error)

    with open_input() as source:
        try:
            for number, data in numbered(source, max_line_bytes, max_lines):
                count += 1
                try:
                    line = read_line(data, number)
                except BadLine as error:
                    wrong(error)
                    continue
                if url is not None and line.url != url:
                    wrong(BadLine(f"url is {show(line.url)}, but the batch's endpoint is {show(url)}", number, param="url"))
                index.add(line, number)
        except BadLine as error:  # of the whole
            wrong(error)
    if not count:
        wrong(BadLine("there is no request", 1))
    pairs = list(index.repeats())
    if pairs:
        names = _names(open_input, max_line_bytes, {number for pair in pairs for number in pair})
        for first, second in sorted(pairs, key=lambda pair: pair[1]):
            if names[first] == names[second]:  # else two names have the same key
                wrong(BadLine(f"custom_id {show(names[second])} stands on line {first} already", second, param="custom_id"))
    if errors:
        raise BadInput(errors, num_errors)
    return index


def _names(open_input: Open, max_line_bytes: int, numbers: set[int]) -> dict[int, str]:
    """The custom_ids on these lines."""
    with open_input() as source:
        lines = numbered(source, max_line_bytes)
        return {number: read_line(data, number).custom_id for number, data in lines if number in numbers}


class Todo:
    """Lines that have no answer yet, in their order. `num_strangers`: answers whose lines the input does not have."""

    def __init__(self, open_input: Open, index: Index, answers: Index, max_line_bytes: int) -> None:
        """Raises Conflict when an answered line has been changed since."""
        self._index = index
        self._is_answered = _matched(index, answers)
        self._source = open_input()
        self._lines = enumerate(numbered(self._source, max_line_bytes))
        self._num_read = 0
        self.num_lines = len(index)
        self.num_answered = int(np.count_nonzero(self._is_answered))
        self.num_strangers = len(answers) - self.num_answered

    def num_strangers_among(self, keys: "array[int]") -> int:
        """How many of these keys the input does not have."""
        return int(np.count_nonzero(~np.isin(_array(keys), _array(self._index.keys))))

    def take(self, count: int) -> list[Line]:
        """The next lines, at most so many, and less where they are long; none: there are no more. Blocks while it reads."""
        found: list[Line] = []
        num_bytes = 0
        while len(found) < count and num_bytes < TAKEN_BYTES:
            entry = next(self._lines, None)
            if entry is None:
                if self._num_read < self.num_lines:
                    raise Conflict("the input has got shorter while it was read; run it again")
                break
            place, (number, data) = entry
            self._num_read += 1
            if place >= self.num_lines:
                raise Conflict("the input has got longer while it was read; run it again")
            if self._is_answered[place]:
                continue
            line = read_line(data, number)
            if line.digest != self._index.digests[place]:
                raise Conflict(f"line {number} of the input has changed while it was read; run it again")
            found.append(line)
            num_bytes += len(data)
        return found

    def close(self) -> None:
        """Read no more."""
        self._source.close()


def _matched(index: Index, answers: Index) -> NDArray[np.bool_]:
    """Of every line, whether it is answered."""
    if not len(answers):
        return np.zeros(len(index), bool)
    keys = _array(answers.keys)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    places = np.minimum(np.searchsorted(ordered, _array(index.keys)), len(ordered) - 1)
    is_answered: NDArray[np.bool_] = ordered[places] == _array(index.keys)
    has_changed = is_answered & (_array(answers.digests)[order[places]] != _array(index.digests))
    if has_changed.any():
        place = int(np.argmax(has_changed))
        raise Conflict(
            f"line {index.numbers[place]} of the input is answered already, but it asked something else then; "
            "give what has changed another custom_id, or name another output",
            param="custom_id",
        )
    return is_answered


def _array(values: "array[int]") -> NDArray[np.uint64]:
    return np.frombuffer(values, np.uint64) if values else np.zeros(0, np.uint64)
