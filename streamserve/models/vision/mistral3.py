"""Mistral 3 (Mistral Small 3.1 and later): Pixtral's tower, whose patches are merged by squares before the projector.

Owns the merging. Tower and projector are shared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._names import encoder_name, text_name
from streamserve.models.vision._pixels import by_size, normalised
from streamserve.models.vision._pixtral import RMSNorm
from streamserve.models.vision._projector import Projector, projector_weights
from streamserve.models.vision._text import text_config
from streamserve.models.vision._towers import TowerSpec
from streamserve.models.vision._vit import Linear, linear_shapes

# What a config.json without a vision_config or text_config means.
ABSENT_TOWER: Mapping[str, Any] = {"model_type": "pixtral", "patch_size": 14, "image_size": 1540}
ABSENT_TEXT: Mapping[str, Any] = {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}
PREFIX = "multi_modal_projector."


def _tower(config: Mapping[str, Any]) -> TowerSpec:
    return TowerSpec({**config, "vision_feature_select_strategy": "full"}, absent=ABSENT_TOWER, layer=-1)


class Vision(Base):
    """Tower, norm, merger, projector."""

    text_name = staticmethod(text_name)
    encoder_name = staticmethod(encoder_name)

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, model_type="mistral", absent=ABSENT_TEXT)

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tower = _tower(config)
        width, merged = tower.width, config.get("spatial_merge_size", 2) ** 2
        return {
            **tower.weights(),
            f"{PREFIX}norm.weight": (width,),
            **linear_shapes(f"{PREFIX}patch_merger.merging_layer", width, width * merged, bias=False),
            **projector_weights(config, width, cls.text_config(config)["hidden_size"], bias=False),
        }

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        spec = _tower(config)
        self._tower, self._patch, self._merge = (
            spec.load(read, device, dtype),
            spec.vit.patch_size,
            config.get("spatial_merge_size", 2),
        )
        self._norm = RMSNorm(read, f"{PREFIX}norm", self.text_config(config)["rms_norm_eps"])
        self._merger = Linear(read, f"{PREFIX}patch_merger.merging_layer", bias=False)
        self._projector = Projector(config, read, bias=False)

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group in by_size(inputs):
            pixels_BCHW = normalised([inputs[index] for index in group], self._device, self._dtype)
            rows, columns = pixels_BCHW.shape[2] // self._patch, pixels_BCHW.shape[3] // self._patch
            squares = self._squares(self._norm(self._tower.features(pixels_BCHW)), rows, columns)
            found |= zip(group, self._projector(self._merger(squares)), strict=True)
        return [found[index] for index in range(len(inputs))]

    def _squares(self, x_BPD: Tensor, rows: int, columns: int) -> Tensor:
        """Patches of each square side by side: [B, squares, D * side²], each number's patches together."""
        count, _, hidden = x_BPD.shape
        side = self._merge
        cut = x_BPD.view(count, rows // side, side, columns // side, side, hidden).permute(0, 1, 3, 5, 2, 4)
        return cut.reshape(count, rows * columns // side**2, hidden * side**2)
