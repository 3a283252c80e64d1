"""Idefics 3: a picture enlarged to whole tiles, row by row, and all of it once more at a tile's size.

Owns the sizes, and the words that stand before each tile. The encoder is models/vision/idefics3.py.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from streamserve.errors import CheckpointError
from streamserve.media.families._images import HALF, Pixels, cut, normalising, read_settings, resized, token_text
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

LANCZOS = 1
LONGEST = 4096  # pixels of a side, whatever the settings say
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
# What vision_config and text_config mean where they are silent, as far as it matters here.
VISION = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 32}
TEXT = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}


class Family:
    """As many tiles as the picture is large."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        settings = read_settings(folder)
        size = settings.get("size") or {"longest_edge": 4 * 364}
        self._tile = int((settings.get("max_image_size") or {"longest_edge": 364})["longest_edge"])
        if "longest_edge" not in size:
            raise CheckpointError(f"the settings for pictures have size {size}; supported is a longest_edge")
        self._longest = int(size["longest_edge"]) if settings.get("do_resize", True) else None
        self._splits = bool(settings.get("do_image_splitting", True))
        self._resample = int(settings.get("resample", LANCZOS))
        self._normalising = normalising(settings, HALF, HALF)
        vision, scale = {**VISION, **(config.get("vision_config") or {})}, config.get("scale_factor", 2)
        patches = self._tile // vision["patch_size"]  # along a side of a tile
        if patches % scale or not patches:
            raise CheckpointError(
                f"the settings for pictures make tiles of {self._tile}: {patches} patches of {vision['patch_size']} on a side, "
                f"which config.json's scale_factor {scale} does not divide"
            )
        self._num_places = (patches // scale) ** 2
        self._cost = encoder_cost(patches**2, vision, {**TEXT, **(config.get("text_config") or {})})
        self.marker = self.token = token_text(folder, config.get("image_token_id", 128257)) or "<image>"
        self._text = f"{config.get('model_type')} {sorted(settings.items())} {self._num_places}"

    def prepare(self, picture: Picture) -> Prepared:
        """Resize, enlarge, cut."""
        pixels = picture.pixels
        if self._longest is not None:
            pixels = resized(pixels, *_within(picture.height, picture.width, self._longest), self._resample)
        rows = columns = 0
        if self._splits:
            pixels = resized(pixels, *_whole_tiles(pixels.shape[0], pixels.shape[1], self._tile), self._resample)
            rows, columns = pixels.shape[0] // self._tile, pixels.shape[1] // self._tile
        if rows * columns <= 1:
            rows = columns = 0
        tiles = [self._whole(pixels)] if not rows else [cut(pixels, self._tile), self._whole(pixels)]
        inputs = {"pixels": np.concatenate(tiles), **self._normalising}
        num_tiles = rows * columns + 1
        layout = Layout(self._words(rows, columns), (Run(self._num_places),) * num_tiles)
        return Prepared(key_of(picture, self._text), inputs, layout, self._cost * num_tiles)

    def _whole(self, pixels: Pixels) -> Pixels:
        return cut(resized(pixels, self._tile, self._tile, self._resample), self._tile)

    def _words(self, rows: int, columns: int) -> str:
        """What stands in the prompt for a picture of so many tiles."""
        places = self.token * self._num_places
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{places}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + ("\n" if lines else "") + f"{AROUND}{WHOLE}{places}{AROUND}"


def _within(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width of the same shape with this longer side, the shorter one even; no side above LONGEST."""
    shape = width / height
    if width >= height:
        height, width = int(longest / shape), longest
        height += height % 2
    else:
        height, width = longest, int(longest * shape)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    shape = width / height
    if width >= height and width > LONGEST:
        return max(int(LONGEST / shape), 1), LONGEST
    if height > width and height > LONGEST:
        return LONGEST, max(int(LONGEST * shape), 1)
    return height, width


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """The next multiples of a tile: of the longer side, then of what the shorter one is beside that."""
    shape = width / height
    if width >= height:
        width = ceil(width / tile) * tile
        return ceil(int(width / shape) / tile) * tile, width
    height = ceil(height / tile) * tile
    return height, ceil(int(height * shape) / tile) * tile
