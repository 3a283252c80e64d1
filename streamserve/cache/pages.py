"""Page accounting: which KV pages are free, and how many hold the rest.

Owns the free list and the reference counts. Knows nothing of tokens, trees, tensors or requests.

Every reference to a page is either pinned (its holder is running and cannot be made to let go) or loose (eviction may
drop it). A page is free without references, and evictable when it has references and all of them are loose.
"""

from collections.abc import Iterable, Mapping, Sequence


class Pages:
    """Reference counts of `num_pages` pages. Both counts of free and of evictable pages cost O(1)."""

    __slots__ = ("_free", "_pins", "_refs", "num_evictable")

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: page 0 goes first, warm pages are reused first
        self._refs = [0] * num_pages
        self._pins = [0] * num_pages
        self.num_evictable = 0

    @property
    def num_pages(self) -> int:
        """All pages there are."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Pages without a reference."""
        return len(self._free)

    def is_pinned(self, page: int) -> bool:
        """Somebody holds the page who cannot be made to let go."""
        return self._pins[page] > 0

    def take(self, num_pages: int) -> list[int]:
        """Free pages, each with one pinned reference. There must be as many."""
        free, refs, pins = self._free, self._refs, self._pins
        assert num_pages <= len(free), f"{num_pages} pages taken of {len(free)} free ones"
        start = len(free) - num_pages
        taken = free[start:]
        taken.reverse()
        del free[start:]
        for page in taken:
            refs[page] = pins[page] = 1
        return taken

    def add_pinned(self, pages: Iterable[int]) -> None:
        """One more pinned reference to each page; each has a pinned one already."""
        for page in pages:
            assert self._pins[page] > 0, f"page {page} is shared, but nobody holds it"
            self._refs[page] += 1
            self._pins[page] += 1

    def add_loose(self, page: int) -> None:
        """One more loose reference to a page that has one."""
        assert self._refs[page] > 0, f"page {page} is shared, but it is free"
        self._refs[page] += 1

    def pin(self, pages: Iterable[int]) -> None:
        """Turn a loose reference to each page into a pinned one."""
        pins = self._pins
        for page in pages:
            if pins[page] == 0:
                self.num_evictable -= 1
            pins[page] += 1
            assert pins[page] <= self._refs[page], f"page {page} is pinned more often than held"

    def unpin(self, pages: Iterable[int]) -> None:
        """Turn a pinned reference to each page into a loose one."""
        pins = self._pins
        for page in pages:
            assert pins[page] > 0, f"page {page} is not pinned"
            pins[page] -= 1
            if pins[page] == 0:
                self.num_evictable += 1

    def give_up(self, pages: Iterable[int]) -> None:
        """Give up a pinned reference to each page."""
        refs, pins = self._refs, self._pins
        for page in pages:
            assert pins[page] > 0, f"page {page} is not pinned"
            refs[page] -= 1
            pins[page] -= 1
            if refs[page] == 0:
                self._free.append(page)
            elif pins[page] == 0:
                self.num_evictable += 1

    def drop(self, pages: Iterable[int]) -> int:
        """Give up one loose reference to each page. Returns how many pages became free."""
        num_free = len(self._free)
        for page in pages:
            assert self._refs[page] > self._pins[page], f"page {page} has no loose reference to drop"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self.num_evictable -= 1
                self._free.append(page)
        return len(self._free) - num_free

    def check(self, refs: Mapping[int, int], pins: Mapping[int, int]) -> None:
        """Assert that the books agree with the references their holders count: no page is lost, none is free and held."""
        free: Sequence[int] = self._free
        assert len(set(free)) == len(free), "a page is in the free list twice"
        for page in range(self.num_pages):
            assert self._refs[page] == refs.get(page, 0), (
                f"page {page}: {self._refs[page]} references, {refs.get(page, 0)} holders"
            )
            assert self._pins[page] == pins.get(page, 0), f"page {page}: {self._pins[page]} pins, {pins.get(page, 0)} holders"
        assert set(free) == {page for page in range(self.num_pages) if self._refs[page] == 0}, "a free page is not in the list"
        loose = sum(1 for refs_, pins_ in zip(self._refs, self._pins, strict=True) if refs_ and not pins_)
        assert self.num_evictable == loose, f"{self.num_evictable} pages counted evictable, {loose} are"
