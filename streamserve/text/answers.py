"""Answers whose tokens are not the ones their text encodes to, so that the next turn of a chat finds them in the cache.

A sampled answer may spell a word in another way than the tokenizer does ("Par" + "is" for "Paris"). Encoded afresh, the
next turn's prompt then parts from what the cache holds, and the model reads other tokens than it wrote. Owns the map from
an answer's text to the tokens that the model gave; the oldest are forgotten. Knows nothing of conversations.
"""

from collections import OrderedDict
from collections.abc import Sequence

from streamserve.text.tokenizer import Tokenizer

MAX_TOKENS = 1_000_000  # remembered at most; some 10 MB
MAX_ANSWER = 8192  # tokens; encoding that many to compare takes some 10 ms of the loop


class Answers:
    """Remembers the tokens of answers by their text. For one event loop and its worker threads: reads change nothing."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._ids_of: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._num_tokens = 0

    def note(self, text: str, token_ids: Sequence[int]) -> None:
        """`token_ids`, the end token left out, were shown as `text`. Kept only if encoding `text` would give others."""
        if not text or not 0 < len(token_ids) <= MAX_ANSWER:
            return
        self._num_tokens -= len(self._ids_of.pop(text, ()))
        if self._tokenizer.encode(text, allow_special=False, continues=True) == list(token_ids):
            return
        if any(map(self._tokenizer.is_special, token_ids)) or self._tokenizer.decode(token_ids) != text:
            return  # something of the tokens was hidden, so the text does not stand for them
        self._ids_of[text] = tuple(token_ids)
        self._num_tokens += len(token_ids)
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= len(self._ids_of.popitem(last=False)[1])

    def get(self, text: str) -> tuple[int, ...] | None:
        """The tokens that were shown as `text`, if they are remembered."""
        return self._ids_of.get(text)
