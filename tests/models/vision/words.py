"""A tokenizer of bytes with the special tokens of a vision model, and prompts as transformers' processors take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from streamserve.media.family import Family, Prepared


def tokenizer(specials: Sequence[str], named: Mapping[str, str] | None = None) -> Any:
    """Every byte is a token; those of `specials` come behind them. `named`: what processors call some of these."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(list(specials))
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=dict(named or {}))
    assert made.convert_tokens_to_ids(specials[0]) == 256
    return made


def token_ids(words: Any, text: str, family: Family, prepared: Sequence[Prepared]) -> list[int]:
    """A text in which each marker is replaced by what stands for its picture, as text/template.py does it."""
    assert family.marker is not None and text.count(family.marker) == len(prepared)
    parts = text.split(family.marker)
    whole = parts[0] + "".join(one.layout.text + part for one, part in zip(prepared, parts[1:], strict=True))
    ids: list[int] = words(whole, add_special_tokens=False)["input_ids"]
    return ids


def normalised(prepared: Prepared) -> NDArray[np.float32]:
    """The pixels as transformers' processors give them."""
    inputs = prepared.inputs
    pixels: NDArray[np.float32] = inputs["pixels"] * inputs["scale"][:, None, None] + inputs["shift"][:, None, None]
    return pixels
