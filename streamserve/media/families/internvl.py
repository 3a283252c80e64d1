"""InternVL (transformers' own layout, InternVL3-hf): a picture stretched to the grid of tiles nearest to its shape, and all of it
once more at a tile's size.

Owns which grid. The encoder is models/vision/internvl.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamserve.errors import CheckpointError
from streamserve.media.families._images import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    cut,
    normalising,
    read_settings,
    resized,
    token_text,
)
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

BEGIN, END = "<img>", "</img>"
# What vision_config and text_config mean where they are silent, as far as it matters here.
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14}
TEXT = {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}


class Family:
    """`min_patches` to `max_patches` tiles, and the whole picture behind them where there are several."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        settings = read_settings(folder)
        size = settings.get("size") or {"height": 384, "width": 384}
        self._tile = int(size.get("height", 0))
        vision, side = {**VISION, **(config.get("vision_config") or {})}, round(1 / config.get("downsample_ratio", 0.5))
        patch = vision["patch_size"]
        patches = self._tile // (patch[0] if isinstance(patch, list) else patch)  # along a side of a tile
        if size.get("width") != self._tile or patches % side or not patches:
            raise CheckpointError(
                f"the settings for pictures have size {size}; tiles must be square, with a number of patches of {patch} along a "
                f"side that {side} divides"
            )
        self._resample = int(settings.get("resample", BICUBIC))
        self._normalising = normalising(settings, CLIP_MEAN, CLIP_STD)
        self._grids = _grids(int(settings.get("min_patches", 1)), int(settings.get("max_patches", 12)))
        self._num_places = (patches // side) ** 2
        self._cost = encoder_cost(patches**2, vision, {**TEXT, **(config.get("text_config") or {})})
        self.marker = self.token = token_text(folder, config.get("image_token_id", 151_667)) or "<IMG_CONTEXT>"
        self._text = f"internvl {sorted(settings.items())} {self._num_places}"

    def prepare(self, picture: Picture) -> Prepared:
        """Stretch, cut."""
        tile, resample = self._tile, self._resample
        columns, rows = self._nearest(picture.height, picture.width)
        tiles = [cut(resized(picture.pixels, rows * tile, columns * tile, resample), tile)]
        if rows * columns > 1:
            tiles.append(cut(resized(picture.pixels, tile, tile, resample), tile))
        pixels = np.concatenate(tiles)
        num_places = len(pixels) * self._num_places
        layout = Layout(f"{BEGIN}{self.token * num_places}{END}", (Run(num_places),))
        return Prepared(key_of(picture, self._text), {"pixels": pixels, **self._normalising}, layout, self._cost * len(pixels))

    def _nearest(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows. Of grids of one shape the largest, but none of twice the picture's area or more."""
        shape, best, best_apart = width / height, (1, 1), float("inf")
        for columns, rows in self._grids:
            apart = abs(shape - columns / rows)
            has_room = height * width > 0.5 * self._tile**2 * columns * rows
            if apart < best_apart or (apart == best_apart and has_room):
                best, best_apart = (columns, rows), apart
        return best


def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """Columns and rows of every grid of so many tiles, small ones first."""
    grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most + 1) if least <= columns * rows <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
