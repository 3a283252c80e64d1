"""The GPU decoder: a Llama-like network over paged KV memory, in Triton kernels and the library's matrix products.

Owns the weights on the device and the choice of path: steps of a few decode rows run five kernels per layer, each reading its
weights once at memory speed (triton_gemv.py); more rows, and prompts, use the library's products with the small operations
between them fused. Nothing here waits for the device, so a step can be captured in a graph. Knows no file format and no
scheduling. Shape letters: see kernels/ops.py; X = H * D, J = (H + 2K) * D.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.impl import triton_gemv as gemv
from streamserve.kernels.impl.triton_decode_attention import DecodeAttention
from streamserve.kernels.impl.triton_drafted_attention import DraftedAttention
from streamserve.kernels.impl.triton_linear import linear as invariant_linear
from streamserve.kernels.impl.triton_mlp import silu_mul
from streamserve.kernels.impl.triton_norm import add_media, add_rms_norm, embed, rms_norm
from streamserve.kernels.impl.triton_prompt_attention import PromptAttention
from streamserve.kernels.impl.triton_rope import pick_angles, rope_table, write_prompt
from streamserve.kernels.ops import DeviceNetwork, Grouping, NetworkParts, NetworkShape, PromptRow, StepInputs, Weights
from streamserve.kernels.registry import Facts, implements

_MANY = 2048  # tokens
_HEAD_DIMS = (16, 32, 64, 128, 256)


def few_rows(hidden_size: int, dtype: torch.dtype) -> int:
    """Rows up to which five kernels per layer are ahead of the library's products and the small operations between them. Measured
    on one H200 (bench/gemv_sweep.py), ms of all products of a step at 2, 5, 8, 16 rows, beside the library's: 0.6B model 0.51,
    0.61, 0.62, 0.70 and 0.96, 0.84, 0.77, 0.78; 8B 3.97, 4.01, 4.05, 4.54 and 4.00, 4.02, 4.05, 4.07. What lies between the
    library's products costs 0.25 and 0.35 ms more; ours does it on its way. Without tensor cores, ms per step at 1, 2, 4, 8 rows:
    0.6B 0.74, 0.91, 1.06, 1.74 and 1.32, 1.24, 1.30, 1.29; 8B 4.17, 4.87, 6.41, 5.58 and 4.51, 4.65, 4.68, 4.72."""
    is_small = hidden_size <= 2048
    if gemv.has_tensor_cores(dtype):
        return 16 if is_small else 8
    return 4 if is_small else 1


def refusal(facts: Facts) -> str | None:
    """Why this decoder cannot run a model; None when it can."""
    shape: NetworkShape = facts.shape
    if shape.only_torch:
        return f"only torch's network computes {shape.only_torch}"
    if shape.head_dim not in _HEAD_DIMS:
        return f"head size {shape.head_dim} is not supported; supported are {', '.join(map(str, _HEAD_DIMS))}"
    if facts.page_size & (facts.page_size - 1):
        return f"page size {facts.page_size} is not a power of two"
    return None


@implements("network", name="triton", device="cuda", priority=10, when=lambda facts: refusal(facts) or True)
def triton_network(parts: NetworkParts) -> DeviceNetwork:
    """See TritonDecoder."""
    return TritonDecoder(parts)


class Layer:
    """Weights of one layer; matrices that read the same input are joined."""

    def __init__(self, load: "Loader", prefix: str, shape: NetworkShape, input_size: int | None = None) -> None:
        """`input_size`: what q, k and v read; None: the stream."""
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.intermediate_size
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = [(f"{attention}{name}_proj", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        gate_up = [(f"{mlp}gate_proj", inner), (f"{mlp}up_proj", inner)]
        self.attention_norm = load.vector(f"{prefix}input_layernorm.weight", hidden)
        self.qkv = load.joined(qkv, input_size or hidden)
        self.qkv_bias = load.joined_bias(qkv) if shape.qkv_bias else None
        self.q_norm = load.vector(f"{attention}q_norm.weight", shape.head_dim) if shape.qk_norm else None
        self.k_norm = load.vector(f"{attention}k_norm.weight", shape.head_dim) if shape.qk_norm else None
        self.o = load.joined([(f"{attention}o_proj", hidden)], q)
        self.o_bias = load.joined_bias([(f"{attention}o_proj", hidden)]) if shape.o_bias else None
        self.mlp_norm = load.vector(f"{prefix}post_attention_layernorm.weight", hidden)
        self.gate_up = load.joined(gate_up, hidden)
        self.gate_up_bias = load.joined_bias(gate_up) if shape.mlp_bias else None
        self.down = load.joined([(f"{mlp}down_proj", hidden)], inner)
        self.down_bias = load.joined_bias([(f"{mlp}down_proj", hidden)]) if shape.mlp_bias else None


class Loader:
    """Weights from the checkpoint straight into their place on the device."""

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = weights
        self._options = {"dtype": dtype, "device": device}

    def vector(self, name: str, size: int) -> Tensor:
        out: Tensor = torch.empty(size, **self._options)  # type: ignore[call-overload]
        self._weights.load(name, out)
        return out

    def joined(self, parts: list[tuple[str, int]], columns: int) -> Tensor:
        """Matrices (name, rows) one below the other."""
        out: Tensor = torch.empty((sum(rows for _, rows in parts), columns), **self._options)  # type: ignore[call-overload]
        at = 0
        for name, rows in parts:
            self._weights.load(f"{name}.weight", out[at : at + rows])
            at += rows
        return out

    def joined_bias(self, parts: list[tuple[str, int]]) -> Tensor:
        out: Tensor = torch.empty(sum(rows for _, rows in parts), **self._options)  # type: ignore[call-overload]
        at = 0
        for name, rows in parts:
            self._weights.load(f"{name}.bias", out[at : at + rows])
            at += rows
        return out


class TritonDecoder:
    """Implements kernels.ops.DeviceNetwork. `max_rows`: most decode rows of a step."""

    def __init__(self, parts: NetworkParts) -> None:
        shape = parts.shape
        gpu = CUDA.find() if parts.device.type == "cuda" else None
        self._shape = shape
        self._eps = shape.rms_norm_eps
        self._is_deterministic = parts.deterministic
        self._pdl = gpu is not None and gpu.supports_pdl
        load = Loader(parts.weights, parts.dtype, parts.device)
        self._embedding_VE = load.joined([("model.embed_tokens", shape.vocab_size)], shape.hidden_size)
        self._layers = [Layer(load, f"model.layers.{i}.", shape) for i in range(shape.num_layers)]
        self._norm_E = load.vector("model.norm.weight", shape.hidden_size)
        head = None if shape.tie_embeddings else load.joined([("lm_head", shape.vocab_size)], shape.hidden_size)
        self._head_VE = self._embedding_VE if head is None else head
        inv_freq, factor = shape.inv_freq()
        self._cos_sin = rope_table(inv_freq, factor, parts.max_len, parts.device)
        axes = shape.rope_axes()
        self._axes_d = torch.tensor(axes, dtype=torch.int32, device=parts.device) if axes else None
        num_sms = gpu.num_sms if gpu is not None else 1
        self._decode = DecodeAttention(
            shape, max_rows=parts.max_rows, num_sms=num_sms, device=parts.device, deterministic=parts.deterministic
        )
        self._drafted: DecodeAttention | DraftedAttention = self._decode
        if not parts.deterministic and not shape.sliding_window:
            self._drafted = DraftedAttention(shape, max_rows=parts.max_rows, num_sms=num_sms, device=parts.device)
        self._prompt = PromptAttention(shape, device=parts.device, deterministic=parts.deterministic)
        has_bias = shape.o_bias or shape.mlp_bias
        self._max_few = 0 if parts.deterministic or has_bias else few_rows(shape.hidden_size, parts.dtype)

    @property
    def embedding_VE(self) -> Tensor:
        """A row for every token."""
        return self._embedding_VE

    @property
    def head_VE(self) -> Tensor:
        """What is multiplied with the last states."""
        return self._head_VE

    @property
    def norm_E(self) -> Tensor:
        """The norm before the head."""
        return self._norm_E

    @property
    def grouping(self) -> Grouping | None:
        """See DeviceNetwork."""
        decode = self._decode
        return Grouping(decode.rows_per_group, decode.tile_len, decode.programs) if decode.rows_per_group > 1 else None

    def forward(self, inputs: StepInputs) -> Tensor:
        """See DeviceNetwork."""
        return self._forward(inputs, every_token=False)

    def forward_all(self, inputs: StepInputs) -> Tensor:
        """See DeviceNetwork."""
        return self._forward(inputs, every_token=True)

    def _forward(self, inputs: StepInputs, *, every_token: bool) -> Tensor:
        x_TE = embed(inputs.tokens_T, self._embedding_VE, inputs.media_TX)
        cos_sin = self._cos_sin
        if inputs.rope_3T is not None:
            assert self._axes_d is not None
            cos_sin = pick_angles(cos_sin, inputs.rope_3T, self._axes_d)
        if not inputs.prompts and len(x_TE) <= self._max_few:
            return self._forward_few(x_TE, inputs, cos_sin)
        has_all = every_token or not inputs.prompts
        if not has_all and inputs.shown is not None and self._shape.num_layers in inputs.shown.layers:
            return self._forward_many(x_TE, inputs, cos_sin, True).index_select(0, inputs.logit_rows_R)
        return self._forward_many(x_TE, inputs, cos_sin, has_all)

    def _forward_few(self, x_TE: Tensor, inputs: StepInputs, cos_sin: Tensor) -> Tensor:
        """Decode rows, up to few_rows(): five kernels per layer."""
        eps, pdl = self._eps, self._pdl
        out_TX = x_TE.new_empty((len(x_TE), self._shape.num_heads * self._shape.head_dim))
        decode = self._attention(inputs)
        for i, layer in enumerate(self._layers):
            self._show(x_TE, inputs, i)
            qkv_TJ = gemv.norm_linear(x_TE, layer.attention_norm, layer.qkv, layer.qkv_bias, eps, pdl=pdl)
            decode.attend(qkv_TJ, inputs, i, cos_sin, layer.q_norm, layer.k_norm, eps, out_TX, pdl=pdl)
            gemv.linear_add(out_TX, layer.o, x_TE, pdl=pdl)
            inner_TF = gemv.norm_gate_up(x_TE, layer.mlp_norm, layer.gate_up, eps, pdl=pdl)
            gemv.linear_add(inner_TF, layer.down, x_TE, pdl=pdl)
            self._add_media(x_TE, inputs, i)
        self._show(x_TE, inputs, len(self._layers))
        return x_TE

    def _forward_many(self, x_TE: Tensor, inputs: StepInputs, cos_sin: Tensor, every_token: bool) -> Tensor:
        eps, num_decode, has_prompts = self._eps, inputs.num_decode, bool(inputs.prompts)
        decode = self._attention(inputs)
        out_TX = x_TE.new_empty((len(x_TE), self._shape.num_heads * self._shape.head_dim))
        h_TE = rms_norm(x_TE, self._layers[0].attention_norm, eps)
        for i, layer in enumerate(self._layers):
            self._show(x_TE, inputs, i)
            qkv_TJ = self._linear(h_TE, layer.qkv, layer.qkv_bias)
            is_last = i + 1 == len(self._layers)
            if is_last and not every_token:
                return self._last_layer(x_TE, qkv_TJ, inputs, cos_sin)
            if has_prompts:
                write_prompt(qkv_TJ, inputs, i, cos_sin, layer.q_norm, layer.k_norm, eps, self._shape)
                out_TX = self._prompt.attend(qkv_TJ, inputs, i, out_TX)
            if num_decode:
                decode.attend(qkv_TJ, inputs, i, cos_sin, layer.q_norm, layer.k_norm, eps, out_TX)
            next_norm_E = None if is_last else self._layers[i + 1].attention_norm
            if i < self._num_added(inputs):
                self._finish(x_TE, out_TX, layer, None)
                self._add_media(x_TE, inputs, i)
                h_TE = x_TE if next_norm_E is None else rms_norm(x_TE, next_norm_E, eps)
            else:
                h_TE = self._finish(x_TE, out_TX, layer, next_norm_E)
        self._show(x_TE, inputs, len(self._layers))
        return x_TE

    @staticmethod
    def _show(x_TE: Tensor, inputs: StepInputs, layer: int) -> None:
        """Leave the stream before a layer to whoever wants it."""
        if inputs.shown is not None and layer in inputs.shown.layers:
            first = inputs.shown.layers.index(layer) * x_TE.shape[1]
            inputs.shown.streams_TX[: len(x_TE), first : first + x_TE.shape[1]] = x_TE

    def _num_added(self, inputs: StepInputs) -> int:
        """Layers behind which media add to the stream (DeepStack)."""
        return 0 if inputs.media_TX is None else inputs.media_TX.shape[1] // self._shape.hidden_size - 1

    def _add_media(self, x_TE: Tensor, inputs: StepInputs, layer: int) -> None:
        if inputs.media_TX is not None and layer < self._num_added(inputs):
            add_media(x_TE, inputs.tokens_T, inputs.media_TX, 1 + layer)

    def _attention(self, inputs: StepInputs) -> DecodeAttention | DraftedAttention:
        """Of the step's decode rows."""
        return self._drafted if inputs.is_drafted else self._decode

    def _last_layer(self, x_TE: Tensor, qkv_TJ: Tensor, inputs: StepInputs, cos_sin: Tensor) -> Tensor:
        """Of a step with prompts: all tokens leave K and V, the rest is done for those that yield logits, each as if it were a
        decode row. What the others would bring nobody looks at."""
        layer, last, eps = self._layers[-1], len(self._layers) - 1, self._eps
        rows_R, slots_R = inputs.logit_rows_R, inputs.logit_slots_R
        qkv_RJ = qkv_TJ.index_select(0, rows_R)  # before write_prompt norms and turns it
        write_prompt(qkv_TJ, inputs, last, cos_sin, layer.q_norm, layer.k_norm, eps, self._shape)
        x_RE = x_TE.index_select(0, rows_R)
        if len(rows_R):
            positions_R = inputs.positions_T.index_select(0, rows_R)
            rows = replace(inputs, num_decode=len(rows_R), positions_T=positions_R, slots_T=slots_R, parts_PR=None)
            if inputs.rope_3T is not None:  # a line for each of these rows, then
                cos_sin = cos_sin.index_select(0, rows_R)
            out_RX = x_RE.new_empty((len(rows_R), self._shape.num_heads * self._shape.head_dim))
            self._attention(inputs).attend(qkv_RJ, rows, last, cos_sin, layer.q_norm, layer.k_norm, eps, out_RX)
            self._finish(x_RE, out_RX, layer, None)
        return x_RE

    def _finish(self, x_TE: Tensor, out_TX: Tensor, layer: Layer, next_norm_E: Tensor | None) -> Tensor:
        """The layer behind its attention, into `x_TE`; returns the next one's norm of that."""
        h_TE = self._add(x_TE, out_TX, layer.o, layer.o_bias, layer.mlp_norm)
        inner_TF = silu_mul(self._linear(h_TE, layer.gate_up, layer.gate_up_bias))
        return self._add(x_TE, inner_TF, layer.down, layer.down_bias, next_norm_E)

    def _add(self, x_TE: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, norm_E: Tensor | None) -> Tensor:
        """x += y @ weight.T + bias; returns the norm of that, or x where there is none. For many tokens the product itself adds
        to x, and the norm reads one tensor instead of two."""
        if len(x_TE) >= _MANY and bias is None and not self._is_deterministic:
            x_TE.addmm_(y, weight.t())
            return x_TE if norm_E is None else rms_norm(x_TE, norm_E, self._eps)
        delta_TE = self._linear(y, weight, bias)
        if norm_E is None:
            x_TE += delta_TE
            return x_TE
        return add_rms_norm(x_TE, delta_TE, norm_E, self._eps)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return invariant_linear(x, weight, bias) if self._is_deterministic else F.linear(x, weight, bias)

    @property
    def long_chunk(self) -> int | None:
        """See DeviceNetwork."""
        return self._prompt.long_len

    def may_capture(self, prompts: tuple[PromptRow, ...]) -> bool:
        """See DeviceNetwork."""
        return not any(self._prompt.is_long(row) for row in prompts)

    def warm_up(self, k: Tensor, v: Tensor, max_len: int, max_chunk: int) -> None:
        """See DeviceNetwork."""
        self._prompt.warm(k, v, k.dtype, max_len, max_chunk)

    def logits(self, hidden_RE: Tensor, out_RV: Tensor) -> None:
        """See DeviceNetwork."""
        if len(hidden_RE) <= self._max_few:
            gemv.norm_logits(hidden_RE, self._norm_E, self._head_VE, self._eps, None, out_RV, pdl=self._pdl)
            return
        x_RE = rms_norm(hidden_RE, self._norm_E, self._eps)
        if self._is_deterministic:
            out_RV.copy_(invariant_linear(x_RE, self._head_VE, None, torch.float32))
        else:
            head_product(x_RE, self._head_VE, out_RV)


def head_product(x_RE: Tensor, head_VE: Tensor, out_RV: Tensor) -> None:
    """Logits of normed states, into `out_RV` (float32)."""
    if x_RE.is_cuda and x_RE.dtype != torch.float32:
        mm: Any = torch.ops.aten.mm.dtype_out  # 16-bit operands, float32 result: logits are never rounded
        mm(x_RE, head_VE.t(), torch.float32, out=out_RV)
    else:
        out_RV.copy_(F.linear(x_RE, head_VE))
