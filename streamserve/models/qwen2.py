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
    """Qwen models can attend within a window from layer `max_window_layers` on; the published ones leave it off."""
    if not config.get("use_sliding_window"):
        return
    layers = config.get("layer_types")
    if "sliding_attention" in layers if layers else config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0):
        raise CheckpointError(
            "config.json: use_sliding_window is true, and a window in some layers only is not supported; "
            "set it to false to serve the model with full attention"
        )
