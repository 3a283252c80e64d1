"""How Qwen's vision models take pictures and clips: in their own size, rounded to whole squares of patches, within limits.

Owns that rule, and the keys of preprocessor_config.json that say so. Pixels travel as bytes, as they lie in a picture; they are
cut into patches and normalised where the encoder runs, which takes microseconds on a GPU. All that is done here is to resize:
14 ms of one core for a picture of 1,024 x 1,024, where transformers' own processor takes 48.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from streamserve.errors import CheckpointError
from streamserve.media.families._images import BICUBIC, CLIP_MEAN, CLIP_STD, normalising, read_settings, resized
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.picture import Picture
from streamserve.media.video import Clip
from streamserve.messages import Layout, Run

BEGIN, TOKEN, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
MIN_SQUARES, MAX_SQUARES = 128, 768  # of a frame of a clip, which is one place of the prompt each
MAX_CLIP_PLACES = 8_192


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
    numbers_per_second: float = 0.0  # how far apart a second lies in M-RoPE's numbers; 0: frames are counted
    marker: str | None = BEGIN + TOKEN + END  # all of it, since a clip may have several in its place
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
        self._frames = int(vision["temporal_patch_size"])
        self._settings = f"{config.get('model_type')} {self._min_pixels} {self._max_pixels}"
        text = config.get("text_config") or config
        self._vision_size = self.encoder_size(vision)
        self._num_full = len(vision.get("fullatt_block_indexes", range(vision["depth"])))
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
        pixels = np.array(resized(picture.pixels, height, width))
        return self._prepared(picture, pixels[None], self.picture_layout(height // side, width // side))

    def prepare_clip(self, clip: Clip) -> Prepared:
        """See ClipFamily. The more frames there are, the smaller they are made. A patch is several frames deep (two); the last
        frame fills the last patch."""
        side, steps = self._patch * self._merge, ceil(len(clip.places) / self._frames)
        most = min(MAX_SQUARES, max(1, MAX_CLIP_PLACES // steps))
        height, width = fitting_size(clip.height, clip.width, side, min(MIN_SQUARES, most) * side**2, most * side**2)
        pixels = np.empty((steps * self._frames, height, width, 3), np.uint8)
        index = -1
        for index, frame in enumerate(clip.frames()):
            pixels[index] = resized(frame, height, width)
        pixels[index + 1 :] = pixels[index]
        times = clip.times + clip.times[-1:] * (len(pixels) - len(clip.times))
        middles = [(times[at] + times[at + self._frames - 1]) / 2 for at in range(0, len(times), self._frames)]
        return self._prepared(clip, pixels, self.clip_layout(middles, clip.seconds_apart, height // side, width // side))

    def picture_layout(self, rows: int, columns: int) -> Layout:
        """What stands in a prompt for a picture of so many squares."""
        return Layout(shown(rows * columns), (Run(rows * columns, (1, rows, columns)),))

    def clip_layout(self, times: Sequence[float], seconds_apart: float, rows: int, columns: int) -> Layout:
        """The same for a clip. `times`: the middle of each patch's frames, in seconds; frames are `seconds_apart`."""
        num_places, grid = len(times) * rows * columns, (len(times), rows, columns)
        frame_step = seconds_apart * self._frames * self.numbers_per_second or 1.0
        return Layout(shown(num_places), (Run(num_places, grid, frame_step),))

    def _prepared(self, source: Picture | Clip, pixels: NDArray[np.uint8], layout: Layout) -> Prepared:
        num_patches = layout.num_tokens * self._merge**2
        # A layer in which patches look at all of their frame takes more, the larger that is: as if there were more patches.
        _, rows, columns = layout.runs[0].grid or (1, 1, 1)
        hidden, inner = self._vision_size["hidden_size"], self._vision_size["intermediate_size"]
        looks = self._num_full * 2 * rows * columns * self._merge**2
        of_weights = self._vision_size["num_hidden_layers"] * (4 * hidden + 3 * inner)
        return Prepared(
            key=key_of(source, self._settings),
            inputs={"pixels": pixels, **self._levels},
            layout=layout,
            cost=encoder_cost(num_patches + num_patches * looks // of_weights, self._vision_size, self._text_size),
        )


def shown(num_places: int) -> str:
    """What stands in a prompt for so many places in a row."""
    return BEGIN + TOKEN * num_places + END


def _limit(settings: Mapping[str, Any], name: str, edge: str) -> int:
    """A number of pixels, which three versions of transformers write in three ways."""
    size = settings["size"]
    found = settings.get(name) or size.get(edge) or size.get(name)
    if not isinstance(found, int) or found <= 0:
        raise CheckpointError(f"preprocessor_config.json: {name} is {found!r}; a positive whole number is needed")
    return found
