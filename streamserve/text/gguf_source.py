"""Text parts of a GGUF file: builds the tokenizer that its metadata describes.

Owns the meaning of `tokenizer.*` keys and the table of pre-tokenizers. Knows nothing of requests.

A GGUF file holds vocabulary and merges, but of the rest of the tokenizer only a name (`tokenizer.ggml.pre`). The table
below says what each name stands for: the pre-tokenizer of the model's own tokenizer.json, as published with the model;
llama.cpp (src/llama-vocab.cpp) splits the same way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from streamserve.errors import CheckpointError
from streamserve.text.gguf_metadata import read_metadata
from streamserve.text.source import TextSource

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # values of tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """What a pre-tokenizer name stands for. `split` None is GPT-2's pattern, which the library has built in."""

    split: str | None = None
    splits_digits: bool = False
    takes_whole_words: bool = False  # a word that is in the vocabulary is one token, whatever the merges say
    adds_bos: bool = False
    composes: bool = False  # Unicode NFC first


_PRES: Mapping[str, _Pre] = {
    "gpt-2": _Pre(),
    "smollm": _Pre(splits_digits=True),
    "starcoder": _Pre(splits_digits=True),
    "refact": _Pre(splits_digits=True),
    "llama-bpe": _Pre(_LLAMA3_SPLIT, takes_whole_words=True, adds_bos=True),
    "qwen2": _Pre(_QWEN2_SPLIT, composes=True),
    "tekken": _Pre(_TEKKEN_SPLIT, takes_whole_words=True, adds_bos=True),
}

# Control tokens that end a turn or a text in the families of chat models; a file names only one or two of its own.
_END_TOKENS = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")
)
_SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_NAMED_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf(path: Path) -> TextSource:
    """Tokenizer, templates and defaults of a GGUF file. CheckpointError when its tokenizer is of an unsupported kind."""
    metadata = read_metadata(path)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(metadata.get("tokenizer.ggml.model", ""))
    if build is None or "tokenizer.ggml.tokens" not in metadata:
        raise CheckpointError(
            f"{path.name} has a tokenizer of kind {metadata.get('tokenizer.ggml.model')!r}; gpt2 and llama are supported; "
            "give --tokenizer-path a folder with the model's tokenizer.json"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    rust = build(path, metadata, tokens)
    _mark_added_tokens(rust, metadata, tokens)
    special = {
        name: tokens[i] for name, key in _NAMED_IDS.items() if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    _add_ends(rust, metadata, special)
    return TextSource(
        rust=rust,
        special_tokens=special,
        eos_token_ids=_eos_token_ids(metadata, tokens),
        templates=_templates(metadata),
        # 0.6 is stored as a 32-bit float, which reads 0.6000000238
        sampling_defaults={name: round(metadata[key], 6) for key, name in _SAMPLING_KEYS.items() if key in metadata},
    )


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    pre = _PRES.get(name or "")
    if pre is None:
        raise CheckpointError(
            f"{path.name} splits text in the way named {name!r} (tokenizer.ggml.pre); supported are {', '.join(_PRES)}; "
            "give --tokenizer-path a folder with the model's tokenizer.json"
        )
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata["tokenizer.ggml.merges"])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.takes_whole_words))
    if pre.composes:
        rust.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.splits_digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    rust.pre_tokenizer = pre_tokenizers.Sequence(steps)
    rust.decoder = decoders.ByteLevel()
    return rust


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata["tokenizer.ggml.merges"])]
    elif "tokenizer.ggml.scores" in metadata:
        merges = _merges_by_score(tokens, kinds, metadata["tokenizer.ggml.scores"])
    else:
        raise CheckpointError(f"{path.name} holds neither merges nor scores for its tokenizer; it cannot be used")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    rust = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=_BYTE in kinds,
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if has_prefix else "never", split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if has_prefix else steps)
    return rust


def _merges_by_score(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose piece scores best; as ranked merges, that is all pairs sorted by their piece's score.

    Control tokens take no part, so that text can never be joined into one.
    """
    score_of = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    pairs = [
        (score, at, len(token) - at, token)
        for token, score in score_of.items()
        for at in range(1, len(token))
        if token[:at] in score_of and token[at:] in score_of
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(token[:at], token[at:]) for _, at, _, token in pairs]


def _mark_added_tokens(rust: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Control tokens and user-defined ones are found whole in a text, before any splitting."""
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    rust.add_special_tokens([token for token in added if token.special])
    rust.add_tokens([token for token in added if not token.special])


def _add_ends(rust: tokenizers.Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Make the tokenizer put the first and last token around a text, as far as the file asks for them."""
    is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    pre = _PRES.get(metadata.get("tokenizer.ggml.pre", ""), _Pre())
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece or pre.adds_bos)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    bos = special.get("bos_token") if adds_bos else None
    eos = special.get("eos_token") if adds_eos else None
    ends = [(token, rust.token_to_id(token)) for token in (bos, eos) if token is not None]
    if ends:
        parts = [part for part in (bos, "$A", eos) if part is not None]
        rust.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ends)


def _eos_token_ids(metadata: Mapping[str, Any], tokens: Sequence[str]) -> frozenset[int]:
    named = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    known = (i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL and token in _END_TOKENS)
    return frozenset(i for i in (*named, *known) if i is not None)


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    return {"default": metadata[key], **named} if key in metadata else named
