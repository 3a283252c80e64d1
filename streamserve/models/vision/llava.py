"""LLaVA (arXiv 2310.03744) and what has its layout: a CLIP or SigLIP tower and a projector; Pixtral's published folders too.

Owns which weights those are. Pictures have one size, or any with Pixtral's tower.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._names import encoder_name, text_name
from streamserve.models.vision._pixels import by_size, normalised
from streamserve.models.vision._projector import Projector, projector_weights
from streamserve.models.vision._text import text_config
from streamserve.models.vision._towers import TowerSpec


class Vision(Base):
    """Tower, then projector."""

    text_name = staticmethod(text_name)
    encoder_name = staticmethod(encoder_name)

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config)

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tower = TowerSpec(config)
        return tower.weights() | projector_weights(config, tower.width, cls.text_config(config)["hidden_size"])

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._tower = TowerSpec(config).load(read, device, dtype)
        self._projector = Projector(config, read)

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group in by_size(inputs):
            pixels_BCHW = normalised([inputs[index] for index in group], self._device, self._dtype)
            found |= zip(group, self._projector(self._tower.features(pixels_BCHW)), strict=True)
        return [found[index] for index in range(len(inputs))]
