"""The decoder that Llama, Qwen and Mistral share: token embedding, layers of attention and gated MLP, norm, head.

A model file subclasses Decoder and declares only what differs. Owns the torch weights; knows no file format, no layout
of KV memory and no scheduling. Shape letters: see kernels/ops.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.ops import Batch, Embedded, NetworkParts, NetworkShape, rope_angles
from streamserve.models.layers import Attention, GatedMLP, Loader
from streamserve.models.spec import ModelSpec, Traits


class Layer:
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, loader: Loader, attention: Attention, mlp: GatedMLP) -> None:
        self._attention_norm = loader.tensor("input_layernorm.weight")
        self._mlp_norm = loader.tensor("post_attention_layernorm.weight")
        self._attention = attention
        self._mlp = mlp
        self._norm = loader.ops["norm.rms"]
        self._eps = loader.shape.rms_norm_eps

    def forward(self, x_TE: Tensor, angles: tuple[Tensor, ...], prepared: Any) -> Tensor:
        x_TE = x_TE + self._attention.forward(self._norm(x_TE, self._attention_norm, self._eps), angles, prepared)
        return x_TE + self._mlp.forward(self._norm(x_TE, self._mlp_norm, self._eps))


class Decoder:
    """A network in torch. Implements kernels.ops.Network."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        """What this family fixes by its code rather than in config.json."""
        return Traits()

    @classmethod
    def weights(cls, shape: NetworkShape) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, by Hugging Face's names. A checkpoint must hold these and no others."""
        return decoder_weights(shape)

    @classmethod
    def optional_weights(cls, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Weights that answers do not need: a checkpoint may hold them, all or none. Layers that guess tokens ahead."""
        return {}

    def __init__(self, parts: NetworkParts) -> None:
        shape = parts.shape
        loader = Loader(parts, "")
        self._device = parts.device
        self._dtype = parts.dtype
        self._eps = shape.rms_norm_eps
        freq, self._rope_factor = shape.inv_freq()
        self._inv_freq = torch.tensor(freq, dtype=torch.float32, device=parts.device)
        self._rope_axes = torch.tensor(shape.rope_axes(), dtype=torch.int64, device=parts.device)
        self._attention_op = parts.ops["attention.paged"](shape)
        self._norm_op = parts.ops["norm.rms"]
        self._embedding_VE = loader.tensor("model.embed_tokens.weight")
        self._layers = [self.layer(Loader(parts, f"model.layers.{i}."), i) for i in range(shape.num_layers)]
        self._norm_E = loader.tensor("model.norm.weight")
        self._head_VE = self._embedding_VE if shape.tie_embeddings else loader.tensor("lm_head.weight")

    def layer(self, loader: Loader, index: int) -> Layer:
        """One layer; a family with another structure overrides this."""
        return Layer(loader, Attention(loader.under("self_attn."), index, self._attention_op), GatedMLP(loader.under("mlp.")))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        return self._logits(batch, self._stream_of(batch))

    @torch.inference_mode()
    def forward_with_features(self, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See FeatureNetwork."""
        kept: list[Tensor] = []
        x_TE = self._stream_of(batch, layers, kept)
        return self._logits(batch, x_TE), kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)

    def angles(self, positions_T: Tensor) -> tuple[Tensor, ...]:
        """cos and sin of RoPE; a family that turns heads in another way overrides this."""
        return rope_angles(positions_T, self._inv_freq, self._rope_factor, self._dtype, self._rope_axes)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """See FeatureNetwork."""
        return F.embedding(token_ids_T, self._embedding_VE)

    @property
    def embedding_VE(self) -> Tensor:
        """A row for every token."""
        return self._embedding_VE

    @property
    def head_VE(self) -> Tensor:
        """What is multiplied with the last states."""
        return self._head_VE

    def last_norm(self, x_TE: Tensor) -> Tensor:
        """The norm before the head."""
        normed_TE: Tensor = self._norm_op(x_TE, self._norm_E, self._eps)
        return normed_TE

    def states(self, token_ids_T: Tensor, positions_T: Tensor, prepared: Any) -> Tensor:
        """The last hidden state of every token; `prepared` is for the attention that the network was built with."""
        return self.last_norm(self._stream(token_ids_T, positions_T, prepared))

    def _stream_of(self, batch: Batch, before: Sequence[int] = (), kept: list[Tensor] | None = None) -> Tensor:
        prepared, rope = self._attention_op.prepare(batch), batch.positions_T if batch.rope_3T is None else batch.rope_3T
        return self._stream(batch.token_ids_T, rope, prepared, before, kept, batch.embedded)

    def _logits(self, batch: Batch, x_TE: Tensor) -> Tensor:
        return F.linear(self.last_norm(x_TE[batch.logit_rows_R]), self._head_VE).float()

    def _stream(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        prepared: Any,
        before: Sequence[int] = (),
        kept: list[Tensor] | None = None,
        embedded: Embedded | None = None,
    ) -> Tensor:
        """The stream behind the last layer. `kept` gets what it was `before` these layers, in their order. `positions_T` are
        those of RoPE: [3, T] for M-RoPE."""
        angles = self.angles(positions_T)
        x_TE = self.embed(token_ids_T)
        added: list[Tensor] = []
        if embedded is not None:
            first, *added = torch.split(embedded.embeds_MX.to(x_TE.dtype), x_TE.shape[1], dim=1)
            x_TE = x_TE.index_copy(0, embedded.tokens_M, first)
        for i, layer in enumerate(self._layers):
            if i in before and kept is not None:
                kept.append(x_TE)
            x_TE = layer.forward(x_TE, angles, prepared)
            if embedded is not None and i < len(added):
                x_TE = x_TE.index_add(0, embedded.tokens_M, added[i])
        if len(self._layers) in before and kept is not None:
            kept.append(x_TE)
        return x_TE


def decoder_weights(shape: NetworkShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a network with these numbers."""
    hidden = shape.hidden_size
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tie_embeddings:
        names["lm_head.weight"] = (shape.vocab_size, hidden)
    for i in range(shape.num_layers):
        names |= layer_weights(shape, f"model.layers.{i}.")
    return names


def layer_weights(shape: NetworkShape, at: str, input_size: int | None = None) -> dict[str, tuple[int, ...]]:
    """Of one layer, whose names begin with `at`. `input_size`: what q, k and v read; None: the stream."""
    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv, read = shape.num_heads * dim, shape.num_kv_heads * dim, input_size or hidden
    names: dict[str, tuple[int, ...]] = {}
    names[at + "input_layernorm.weight"] = names[at + "post_attention_layernorm.weight"] = (hidden,)
    for part, has_bias, rows, columns in (
        ("self_attn.q_proj", shape.qkv_bias, q, read),
        ("self_attn.k_proj", shape.qkv_bias, kv, read),
        ("self_attn.v_proj", shape.qkv_bias, kv, read),
        ("self_attn.o_proj", shape.o_bias, hidden, q),
        ("mlp.gate_proj", shape.mlp_bias, inner, hidden),
        ("mlp.up_proj", shape.mlp_bias, inner, hidden),
        ("mlp.down_proj", shape.mlp_bias, hidden, inner),
    ):
        names[f"{at}{part}.weight"] = (rows, columns)
        if has_bias:
            names[f"{at}{part}.bias"] = (rows,)
    if shape.qk_norm:
        names[at + "self_attn.q_norm.weight"] = names[at + "self_attn.k_norm.weight"] = (dim,)
    return names
