"""Gemma 3's eyes (arXiv 2503.19786): SigLIP at one size, patches averaged by squares, a norm and one matrix.

Owns the averaging and the projection. The language model is models/gemma3_text.py: it lets the places of a picture look at each
other in both directions.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._names import encoder_name, text_name
from streamserve.models.vision._pixels import normalised
from streamserve.models.vision._siglip import Siglip, siglip_weights
from streamserve.models.vision._text import text_config
from streamserve.models.vision._vit import VitSpec, read_vit

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."


def _tower(config: Mapping[str, Any]) -> VitSpec:
    return read_vit({"model_type": "siglip_vision_model", **(config.get("vision_config") or {})})


class Vision(Base):
    """Tower, then averages, norm and matrix."""

    whole_spans: ClassVar[bool] = True

    text_name = staticmethod(text_name)
    encoder_name = staticmethod(encoder_name)

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, model_type="gemma3_text")

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tower = _tower(config)
        return {
            **siglip_weights(tower, TOWER),
            f"{PROJECTOR}mm_soft_emb_norm.weight": (tower.hidden_size,),
            f"{PROJECTOR}mm_input_projection_weight": (tower.hidden_size, cls.text_config(config)["hidden_size"]),
        }

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        spec = _tower(config)
        places = isqrt(config.get("mm_tokens_per_image", 256))  # along a side
        if spec.side % places:
            raise CheckpointError(f"config.json: {spec.side} patches along a side cannot be averaged to {places} places")
        self._tower = Siglip(spec, read, TOWER)
        self._rows, self._square = spec.side, spec.side // places
        self._eps = spec.eps
        self._norm_D = (1.0 + read(f"{PROJECTOR}mm_soft_emb_norm.weight").float()).to(dtype)
        self._matrix_DE = read(f"{PROJECTOR}mm_input_projection_weight")

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        states_BPD = self._tower(normalised(inputs, self._device, self._dtype))
        grid_BDRC = states_BPD.transpose(1, 2).reshape(len(states_BPD), -1, self._rows, self._rows)
        means_BQD = F.avg_pool2d(grid_BDRC, self._square).flatten(2).transpose(1, 2)
        normed_BQD = F.rms_norm(means_BQD, self._norm_D.shape, self._norm_D, self._eps)
        return list((normed_BQD @ self._matrix_DE).unbind())
