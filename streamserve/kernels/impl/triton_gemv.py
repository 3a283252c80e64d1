"""Products of a few rows with a weight matrix, as fast as the weights can be read, with the small operations around them.

Owns the tile shapes. Knows no layer and no batch. Up to 16 rows; more are the library's business.

A step of one to sixteen rows reads every weight once and computes little: what counts is how many bytes are on their way. Each
program takes a block of weight rows, 16 bytes per thread and load. The first tiles are asked for before anything else, even
before the kernels in front have finished (programmatic dependent launch), and later ones before the tile in hand is used.
Products are summed in float32 registers, one sum per row, weight row and column of a tile, and added up once, at the end. From
a few rows on, multiplying takes longer than reading: then tensor cores do it (triton_fragments.py).

RMSNorm is one factor per row, so it need not be known before the end: squares are summed beside the products. The normalised
row is not rounded (once, for tensor cores), which makes results a little more exact than those of separate operations.

Shape letters: T rows, R rows chosen from them, E (K in kernels) columns, N weight rows, F gated outputs, V vocabulary;
W weight rows of a tile.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.impl.triton_fragments import as_operand, load_tile, sums_of_lanes, weight_rows

# Programs with large tiles are few, two or three for each SM. Let in early, those of the next kernel take whatever place is free
# first, and some SMs get twice as many as others: 44 us instead of 32 for a product of 117 MB on an H200. Of small matrices what
# is read ahead is worth more.
_LATE_WEIGHTS = 10 << 20
_MAX_ROWS = 16
_MAX_SUM_ROWS = 8  # without tensor cores: more sums than registers hold


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: weight rows per tile (half of them gate rows where outputs are gated), columns per tile, and tiles
    asked for ahead of use: 1 or 2, held in registers. With `dot`, on tensor cores: weight rows in multiples of 16, columns in
    multiples of 32 per warp, both powers of two."""

    block_w: int
    block_k: int
    num_warps: int
    ahead: int = 1
    dot: bool = False


@triton.jit
def _load_tile(tile, norm, k, i, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [W, BLOCK_K] of tile i and norm's factors [1, BLOCK_K] for its columns k (the weights again without a norm)."""
    if K % BLOCK_K == 0:
        weights = tl.load(tile + i * BLOCK_K, eviction_policy="evict_first")
        factors = weights if norm is None else tl.load(norm + i * BLOCK_K + k)
    else:
        is_in = i * BLOCK_K + k < K
        weights = tl.load(tile + i * BLOCK_K, mask=is_in, other=0.0, eviction_policy="evict_first")
        factors = weights if norm is None else tl.load(norm + i * BLOCK_K + k, mask=is_in, other=0.0)
    return weights, factors


@triton.jit
def _begin(
    w,
    norm,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Ask for the first tiles. They depend on no other kernel: whatever does must come after _wait."""
    if DOT:
        C: tl.constexpr = BLOCK_K // (32 * WARPS)
        KIND: tl.constexpr = "gated" if GATED else "weights"
        first = load_tile(w, None, 0, 0, N, K, BLOCK_W, C, WARPS, KIND, BLOCK_W // 8 * C)
        first_factors, second = first, first
        if norm is not None:
            first_factors = load_tile(norm, None, 0, 0, N, K, BLOCK_W, C, WARPS, "norm", C)
        if AHEAD == 2:
            second = load_tile(w, None, 0, 1, N, K, BLOCK_W, C, WARPS, KIND, BLOCK_W // 8 * C)
        return w, first, first_factors, second, second
    else:
        k = tl.arange(0, BLOCK_K)[None, :]
        tile = w + weight_rows(tl.arange(0, BLOCK_W), N, BLOCK_W, GATED).to(tl.int64)[:, None] * K + k
        first, first_factors = _load_tile(tile, norm, k, 0, K, BLOCK_K)
        if AHEAD == 2:
            second, second_factors = _load_tile(tile, norm, k, 1, K, BLOCK_K)
        else:
            second, second_factors = first, first_factors
        return tile, first, first_factors, second, second_factors


@triton.jit
def _wait(PDL: tl.constexpr, LATE: tl.constexpr):
    """Until all kernels before this one have finished. The one behind it may begin to ask for its weights, unless this one's
    programs are to be LATE in saying so."""
    if PDL:
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _end(PDL: tl.constexpr, LATE: tl.constexpr):
    """What this program had to read is read."""
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _row_indices(rows, num_rows, ROWS: tl.constexpr):
    """Which rows of x are meant: the first, or those that `rows` names. Row 0 stands in for surplus ones."""
    r = tl.arange(0, ROWS)
    if rows is None:
        return tl.where(r < num_rows, r, 0).to(tl.int64)
    else:
        return tl.maximum(tl.load(rows + r, mask=r < num_rows, other=0), 0).to(tl.int64)


@triton.jit
def _add_tile(sums, squares, weights, factors, x, norm, i, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile more: sums [ROWS, W, BLOCK_K], squares [ROWS, 1, BLOCK_K]."""
    if K % BLOCK_K == 0:
        values = tl.load(x + i * BLOCK_K, eviction_policy="evict_last").to(tl.float32)
    else:
        is_in = i * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :] < K
        values = tl.load(x + i * BLOCK_K, mask=is_in, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if norm is not None:
        squares += values * values
        values *= factors.to(tl.float32)[None, :, :]
    sums += weights.to(tl.float32)[None, :, :] * values
    return sums, squares


@triton.jit
def _products(
    x,
    rows,
    num_rows,
    norm,
    begun,
    eps: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Products of the rows of x, normalised if `norm` is given, with the weight rows of _begin: float32 [ROWS, BLOCK_W]."""
    if DOT:
        return _products_by_dot(x, rows, num_rows, norm, begun, eps, N, K, ROWS, BLOCK_W, BLOCK_K, WARPS, AHEAD, GATED)
    else:
        return _products_by_sum(x, rows, num_rows, norm, begun, eps, K, ROWS, BLOCK_W, BLOCK_K, AHEAD)


@triton.jit
def _products_by_sum(
    x,
    rows,
    num_rows,
    norm,
    begun,
    eps: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
):
    NUM_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile, first, first_factors, second, second_factors = begun
    k = tl.arange(0, BLOCK_K)[None, :]
    x_row = x + _row_indices(rows, num_rows, ROWS)[:, None, None] * K + k[None, :, :]
    sums = tl.zeros([ROWS, BLOCK_W, BLOCK_K], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_K], tl.float32)
    for i in range(NUM_TILES - AHEAD):
        weights, factors = first, first_factors
        if AHEAD == 2:
            first, first_factors = second, second_factors
            second, second_factors = _load_tile(tile, norm, k, i + 2, K, BLOCK_K)
        else:
            first, first_factors = _load_tile(tile, norm, k, i + 1, K, BLOCK_K)
        sums, squares = _add_tile(sums, squares, weights, factors, x_row, norm, i, K, BLOCK_K)
    sums, squares = _add_tile(sums, squares, first, first_factors, x_row, norm, NUM_TILES - AHEAD, K, BLOCK_K)
    if AHEAD == 2:
        sums, squares = _add_tile(sums, squares, second, second_factors, x_row, norm, NUM_TILES - 1, K, BLOCK_K)
    products = tl.sum(sums, axis=2)
    if norm is not None:
        products *= tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
    return products


@triton.jit
def _products_by_dot(
    x,
    rows,
    num_rows,
    norm,
    begun,
    eps: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    GATED: tl.constexpr,
):
    """On tensor cores. x times norm is rounded to the model's type, as separate operations do. Rows of x and norm's factors, too,
    are asked for a tile ahead: they wait in the L2 cache, which is not near."""
    NUM_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    C: tl.constexpr = BLOCK_K // (32 * WARPS)
    KIND: tl.constexpr = "gated" if GATED else "weights"
    W_PARTS: tl.constexpr = BLOCK_W // 8 * C
    X_PARTS: tl.constexpr = ROWS // 8 * C
    w, first, next_factors, second, _ = begun
    next_values = load_tile(x, rows, num_rows, 0, N, K, BLOCK_W, C, WARPS, "rows", X_PARTS)
    sums = tl.zeros([WARPS, BLOCK_W, ROWS], tl.float32)
    squares = tl.zeros([WARPS, ROWS, 4], tl.float32)
    for i in range(NUM_TILES - 1):
        weights, values, factors = first, next_values, next_factors
        if AHEAD == 2:
            first = second
            if i + 2 < NUM_TILES:
                second = load_tile(w, None, 0, i + 2, N, K, BLOCK_W, C, WARPS, KIND, W_PARTS)
        else:
            first = load_tile(w, None, 0, i + 1, N, K, BLOCK_W, C, WARPS, KIND, W_PARTS)
        next_values = load_tile(x, rows, num_rows, i + 1, N, K, BLOCK_W, C, WARPS, "rows", X_PARTS)
        if norm is not None:
            next_factors = load_tile(norm, None, 0, i + 1, N, K, BLOCK_W, C, WARPS, "norm", C)
        sums, squares = _add_dot(sums, squares, weights, values, norm, factors, x.dtype.element_ty, ROWS, BLOCK_W, C, WARPS)
    sums, squares = _add_dot(sums, squares, first, next_values, norm, next_factors, x.dtype.element_ty, ROWS, BLOCK_W, C, WARPS)
    products = tl.trans(tl.sum(sums, axis=0))
    if norm is not None:
        products *= tl.rsqrt(tl.sum(tl.sum(squares, axis=2), axis=0) / K + eps)[:, None]
    return products


@triton.jit
def _add_dot(
    sums,
    squares,
    weights,
    values,
    norm,
    factors,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    C: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One tile more: sums [WARPS, BLOCK_W, ROWS], squares [WARPS, ROWS, 4]."""
    operand = as_operand(values, ROWS // 8, C, WARPS, DTYPE)
    if norm is not None:
        exact = operand.to(tl.float32)
        squares += sums_of_lanes(exact * exact, ROWS, C, WARPS)
        # One row of factors per row of threads: for rows 8 to 15 the same ones again.
        factors = tl.reshape(as_operand(factors, 1, C, WARPS, DTYPE), [WARPS, 1, 8, C * 32]).to(tl.float32)
        exact = tl.reshape(exact, [WARPS, ROWS // 8, 8, C * 32]) * factors
        operand = tl.reshape(exact, [WARPS, ROWS, C * 32]).to(DTYPE)
    taken = as_operand(weights, BLOCK_W // 8, C, WARPS, DTYPE)
    return tl.dot(taken, tl.permute(operand, [0, 2, 1]), sums, input_precision="ieee"), squares


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def norm_linear_kernel(
    x,
    norm,
    w,
    bias,
    out,
    rows,
    num_rows,
    eps: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    begun = _begin(w, norm, N, K, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, False)
    if bias is not None:
        added = tl.load(bias + tl.minimum(n, N - 1)).to(tl.float32)
    _wait(PDL, LATE)
    products = _products(x, rows, num_rows, norm, begun, eps, N, K, ROWS, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, False)
    _end(PDL, LATE)
    if bias is not None:
        products += added[None, :]
    r = tl.arange(0, ROWS)
    place = out + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, products.to(out.dtype.element_ty), mask=(r < num_rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def linear_add_kernel(
    x,
    w,
    residual,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    begun = _begin(w, None, N, K, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, False)
    r = tl.arange(0, ROWS)
    place = residual + r.to(tl.int64)[:, None] * N + n[None, :]
    is_in = (r < num_rows)[:, None] & (n < N)[None, :]
    _wait(PDL, LATE)
    before = tl.load(place, mask=is_in, other=0.0)
    products = _products(x, None, num_rows, None, begun, 0.0, N, K, ROWS, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, False)
    _end(PDL, LATE)
    tl.store(place, (before.to(tl.float32) + products).to(residual.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_up_kernel(
    x,
    norm,
    w,
    out,
    num_rows,
    eps: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCK_W // 2
    begun = _begin(w, norm, N, K, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, True)
    _wait(PDL, LATE)
    products = _products(x, None, num_rows, norm, begun, eps, N, K, ROWS, BLOCK_W, BLOCK_K, WARPS, AHEAD, DOT, True)
    _end(PDL, LATE)
    gate, up = tl.split(tl.reshape(products, [ROWS, BLOCK_N, 2]))
    inner = gate * tl.sigmoid(gate) * up
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)
    place = out + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, inner.to(out.dtype.element_ty), mask=(r < num_rows)[:, None] & (n < N)[None, :])


# The best that bench/gemv_sweep.py found on an H200, by (weight rows, columns, rows). Other shapes: _default_tile.
_TILES = MappingProxyType[tuple[int, int, int], Tile](
    {
        # (weight rows, columns, rows of x), measured on one H200 by bench/gemv_sweep.py
        (6144, 4096, 1): Tile(block_w=2, block_k=1024, num_warps=4, ahead=1, dot=False),
        (4096, 4096, 1): Tile(block_w=4, block_k=2048, num_warps=8, ahead=1, dot=False),
        (28672, 4096, 1): Tile(block_w=2, block_k=1024, num_warps=4, ahead=1, dot=False),
        (4096, 14336, 1): Tile(block_w=2, block_k=1024, num_warps=4, ahead=2, dot=False),
        (128256, 4096, 1): Tile(block_w=2, block_k=1024, num_warps=4, ahead=2, dot=False),
        (4096, 1024, 1): Tile(block_w=4, block_k=256, num_warps=1, ahead=2, dot=False),
        (1024, 2048, 1): Tile(block_w=1, block_k=2048, num_warps=8, ahead=1, dot=False),
        (6144, 1024, 1): Tile(block_w=4, block_k=512, num_warps=2, ahead=1, dot=False),
        (1024, 3072, 1): Tile(block_w=1, block_k=2048, num_warps=8, ahead=1, dot=False),
        (151936, 1024, 1): Tile(block_w=4, block_k=256, num_warps=1, ahead=2, dot=False),
        (6144, 4096, 2): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 4096, 2): Tile(block_w=2, block_k=512, num_warps=2, ahead=2, dot=False),
        (28672, 4096, 2): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 14336, 2): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (128256, 4096, 2): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 1024, 2): Tile(block_w=4, block_k=512, num_warps=2, ahead=1, dot=False),
        (1024, 2048, 2): Tile(block_w=4, block_k=1024, num_warps=4, ahead=1, dot=False),
        (6144, 1024, 2): Tile(block_w=4, block_k=256, num_warps=1, ahead=1, dot=False),
        (1024, 3072, 2): Tile(block_w=1, block_k=1024, num_warps=4, ahead=1, dot=False),
        (151936, 1024, 2): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (6144, 4096, 4): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 4096, 4): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (28672, 4096, 4): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 14336, 4): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (128256, 4096, 4): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 1024, 4): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (1024, 2048, 4): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (6144, 1024, 4): Tile(block_w=16, block_k=256, num_warps=4, ahead=2, dot=True),
        (1024, 3072, 4): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (151936, 1024, 4): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (6144, 4096, 8): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 4096, 8): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (28672, 4096, 8): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 14336, 8): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (128256, 4096, 8): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 1024, 8): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (1024, 2048, 8): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (6144, 1024, 8): Tile(block_w=16, block_k=256, num_warps=4, ahead=2, dot=True),
        (1024, 3072, 8): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (151936, 1024, 8): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (4096, 1024, 16): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (1024, 2048, 16): Tile(block_w=16, block_k=512, num_warps=8, ahead=2, dot=True),
        (6144, 1024, 16): Tile(block_w=16, block_k=512, num_warps=4, ahead=1, dot=True),
        (1024, 3072, 16): Tile(block_w=16, block_k=1024, num_warps=8, ahead=1, dot=True),
        (151936, 1024, 16): Tile(block_w=32, block_k=256, num_warps=4, ahead=1, dot=True),
    }
)


def has_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether tensor cores are for us. They take x times norm not yet divided by the row's length: float16 may not hold that. And
    AMD's expect columns elsewhere, so that all would pass through shared memory."""
    return dtype is torch.bfloat16 and torch.version.hip is None


def tile_for(w: Tensor, rows: int) -> Tile:
    """The tile for a weight and a number of rows that is 1, 2, 4, 8 or 16."""
    num_rows, num_columns = w.shape
    known = _TILES.get((num_rows, num_columns, rows)) if has_tensor_cores(w.dtype) else None
    return known or _default_tile(num_rows, num_columns, rows, w.dtype)


def _default_tile(num_rows: int, num_columns: int, rows: int, dtype: torch.dtype) -> Tile:
    """Columns as many as the threads read in one load each, so that nothing passes through shared memory; programs enough to
    fill a GPU; sums that fit in registers."""
    if rows > _MAX_SUM_ROWS or (rows >= 4 and has_tensor_cores(dtype) and num_columns % 32 == 0):
        # 256 bytes of a row per warp; where programs are few, more warps for each.
        num_warps = 8 if num_rows <= 4096 and num_columns >= 1024 else 4
        return Tile(16, 128 * num_warps, num_warps, dot=True)
    num_warps = 4 if num_columns > 512 else 2
    block_w = 4 if num_rows >= 4096 else 2 if num_rows >= 2048 else 1
    return Tile(block_w if rows <= 2 else 1, 256 * num_warps, num_warps)


def norm_linear(
    x_TE: Tensor,
    norm_E: Tensor,
    w_NE: Tensor,
    bias_N: Tensor | None,
    eps: float,
    *,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """rmsnorm(x) @ w.T + bias: [T, N] in x's type."""
    out_TN = x_TE.new_empty((len(x_TE), len(w_NE)))
    _norm_linear(x_TE, norm_E, w_NE, bias_N, eps, out_TN, None, pdl, tile)
    return out_TN


def norm_logits(
    x_TE: Tensor,
    norm_E: Tensor,
    w_VE: Tensor,
    eps: float,
    rows_R: Tensor | None = None,
    out_RV: Tensor | None = None,
    *,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """rmsnorm(x) @ w.T for the rows of x that `rows_R` (int32) names, or all: float32 [R, V], in `out_RV` if that is given. A
    row below 0 counts as 0."""
    num_rows = len(x_TE if rows_R is None else rows_R)
    if out_RV is None:
        out_RV = x_TE.new_empty((num_rows, len(w_VE)), dtype=torch.float32)
    _norm_linear(x_TE, norm_E, w_VE, None, eps, out_RV, rows_R, pdl, tile)
    return out_RV


def linear_add(x_TE: Tensor, w_NE: Tensor, residual_TN: Tensor, *, pdl: bool = False, tile: Tile | None = None) -> None:
    """residual += x @ w.T, in place, rounded once."""
    assert residual_TN.is_contiguous() and residual_TN.shape == (len(x_TE), len(w_NE))
    tile, options = _plan(x_TE, w_NE, len(x_TE), pdl, tile)
    kernel: Any = linear_add_kernel
    kernel[(triton.cdiv(len(w_NE), tile.block_w),)](x_TE, w_NE, residual_TN, len(x_TE), N=len(w_NE), **options)


def norm_gate_up(
    x_TE: Tensor, norm_E: Tensor, w_2FE: Tensor, eps: float, *, pdl: bool = False, tile: Tile | None = None
) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of rmsnorm(x) @ w.T: [T, F] in x's type."""
    num_outputs = len(w_2FE) // 2
    out_TF = x_TE.new_empty((len(x_TE), num_outputs))
    tile, options = _plan(x_TE, w_2FE, len(x_TE), pdl, tile)
    options["BLOCK_W"] = max(2, tile.block_w)
    grid = (triton.cdiv(num_outputs, options["BLOCK_W"] // 2),)
    kernel: Any = norm_gate_up_kernel
    kernel[grid](x_TE, norm_E, w_2FE, out_TF, len(x_TE), eps=eps, N=num_outputs, **options)
    return out_TF


def _norm_linear(
    x_TE: Tensor,
    norm_E: Tensor,
    w_NE: Tensor,
    bias_N: Tensor | None,
    eps: float,
    out_RN: Tensor,
    rows_R: Tensor | None,
    pdl: bool,
    tile: Tile | None,
) -> None:
    num_rows, num_outputs = out_RN.shape
    assert out_RN.is_contiguous() and num_outputs == len(w_NE)
    tile, options = _plan(x_TE, w_NE, num_rows, pdl, tile)
    kernel: Any = norm_linear_kernel
    kernel[(triton.cdiv(num_outputs, tile.block_w),)](
        x_TE, norm_E, w_NE, bias_N, out_RN, rows_R, num_rows, eps=eps, N=num_outputs, **options
    )


def _plan(x_TE: Tensor, w_NE: Tensor, num_rows: int, pdl: bool, tile: Tile | None) -> tuple[Tile, dict[str, Any]]:
    """The tile and what a kernel is told of it."""
    assert x_TE.is_contiguous() and w_NE.is_contiguous() and x_TE.shape[1] == w_NE.shape[1] and x_TE.dtype is w_NE.dtype
    rows = triton.next_power_of_2(num_rows)
    tile = tile or tile_for(w_NE, rows)
    assert 1 <= num_rows <= (_MAX_ROWS if tile.dot else _MAX_SUM_ROWS), f"{num_rows} rows"
    num_columns = w_NE.shape[1]
    options: dict[str, Any] = {
        "K": num_columns,
        "ROWS": max(8, rows) if tile.dot else rows,
        "BLOCK_W": tile.block_w,
        "BLOCK_K": tile.block_k,
        "WARPS": tile.num_warps,
        "AHEAD": min(tile.ahead, triton.cdiv(num_columns, tile.block_k)),
        "DOT": tile.dot,
        "PDL": pdl,
        "LATE": tile.dot and w_NE.numel() >= _LATE_WEIGHTS,
        "num_warps": tile.num_warps,
    }
    if tile.dot:  # tiles ahead are ours to hold: the compiler would move rows of x through shared memory
        options["num_stages"] = 1
    if pdl:  # an option that only NVIDIA's compiler knows
        options["launch_pdl"] = True
    return tile, options
