"""Qwen2.5-VL's pictures: see _qwen.py."""

from collections.abc import Mapping
from typing import Any, ClassVar

from streamserve.media.families._qwen import QwenFamily


class Family(QwenFamily):
    """What its folder means where it is silent."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "patch_size": 14,
    }
    settings_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    }
