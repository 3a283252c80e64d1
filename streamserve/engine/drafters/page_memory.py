"""Which pages hold a drafter's own keys and values, so that a prefix out of the tree is read again where it does not. Torch-free.

Pages are shared, copied and freed for target and drafter at once, but an answer for which nobody wanted guesses enters the tree
without having been read. Owns how many tokens of each page, from its first on, the drafter has read.
"""

from array import array
from collections.abc import Sequence

import numpy as np


class PageMemory:
    """Of `num_pages` pages. Nothing is read yet."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._lens = array("H", bytes(2 * num_pages))

    def copied(self, src: int, dst: int) -> None:
        """A page is the copy of another."""
        self._lens[dst] = self._lens[src]

    def fresh(self, pages: Sequence[int]) -> None:
        """Pages that nobody has written to since they were handed out."""
        for page in pages:
            self._lens[page] = 0

    def opened(self, pages: Sequence[int], num_cached: int) -> int:
        """A request begins with these pages, `num_cached` of its tokens in them. Returns how many of those, from the first on,
        were read."""
        whole, rest = divmod(num_cached, self._page_size)
        held = whole + (rest > 0)
        self.fresh(pages[held:])
        if rest:  # its page is a copy, in which the request goes on
            self._lens[pages[whole]] = min(self._lens[pages[whole]], rest)
        lens = np.frombuffer(self._lens, np.uint16)[np.fromiter(pages[:held], np.intp, held)]
        lacking = np.flatnonzero(lens < self._page_size)[:1]
        if not len(lacking):
            return num_cached
        first = int(lacking[0])
        return first * self._page_size + int(lens[first])

    def has_read(self, pages: Sequence[int], start: int, end: int) -> None:
        """Of a request with these pages the tokens from `start` to before `end` were read."""
        size, lens = self._page_size, self._lens
        while start < end:
            index, offset = divmod(start, size)
            stop = min(end - index * size, size)
            page = pages[index]
            if offset <= lens[page] < stop:
                lens[page] = stop
            start = index * size + size
