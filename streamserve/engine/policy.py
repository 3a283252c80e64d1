"""Orders of the waiting queue, one function each. Torch-free.

A policy gives the waiting requests in the order in which they are tried; it changes nothing.
"""

from collections.abc import Callable, Iterable, Sequence

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.request import Request

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
    return sorted(waiting, key=lambda r: -cache.match_len(r.given.salt, r.tokens, len(r.tokens) - 1))


POLICIES: dict[str, Policy] = {"fcfs": first_come_first_served, "lpm": longest_prefix_first}
