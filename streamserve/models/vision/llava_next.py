"""LLaVA-NeXT (LLaVA 1.6): the whole picture small, then its tiles put together again, without what was padded, and with an
embedding at the end of each row.

Owns that packing. Tower and projector are LLaVA's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision._pixels import normalised
from streamserve.models.vision._towers import TowerSpec
from streamserve.models.vision.llava import Vision as Llava


class Vision(Llava):
    """Beside the pixels of all tiles, the whole picture first, a picture has `tiles`, rows and columns of them, and `kept`: of
    the patches that they make up the first row and the one behind the last, and columns likewise, that are not padding."""

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tower = TowerSpec(config)
        if tower.places_of(tower.vit.side, tower.vit.side) != tower.vit.side**2:
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy with a {tower.model_type} leaves no square of patches; "
                "LLaVA-NeXT needs 'default' with CLIP and 'full' with SigLIP"
            )
        return {**super().weights(config), "image_newline": (cls.text_config(config)["hidden_size"],)}

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, read, device=device, dtype=dtype)
        self._newline = read("image_newline")
        self._side = TowerSpec(config).vit.side

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        features = self._projector(self._tower.features(normalised(inputs, self._device, self._dtype)))
        parts = torch.split(features, [len(one["pixels"]) for one in inputs])
        return [self._packed(part, one["tiles"], one["kept"]) for part, one in zip(parts, inputs, strict=True)]

    def _packed(self, features_NPX: Tensor, tiles: tuple[int, int], kept: tuple[int, int, int, int]) -> Tensor:
        (rows, columns), (top, bottom, left, right), side = tiles, kept, self._side
        grid = features_NPX[1:].view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        grid = grid[top:bottom, left:right]
        ends = self._newline.expand(len(grid), 1, -1)
        return torch.cat((features_NPX[0], torch.cat((grid, ends), dim=1).flatten(0, 1)))
