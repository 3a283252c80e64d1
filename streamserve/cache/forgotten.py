"""Where the prefix tree was cut lately: so that a prompt which ends there can be told that its rest was evicted.

Owns a bounded record of such places, of which the oldest go first. Knows nothing of nodes, tokens or pages.
"""

from collections.abc import Hashable

MAX_PLACES = 16_384


class Forgotten:
    """Places are whatever their owner says they are. Kept as hashes: a wrong answer needs two that are equal."""

    __slots__ = ("_max_places", "_places")

    def __init__(self, max_places: int = MAX_PLACES) -> None:
        self._max_places = max_places
        self._places: dict[int, None] = {}

    def __contains__(self, place: Hashable) -> bool:
        return hash(place) in self._places

    def add(self, place: Hashable) -> None:
        """Something was there until now."""
        places, key = self._places, hash(place)
        places.pop(key, None)
        places[key] = None
        if len(places) > self._max_places:
            del places[next(iter(places))]
