"""The parts of a decoder layer: Linear, Attention, GatedMLP.

Matrices that read the same input are joined at load (q, k and v; gate and up): one product instead of two or three.
Owns torch weights; knows no file format and no layout of KV memory. Shape letters: see kernels/ops.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.ops import NetworkParts, NetworkShape, PagedAttention


class Loader:
    """Weights under one prefix of names, brought to the network's dtype and device."""

    __slots__ = ("_parts", "_prefix")

    def __init__(self, parts: NetworkParts, prefix: str) -> None:
        self._parts = parts
        self._prefix = prefix

    @property
    def shape(self) -> NetworkShape:
        return self._parts.shape

    @property
    def ops(self) -> Mapping[str, Any]:
        return self._parts.ops

    def under(self, prefix: str) -> "Loader":
        return Loader(self._parts, self._prefix + prefix)

    def tensor(self, name: str) -> Tensor:
        return self._parts.weights.tensor(self._prefix + name).to(self._parts.device, self._parts.dtype)

    def linear(self, *names: str, bias: bool) -> "Linear":
        """One Linear out of several that read the same input."""
        weights = [self.tensor(f"{name}.weight") for name in names]
        biases = [self.tensor(f"{name}.bias") for name in names] if bias else []
        return Linear(_joined(weights), _joined(biases) if biases else None)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class Linear:
    """A matrix product, with or without a bias."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class Attention:
    """Self-attention with grouped key/value heads over paged KV memory."""

    def __init__(self, loader: Loader, index: int, attention: PagedAttention) -> None:
        shape = loader.shape
        self._index = index
        self._heads, self._kv_heads, self._dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._eps = shape.rms_norm_eps
        self._qkv = loader.linear("q_proj", "k_proj", "v_proj", bias=shape.qkv_bias)
        self._out = loader.linear("o_proj", bias=shape.o_bias)
        self._qk_norm = (loader.tensor("q_norm.weight"), loader.tensor("k_norm.weight")) if shape.qk_norm else None
        self._attention = attention
        self._norm = loader.ops["norm.rms"]
        self._rope = loader.ops["rope.apply"]

    def forward(self, x_TE: Tensor, angles: tuple[Tensor, ...], prepared: Any) -> Tensor:
        heads, both = self._heads, self._heads + self._kv_heads
        qkv_TJD = self._qkv.forward(x_TE).view(x_TE.shape[0], -1, self._dim)  # J = H + 2K
        qk_TJD = qkv_TJD[:, :both]
        if self._qk_norm is not None:
            q_norm, k_norm = self._qk_norm
            qk_TJD = torch.cat(
                (self._norm(qk_TJD[:, :heads], q_norm, self._eps), self._norm(qk_TJD[:, heads:], k_norm, self._eps)), dim=1
            )
        qk_TJD = self._rope(qk_TJD, *angles)
        out_THD = self._attention.attend(prepared, self._index, qk_TJD[:, :heads], qk_TJD[:, heads:], qkv_TJD[:, both:])
        return self._out.forward(out_THD.reshape(x_TE.shape[0], -1))


class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, loader: Loader) -> None:
        self._gate_up = loader.linear("gate_proj", "up_proj", bias=loader.shape.mlp_bias)
        self._down = loader.linear("down_proj", bias=loader.shape.mlp_bias)
        self._silu_mul = loader.ops["mlp.silu_mul"]

    def forward(self, x_TE: Tensor) -> Tensor:
        return self._down.forward(self._silu_mul(self._gate_up.forward(x_TE)))
