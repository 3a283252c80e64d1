"""Qwen2.5-VL (arXiv 2502.13923): most layers look within windows of 112 x 112 pixels only; RMS norms and gated perceptrons.

Owns its layers and merger, and what its config.json leaves out. Shape letters as in _qwen.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision._qwen import (
    Attention,
    EncoderSpec,
    Layer,
    QwenVision,
    Tables,
    Windows,
    attention_shapes,
    in_parts,
    patch_shapes,
    read_encoder,
    text_config,
)
from streamserve.models.vision._vit import Linear, linear_shapes
from streamserve.models.vision.qwen2_vl import SECTIONS, TEXT_DEFAULTS

EPS = 1e-6
ENCODER_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
ALIGNMENT = 16  # a product over 3,420 numbers, whose rows begin at no whole 16 bytes, takes a slow way on a GPU


class RmsNorm:
    """x / rms(x) * weight."""

    def __init__(self, read: Read, name: str) -> None:
        self._weight = read(f"{name}.weight")

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, EPS)


class GatedMLP:
    """down(silu(gate(x)) * up(x)). Its inner size is filled up with zeros, which add nothing, to a multiple of ALIGNMENT."""

    def __init__(self, read: Read, at: str, inner_size: int) -> None:
        more = -inner_size % ALIGNMENT
        self._weight = torch.cat([F.pad(read(f"{at}{part}_proj.weight"), (0, 0, 0, more)) for part in ("gate", "up")])
        self._bias = torch.cat([F.pad(read(f"{at}{part}_proj.bias"), (0, more)) for part in ("gate", "up")])
        self._down, self._down_bias = F.pad(read(f"{at}down_proj.weight"), (0, more)), read(f"{at}down_proj.bias")

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self._weight, self._bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), self._down, self._down_bias)


class _Layer:
    def __init__(self, read: Read, at: str, spec: EncoderSpec) -> None:
        self._norm1, self._norm2 = RmsNorm(read, f"{at}norm1"), RmsNorm(read, f"{at}norm2")
        self._attention = Attention(read, f"{at}attn.", spec.num_heads)
        self._mlp = GatedMLP(read, f"{at}mlp.", spec.inner_size)

    def __call__(self, x_FNE: Tensor, turns_N1d: Tensor, windows: tuple[Windows, ...]) -> Tensor:
        x_FNE = x_FNE + self._attention(self._norm1(x_FNE), turns_N1d, windows)
        return x_FNE + self._mlp(self._norm2(x_FNE))


class Vision(QwenVision):
    """See above."""

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, "qwen2", TEXT_DEFAULTS, SECTIONS, is_interleaved=False)

    @classmethod
    def spec_of(cls, config: Mapping[str, Any]) -> EncoderSpec:
        if (activation := config.get("vision_config", {}).get("hidden_act", "silu")) != "silu":
            raise CheckpointError(f"config.json: vision_config's hidden_act is {activation!r}; supported is silu")
        return read_encoder(config, ENCODER_DEFAULTS, hidden="hidden_size", out="out_hidden_size")

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        spec = cls.spec_of(config)
        hidden, inner, wide = spec.hidden_size, spec.inner_size, spec.hidden_size * spec.num_merged
        shapes = patch_shapes(spec, bias=False)
        for index in range(spec.depth):
            at = f"blocks.{index}."
            shapes |= {f"{at}norm1.weight": (hidden,), f"{at}norm2.weight": (hidden,)} | attention_shapes(spec, f"{at}attn.")
            shapes |= linear_shapes(f"{at}mlp.gate_proj", inner, hidden) | linear_shapes(f"{at}mlp.up_proj", inner, hidden)
            shapes |= linear_shapes(f"{at}mlp.down_proj", hidden, inner)
        shapes |= {"merger.ln_q.weight": (hidden,)} | linear_shapes("merger.mlp.0", wide, wide)
        return shapes | linear_shapes("merger.mlp.2", spec.out_size, wide)

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, read, device=device, dtype=dtype)
        self._layers = [_Layer(read, f"blocks.{index}.", self._spec) for index in range(self._spec.depth)]
        self._norm = RmsNorm(read, "merger.ln_q")
        self._widen, self._project = Linear(read, "merger.mlp.0"), Linear(read, "merger.mlp.2")

    def parts(self, tables: Tables) -> list[Layer]:
        windows = [() if index in self._spec.full_layers else tables.windows for index in range(self._spec.depth)]
        layers = [
            partial(layer, turns_N1d=tables.turns_N1d, windows=own) for layer, own in zip(self._layers, windows, strict=True)
        ]
        return in_parts(layers, lambda x: self._project(F.gelu(self._widen(self.squares(self._norm(x))))))
