"""Qwen2.5-VL's pictures: see _qwen.py. A clip's frames are numbered by their times."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from streamserve.media.families._qwen import QwenFamily


class Family(QwenFamily):
    """What its folder means where it is silent."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "patch_size": 14,
        "fullatt_block_indexes": (7, 15, 23, 31),
    }
    settings_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    }

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self.numbers_per_second = float(config.get("vision_config", {}).get("tokens_per_second", 4))
