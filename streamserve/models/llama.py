"""Llama, and everything with its shape: Llama 1 to 3, SmolLM, TinyLlama and many more."""

from collections.abc import Mapping
from typing import Any

from streamserve.models.decoder import Decoder
from streamserve.models.spec import Traits


class Model(Decoder):
    """The plain decoder; biases only where config.json asks for them."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        bias = bool(config.get("attention_bias", False))
        return Traits(qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
