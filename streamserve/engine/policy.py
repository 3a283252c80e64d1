"""Orders of the waiting queue, one function each. Torch-free.

A policy gives the waiting requests in the order in which they are tried; it changes nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from time import monotonic

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.request import Request

_PRIORITY = attrgetter("given.priority")

Policy = Callable[[Sequence[Request], KVCache], Iterable[Request]]

# Above this many waiting requests looking each one up in the tree costs more than it brings (SGLang's bound as well).
MAX_LOOKUPS = 128


def first_come_first_served(waiting: Sequence[Request], cache: KVCache) -> Iterable[Request]:
    """Arrival order; preempted requests stand in front."""
    return waiting


def longest_prefix_first(waiting: Sequence[Request], cache: KVCache) -> Iterable[Request]:
    """Most cached tokens first, so that requests of one prefix run while it is in memory; ties in arrival order."""
    if len(waiting) > MAX_LOOKUPS:
        return waiting
    return sorted(waiting, key=lambda r: -cache.match_len(r.given.salt, r.packed, len(r.tokens) - 1))


class HighestPriorityFirst:
    """Higher priority first, in order of arrival among equals. Nobody starves: who has waited `max_wait_s` stands in front of all
    who have not, whatever their priority, and those are again in order of arrival."""

    def __init__(self, max_wait_s: float = 60.0, now: Callable[[], float] = monotonic) -> None:
        self._max_wait_s = max_wait_s
        self._now = now

    def __call__(self, waiting: Sequence[Request], cache: KVCache) -> Iterable[Request]:
        if not any(request.given.priority for request in waiting):
            return waiting
        late_s = self._now() - self._max_wait_s
        late = [request for request in waiting if request.submitted_s <= late_s]
        others = [request for request in waiting if request.submitted_s > late_s]
        return late + sorted(others, key=_PRIORITY, reverse=True)  # equals stay in order


POLICIES: dict[str, Policy] = {
    "fcfs": first_come_first_served,
    "lpm": longest_prefix_first,
    "priority": HighestPriorityFirst(),
}
