"""Rotary embedding of a prompt on a GPU, with the norm of q and k before it and the way into the pages behind it.

Owns this kernel, the table of angles, and what M-RoPE (Qwen2-VL, arXiv 2409.12191) makes of that for one step: a table with a
line for each token, since a token has three positions there. Decode rows do the same inside their attention
(triton_decode_attention.py).
T tokens of the step, H query heads, K key/value heads, D head size, J = (H + 2K) * D, S tokens per page.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.impl.triton_norm import pdl_options
from streamserve.kernels.ops import StepInputs

# Heads of one token per program: two loads of 16 bytes a thread at D = 128, and three programs per token of an 8B model.
_BLOCK_HEADS = 16


@triton.jit(
    do_not_specialize=["num_decode", "layer", "num_pages", "table_width"],
    do_not_specialize_on_alignment=["positions", "slots"],
)
def _write_prompt(
    qkv,
    positions,
    slots,
    page_table,
    k_pages,
    v_pages,
    cos_sin,
    q_norm,
    k_norm,
    eps,
    num_decode,
    layer,
    num_pages,
    table_width,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BY_TOKEN: tl.constexpr,  # cos_sin has a line for each token of the step, not for each position
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    # Heads of a token run side by side: programs in flight touch whole pages of memory.
    NUM_BLOCKS: tl.constexpr = (H + 2 * K + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = num_decode + tl.program_id(0) // NUM_BLOCKS
    first_head = tl.program_id(0) % NUM_BLOCKS * BLOCK_HEADS
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    is_live = slot >= 0
    page = tl.load(page_table + slot.to(tl.int64) * table_width + position // S, mask=is_live, other=0)  # known when needed
    mask = (head < H + 2 * K) & (dim < HALF)
    at = qkv + token.to(tl.int64) * ((H + 2 * K) * D) + head * D + dim
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    is_v = head >= H + K
    dtype = qkv.dtype.element_ty
    if q_norm is not None:  # rounded where transformers rounds: before and after the weight
        inverse = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + eps)[:, None]
        q_low = tl.load(q_norm + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        is_q = head < H
        normed_low = (low * inverse).to(dtype).to(tl.float32) * tl.where(is_q, q_low, k_low)
        normed_high = (high * inverse).to(dtype).to(tl.float32) * tl.where(is_q, q_high, k_high)
        low = tl.where(is_v, low, normed_low.to(dtype).to(tl.float32))
        high = tl.where(is_v, high, normed_high.to(dtype).to(tl.float32))
    angle = cos_sin + (token if BY_TOKEN else position).to(tl.int64) * D + dim
    cos = tl.load(angle, mask=dim < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=dim < HALF, other=0.0)
    new_low = tl.where(is_v, low, low * cos - high * sin).to(dtype)
    new_high = tl.where(is_v, high, high * cos + low * sin).to(dtype)
    tl.store(at, new_low, mask=mask & (head < H + K))
    tl.store(at + HALF, new_high, mask=mask & (head < H + K))
    if first_head + BLOCK_HEADS > H:
        kv_head = tl.where(is_v, head - H - K, head - H)
        line = ((layer * num_pages.to(tl.int64) + page) * K + kv_head) * S + position % S
        is_k = (head >= H) & (head < H + K)
        cell = line * D + dim
        page_dtype = k_pages.dtype.element_ty
        tl.store(k_pages + cell, new_low.to(page_dtype), mask=mask & is_k & is_live)
        tl.store(k_pages + cell + HALF, new_high.to(page_dtype), mask=mask & is_k & is_live)
        tl.store(v_pages + cell, new_low.to(page_dtype), mask=mask & is_v & is_live)
        tl.store(v_pages + cell + HALF, new_high.to(page_dtype), mask=mask & is_v & is_live)


def rope_table(inv_freq: Sequence[float], factor: float, max_len: int, device: torch.device | str) -> Tensor:
    """cos, then sin, of every position's angles, times `factor`: [max_len, D] float32, computed in float32 as
    transformers does."""
    freq_d = torch.tensor(inv_freq, dtype=torch.float32, device=device)
    positions_N = torch.arange(max_len, dtype=torch.float32, device=device)
    angles_Nd = positions_N.unsqueeze(1) * freq_d
    return torch.cat((angles_Nd.cos(), angles_Nd.sin()), dim=1).mul_(factor)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["rope_3T"])
def _pick_angles(rope_3T, axes_d, cos_sin, out_TD, stride, D: tl.constexpr, BLOCK_HALF: tl.constexpr):
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_HALF)
    is_dim = dim < HALF
    position = tl.load(rope_3T + tl.load(axes_d + dim, mask=is_dim, other=0) * stride + token, mask=is_dim, other=0)
    angle = cos_sin + position.to(tl.int64) * D + dim
    tl.store(out_TD + token * D + dim, tl.load(angle, mask=is_dim), mask=is_dim)
    tl.store(out_TD + token * D + HALF + dim, tl.load(angle + HALF, mask=is_dim), mask=is_dim)


def pick_angles(cos_sin: Tensor, rope_3T: Tensor, axes_d: Tensor) -> Tensor:
    """[T, D]: of a rope_table() what each token's heads are turned by. `axes_d` (int32) says which line of `rope_3T` (int32) a
    frequency takes its position from."""
    num_tokens, dim = rope_3T.shape[1], cos_sin.shape[1]
    assert rope_3T.stride(1) == 1 and cos_sin.is_contiguous() and 2 * len(axes_d) == dim
    out_TD = cos_sin.new_empty((num_tokens, dim))
    if num_tokens:
        kernel: Any = _pick_angles[(num_tokens,)]
        half = triton.next_power_of_2(dim // 2)
        kernel(rope_3T, axes_d, cos_sin, out_TD, rope_3T.stride(0), D=dim, BLOCK_HALF=half, num_warps=1)
    return out_TD


class Queries(Protocol):
    """How many heads of a product's lines are queries."""

    @property
    def num_heads(self) -> int: ...


def write_prompt(
    qkv_TJ: Tensor,
    inputs: StepInputs,
    layer: int,
    cos_sin: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    shape: Queries,
    *,
    pdl: bool = False,
) -> None:
    """For the tokens after the decode rows: norm (if there are weights) and rotation of q and k in place, then k and v into
    their pages. `cos_sin` is a rope_table(), or, in a step with three positions a token, what pick_angles() made of it."""
    assert qkv_TJ.is_contiguous() and (q_norm_D is None) == (k_norm_D is None)
    num_layers, num_pages, num_kv_heads, page_size, head_dim = inputs.k.shape
    assert layer < num_layers and inputs.k.is_contiguous() and inputs.v.is_contiguous() and cos_sin.shape[1] == head_dim
    num_heads = shape.num_heads + 2 * num_kv_heads
    assert qkv_TJ.shape[1] == num_heads * head_dim
    num_prompt = len(qkv_TJ) - inputs.num_decode
    if num_prompt == 0:
        return
    _write_prompt[(num_prompt * triton.cdiv(num_heads, _BLOCK_HEADS),)](
        qkv_TJ,
        inputs.positions_T,
        inputs.slots_T,
        inputs.page_table_SP,
        inputs.k,
        inputs.v,
        cos_sin,
        q_norm_D,
        k_norm_D,
        eps,
        inputs.num_decode,
        layer,
        num_pages,
        inputs.page_table_SP.shape[1],
        H=shape.num_heads,
        K=num_kv_heads,
        D=head_dim,
        S=page_size,
        BLOCK_HEADS=_BLOCK_HEADS,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BY_TOKEN=inputs.rope_3T is not None,
        num_warps=4,
        **pdl_options(pdl),
    )
