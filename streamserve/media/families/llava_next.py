"""LLaVA-NeXT (LLaVA 1.6): the whole picture at the tower's size, and the same picture larger, cut into tiles of that size.

Owns which tiles, and how many places are left of them when the padding is gone. The encoder is models/vision/llava_next.py.
"""

from collections.abc import Mapping
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from streamserve.errors import CheckpointError
from streamserve.media.families._images import channels_first, resized
from streamserve.media.families.llava import Sizes
from streamserve.media.family import Prepared, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class Family:
    """Height and width of what the larger picture may be made are config.json's image_grid_pinpoints."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._sizes = Sizes(folder, config)
        self._pinpoints = config.get("image_grid_pinpoints") or PINPOINTS
        asked = self._sizes.settings.get("image_grid_pinpoints", self._pinpoints)
        if asked != self._pinpoints or any(edge % self._sizes.side for pinpoint in asked for edge in pinpoint):
            raise CheckpointError(
                f"image_grid_pinpoints are {asked} for the preparation, {self._pinpoints} in config.json; they must be the same, "
                f"and multiples of the encoder's image_size {self._sizes.side}"
            )
        self.marker = self.token = self._sizes.token

    def prepare(self, picture: Picture) -> Prepared:
        """Resize, pad, cut."""
        side, patches, resample = self._sizes.side, self._sizes.patches, self._sizes.resample
        height, width = self._best(picture.height, picture.width)
        rows, columns = height // side, width // side
        by_height, by_width = height / picture.height, width / picture.width
        if by_width < by_height:
            inner = min(ceil(picture.height * by_width), height), width
        else:
            inner = height, min(ceil(picture.width * by_height), width)
        large = np.zeros((height, width, 3), np.uint8)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        large[top : top + inner[0], left : left + inner[1]] = resized(picture.pixels, *inner, resample)
        tiles = large.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
        whole = channels_first(resized(picture.pixels, side, side, resample))
        kept = _unpadded(picture.height, picture.width, rows * patches, columns * patches)
        num_places = self._sizes.num_places + (kept[1] - kept[0]) * (kept[3] - kept[2] + 1)
        inputs = {
            "pixels": np.concatenate((whole[None], tiles)),
            "tiles": (rows, columns),
            "kept": kept,
            **self._sizes.normalising,
        }
        layout = Layout((self.token or "") * num_places, (Run(num_places),))
        return Prepared(key_of(picture, self._sizes.text), inputs, layout, self._sizes.cost * (rows * columns + 1))

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that loses the fewest pixels of the picture, and of those the one that is padded least."""
        best, most, least = self._pinpoints[0], 0, inf
        for pinpoint in self._pinpoints:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            seen = min(int(width * scale) * int(height * scale), width * height)
            wasted = pinpoint[0] * pinpoint[1] - seen
            if seen > most or (seen == most and wasted < least):
                best, most, least = pinpoint, seen, wasted
        return best[0], best[1]


def _unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Of so many rows and columns of patches the first row and the one behind the last, and columns likewise, in which a picture
    of this height and width is that was padded in the middle."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, rows - padding, 0, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, columns - padding
