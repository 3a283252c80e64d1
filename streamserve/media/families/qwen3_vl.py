"""Qwen3-VL's pictures: see _qwen.py."""

from collections.abc import Mapping
from typing import Any, ClassVar

from streamserve.media.families._qwen import QwenFamily


class Family(QwenFamily):
    """What its folder means where it is silent."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 16,
    }
    settings_defaults: ClassVar[Mapping[str, Any]] = {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
