"""Text to token ids and back.

Owns what a token's bytes are, and which tokens are control tokens. Knows nothing of messages, requests or models.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.text.folder_source import read_folder
from streamserve.text.gguf_source import read_gguf
from streamserve.text.source import TextSource

# Longer texts are encoded as a batch of one: the library keeps the GIL for the whole of a single text, and a prompt of a hundred
# thousand tokens would stop every stream for a quarter of a second, whichever thread it is encoded in.
_LONG_CHARS = 1000
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer(Protocol):
    """What the text layer needs of a tokenizer. All methods may be called from several threads at once."""

    @property
    def vocab_size(self) -> int:
        """Ids below this may be tokens; the model's embedding may have more rows."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: end of text and end of turn."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts of the named special tokens, as chat templates know them: `bos_token`, `eos_token` …"""
        ...

    @property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the text of any control token; the longest where several begin."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """A text loses the one space that the tokenizer itself puts before its first word."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, continues: bool = False
    ) -> list[int]:
        """Ids of a text. InvalidRequest when it is not valid Unicode.

        `add_special_tokens`: put begin and end tokens around it, as the model wants. `allow_special` False: the text of a
        control token in it becomes plain text tokens, never the control token. `continues`: the text goes on from other
        text, so it gets neither begin token nor a space of its own.
        """
        ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of a token; of a control token its text. Empty for an id that is not in the vocabulary."""
        ...

    @property
    def whole_texts(self) -> Mapping[int, str | None]:
        """By id, for every id, the text of a token that is neither a control token nor a part of a character; else None."""
        ...

    def id_to_text(self, id: int) -> str:
        """A token's bytes as text, for display: half a character shows as U+FFFD."""
        ...

    def is_special(self, id: int) -> bool:
        """Whether the token is a control token, hidden from answers."""
        ...

    def to_json(self) -> str | None:
        """The tokenizer as the `tokenizers` library writes it (tokenizer.json); None when it is no tokenizer of that library."""
        ...


class WholeTexts(dict[int, str | None]):
    """See Tokenizer.whole_texts. Filled as tokens are met: the same value from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, id: int) -> str | None:
        try:
            text = None if self._tokenizer.is_special(id) else self._tokenizer.token_bytes(id).decode()
        except UnicodeDecodeError:
            text = None
        self[id] = text
        return text


def read_source(path: Path) -> TextSource:
    """The text parts of a GGUF file or a Hugging Face folder."""
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a GGUF file or a Hugging Face folder")
    return read_gguf(path)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file or of a Hugging Face folder. CheckpointError when it is missing or unsupported."""
    return FastTokenizer(read_source(path))


class FastTokenizer:
    """Tokenizer on the `tokenizers` library. Other threads run while it encodes a long text."""

    def __init__(self, source: TextSource) -> None:
        self._rust = source.rust
        added = source.rust.get_added_tokens_decoder()
        self._plain = _without_control_tokens(source.rust)
        self._added = {id: token.content.encode() for id, token in added.items()}
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._spelling = _Spelling(source.rust.decoder)
        self.special_tokens = source.special_tokens
        self.eos_token_ids = source.eos_token_ids
        self.bos_token_id = _id_of(source, "bos_token")
        self.vocab_size = max(source.rust.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
        self.strips_leading_space = self._spelling.strips_leading_space
        self.control_pattern = _any_of(added[id].content for id in self._special)
        self._bytes: list[bytes | None] = [None] * self.vocab_size  # filled as tokens are met; same value from any thread
        self.whole_texts = WholeTexts(self)
        self._anchor = self._find_anchor()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, continues: bool = False
    ) -> list[int]:
        """See Tokenizer."""
        if continues:
            anchor, ids = self._anchor, self._encode("\n" + text if self._anchor else text, False, allow_special)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
            return self._encode(text, False, allow_special)
        return self._encode(text, add_special_tokens, allow_special)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        hidden = self._special if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(id) for id in ids if id not in hidden).decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, id: int) -> bytes:
        """See Tokenizer."""
        if not 0 <= id < self.vocab_size:
            return b""
        known = self._bytes[id]
        if known is None:
            known = self._bytes[id] = self._read_bytes(id)
        return known

    def id_to_text(self, id: int) -> str:
        """See Tokenizer."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def is_special(self, id: int) -> bool:
        """See Tokenizer."""
        return id in self._special

    def to_json(self) -> str | None:
        """See Tokenizer."""
        serialised: str = self._rust.to_str()
        return serialised

    def _encode(self, text: str, add_special_tokens: bool, allow_special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        rust = self._rust if allow_special else self._plain
        if len(text) > _LONG_CHARS:
            found = rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        else:
            found = rust.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    def _read_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id]
        piece = self._rust.id_to_token(id)
        return b"" if piece is None else self._spelling.bytes_of(piece)

    def _find_anchor(self) -> list[int]:
        """Ids of a newline to encode a continuation behind, for tokenizers that put a space before a text; else none."""
        newline = self._encode("\n", False, True)
        behind = self._encode("\nx", False, True)[len(newline) :]
        return [] if behind == self._encode("x", False, True) else newline


class _Spelling:
    """How the vocabulary spells bytes, read from the tokenizer's decoder."""

    def __init__(self, decoder: Any) -> None:
        steps = list(_flat(json.loads(decoder.__getstate__()))) if decoder is not None else []
        kinds = {step["type"] for step in steps}
        if not kinds & {"ByteLevel", "Metaspace", "Replace"}:
            raise CheckpointError(
                f"the tokenizer's decoder is {sorted(kinds) or 'missing'}; byte-level BPE and SentencePiece are supported"
            )
        self._byte_of = _bytes_by_letter() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self.strips_leading_space = any(_strips(step) for step in steps)

    def bytes_of(self, piece: str) -> bytes:
        """Bytes of an ordinary piece of the vocabulary."""
        if self._byte_of is not None:
            try:
                return bytes([self._byte_of[letter] for letter in piece])
            except KeyError:
                return piece.encode()
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace("▁", " ").encode()


def _flat(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step["type"] == "Sequence":
        for part in step["decoders"]:
            yield from _flat(part)
    else:
        yield step


def _strips(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["start"])
    return bool(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")


def _bytes_by_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible letter: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _without_control_tokens(rust: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A second tokenizer on the same vocabulary that takes the text of control tokens as plain text.

    The library's switch for this is a state of the whole tokenizer, so toggling it would race with other threads.
    """
    plain = tokenizers.Tokenizer(rust.model)  # shares the vocabulary: microseconds
    plain.normalizer, plain.pre_tokenizer = rust.normalizer, rust.pre_tokenizer
    plain.post_processor, plain.decoder = rust.post_processor, rust.decoder
    added = rust.get_added_tokens_decoder()
    plain.add_tokens([token for _, token in sorted(added.items())])
    assert plain.get_added_tokens_decoder().keys() == added.keys()
    plain.encode_special_tokens = True
    return plain


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _id_of(source: TextSource, name: str) -> int | None:
    text = source.special_tokens.get(name)
    id: int | None = source.rust.token_to_id(text) if text is not None else None
    return id
