"""LLaVA (1.5 and what has its layout): each picture resized to the size of its CLIP or SigLIP tower, one place per patch.
Pixtral's published folders have the same model_type: their pictures keep their shape (_pixtral.py).

Owns those sizes and counts. The encoder is models/vision/llava.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamserve.errors import CheckpointError
from streamserve.media.families._images import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Pixels,
    channels_first,
    middle_of_resized,
    normalising,
    read_settings,
    resized,
    token_text,
)
from streamserve.media.families._pixtral import PixtralFamily
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
# What vision_config and text_config mean where they are silent, as far as it matters here.
VISION: Mapping[str, Mapping[str, int]] = {
    CLIP: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32},
    SIGLIP: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16},
}
ABSENT: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
TEXT = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}


class Sizes:
    """What the LLaVA families read out of config.json and the settings for pictures. Raises CheckpointError."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        given = config.get("vision_config") or ABSENT
        kind = given.get("model_type", CLIP)
        if kind not in VISION:
            raise CheckpointError(f"config.json: vision_config's model_type is {kind!r}; supported are {', '.join(VISION)}")
        vision = {**VISION[kind], **given}
        self.side: int = vision["image_size"]  # pixels
        self.patches: int = self.side // vision["patch_size"]  # along a side
        self.settings = read_settings(folder)
        # SigLIP's processor stretches a picture to the size it wants, CLIP's cuts out its middle.
        self.size, self.crop = self._sizes(self.settings, is_square=kind == SIGLIP)
        self.normalising = normalising(self.settings, *((HALF, HALF) if kind == SIGLIP else (CLIP_MEAN, CLIP_STD)))
        self.resample = int(self.settings.get("resample", BICUBIC))
        drops_first = config.get("vision_feature_select_strategy", "default") == "default"
        self.num_places = self.patches**2 + int(kind == CLIP) - int(drops_first)
        self.token = token_text(folder, config.get("image_token_index", config.get("image_token_id")))
        text = {**TEXT, **(config.get("text_config") or {})}
        self.cost = encoder_cost(self.patches**2, vision, text)
        # What inputs depend on beside the picture.
        self.text = f"{config.get('model_type')} {sorted(self.settings.items())} {self.side} {self.num_places}"

    def _sizes(self, settings: Mapping[str, Any], *, is_square: bool) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
        """What the shorter side, or the whole picture, is resized to, and what is cut out of it then."""
        square = (self.side, self.side)
        size: int | tuple[int, int] = square if is_square else self.side
        given = settings.get("size")
        if isinstance(given, int):
            size = given if settings.get("do_center_crop", not is_square) else (given, given)
        elif isinstance(given, dict):
            if not {"shortest_edge"} <= given.keys() and not {"height", "width"} <= given.keys():
                raise CheckpointError(f"the settings for pictures have size {given}; known: shortest_edge, height and width")
            size = given["shortest_edge"] if "shortest_edge" in given else (given["height"], given["width"])
        crop = None
        if settings.get("do_center_crop", not is_square):
            asked = settings.get("crop_size", self.side)
            crop = (asked, asked) if isinstance(asked, int) else (asked["height"], asked["width"])
        if (crop or size) != square or not settings.get("do_resize", True):
            raise CheckpointError(
                f"the settings for pictures make them {crop or size} large; config.json's encoder takes {square} (image_size)"
            )
        return size, crop


class SquareFamily:
    """Every picture takes as many places."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._sizes = Sizes(folder, config)
        self.marker = self.token = self._sizes.token
        self._pads = bool(self._sizes.settings.get("do_pad", False))  # to a square, as LLaVA's own code does
        mean = self._sizes.settings.get("image_mean", CLIP_MEAN)
        self._background = [int(part * 255) for part in mean] if mean else [0, 0, 0]

    def prepare(self, picture: Picture) -> Prepared:
        """Resize, crop."""
        sizes = self._sizes
        pixels = self._padded(picture.pixels) if self._pads else picture.pixels
        height, width = (sizes.size, sizes.size) if isinstance(sizes.size, int) else sizes.size
        if isinstance(sizes.size, int):
            longer = int(sizes.size * max(pixels.shape[:2]) / min(pixels.shape[:2]))
            height, width = (longer, width) if pixels.shape[1] <= pixels.shape[0] else (height, longer)
        if sizes.crop is None:
            pixels = resized(pixels, height, width, sizes.resample)
        else:
            pixels = middle_of_resized(pixels, height, width, sizes.crop, sizes.resample)
        layout = Layout((self.token or "") * sizes.num_places, (Run(sizes.num_places),))
        inputs = {"pixels": channels_first(pixels), **sizes.normalising}
        return Prepared(key_of(picture, sizes.text), inputs, layout, sizes.cost)

    def _padded(self, pixels: Pixels) -> Pixels:
        """Made square by bars of the mean colour."""
        height, width, _ = pixels.shape
        side = max(height, width)
        square = pixels[:1, :1].repeat(side, 0).repeat(side, 1)
        square[:] = self._background
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        return square


def Family(folder: Path, config: Mapping[str, Any]) -> SquareFamily | PixtralFamily:
    """By the tower."""
    if (config.get("vision_config") or {}).get("model_type") == "pixtral":
        return PixtralFamily(folder, config, merge=1)
    return SquareFamily(folder, config)
