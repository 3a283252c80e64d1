"""Idefics 3 (arXiv 2408.12637): SigLIP over tiles, whose patches are joined by squares, and one matrix behind it.

Owns the positions that patches take in a tower trained at another size. How pictures become tiles: media/families/idefics3.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._pixels import normalised, to_device
from streamserve.models.vision._siglip import Siglip, siglip_weights
from streamserve.models.vision._text import text_config
from streamserve.models.vision._tiles import joined_squares, of_pictures
from streamserve.models.vision._vit import Linear, VitSpec, linear_shapes, read_vit

TOWER, PROJECTION = "vision_model.", "connector.modality_projection.proj"
# What a vision_config means where it is silent.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def _tower(config: Mapping[str, Any]) -> VitSpec:
    return read_vit(config.get("vision_config") or {}, DEFAULTS)


class Vision(Base):
    """Tower, then projection."""

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, absent={"rms_norm_eps": 1e-5})

    @staticmethod
    def text_name(name: str) -> str | None:
        if name.startswith("lm_head."):
            return name
        own = name.removeprefix("model.")
        return f"model.{own.removeprefix('text_model.')}" if own.startswith("text_model.") else None

    @staticmethod
    def encoder_name(name: str) -> str | None:
        own = name.removeprefix("model.")
        return own if own.startswith((TOWER, "connector.")) else None

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tower, side = _tower(config), config.get("scale_factor", 2)
        rows, columns = cls.text_config(config)["hidden_size"], tower.hidden_size * side**2
        return siglip_weights(tower, TOWER) | linear_shapes(PROJECTION, rows, columns, bias=False)

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._spec = _tower(config)
        self._tower = Siglip(self._spec, read, TOWER)
        self._projection = Linear(read, PROJECTION, bias=False)
        self._side = config.get("scale_factor", 2)
        self._positions: dict[tuple[int, int], Tensor] = {}

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        pixels_NCHW = normalised(inputs, self._device, self._dtype)
        height, width = pixels_NCHW.shape[2:]
        positions_P = self._positions_of(height // self._spec.patch_size, width // self._spec.patch_size)
        states_NPD = self._tower(pixels_NCHW, position_ids_BP=positions_P)
        return of_pictures(self._projection(joined_squares(states_NPD, self._side)), inputs)

    def _positions_of(self, rows: int, columns: int) -> Tensor:
        """The tower's position of each patch of a tile of so many patches."""
        if (rows, columns) not in self._positions:
            side = self._spec.side
            ids_RC = _buckets(rows, side)[:, None] * side + _buckets(columns, side)
            self._positions[rows, columns] = to_device(ids_RC.flatten().numpy(), self._device)
        return self._positions[rows, columns]


def _buckets(count: int, side: int) -> Tensor:
    """Which of `side` equal parts of a line each of `count` points lies in. In float32 and in these steps, as transformers does
    it: exact arithmetic would give other parts where a point lies on a border."""
    borders = torch.arange(1 / side, 1.0, 1 / side)
    points = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    return torch.bucketize(points.clamp(max=1.0 - 1e-6), borders, right=True)
