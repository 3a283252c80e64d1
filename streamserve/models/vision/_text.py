"""A vision model's text_config as a config.json of its own, with what published ones leave out.

Owns what a text_config means where it is silent: the values that transformers' config classes have, by model_type. A plain
model's config.json is written in full, so that nothing else here needs them.
"""

from collections.abc import Mapping
from typing import Any

from streamserve.errors import CheckpointError

_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
_QWEN2: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2,
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "eos_token_id": 1,
    },
    "qwen3": {**_QWEN2, "head_dim": 128},
}


def text_config(
    config: Mapping[str, Any], *, model_type: str = "llama", absent: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The text_config of a folder's config.json, complete. `model_type`: of one that does not name it. `absent`: what a
    config.json without any text_config means. Raises CheckpointError.

    Whether the head is the embedding is left open (no tie_word_embeddings) where the two configs contradict each other or both
    are silent: then the folder's weights tell.
    """
    given = config.get("text_config") or absent or {}
    kind = given.get("model_type", model_type)
    if kind not in DEFAULTS:
        raise CheckpointError(
            f"config.json: text_config's model_type is {kind!r}; behind a {config.get('model_type')} encoder stands one of "
            + ", ".join(DEFAULTS)
        )
    text = {**DEFAULTS[kind], **given, "model_type": kind}
    ties = {at["tie_word_embeddings"] for at in (given, config) if isinstance(at.get("tie_word_embeddings"), bool)}
    text.pop("tie_word_embeddings", None)
    if given.get("tie_word_embeddings") or ties == {False}:
        text["tie_word_embeddings"] = bool(given.get("tie_word_embeddings"))
    if "eos_token_id" not in given and config.get("eos_token_id") is not None:
        text["eos_token_id"] = config["eos_token_id"]
    return text
