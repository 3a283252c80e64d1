"""Qwen2-VL (arXiv 2409.12191): every patch of a frame looks at all of it; LayerNorms and plain perceptrons.

Owns its layers and merger, and what its config.json leaves out. Shape letters as in _qwen.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision._qwen import (
    Attention,
    EncoderSpec,
    Layer,
    QwenVision,
    Tables,
    attention_shapes,
    in_parts,
    patch_shapes,
    read_encoder,
    text_config,
)
from streamserve.models.vision._vit import ACTIVATIONS, Linear, Norm, activation_name, linear_shapes, norm_shapes

EPS = 1e-6
ENCODER_DEFAULTS = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
TEXT_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768}
SECTIONS = (16, 24, 24)


class _Layer:
    def __init__(self, read: Read, at: str, num_heads: int, activation: str) -> None:
        self._norm1, self._norm2 = Norm(read, f"{at}norm1", EPS), Norm(read, f"{at}norm2", EPS)
        self._attention = Attention(read, f"{at}attn.", num_heads)
        self._up, self._down, self._activate = Linear(read, f"{at}mlp.fc1"), Linear(read, f"{at}mlp.fc2"), ACTIVATIONS[activation]

    def __call__(self, x_FNE: Tensor, tables: Tables) -> Tensor:
        x_FNE = x_FNE + self._attention(self._norm1(x_FNE), tables.turns_N1d, ())
        return x_FNE + self._down(self._activate(self._up(self._norm2(x_FNE))))


class Vision(QwenVision):
    """See above."""

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, "qwen2", TEXT_DEFAULTS, SECTIONS, is_interleaved=False)

    @classmethod
    def spec_of(cls, config: Mapping[str, Any]) -> EncoderSpec:
        return read_encoder(config, ENCODER_DEFAULTS, hidden="embed_dim", out="hidden_size")

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        spec = cls.spec_of(config)
        hidden, wide = spec.hidden_size, spec.hidden_size * spec.num_merged
        shapes = patch_shapes(spec, bias=False)
        for index in range(spec.depth):
            at = f"blocks.{index}."
            shapes |= norm_shapes(f"{at}norm1", hidden) | norm_shapes(f"{at}norm2", hidden) | attention_shapes(spec, f"{at}attn.")
            shapes |= linear_shapes(f"{at}mlp.fc1", spec.inner_size, hidden)
            shapes |= linear_shapes(f"{at}mlp.fc2", hidden, spec.inner_size)
        shapes |= norm_shapes("merger.ln_q", hidden) | linear_shapes("merger.mlp.0", wide, wide)
        return shapes | linear_shapes("merger.mlp.2", spec.out_size, wide)

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, read, device=device, dtype=dtype)
        spec = self._spec
        activation = activation_name(config.get("vision_config", {}).get("hidden_act", "quick_gelu"))
        self._layers = [_Layer(read, f"blocks.{index}.", spec.num_heads, activation) for index in range(spec.depth)]
        self._norm = Norm(read, "merger.ln_q", EPS)
        self._widen, self._project = Linear(read, "merger.mlp.0"), Linear(read, "merger.mlp.2")

    def parts(self, tables: Tables) -> list[Layer]:
        layers = [partial(layer, tables=tables) for layer in self._layers]
        return in_parts(layers, lambda x: self._project(F.gelu(self._widen(self.squares(self._norm(x))))))
