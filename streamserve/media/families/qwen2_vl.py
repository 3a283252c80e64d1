"""Qwen2-VL's pictures: see _qwen.py."""

from collections.abc import Mapping
from typing import Any, ClassVar

from streamserve.media.families._qwen import QwenFamily


class Family(QwenFamily):
    """What its folder means where it is silent."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "patch_size": 14,
    }
    settings_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    }

    def encoder_size(self, vision: Mapping[str, Any]) -> dict[str, int]:
        hidden = int(vision["embed_dim"])  # its hidden_size is the language model's
        inner = hidden * int(vision["mlp_ratio"])
        return {"num_hidden_layers": int(vision["depth"]), "hidden_size": hidden, "intermediate_size": inner}
