"""Pixtral's vision transformer (arXiv 2410.07073): pictures of any size, heads turned by row and column, RMSNorm.

Owns its weights and arithmetic. Pictures of one call have one size: each attends to itself only. Shape letters as in _vit.py.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision._pixels import to_device
from streamserve.models.vision._vit import ACTIVATIONS, Linear, VitSpec, linear_shapes, patch_rows, read_vit

EPS = 1e-5  # of all its norms, whatever config.json says
# What a vision_config of this type means where it is silent.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": EPS,
}


def read_pixtral(config: Mapping[str, Any]) -> tuple[VitSpec, float]:
    """The shape and the base of the rotary frequencies. Raises CheckpointError."""
    parameters = config.get("rope_parameters") or {}
    return read_vit(config, DEFAULTS), float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)


def pixtral_weights(spec: VitSpec, prefix: str, *, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that Pixtral reads."""
    hidden, inner, patch = spec.hidden_size, spec.intermediate_size, spec.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}patch_conv.weight": (hidden, spec.num_channels, patch, patch),
        f"{prefix}ln_pre.weight": (hidden,),
    }
    for index in range(num_layers):
        at = f"{prefix}transformer.layers.{index}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= linear_shapes(f"{at}attention.{part}", hidden, hidden, bias=False)
        for part in ("gate_proj", "up_proj"):
            shapes |= linear_shapes(f"{at}feed_forward.{part}", inner, hidden, bias=False)
        shapes |= linear_shapes(f"{at}feed_forward.down_proj", hidden, inner, bias=False)
        shapes |= {f"{at}attention_norm.weight": (hidden,), f"{at}ffn_norm.weight": (hidden,)}
    return shapes


class RMSNorm:
    """x over its root mean square, in float32."""

    __slots__ = ("_eps", "_weight")

    def __init__(self, read: Read, name: str, eps: float) -> None:
        self._weight, self._eps = read(f"{name}.weight"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Layer:
    """Attention among the patches of a picture, then a gated perceptron; a norm before each."""

    __slots__ = ("_activate", "_down", "_ffn_norm", "_gate_up", "_norm", "_num_heads", "_out", "_qkv")

    def __init__(self, spec: VitSpec, read: Read, at: str) -> None:
        self._num_heads, self._activate = spec.num_heads, ACTIVATIONS[spec.activation]
        self._norm, self._ffn_norm = RMSNorm(read, f"{at}attention_norm", EPS), RMSNorm(read, f"{at}ffn_norm", EPS)
        self._qkv = Linear(read, *(f"{at}attention.{part}" for part in ("q_proj", "k_proj", "v_proj")), bias=False)
        self._out = Linear(read, f"{at}attention.o_proj", bias=False)
        self._gate_up = Linear(read, f"{at}feed_forward.gate_proj", f"{at}feed_forward.up_proj", bias=False)
        self._down = Linear(read, f"{at}feed_forward.down_proj", bias=False)

    def __call__(self, x_BPD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        num_pictures, num_patches, hidden = x_BPD.shape
        qkv = self._qkv(self._norm(x_BPD)).view(num_pictures, num_patches, 3, self._num_heads, hidden // self._num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v)
        x_BPD = x_BPD + self._out(mixed.transpose(1, 2).flatten(2))
        gate, up = self._gate_up(self._ffn_norm(x_BPD)).chunk(2, dim=-1)
        return x_BPD + self._down(self._activate(gate) * up)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Pixtral:
    """The encoder's first `num_layers` layers. Names of weights are `prefix` and "patch_conv.weight" and so on."""

    def __init__(
        self, spec: VitSpec, theta: float, read: Read, prefix: str, *, num_layers: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self._theta, self._device, self._dtype = theta, device, dtype
        self._patches = Linear(read, f"{prefix}patch_conv", bias=False)
        self._norm = RMSNorm(read, f"{prefix}ln_pre", EPS)
        self._layers = [_Layer(spec, read, f"{prefix}transformer.layers.{index}.") for index in range(num_layers)]
        self._angles = lru_cache(maxsize=32)(self._angles_of)

    def states(self, pixels_BCHW: Tensor, *, keep: Collection[int] = ()) -> dict[int, Tensor]:
        """The stream [B, P, D] behind as many layers as each of `keep` says and behind the last."""
        patch = self.spec.patch_size
        x_BPD = self._norm(self._patches(patch_rows(pixels_BCHW, patch)))
        cos, sin = self._angles(pixels_BCHW.shape[2] // patch, pixels_BCHW.shape[3] // patch)
        kept = {0: x_BPD} if 0 in keep else {}
        for index, layer in enumerate(self._layers, 1):
            x_BPD = layer(x_BPD, cos, sin)
            if index in keep:
                kept[index] = x_BPD
        kept[len(self._layers)] = x_BPD
        return kept

    def _angles_of(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, half a head]: even frequencies turn with the row, odd ones with the column."""
        head_dim = self.spec.hidden_size // self.spec.num_heads
        frequencies = 1.0 / self._theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        by_row = torch.arange(rows)[:, None] * frequencies[0::2]
        by_column = torch.arange(columns)[:, None] * frequencies[1::2]
        angles = torch.cat((by_row.repeat_interleave(columns, dim=0), by_column.repeat(rows, 1)), dim=1)
        cos, sin = (to_device(part.numpy(), self._device).to(self._dtype) for part in (angles.cos(), angles.sin()))
        return cos, sin
