"""A tokenizer without files: one token per byte, and three control tokens. For `serve --fake` and tests.

Owns its vocabulary. Knows nothing of models.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from streamserve.errors import InvalidRequest
from streamserve.text.model import TextModel
from streamserve.text.template import ChatTemplate
from streamserve.text.tokenizer import WholeTexts

END_OF_TEXT, START_OF_TURN, END_OF_TURN = 256, 257, 258
_CONTROL = {"<|endoftext|>": END_OF_TEXT, "<|im_start|>": START_OF_TURN, "<|im_end|>": END_OF_TURN}
_CONTROL_TEXT = {id: text for text, id in _CONTROL.items()}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_text_model() -> TextModel:
    """Byte tokenizer with a ChatML template."""
    tokenizer = ByteTokenizer()
    return TextModel(tokenizer, ChatTemplate(_CHATML, special_tokens=tokenizer.special_tokens))


class ByteTokenizer:
    """Tokenizer whose ids 0 to 255 are bytes; no begin token."""

    vocab_size = 256 + len(_CONTROL)
    bos_token_id: int | None = None
    eos_token_ids = frozenset((END_OF_TEXT, END_OF_TURN))
    special_tokens: Mapping[str, str] = {"eos_token": "<|im_end|>"}
    control_pattern = re.compile("|".join(map(re.escape, _CONTROL)))
    strips_leading_space = False

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, continues: bool = False
    ) -> list[int]:
        """See Tokenizer; there are no begin and end tokens to add."""
        try:
            if not allow_special:
                return list(text.encode())
            ids: list[int] = []
            for piece in re.split(f"({self.control_pattern.pattern})", text):
                ids += (_CONTROL[piece],) if piece in _CONTROL else piece.encode()
            return ids
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        visible = (id for id in ids if not (skip_special_tokens and self.is_special(id)))
        return b"".join(map(self.token_bytes, visible)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """See Tokenizer."""
        return bytes((id,)) if 0 <= id < 256 else _CONTROL_TEXT.get(id, "").encode()

    @cached_property
    def whole_texts(self) -> WholeTexts:
        """See Tokenizer."""
        return WholeTexts(self)

    def id_to_text(self, id: int) -> str:
        """See Tokenizer."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def is_special(self, id: int) -> bool:
        """See Tokenizer."""
        return id in _CONTROL_TEXT

    def to_json(self) -> str | None:
        """See Tokenizer."""
        return None
