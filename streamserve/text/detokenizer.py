"""Token ids to text while they arrive.

Owns bytes that do not make a whole character yet. Knows nothing of stop strings or streams.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from streamserve.text.tokenizer import Tokenizer

_Utf8Decoder = getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one answer, piece by piece. The pieces joined do not depend on how the ids were grouped.

    They equal `decode` of prompt and answer without the prompt's part, except that a character cut off at the very end is
    left out instead of shown as U+FFFD. Bytes that are not UTF-8 become U+FFFD as soon as that is certain.
    """

    __slots__ = ("_hidden", "_is_open", "_shows", "_strips", "_tokenizer", "_utf8", "_whole_texts")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shows: frozenset[int] = frozenset(),
    ) -> None:
        """`shows`: control tokens that are shown although `skip_special_tokens`."""
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._hidden = skip_special_tokens
        self._shows = shows
        self._utf8 = _Utf8Decoder("replace")
        before = self._tail(prompt_ids)
        self._is_open = False  # bytes of a character wait in _utf8
        self._decode(before)  # a character that the prompt leaves open is closed, and shown, by the answer
        self._strips = tokenizer.strips_leading_space and not before

    def push(self, ids: Sequence[int]) -> str:
        """Text that these ids make certain."""
        if not self._is_open and not self._strips:
            whole_texts, text = self._whole_texts, ""
            for id in ids:
                part = whole_texts[id]
                if part is None:
                    break
                text += part
            else:  # as nearly always
                return text
        text = self._decode(self._bytes(ids))
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """End the text and return what was held back. Half a character is dropped, so today that is nothing."""
        self._utf8.reset()
        self._is_open = False
        return ""

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self._is_open = self._utf8.getstate()[0] != b""
        return text

    def _bytes(self, ids: Sequence[int]) -> bytes:
        tokenizer = self._tokenizer
        if self._hidden:
            shows = self._shows
            return b"".join([tokenizer.token_bytes(id) for id in ids if not tokenizer.is_special(id) or id in shows])
        return b"".join([tokenizer.token_bytes(id) for id in ids])

    def _tail(self, ids: Sequence[int]) -> bytes:
        """The visible bytes at the end of a prompt: all of them, or at least the four that may hold an open character."""
        tail = b""
        for id in reversed(ids):
            tail = self._bytes((id,)) + tail
            if len(tail) >= 4:
                break
        return tail
