"""Mistral 3 (Mistral Small 3.1 and later): Pixtral's rows, with squares of patches for places. The encoder is
models/vision/mistral3.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamserve.media.families._pixtral import VISION, PixtralFamily

TEXT = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}


class Family(PixtralFamily):
    """Places of several patches."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        merge = config.get("spatial_merge_size", 2)
        absent = {} if config.get("vision_config") else {"patch_size": 14, "image_size": 1540}
        super().__init__(folder, config, merge=merge, vision={**VISION, **absent}, text=TEXT)
