"""Which embeddings of media the runner keeps, as the scheduler knows it: least recently used ones make room for new ones.

Owns that book; the tensors are the runner's (engine/embeddings.py). What a running prompt needs is never given up. Torch-free.
"""

from collections.abc import Iterable

from streamserve.messages import Media

MAX_TOKENS = 65_536  # embeddings kept: 64 pictures of 1,024 places


class Encodings:
    """The book of one engine. Keys are media's."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._kept: dict[bytes, int] = {}  # embeddings by key, least recently used first
        self._num_tokens = 0
        self._gone: set[bytes] = set()  # the runner is to be told that these are not kept
        self.num_encoded = 0  # media encoded so far

    def has(self, media: Media) -> bool:
        """Whether its embeddings are there, or will be before the next step's rows. Counts as a use."""
        if (num_tokens := self._kept.pop(media.key, None)) is None:
            return False
        self._kept[media.key] = num_tokens
        return True

    def has_room(self, media: Media, used: Iterable[bytes]) -> bool:
        """Whether it can be kept beside those of `used` that are."""
        return sum(self._kept.get(key, 0) for key in used) + media.num_tokens <= self._max_tokens

    def add(self, media: Media) -> None:
        """A plan encodes it."""
        assert media.key not in self._kept
        self._kept[media.key] = media.num_tokens
        self._num_tokens += media.num_tokens
        self.num_encoded += 1

    def shrink(self, used: Iterable[bytes]) -> tuple[bytes, ...]:
        """Give up the least recently used ones beyond the limit, but none of `used`. Returns their keys, and those of `drop`."""
        if self._num_tokens > self._max_tokens:
            held = set(used)
            for key in [key for key in self._kept if key not in held]:
                if self._num_tokens <= self._max_tokens:
                    break
                self.drop([key])
        gone, self._gone = tuple(self._gone), set()
        return gone

    def drop(self, keys: Iterable[bytes]) -> None:
        """Give these up: nobody may use them."""
        for key in keys:
            if (num_tokens := self._kept.pop(key, None)) is not None:
                self._num_tokens -= num_tokens
                self._gone.add(key)
