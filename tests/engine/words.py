"""A vocabulary small enough to read: all bytes, a few words of JSON, and control tokens; and what a fake model answers in it."""

from streamserve.engine.fake import FakeRunner
from streamserve.messages import SamplingParams

_WORDS = (b'{"', b'":', b'":"', b'","', b'"}', b'"]', b"name", b"kind", b"red", b"green", b" is", b"the", b"123", b"true", b"ab")
CONTROL = (b"<end>", b"<stop>", b"<think>", b"</think>")
TOKENS = (*(bytes((byte,)) for byte in range(256)), *_WORDS, *CONTROL)
END, STOP, THINK, END_THINK = range(len(TOKENS) - len(CONTROL), len(TOKENS))
ENDS = frozenset({END, STOP})


class Words:
    """The longest token first. engine/grammar.py's Vocabulary."""

    vocab_size = len(TOKENS)

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """Ids of a text; without `allow_special` the text of a control token is plain text."""
        last = len(TOKENS) if allow_special else END
        by_length = sorted(range(last), key=lambda id: -len(TOKENS[id]))
        rest, ids = text.encode(), []
        while rest:
            ids.append(next(id for id in by_length if rest.startswith(TOKENS[id])))
            rest = rest[len(TOKENS[ids[-1]]) :]
        return ids

    def token_bytes(self, id: int) -> bytes:
        return TOKENS[id] if id < len(TOKENS) else b""

    def is_special(self, id: int) -> bool:
        return id >= END

    def to_json(self) -> str | None:
        return None


def text_of(ids: tuple[int, ...] | list[int]) -> bytes:
    """Bytes of an answer, an end token left out."""
    return b"".join(TOKENS[id] for id in ids if id not in ENDS)


def favourite(runner: FakeRunner, prompt: list[int], index: int) -> int:
    """The token that the fake model would choose at a place of its answer."""
    from streamserve.engine.fake import _Slot

    return runner._token(_Slot(SamplingParams(ignore_eos=True), prompt + [0] * index, len(prompt)))
