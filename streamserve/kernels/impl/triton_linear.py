"""A matrix product on a GPU whose rows do not depend, bit for bit, on how many rows there are.

Owns one kernel. Libraries choose tiles and a split of the sum by the number of rows, so the same row gets other bits in a
larger batch; here the tile and the order of the sum are fixed (He et al., Defeating Nondeterminism in LLM Inference, 2025).
Serves --deterministic only. T rows, E columns summed over, N columns out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 64 rows are the smallest tile of Hopper's matrix units; 64 columns leave enough tiles for a device when rows are few. 80 KiB of
# shared memory in 16 bits: two blocks on each multiprocessor of an H100.
_TILE: dict[str, int] = {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_E": 64}
_GROUP = 8


def tile_options(itemsize: int, is_hip: bool) -> dict[str, Any]:
    """Launch options: stages as shared memory allows (64 KiB on AMD's, 163 KiB on an A100). They change no sum."""
    return {**_TILE, "GROUP": _GROUP, "num_warps": 4, "num_stages": 2 if is_hip else 5 if itemsize == 2 else 3}


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weight,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Tiles in groups of GROUP lines, column by column, so that neighbours in time share x and weight in the cache.
    num_lines = tl.cdiv(num_rows, BLOCK_T)
    NUM_COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first = pid // (GROUP * NUM_COLUMNS) * GROUP
    height = tl.minimum(num_lines - first, GROUP)
    inside = pid % (GROUP * NUM_COLUMNS)
    row = (first + inside % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    # Rows beyond the last read the last again, columns too; they are not stored, and no sum mixes rows or columns.
    x_at = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * E + e[None, :]
    weight_at = weight + tl.minimum(column, N - 1).to(tl.int64)[:, None] * E + e[None, :]
    sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        if E % BLOCK_E == 0:
            x_tile = tl.load(x_at + start)
            weight_tile = tl.load(weight_at + start)
        else:
            x_tile = tl.load(x_at + start, mask=(start + e < E)[None, :], other=0.0)
            weight_tile = tl.load(weight_at + start, mask=(start + e < E)[None, :], other=0.0)
        sums = tl.dot(x_tile, tl.trans(weight_tile), sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    out_at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (column < N)[None, :])


def linear(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32, rounded once to `out_dtype` (x's by default): [T, N]."""
    assert x_TE.is_contiguous() and weight_NE.is_contiguous() and x_TE.dtype == weight_NE.dtype
    num_rows, size = x_TE.shape
    num_columns = len(weight_NE)
    assert weight_NE.shape[1] == size
    out_TN = torch.empty((num_rows, num_columns), dtype=out_dtype or x_TE.dtype, device=x_TE.device)
    tiles = triton.cdiv(num_rows, _TILE["BLOCK_T"]) * triton.cdiv(num_columns, _TILE["BLOCK_N"])
    options = tile_options(x_TE.element_size(), torch.version.hip is not None)
    _linear[(tiles,)](x_TE, weight_NE, bias_N, out_TN, num_rows, N=num_columns, E=size, **options)
    return out_TN
