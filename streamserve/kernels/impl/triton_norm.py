"""Embedding and RMS norm on a GPU: one row of the stream per program, read once and written once.

Owns the kernels; knows no layer and no weight by name. T tokens of the step, R chosen rows, E hidden size, V vocabulary.

A row's sum is taken in an order that depends on E alone, so its bits do not depend on the rows beside it. Rounding is that of
transformers' Llama: the residual sum is rounded to the stream's dtype, the norm is computed in float32 from it, rounded, and
multiplied with the weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.messages import MEDIA_BASE

_EMBED_BLOCK = 1024
_MEDIA = tl.constexpr(MEDIA_BASE)


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _embed(tokens, table, media, out, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    # A surplus row may hold any token; it must read the table all the same.
    token = tl.maximum(tl.load(tokens + row), 0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if media is not None:
        is_media = token == _MEDIA
        token = tl.where(is_media, 0, token)
    x = tl.load(table + token * E + col, mask=col < E)
    if media is not None:
        x = tl.where(is_media, tl.load(media + row * X + col, mask=(col < E) & is_media, other=0.0), x)
    tl.store(out + row * E + col, x, mask=col < E)


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _add_media(tokens, media, x_ptr, PART: tl.constexpr, E: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tokens + row) == _MEDIA:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * E + col, mask=col < E).to(tl.float32)
        x += tl.load(media + row * X + PART * E + col, mask=col < E).to(tl.float32)
        tl.store(x_ptr + row * E + col, x.to(x_ptr.dtype.element_ty), mask=col < E)


@triton.jit
def _scale(x, weight, eps, E: tl.constexpr, dtype: tl.constexpr):
    """x / rms(x), rounded to dtype, times weight: float32 in, float32 out. Columns beyond E hold zeros."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / E + eps)
    return (x * inverse).to(dtype).to(tl.float32) * weight


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _rms_norm(x_ptr, weight_ptr, rows, out_ptr, eps, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    to = tl.program_id(0).to(tl.int64)
    row = to
    if rows is not None:
        row = tl.maximum(tl.load(rows + to), 0).to(tl.int64)
    x = tl.load(x_ptr + row * E + col, mask=col < E, other=0.0).to(tl.float32)
    y = _scale(x, weight, eps, E, x_ptr.dtype.element_ty)
    tl.store(out_ptr + to * E + col, y.to(out_ptr.dtype.element_ty), mask=col < E)


@triton.jit
def _add_rms_norm(x_ptr, delta_ptr, weight_ptr, out_ptr, eps, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * E + col
    x = tl.load(x_ptr + at, mask=col < E, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + at, mask=col < E, other=0.0).to(tl.float32)
    total = (x + delta).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + at, total, mask=col < E)
    y = _scale(total.to(tl.float32), weight, eps, E, x_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=col < E)


def row_options(size: int, pdl: bool = False) -> dict[str, Any]:
    """Launch of one row of `size` columns per program: 16 bytes a thread where 256 threads suffice, two or more loads beyond."""
    block = triton.next_power_of_2(size)
    num_warps = 16 if block >= 8192 else min(max(block // 256, 1), 8)
    return {"BLOCK": block, "num_warps": num_warps, **pdl_options(pdl)}


def pdl_options(pdl: bool) -> dict[str, Any]:
    """What a launch is given to begin before the kernel ahead of it ends; HIP and the interpreter do not know the word."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def embed(tokens_T: Tensor, table_VE: Tensor, media_TX: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """Rows of the table: [T, E]. A token below 0 counts as 0; one that is MEDIA_BASE takes its line of `media_TX`, X >= E."""
    assert table_VE.is_contiguous() and tokens_T.is_contiguous()
    num_tokens, size = len(tokens_T), table_VE.shape[1]
    width = 0
    if media_TX is not None:
        width = media_TX.shape[1]
        assert media_TX.is_contiguous() and len(media_TX) >= num_tokens and width % size == 0 and media_TX.dtype == table_VE.dtype
    out_TE = torch.empty((num_tokens, size), dtype=table_VE.dtype, device=table_VE.device)
    grid = (num_tokens, triton.cdiv(size, _EMBED_BLOCK))
    options = {"BLOCK": _EMBED_BLOCK, "num_warps": 4, **pdl_options(pdl)}
    _embed[grid](tokens_T, table_VE, media_TX, out_TE, E=size, X=width, **options)
    return out_TE


def add_media(x_TE: Tensor, tokens_T: Tensor, media_TX: Tensor, part: int) -> None:
    """Add part `part` of their lines of `media_TX`, E numbers each, to those of `x_TE` whose token is MEDIA_BASE."""
    num_tokens, size = x_TE.shape
    assert x_TE.is_contiguous() and media_TX.is_contiguous() and (part + 1) * size <= media_TX.shape[1]
    kernel: Any = _add_media[(num_tokens, triton.cdiv(size, _EMBED_BLOCK))]
    kernel(tokens_T, media_TX, x_TE, PART=part, E=size, X=media_TX.shape[1], BLOCK=_EMBED_BLOCK, num_warps=4)


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, rows_R: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """x / rms(x) * weight: [T, E], or [R, E] of the rows named. A row below 0 counts as 0."""
    assert x_TE.is_contiguous() and (rows_R is None or rows_R.is_contiguous())
    num_rows, size = len(x_TE) if rows_R is None else len(rows_R), x_TE.shape[1]
    out_RE = torch.empty((num_rows, size), dtype=x_TE.dtype, device=x_TE.device)
    _rms_norm[(num_rows,)](x_TE, weight_E, rows_R, out_RE, eps, E=size, **row_options(size, pdl))
    return out_RE


def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x += delta, in place and rounded to x's dtype; returns x / rms(x) * weight, [T, E]."""
    assert x_TE.is_contiguous() and delta_TE.is_contiguous() and x_TE.shape == delta_TE.shape
    num_rows, size = x_TE.shape
    out_TE = torch.empty_like(x_TE)
    _add_rms_norm[(num_rows,)](x_TE, delta_TE, weight_E, out_TE, eps, E=size, **row_options(size, pdl))
    return out_TE
