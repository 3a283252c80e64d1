"""The text side of an encoder model: texts and pairs of texts to token ids as its folder's tokenizer has it.

Owns cutting to a length, and the prompts that a folder names. Knows nothing of HTTP or of the network. Long texts take
milliseconds: encode them in a worker thread; all methods are safe for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import tokenizers

from streamserve.errors import CheckpointError
from streamserve.text.folder_source import read_folder

Pair = tuple[list[int], int | None]  # token ids; where the second text begins, for networks that are told


@dataclass(frozen=True, slots=True)
class EncoderText:
    """A tokenizer and what stands before texts: `prompts` by name, `default_prompt` where a request names none.

    As with transformers, the text of a control token (`[SEP]`) in a text is that token.
    """

    rust: tokenizers.Tokenizer
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def encode(self, texts: Sequence[str], *, max_len: int | None = None) -> list[list[int]]:
        """Token ids of each text with the tokens around it, cut to `max_len` where one is given."""
        found: list[list[int]] = [encoding.ids for encoding in self.rust.encode_batch_fast(list(texts))]
        if max_len is not None:
            room = max_len - self.rust.num_special_tokens_to_add(False)
            for index, ids in enumerate(found):
                if len(ids) > max_len:
                    found[index] = self._cut(texts[index], room)
        return found

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, max_len: int | None = None) -> list[Pair]:
        """The same of pairs. The longer text of a pair is cut first."""
        encodings = self.rust.encode_batch_fast(list(pairs))
        if max_len is not None:
            for index, encoding in enumerate(encodings):
                if len(encoding.ids) > max_len:
                    encodings[index] = self._cut_pair(*pairs[index], max_len - self.rust.num_special_tokens_to_add(True))
        return [(encoding.ids, _second_from(encoding.type_ids)) for encoding in encodings]

    def _cut(self, text: str, room: int) -> list[int]:
        encoding = self.rust.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, room))
        ids: list[int] = self.rust.post_process(encoding).ids
        return ids

    def _cut_pair(self, first: str, second: str, room: int) -> tokenizers.Encoding:
        one, two = (self.rust.encode(text, add_special_tokens=False) for text in (first, second))
        lengths = _lengths(len(one), len(two), max(0, room))
        one.truncate(lengths[0])
        two.truncate(lengths[1])
        return self.rust.post_process(one, two)


def _lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that fit together: tokens are taken from the one that is longer at the time."""
    if first > second:
        return _lengths(second, first, room)[::-1]
    if first + second <= room:
        return first, second
    if first <= room - first:
        return first, room - first
    return room // 2, room - room // 2


def _second_from(type_ids: Sequence[int]) -> int | None:
    return next((index for index, kind in enumerate(type_ids) if kind == 1), None)


def load_encoder_text(folder: Path) -> EncoderText:
    """The text side of an encoder's folder. Raises CheckpointError."""
    rust = read_folder(folder).rust
    path = folder / "config_sentence_transformers.json"
    try:
        config = orjson.loads(path.read_bytes()) if path.is_file() else {}
        prompts = {str(name): str(prompt) for name, prompt in (config.get("prompts") or {}).items()}
        name = config.get("default_prompt_name")
    except (OSError, orjson.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if name is not None and name not in prompts:
        raise CheckpointError(f"{path}: default_prompt_name is {name!r}, which prompts do not hold")
    return EncoderText(rust, prompts, prompts[name] if name is not None else "")
