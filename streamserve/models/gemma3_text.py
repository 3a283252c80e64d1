"""Gemma 3's language model: norms on both sides of attention and MLP, gelu in the MLP, norms on q and k, and layers of two kinds:
most look back over a window and turn heads by a RoPE of their own, every sixth sees everything.

Only the torch network computes it: `only_torch` tells the kernels of other networks. See models/spec.py for `window_layers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import NetworkParts, NetworkShape, Packed, Weights, rope_angles
from streamserve.models.decoder import Decoder, Layer, decoder_weights
from streamserve.models.layers import Attention, GatedMLP, Loader
from streamserve.models.spec import ModelSpec, Rope, Traits

ACTIVATION = "gelu_pytorch_tanh"


class Model(Decoder):
    """Gemma 3 without its pictures."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if config.get(key):
                raise CheckpointError(f"config.json: {key} is {config[key]!r}, which is not supported")
        bias = bool(config.get("attention_bias", False))
        return Traits(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
            activation=ACTIVATION,
            tie_embeddings=True,
            rope_theta=1_000_000.0,
            local_rope=_local_rope(config),
            sliding_window=config.get("sliding_window", 4096),
            window_layers=_window_layers(config),
            score_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
            only_torch="layers with and without a window, gelu, and norms behind attention and MLP",
        )

    @classmethod
    def weights(cls, shape: NetworkShape) -> dict[str, tuple[int, ...]]:
        names = decoder_weights(shape)
        for i in range(shape.num_layers):
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                names[f"model.layers.{i}.{norm}.weight"] = (shape.hidden_size,)
        return names

    def __init__(self, parts: NetworkParts) -> None:
        assert isinstance(parts.shape, ModelSpec)
        self._spec = parts.shape
        super().__init__(replace(parts, weights=_PlainNorms(parts.weights, self._spec)))
        freq, _ = self._spec.local_inv_freq()
        self._local_inv_freq = torch.tensor(freq, dtype=torch.float32, device=parts.device)
        # A tensor, so that it is rounded to the stream's type as it was in training.
        self._embedding_scale = torch.tensor(self._spec.hidden_size**0.5, dtype=parts.dtype, device=parts.device)

    def layer(self, loader: Loader, index: int) -> Layer:
        attention = Attention(loader.under("self_attn."), index, self._attention_op)
        has_window = self._spec.window_layers is not None and index in self._spec.window_layers
        return _Layer(loader, attention, _GeluMLP(loader.under("mlp.")), has_window=has_window)

    def angles(self, positions_T: Tensor) -> tuple[Tensor, ...]:
        """cos and sin of layers that see everything, then of those with a window."""
        return (*super().angles(positions_T), *rope_angles(positions_T, self._local_inv_freq, 1.0, self._dtype))

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Words are scaled, pictures are not."""
        return super().embed(token_ids_T) * self._embedding_scale


class _Layer(Layer):
    """What attention and MLP give is normed once more before it is added to the stream."""

    def __init__(self, loader: Loader, attention: Attention, mlp: GatedMLP, *, has_window: bool) -> None:
        super().__init__(loader, attention, mlp)
        self._behind_attention = self._mlp_norm
        self._mlp_norm = loader.tensor("pre_feedforward_layernorm.weight")
        self._behind_mlp = loader.tensor("post_feedforward_layernorm.weight")
        self._has_window = has_window

    def forward(self, x_TE: Tensor, angles: tuple[Tensor, ...], prepared: Any) -> Tensor:
        turn = angles[2:] if self._has_window else angles[:2]
        y_TE = self._attention.forward(self._normed(x_TE, self._attention_norm), turn, prepared)
        x_TE = x_TE + self._normed(y_TE, self._behind_attention)
        y_TE = self._mlp.forward(self._normed(x_TE, self._mlp_norm))
        return x_TE + self._normed(y_TE, self._behind_mlp)

    def _normed(self, x_TE: Tensor, weight_E: Tensor) -> Tensor:
        normed_TE: Tensor = self._norm(x_TE, weight_E, self._eps)
        return normed_TE


class _GeluMLP(GatedMLP):
    """down(gelu(gate(x)) * up(x))."""

    def forward(self, x_TE: Tensor) -> Tensor:
        gate_TF, up_TF = self._gate_up.forward(x_TE).chunk(2, dim=-1)
        inner_TF: Tensor = F.gelu(gate_TF, approximate="tanh") * up_TF
        return self._down.forward(inner_TF)


@dataclass(frozen=True, slots=True)
class _PlainNorms:
    """The weights with norms as other families have them. Implements kernels.ops.Weights.

    Gemma's norms multiply by 1 + weight. Its scores are scaled by a number of the config's instead of by the head size; the norm
    of q takes the difference, so that no attention needs to know."""

    weights: Weights
    spec: ModelSpec

    def tensor(self, name: str) -> Tensor:
        tensor = self.weights.tensor(name)
        if not name.endswith("norm.weight"):
            return tensor
        tensor = 1.0 + tensor.float()
        if name.endswith("q_norm.weight") and self.spec.score_scale is not None:
            tensor *= self.spec.score_scale * self.spec.head_dim**0.5
        return tensor

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))

    def packed(self, name: str) -> Packed | None:
        return self.weights.packed(name)


def _window_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """By `layer_types`; older files say only that every so many-th layer has no window."""
    if kinds := config.get("layer_types"):
        if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
            raise CheckpointError(f"config.json: layer_types names {unknown[0]!r}; supported are sliding and full attention")
        return frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    every = config.get("sliding_window_pattern", 6)
    return frozenset(i for i in range(config.get("num_hidden_layers", 0)) if (i + 1) % every)


def _local_rope(config: Mapping[str, Any]) -> Rope:
    given = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if (kind := given.get("rope_type", "default")) != "default":
        raise CheckpointError(f"config.json: rope type of layers with a window is {kind!r}; supported is default")
    return Rope(float(given.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0))
