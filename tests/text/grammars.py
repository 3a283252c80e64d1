"""Whether grammars compile and what they accept, seen by llguidance over bytes."""

from collections.abc import Mapping, Sequence

import llguidance

_TOKENIZER = llguidance.LLTokenizer("byte")
CONTROL_IDS = (256, 257, 258, 259, 260, 0xFE, 0xFF)  # stand for control tokens; the last two are no bytes of any text


class Grammar:
    """A compiled grammar. `control`: texts of control tokens and their ids in this vocabulary."""

    def __init__(self, text: str, control: Mapping[str, int] | None = None) -> None:
        self._matcher = llguidance.LLMatcher(_TOKENIZER, text, log_level=0)
        self._control = control or {}
        assert not self._matcher.is_error(), self._matcher.get_error()

    def accepts(self, text: str) -> bool:
        """Whether the whole text matches."""
        return self._read(text) is True

    def begins(self, text: str) -> bool:
        """Whether the text may be the beginning of a match."""
        return self._read(text) is not None

    def forced(self, text: str) -> str:
        """What must follow the text."""
        matcher = self._matcher.deep_copy()
        assert matcher.consume_tokens(self._tokens(text)), text
        return matcher.compute_ff_bytes().decode()

    def _read(self, text: str) -> bool | None:
        tokens = self._tokens(text)
        matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(tokens) < len(tokens):
            return None
        return matcher.is_accepting()

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text, sorted(self._control, key=len, reverse=True)):
            ids += [self._control[piece]] if piece in self._control else list(piece.encode())
        return ids


def error_of(text: str) -> str:
    """Why a grammar does not compile; empty when it does."""
    return llguidance.LLMatcher(_TOKENIZER, text, log_level=0).get_error()


def _pieces(text: str, markers: Sequence[str]) -> list[str]:
    for marker in markers:
        before, found, behind = text.partition(marker)
        if found:
            return [piece for piece in (*_pieces(before, markers), marker, *_pieces(behind, markers)) if piece]
    return [text] if text else []
