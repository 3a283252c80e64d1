"""Which media a step encodes, and how much of a prompt it can compute then. Torch-free.

Works on a plan in the making, for the scheduler. Which embeddings are kept is the book's (engine/encodings.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.encodings import Encodings
from streamserve.engine.flight import Draft
from streamserve.engine.plan import Encode
from streamserve.engine.request import Request, State
from streamserve.messages import Media

MAX_AHEAD = 2  # pictures that are encoded and whose places are not all computed, when another is encoded ahead


def _needed(request: Request) -> Iterator[Media]:
    """Media of a running request that have places which are not computed yet."""
    return (media for media in request.given.media if media.spans[-1].end > request.computed)


class EncodePlanner:
    """Of one engine. `has_whole_spans`, `encodes_beside`: see the scheduler's Limits."""

    def __init__(self, encodings: Encodings, cache: KVCache, *, has_whole_spans: bool, encodes_beside: bool) -> None:
        self._encodings = encodings
        self._cache = cache
        self._has_whole_spans = has_whole_spans
        self._encodes_beside = encodes_beside

    @property
    def num_encoded(self) -> int:
        """Media that were encoded."""
        return self._encodings.num_encoded

    def fit(self, draft: Draft, request: Request, num_tokens: int, budget: int) -> tuple[int, int]:
        """How many of these tokens the next row of a prompt may have, and the cost of what is encoded for them. Encoding draws on
        the budget of the step like tokens do; what a whole step has no room for gets one that encodes nothing else."""
        start, cost = request.planned, 0
        for media in request.given.media:
            for span in media.spans:
                if span.end <= start or span.start >= start + num_tokens:
                    continue
                if not self._encodings.has(media):
                    if draft.encodes and media.cost >= budget - cost:
                        return max(0, span.start - start), cost
                    self._encode(draft, media)
                    cost += media.cost
                    if self._encodes_beside and draft.rows:
                        return max(0, span.start - start), cost  # others' rows do not wait for it
                    # A row is in the step for it, if need be a short one.
                    num_tokens = min(num_tokens, max(budget - cost, self._cache.page_size, span.start - start + 1))
                if self._has_whole_spans and span.end > start + num_tokens:
                    num_tokens = span.start - start or span.num_tokens
        return num_tokens, cost

    def encode_ahead(self, draft: Draft, running: Iterable[Request], next_ones: Iterable[Request]) -> None:
        """Where that does not hold up rows, have the next picture encoded whose places are not computed yet, unless enough are.
        `next_ones` wait for their turn."""
        if not self._encodes_beside or draft.encodes:
            return
        num_ahead = 0
        for request in chain(running, next_ones):
            for media in request.given.media:
                end, is_waiting = media.spans[-1].end, request.state is State.QUEUED
                if not is_waiting and end <= request.planned:
                    continue
                if self._encodings.has(media):
                    num_ahead += 1
                    if num_ahead == MAX_AHEAD:
                        return
                elif not is_waiting or self._cache.match_len(request.given.salt, request.packed, end) < end:
                    if self._encodings.has_room(media, self._keys_in_use(draft, running)):
                        self._encode(draft, media)
                    return

    def forgets(self, draft: Draft, running: Iterable[Request]) -> tuple[bytes, ...]:
        """Keys of embeddings that make room for those which this step computes."""
        return self._encodings.shrink(self._keys_in_use(draft, running)) if draft.encodes else ()

    def drop(self, failed: Mapping[bytes, str]) -> None:
        """These could not be encoded: nobody may use them."""
        self._encodings.drop(failed)

    def _encode(self, draft: Draft, media: Media) -> None:
        draft.encodes.append(Encode(media.key, media.num_tokens, media.inputs))
        self._encodings.add(media)

    @staticmethod
    def _keys_in_use(draft: Draft, running: Iterable[Request]) -> set[bytes]:
        """Media that running prompts need, and those that are encoded now."""
        return {encode.key for encode in draft.encodes} | {media.key for request in running for media in _needed(request)}
