"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from collections.abc import Mapping
from typing import Any

from streamserve.errors import CheckpointError
from streamserve.models.decoder import Decoder
from streamserve.models.spec import Traits


class Model(Decoder):
    """Biases on q, k and v, whatever config.json says."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        refuse_mixed_windows(config)
        return Traits(qkv_bias=True)


def refuse_mixed_windows(config: Mapping[str, Any]) -> None:
    """Qwen models may attend within a window in some layers only; no published one turns it on."""
    if config.get("use_sliding_window") and "sliding_attention" in config.get("layer_types", ("sliding_attention",)):
        raise CheckpointError(
            "config.json: use_sliding_window is true, and a window in some layers only is not supported; "
            "set it to false to serve the model with full attention"
        )
