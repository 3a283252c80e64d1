"""What a checkpoint says about text, in one value: filled by gguf_source.py or folder_source.py, read by the rest of text/.

Owns the field names only. Knows no file format.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers

# Sampling fields that a model's files may set, as messages.SamplingParams spells them.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class TextSource:
    """Tokenizer, special tokens, chat templates and sampling defaults of one model.

    `special_tokens` holds what templates may name (`bos_token`, `eos_token` …). `templates` holds chat templates by name:
    `default`, perhaps `tool_use`. `sampling_defaults` holds only keys that the files set.
    """

    rust: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: frozenset[int] = frozenset()
    templates: Mapping[str, str] = field(default_factory=dict)
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
