"""Pictures for Pixtral's tower: they keep their shape, are at most so large, and take a row of places for each row of patches,
with tokens at the ends of rows.

Owns those sizes and rows, for Pixtral and for Mistral 3, where several patches make up a place.
"""

from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import Any

from streamserve.media.families._images import (
    BICUBIC,
    channels_first,
    normalising,
    read_processor,
    read_settings,
    resized,
    token_text,
)
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "patch_size": 16,
}  # where config.json is silent
TEXT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}


class PixtralFamily:
    """`merge`: so many patches by so many make up a place."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        merge: int,
        vision: Mapping[str, int] = VISION,
        text: Mapping[str, int] = TEXT,
    ) -> None:
        """`vision` and `text`: what the configs mean where they are silent."""
        self._vision, self._text = (
            {**vision, **(config.get("vision_config") or {})},
            {**text, **(config.get("text_config") or {})},
        )
        self._merge, self._step = merge, self._vision["patch_size"] * merge  # pixels of a place
        settings = read_settings(folder)
        size = settings.get("size") or {"longest_edge": self._vision.get("image_size", 1024)}
        if isinstance(size, int):
            size = {"longest_edge": size}
        self._largest: tuple[int, int] = (
            (size["longest_edge"], size["longest_edge"]) if "longest_edge" in size else (size["height"], size["width"])
        )
        self._resample = int(settings.get("resample", BICUBIC))
        self._normalising = normalising(settings)
        self.marker = self.token = token_text(folder, config.get("image_token_index", config.get("image_token_id")))
        processor = read_processor(folder)
        self._break, self._end = processor.get("image_break_token", "[IMG_BREAK]"), processor.get("image_end_token", "[IMG_END]")
        self._settings = f"{config.get('model_type')} {sorted(settings.items())} {self._step}"

    def prepare(self, picture: Picture) -> Prepared:
        """Resize to whole places."""
        height, width = self._size_of(picture.height, picture.width)
        pixels = resized(picture.pixels, height, width, self._resample)
        rows, columns = height // self._step, width // self._step
        cost = encoder_cost(rows * columns * self._merge**2, self._vision, self._text)
        inputs = {"pixels": channels_first(pixels), **self._normalising}
        return Prepared(key_of(picture, self._settings), inputs, self._layout(rows, columns), cost)

    def _size_of(self, height: int, width: int) -> tuple[int, int]:
        ratio = max(height / self._largest[0], width / self._largest[1])
        if ratio > 1:
            height, width = floor(height / ratio), floor(width / ratio)
        return ((height - 1) // self._step + 1) * self._step, ((width - 1) // self._step + 1) * self._step

    def _layout(self, rows: int, columns: int) -> Layout:
        if self.token is None:
            return Layout("", (Run(rows * columns),))
        row = self.token * columns
        return Layout((row + self._break) * (rows - 1) + row + self._end, (Run(columns),) * rows)
