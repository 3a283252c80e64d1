"""A head on a GPU: one decoder layer that reads what another network shows, and the token behind it (models/heads.py).

Owns the layer's weights on the device and how it is run: of pairs that are only remembered, keys and values; of those that guess,
one per row, all of it. How stream and token become the layer's input, and what its output is, a subclass says. Nothing here waits
for the device, so a pass can be captured in a graph. Shape letters: see kernels/ops.py; X = H * D.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.impl import triton_gemv as gemv
from streamserve.kernels.impl.triton_decode_attention import DecodeAttention
from streamserve.kernels.impl.triton_decoder import Layer, Loader, few_rows, head_product
from streamserve.kernels.impl.triton_mlp import silu_mul
from streamserve.kernels.impl.triton_norm import add_rms_norm, rms_norm
from streamserve.kernels.impl.triton_rope import rope_table, write_prompt
from streamserve.kernels.ops import NetworkParts, NetworkShape, StepInputs


@dataclass(frozen=True, slots=True)
class _KeysOnly:
    """Of a layer from whose product the queries are left out."""

    num_heads: int = 0


class TritonHead:
    """`parts.shape` is that of the layer, whose weights' names begin with `prefix`; `parts.max_rows`: most rows of a pass that
    guesses. `input_size`: what q, k and v read; None: the stream."""

    def __init__(self, parts: NetworkParts, prefix: str, input_size: int | None = None) -> None:
        shape: NetworkShape = parts.shape
        gpu = CUDA.find() if parts.device.type == "cuda" else None
        self._eps = shape.rms_norm_eps
        self._pdl = gpu is not None and gpu.supports_pdl
        self._load = Loader(parts.weights, parts.dtype, parts.device)
        self._layer = Layer(self._load, prefix, shape, input_size)
        self._width = shape.num_heads * shape.head_dim
        freq, factor = shape.inv_freq()
        self._cos_sin = rope_table(freq, factor, parts.max_len, parts.device)
        num_sms = gpu.num_sms if gpu is not None else 1
        self._attention = DecodeAttention(shape, max_rows=parts.max_rows, num_sms=num_sms, device=parts.device)
        has_bias = shape.o_bias or shape.mlp_bias
        self._max_few = 0 if has_bias else few_rows(shape.hidden_size, parts.dtype)

    def join(self, features_TE: Tensor, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs: what attention is added to, a tensor of its own, and what its products read."""
        raise NotImplementedError

    def remember(self, features_TE: Tensor, inputs: StepInputs) -> None:
        """Keys and values of pairs, one for each token of `inputs`: what stands for the stream there, and the token behind."""
        layer = self._layer
        _, read_TJ = self.join(features_TE, inputs.tokens_T)
        bias = None if layer.qkv_bias is None else layer.qkv_bias[self._width :]
        kv_TJ = F.linear(read_TJ, layer.qkv[self._width :], bias)
        norms = layer.q_norm, layer.k_norm
        write_prompt(kv_TJ, replace(inputs, num_decode=0), 0, self._cos_sin, *norms, self._eps, _KeysOnly())

    def guess(self, features_RE: Tensor, inputs: StepInputs) -> Tensor:
        """The same of one pair per row of `inputs`, and their states: [R, E]."""
        layer, eps, pdl = self._layer, self._eps, self._pdl
        x_RE, read_RJ = self.join(features_RE, inputs.tokens_T)
        qkv_RJ = F.linear(read_RJ, layer.qkv, layer.qkv_bias)
        out_RX = x_RE.new_empty((len(x_RE), self._width))
        self._attention.attend(qkv_RJ, inputs, 0, self._cos_sin, layer.q_norm, layer.k_norm, eps, out_RX)
        if len(x_RE) <= self._max_few:
            gemv.linear_add(out_RX, layer.o, x_RE, pdl=pdl)
            inner_RF = gemv.norm_gate_up(x_RE, layer.mlp_norm, layer.gate_up, eps, pdl=pdl)
            gemv.linear_add(inner_RF, layer.down, x_RE, pdl=pdl)
            return x_RE
        h_RE = add_rms_norm(x_RE, F.linear(out_RX, layer.o, layer.o_bias), layer.mlp_norm, eps)
        x_RE += F.linear(silu_mul(F.linear(h_RE, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
        return x_RE

    def _logits(self, x_RE: Tensor, norm_E: Tensor, head_VE: Tensor, out_RV: Tensor) -> None:
        """Of states before their norm."""
        if len(x_RE) <= self._max_few:
            gemv.norm_logits(x_RE, norm_E, head_VE, self._eps, None, out_RV, pdl=self._pdl)
        else:
            head_product(rms_norm(x_RE, norm_E, self._eps), head_VE, out_RV)
