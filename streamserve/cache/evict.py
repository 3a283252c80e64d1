"""Which unreferenced part of the prefix tree goes first: the one that was let go longest ago.

Owns the order of idle nodes. Knows nothing of pages or of what a node is.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class LeastRecentlyUsed(Generic[T]):
    """Idle nodes in the order in which they became idle. Every operation costs O(1).

    A path is let go from its end upwards, so a node always comes after all nodes below it, and the oldest node has
    nothing below it. That makes one list enough: no heap of leaves, no clock, no search. A request's whole run counts
    as use: what a long answer held until just now is younger than what a short one asked for after it began.
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[T, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[T]:
        """Oldest first."""
        return iter(self._order)

    def add(self, node: T) -> None:
        """The node became idle now. It must not be idle already."""
        assert node not in self._order
        self._order[node] = None

    def remove(self, node: T) -> None:
        """The node is in use again, or gone."""
        del self._order[node]

    def oldest(self) -> T | None:
        """The node to evict first."""
        return next(iter(self._order), None)
