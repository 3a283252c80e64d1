"""Qwen3: Llama with an RMS norm on every head of q and k before RoPE, no biases."""

from collections.abc import Mapping
from typing import Any

from streamserve.models.decoder import Decoder
from streamserve.models.qwen2 import refuse_mixed_windows
from streamserve.models.spec import Traits


class Model(Decoder):
    """Norms on q and k; biases only where config.json asks for them."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        refuse_mixed_windows(config)
        bias = bool(config.get("attention_bias", False))
        return Traits(qkv_bias=bias, o_bias=bias, qk_norm=True)
