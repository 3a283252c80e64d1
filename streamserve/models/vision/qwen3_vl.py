"""Qwen3-VL: a learned embedding of each place beside the turning; some layers' output goes to the language model as well.

Owns its layers and mergers, and what its config.json leaves out. What goes beside the embeddings is added to the language
model's stream behind its first layers (DeepStack, arXiv 2406.04334). Shape letters as in _qwen.py.
"""

from collections.abc import Mapping
from functools import partial
from math import isqrt
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
    attention_shapes,
    patch_shapes,
    read_encoder,
    text_config,
)
from streamserve.models.vision._vit import ACTIVATIONS, Linear, Norm, activation_name, linear_shapes, norm_shapes

EPS = 1e-6
ENCODER_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
    "hidden_act": "gelu_pytorch_tanh",
}
TEXT_DEFAULTS = {"rope_theta": 5e5, "max_position_embeddings": 128000, "head_dim": 128}
SECTIONS = (24, 20, 20)


class _Layer:
    def __init__(self, read: Read, at: str, num_heads: int, activation: str) -> None:
        self._norm1, self._norm2 = Norm(read, f"{at}norm1", EPS), Norm(read, f"{at}norm2", EPS)
        self._attention = Attention(read, f"{at}attn.", num_heads)
        self._up, self._down = Linear(read, f"{at}mlp.linear_fc1"), Linear(read, f"{at}mlp.linear_fc2")
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x_FNE: Tensor, tables: Tables) -> Tensor:
        x_FNE = x_FNE + self._attention(self._norm1(x_FNE), tables.turns_N1d, ())
        return x_FNE + self._down(self._activate(self._up(self._norm2(x_FNE))))


class _Merger:
    """Squares of patches to embeddings; the norm is over each patch, or over a square."""

    def __init__(self, read: Read, at: str, num_merged: int, *, is_square_normed: bool) -> None:
        self._num_merged, self._is_square_normed = num_merged, is_square_normed
        self._norm = Norm(read, f"{at}norm", EPS)
        self._widen, self._project = Linear(read, f"{at}linear_fc1"), Linear(read, f"{at}linear_fc2")

    def __call__(self, x_FNE: Tensor) -> Tensor:
        x = x_FNE if self._is_square_normed else self._norm(x_FNE)
        x = x.reshape(len(x), -1, self._num_merged * x.shape[-1])
        return self._project(F.gelu(self._widen(self._norm(x) if self._is_square_normed else x)))


class Vision(QwenVision):
    """See above."""

    has_patch_bias = True

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, "qwen3", TEXT_DEFAULTS, SECTIONS, is_interleaved=True)

    @classmethod
    def spec_of(cls, config: Mapping[str, Any]) -> EncoderSpec:
        return read_encoder(config, ENCODER_DEFAULTS, hidden="hidden_size", out="out_hidden_size")

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        spec, known = cls.spec_of(config), _known(config)
        hidden, wide = spec.hidden_size, spec.hidden_size * spec.num_merged
        shapes = patch_shapes(spec, bias=True) | {"pos_embed.weight": (known["num_position_embeddings"], hidden)}
        for index in range(spec.depth):
            at = f"blocks.{index}."
            shapes |= norm_shapes(f"{at}norm1", hidden) | norm_shapes(f"{at}norm2", hidden) | attention_shapes(spec, f"{at}attn.")
            shapes |= linear_shapes(f"{at}mlp.linear_fc1", spec.inner_size, hidden)
            shapes |= linear_shapes(f"{at}mlp.linear_fc2", hidden, spec.inner_size)
        mergers = {"merger.": hidden, **{_deep_name(i): wide for i in range(len(known["deepstack_visual_indexes"]))}}
        for at, normed in mergers.items():
            shapes |= norm_shapes(f"{at}norm", normed) | linear_shapes(f"{at}linear_fc1", wide, wide)
            shapes |= linear_shapes(f"{at}linear_fc2", spec.out_size, wide)
        return shapes

    @classmethod
    def deepstack_of(cls, config: Mapping[str, Any]) -> int:
        return len(_known(config)["deepstack_visual_indexes"])

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, read, device=device, dtype=dtype)
        spec, known = self._spec, _known(config)
        self._places_PE = read("pos_embed.weight")
        self._side = isqrt(len(self._places_PE))
        activation = activation_name(known["hidden_act"])
        self._layers = [_Layer(read, f"blocks.{index}.", spec.num_heads, activation) for index in range(spec.depth)]
        self._merger = _Merger(read, "merger.", spec.num_merged, is_square_normed=False)
        self._deep = {
            index: _Merger(read, _deep_name(i), spec.num_merged, is_square_normed=True)
            for i, index in enumerate(known["deepstack_visual_indexes"])
        }
        self.num_deepstack = self.deepstack_of(config)

    def parts(self, tables: Tables) -> list[Layer]:
        return [partial(self._whole, tables)]  # middle layers give a part of what comes out

    def _whole(self, tables: Tables, x_FNE: Tensor) -> Tensor:
        x_FNE = x_FNE + self._places(tables).to(x_FNE.dtype)
        deep: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            x_FNE = layer(x_FNE, tables)
            if index in self._deep:
                deep[index] = self._deep[index](x_FNE)
        return torch.cat((self._merger(x_FNE), *(deep[index] for index in self._deep)), dim=-1)

    def _places(self, tables: Tables) -> Tensor:
        """The learned square of embeddings stretched over a frame, between its four neighbours each: its corners stay corners."""
        rows, row_weights = self._neighbours(tables.row_N, tables.rows)
        columns, column_weights = self._neighbours(tables.column_N, tables.columns)
        neighbours_N4 = (rows[:, :, None] * self._side + columns[:, None, :]).flatten(1)
        weights_N4 = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
        return (F.embedding(neighbours_N4, self._places_PE) * weights_N4.unsqueeze(-1)).sum(dim=1)

    def _neighbours(self, place_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Of one axis: the two that lie next to each patch's place, and how much each counts."""
        at_N = place_N.float() * (self._side - 1) / max(size - 1, 1)
        low_N = at_N.floor()
        share_N = at_N - low_N
        both_N2 = torch.stack((low_N, low_N + 1), dim=1).long().clamp_(max=self._side - 1)
        return both_N2, torch.stack((1 - share_N, share_N), dim=1)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {**ENCODER_DEFAULTS, **config.get("vision_config", {})}
    count = known["num_position_embeddings"]
    if not isinstance(count, int) or count <= 0 or isqrt(count) ** 2 != count:
        raise CheckpointError(f"config.json: vision_config's num_position_embeddings is {count!r}; a square number is needed")
    return known


def _deep_name(index: int) -> str:
    return f"deepstack_merger_list.{index}."
