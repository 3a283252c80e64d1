"""Where in a text each pair of tokens stands, for texts that are known at once. Torch-free.

Owns one sorted array of (pair, place) per part of a text; looking a pair up takes about a microsecond.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_CANDIDATES = 32  # places of a pair that are looked at, in each part
TOKEN_BITS = 20  # of an id; vocabularies have less than a million
_PLACE_BITS = 63 - 2 * TOKEN_BITS
_LAST_PLACE = (1 << _PLACE_BITS) - 1


def pair_of(first: int, second: int) -> int:
    """Two tokens as one number."""
    return first << TOKEN_BITS | second


class Places:
    """Places of a part of a text by the two tokens before them. Numbers below 0 are ends, no tokens: nothing stands there."""

    def __init__(self, text: Sequence[int], begin: int, end: int) -> None:
        """Of the places from `begin` on, before which there are two tokens, to before `end`."""
        tokens = np.fromiter(text[begin - 2 : end], np.int64, end - begin + 2)
        entries = (tokens[:-2] << TOKEN_BITS | tokens[1:-1]) << _PLACE_BITS | np.arange(begin, end)
        self._sorted: NDArray[np.int64] = np.sort(entries[tokens[2:] >= 0])

    def newest(self, pair: int) -> Iterator[int]:
        """The last places behind such a pair, last first."""
        end = int(self._sorted.searchsorted(pair << _PLACE_BITS | _LAST_PLACE))
        for entry in reversed(self._sorted[max(0, end - MAX_CANDIDATES) : end].tolist()):
            if entry >> _PLACE_BITS != pair:
                return
            yield entry & _LAST_PLACE
