"""Gemma 3: every picture at one size, in as many places (256), between markers of their own and blank lines.

Owns that size and what stands around the places. A picture is seen once: the crops of "pan and scan" are off, as in the published
processors. The encoder is models/vision/gemma3.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamserve.errors import CheckpointError
from streamserve.media.families._images import HALF, channels_first, normalising, read_settings, resized, token_text
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

BILINEAR = 2
# What vision_config and text_config mean where they are silent, as far as it matters here.
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
TEXT = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}


class Family:
    """Every picture takes as many places."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        settings = read_settings(folder)
        vision = {**VISION, **(config.get("vision_config") or {})}
        self._side: int = vision["image_size"]
        size = settings.get("size") or {"height": self._side, "width": self._side}
        if size != {"height": self._side, "width": self._side} or not settings.get("do_resize", True):
            raise CheckpointError(
                f"the settings for pictures make them {size} large; config.json's encoder takes {self._side} (image_size)"
            )
        self._resample = int(settings.get("resample", BILINEAR))
        self._normalising = normalising(settings, HALF, HALF)
        num_places = config.get("mm_tokens_per_image", 256)
        begin = token_text(folder, config.get("boi_token_index", 255_999)) or "<start_of_image>"
        end = token_text(folder, config.get("eoi_token_index", 256_000)) or "<end_of_image>"
        self.marker = begin
        self.token = token_text(folder, config.get("image_token_index", 262_144)) or "<image_soft_token>"
        self._layout = Layout(f"\n\n{begin}{self.token * num_places}{end}\n\n", (Run(num_places),))
        self._cost = encoder_cost(
            (self._side // vision["patch_size"]) ** 2, vision, {**TEXT, **(config.get("text_config") or {})}
        )
        self._text = f"gemma3 {sorted(settings.items())} {self._side} {num_places}"

    def prepare(self, picture: Picture) -> Prepared:
        """Resize."""
        pixels = channels_first(resized(picture.pixels, self._side, self._side, self._resample))
        return Prepared(key_of(picture, self._text), {"pixels": pixels, **self._normalising}, self._layout, self._cost)
